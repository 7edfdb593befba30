"""Classifiers with a fixed list of classes: accuracy, recall by class and calibration from their probabilities."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from vlkd.errors import UserError
from vlkd.metrics import expected_calibration_error
from vlkd.protocols.classified import check_classes, measure_classes
from vlkd.protocols.measured import Measured
from vlkd.protocols.zero_shot import CALIBRATION_BINS
from vlkd.retrieval.search import Indices
from vlkd.retrieval.zero_shot import check_labels

TOLERANCE = 1e-3


def classifier(
    probabilities: NDArray[np.floating],
    labels: Indices,
    *,
    classes: Sequence[str],
    main_metric: str = "acc1",
    seed: int = 0,
    notes: Mapping[str, str | int | float] | None = None,
) -> Measured:
    """Name for each image the most probable class; equal probabilities go in the order of the class ids.

    Besides the figures of `measure_classes`: `ece`, the expected calibration error of the first class's probability
    (Guo et al., 2017, https://arxiv.org/abs/1706.04599; 15 bins of equal width).

    Args:
        probabilities: (I, C), each row with the sum 1.
        labels: (I,) class id of each image.
        classes: C names.
        main_metric: one of the figures.
        seed: of the bootstrap for `mean_per_class_recall`.
        notes: settings of the classifier, such as the constants of its mix.

    Raises:
        UserError: no table of probabilities, fewer than two classes, another number of names than of columns, a label
            that is no class id, or a `main_metric` that was not measured.
    """
    table = np.asarray(probabilities, np.float64)
    if table.ndim != 2 or not len(table):
        raise UserError(f"Probabilities: expected a table (I, C) of one or more images, found shape {table.shape}.")
    check_classes(classes, table.shape[1])
    label = check_labels(labels, len(table), len(classes))
    wrong = ~np.isfinite(table).all(axis=1) | (table < 0).any(axis=1) | (np.abs(table.sum(axis=1) - 1) > TOLERANCE)
    if wrong.any():
        row = int(wrong.argmax())
        raise UserError(
            f"Probabilities: row {row} is no distribution (its sum is {table[row].sum():.4g}); expected numbers of 0 "
            "or more with the sum 1."
        )
    order = np.argsort(-table, axis=1, kind="stable")[:, : min(5, len(classes))].astype(np.int64)
    confidence = table[np.arange(len(table)), order[:, 0]]
    correct = (order[:, 0] == label).astype(np.float64)
    return measure_classes(
        "classifier",
        "classification",
        order,
        label,
        classes,
        main_metric=main_metric,
        seed=seed,
        metrics={"ece": expected_calibration_error(confidence, correct, bins=CALIBRATION_BINS)},
        per_item={"confidence": confidence},
        notes={"calibration_bins": CALIBRATION_BINS, "ties": "smaller class id", "seed": seed, **(notes or {})},
    )
