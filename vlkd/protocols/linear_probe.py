"""A linear classifier on frozen embeddings: multinomial logistic regression, its penalty chosen on training images."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vlkd.errors import UserError
from vlkd.protocols.classified import check_classes, measure_classes
from vlkd.protocols.measured import Measured
from vlkd.retrieval.search import Indices, Vectors, check_embeddings
from vlkd.retrieval.zero_shot import check_labels

L2_GRID = (1e-6, 1e-5, 1e-4, 1e-3, 1e-2)
VALIDATION_SHARE = 0.2
MAX_STEPS = 1000
_GRADIENT, _CHANGE = 1e-7, 1e-12


def linear_probe(
    train_embed: Vectors,
    train_labels: Indices,
    test_embed: Vectors,
    test_labels: Indices,
    *,
    classes: Sequence[str],
    seed: int = 0,
    l2_grid: Sequence[float] = L2_GRID,
    main_metric: str = "acc1",
) -> Measured:
    """Fit logistic regression on normalised embeddings and classify the test images.

    Minimises mean cross-entropy + l2 / 2 |W|^2 in float64 with L-BFGS over all images at once; the bias is not
    penalised (scikit-learn's `LogisticRegression` with C = 1 / (N l2)). The l2 with the highest accuracy on a fifth
    of the training images, drawn within each class, is taken, the larger of two equally good ones; then the
    classifier is fitted anew on all training images. Test images choose nothing.

    A class without a training image is never predicted.

    Args:
        train_embed: (N, D), not necessarily normalised.
        train_labels: (N,) class ids.
        test_embed: (I, D).
        test_labels: (I,) class ids.
        classes: C names.
        seed: of the validation images, and of the bootstrap for `mean_per_class_recall`.
        l2_grid: penalties above 0; one alone needs no validation images.
        main_metric: one of the figures of `measure_classes`.

    Raises:
        UserError: bad embeddings (`check_embeddings`), fewer than two classes in the list or among the training
            labels, a label that is no class id, no usable penalty, no class with two training images to hold one
            out, or a `main_metric` that was not measured.
    """
    train = check_embeddings(train_embed, "training embeddings")
    test = check_embeddings(test_embed, "test embeddings", train.shape[1])
    check_classes(classes, len(classes))
    known = check_labels(train_labels, len(train), len(classes))
    label = check_labels(test_labels, len(test), len(classes))
    grid = sorted(set(l2_grid), reverse=True)
    if not grid or not all(0 < l2 < float("inf") for l2 in grid):
        raise UserError(f"The penalties are {tuple(l2_grid)}; give one or more numbers above 0.")
    # A class that no training image has would drive its bias to minus infinity.
    present, target = np.unique(known, return_inverse=True)
    if len(present) < 2:
        raise UserError("All training images have one class; a linear probe needs two: check the training labels.")
    features, labels = _unit(train), torch.from_numpy(target)
    l2, notes = _choose(features, labels, len(present), grid, seed)
    weights, steps = fit_logistic(features, labels, len(present), l2)
    order = present[_order(_logits(_unit(test), weights))]
    missing = len(classes) - len(present)
    if order.shape[1] < min(5, len(classes)):
        order = np.pad(order, ((0, 0), (0, min(5, len(classes)) - order.shape[1])), constant_values=-1)
    return measure_classes(
        "linear_probe",
        "linear_probe",
        order,
        label,
        classes,
        main_metric=main_metric,
        seed=seed,
        counts={"training_images": len(train), "classes_without_training_images": missing},
        notes={"l2": l2, "seed": seed, "steps": steps, "step_limit": MAX_STEPS, **notes},
    )


def fit_logistic(
    features: Tensor, labels: Tensor, classes: int, l2: float, start: Tensor | None = None
) -> tuple[Tensor, int]:
    """Multinomial logistic regression by L-BFGS.

    Args:
        features: (N, D) float64.
        labels: (N,) int64.
        classes: C.
        l2: penalty of the squared weights over two, beside the mean cross-entropy.
        start: (C, D + 1) where to begin, zeros by default.

    Returns:
        (C, D + 1) float64 weights with the bias in the last column, and the number of steps taken.
    """
    first = torch.zeros(classes, features.shape[1] + 1, dtype=torch.float64) if start is None else start.clone()
    weights = first.requires_grad_()
    optimizer = torch.optim.LBFGS(
        [weights],
        max_iter=MAX_STEPS,
        max_eval=2 * MAX_STEPS,
        tolerance_grad=_GRADIENT,
        tolerance_change=_CHANGE,
        history_size=20,
        line_search_fn="strong_wolfe",
    )

    def loss() -> Tensor:
        optimizer.zero_grad()
        value = torch.nn.functional.cross_entropy(_logits(features, weights), labels)
        value = value + l2 / 2 * weights[:, :-1].square().sum()
        value.backward()  # type: ignore[no-untyped-call]
        return value

    with torch.enable_grad():
        optimizer.step(loss)  # type: ignore[no-untyped-call]
    return weights.detach(), int(optimizer.state[weights]["n_iter"])


def _choose(
    features: Tensor, labels: Tensor, classes: int, grid: Sequence[float], seed: int
) -> tuple[float, dict[str, str | int | float]]:
    """The penalty with the highest validation accuracy, of a descending grid; each fit starts from the one before."""
    if len(grid) == 1:
        return grid[0], {"validation_images": 0}
    held_out = validation_rows(labels.numpy(), seed)
    if not held_out.any():
        raise UserError(
            "No class has two training images, so none can be held out to choose the penalty; give a single penalty."
        )
    held, kept = torch.from_numpy(held_out), torch.from_numpy(~held_out)
    weights, best, chosen = None, -1.0, grid[0]
    for l2 in grid:
        weights, _ = fit_logistic(features[kept], labels[kept], classes, l2, weights)
        found = _order(_logits(features[held], weights))[:, 0] == labels[held].numpy()
        if found.mean() > best:
            best, chosen = float(found.mean()), l2
    edge = "yes" if chosen in (grid[0], grid[-1]) else "no"
    return chosen, {"validation_images": int(held_out.sum()), "validation_acc1": best, "l2_at_edge_of_grid": edge}


def validation_rows(labels: NDArray[np.int64], seed: int) -> NDArray[np.bool_]:
    """(N,) true for a fifth of each class, one at least, none of a class with a single image."""
    rng = np.random.default_rng(seed)
    held_out = np.zeros(len(labels), np.bool_)
    for own in np.unique(labels):
        rows = rng.permutation(np.flatnonzero(labels == own))
        if len(rows) > 1:
            held_out[rows[: max(1, int(VALIDATION_SHARE * len(rows)))]] = True
    return held_out


def _unit(vectors: Tensor) -> Tensor:
    return torch.nn.functional.normalize(vectors.double(), dim=1, eps=0)


def _logits(features: Tensor, weights: Tensor) -> Tensor:
    return torch.addmm(weights[:, -1], features, weights[:, :-1].T)


def _order(logits: Tensor) -> NDArray[np.int64]:
    """(I, min(5, C)) classes by their logit, equal ones in the order of their ids."""
    return np.argsort(-logits.numpy(), axis=1, kind="stable")[:, :5]
