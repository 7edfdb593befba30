"""Classification by the nearest training images, weighed by their similarity."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from vlkd.errors import UserError
from vlkd.protocols.classified import check_classes, measure_classes
from vlkd.protocols.measured import Measured
from vlkd.retrieval.search import Indices, Vectors, check_embeddings, topk
from vlkd.retrieval.zero_shot import check_labels

_ROWS_AT_ONCE = 4096


def knn(
    train_embed: Vectors,
    train_labels: Indices,
    test_embed: Vectors,
    test_labels: Indices,
    *,
    classes: Sequence[str],
    k: int = 20,
    temperature: float = 0.07,
    main_metric: str = "acc1",
    seed: int = 0,
) -> Measured:
    """Each of the k nearest training images votes for its class with exp(cosine / temperature).

    The vote of Wu et al., 2018 (https://arxiv.org/abs/1805.01978) and DINO (Caron et al., 2021,
    https://arxiv.org/abs/2104.14294). Equal cosines go in the order of the training images, equal votes in the order of
    the class ids. A class without a vote is never among an image's first five.

    Args:
        train_embed: (N, D), not necessarily normalised.
        train_labels: (N,) class ids.
        test_embed: (I, D).
        test_labels: (I,) class ids.
        classes: C names.
        k: 1 to N.
        temperature: above 0.
        main_metric: one of the figures of `measure_classes`.
        seed: of the bootstrap for `mean_per_class_recall`.

    Raises:
        UserError: bad embeddings (`check_embeddings`), fewer than two classes, a label that is no class id, k outside
            1 to N, a temperature that is not above 0, or a `main_metric` that was not measured.
    """
    train = check_embeddings(train_embed, "training embeddings")
    test = check_embeddings(test_embed, "test embeddings", train.shape[1])
    check_classes(classes, len(classes))
    known = check_labels(train_labels, len(train), len(classes))
    label = check_labels(test_labels, len(test), len(classes))
    if not temperature > 0:
        raise UserError(f"The temperature is {temperature}; expected a number above 0, usually 0.07.")
    similarity, near = topk(test, train, k)
    order = _votes(similarity.double().numpy() / temperature, known[near.numpy()], len(classes))
    return measure_classes(
        "knn",
        "knn",
        order,
        label,
        classes,
        main_metric=main_metric,
        seed=seed,
        counts={"training_images": len(train), "classes_without_training_images": len(classes) - len(np.unique(known))},
        notes={"k": k, "temperature": temperature, "ties": "smaller class id", "seed": seed},
    )


def _votes(logits: NDArray[np.float64], voted: NDArray[np.int64], classes: int) -> NDArray[np.int64]:
    """(I, min(5, C)) classes by their votes, -1 where no further class has one."""
    # The nearest neighbour's weight is set to 1, which no temperature can make overflow.
    weight = np.exp(logits - logits[:, :1])
    width = min(5, classes)
    orders = []
    for start in range(0, len(weight), _ROWS_AT_ONCE):
        part, own = weight[start : start + _ROWS_AT_ONCE], voted[start : start + _ROWS_AT_ONCE]
        votes = np.zeros((len(part), classes))
        rows = np.arange(len(part))
        for neighbour in range(part.shape[1]):
            votes[rows, own[:, neighbour]] += part[:, neighbour]
        order = np.argsort(-votes, axis=1, kind="stable")[:, :width]
        orders.append(np.where(np.take_along_axis(votes, order, 1) > 0, order, -1))
    return np.concatenate(orders)
