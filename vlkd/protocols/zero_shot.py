"""Zero-shot classification: accuracy, recall by class, worst group and calibration from embeddings."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from vlkd.errors import UserError
from vlkd.metrics import expected_calibration_error, group_accuracy
from vlkd.protocols.classified import check_classes, measure_classes
from vlkd.protocols.measured import Measured
from vlkd.protocols.scores import score_blocks
from vlkd.retrieval.search import Indices, Vectors, check_embeddings, topk
from vlkd.retrieval.zero_shot import check_labels

CALIBRATION_BINS = 15


def zero_shot(
    image_embed: Vectors,
    class_vectors: Vectors,
    labels: Indices,
    *,
    classes: Sequence[str],
    logit_scale: float,
    groups: Mapping[str, NDArray[np.int64]] | None = None,
    main_metric: str = "acc1",
    seed: int = 0,
) -> Measured:
    """Name for each image the class of the highest cosine; equal cosines go in the order of the class ids.

    Besides the figures of `measure_classes`: `ece`, the expected calibration error of the softmax over the classes of
    `logit_scale` times the cosine (Guo et al., 2017, https://arxiv.org/abs/1706.04599; 15 bins of equal width). With
    groups: `acc_group_<column>_<id>`, `acc_worst_<column>`, and over all columns `acc_wg` and `acc_top5_wg`, the lowest
    acc1 and acc5 of a group, under DataComp's names.

    Args:
        image_embed: (I, D), not necessarily normalised.
        class_vectors: (C, D).
        labels: (I,) class id of each image.
        classes: C names.
        logit_scale: the model's factor of the cosine, above 0.
        groups: (I,) group id of each image, by name of the column.
        main_metric: one of the figures.
        seed: of the bootstrap for `mean_per_class_recall`.

    Raises:
        UserError: bad embeddings (`check_embeddings`), fewer than two classes, another number of names than of vectors,
            a label that is no class id, groups of another length, or a `main_metric` that was not measured.
    """
    images = check_embeddings(image_embed, "image embeddings")
    vectors = check_embeddings(class_vectors, "class vectors", images.shape[1])
    check_classes(classes, len(vectors))
    label = check_labels(labels, len(images), len(classes))
    if not (math.isfinite(logit_scale) and logit_scale > 0):
        raise UserError(f"The logit scale is {logit_scale}; expected a factor above 0, e^t of a CLIP model.")
    order = topk(images, vectors, min(5, len(classes)))[1].numpy()
    confidence = _confidence(images, vectors, logit_scale)
    right = order == label[:, None]
    first = right[:, 0].astype(np.float64)
    more = {"ece": expected_calibration_error(confidence, first, bins=CALIBRATION_BINS)}
    columns = {name: _check_groups(ids, name, len(images)) for name, ids in (groups or {}).items()}
    five = right.any(axis=1).astype(np.float64) if len(classes) >= 5 else None
    return measure_classes(
        "zero_shot",
        "zeroshot_classification",
        order,
        label,
        classes,
        main_metric=main_metric,
        seed=seed,
        metrics=more | _group_figures(first, five, columns),
        counts={f"groups_{name}": len(np.unique(ids)) for name, ids in columns.items()},
        per_item={"confidence": confidence},
        notes={
            "logit_scale": logit_scale,
            "calibration_bins": CALIBRATION_BINS,
            "ties": "smaller class id",
            "seed": seed,
        },
    )


def _confidence(images: Tensor, vectors: Tensor, logit_scale: float) -> NDArray[np.float64]:
    """(I,) probability of the first class: the softmax of its logit, in float64."""
    found = np.empty(len(images))
    for rows, block in score_blocks(images, vectors):
        logits = logit_scale * block.astype(np.float64)
        found[rows] = 1 / np.exp(logits - logits.max(axis=1, keepdims=True)).sum(axis=1)
    return found


def _check_groups(ids: NDArray[np.int64], name: str, images: int) -> NDArray[np.int64]:
    group = np.asarray(ids)
    if group.shape != (images,) or group.dtype.kind not in "iu":
        raise UserError(
            f"{images} images but groups {name!r} {group.shape}, {group.dtype}; give one whole number per image."
        )
    return group.astype(np.int64)


def _group_figures(
    correct: NDArray[np.float64], correct5: NDArray[np.float64] | None, columns: Mapping[str, NDArray[np.int64]]
) -> dict[str, float]:
    figures: dict[str, float] = {}
    worst, worst5 = [], []
    for name, ids in columns.items():
        of_group = group_accuracy(correct, ids)
        figures |= {f"acc_group_{name}_{group}": value for group, value in of_group.items()}
        worst.append(min(of_group.values()))
        figures[f"acc_worst_{name}"] = worst[-1]
        if correct5 is not None:
            worst5.append(min(group_accuracy(correct5, ids).values()))
    if worst:
        figures["acc_wg"] = min(worst)
    if worst5:
        figures["acc_top5_wg"] = min(worst5)
    return figures
