"""Average precision by class, for images with several labels each."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

from vlkd.errors import UserError
from vlkd.metrics.checks import Floats, finite, same_shape


def average_precision_by_class(scores: ArrayLike, labels: ArrayLike) -> Floats:
    """(C,) AP = mean over the images of a class of the precision at their ranks; NaN for a class without an image.

    Images are ranked by their score for the class, equal scores in the order of the images. Without equal scores it
    is scikit-learn's `average_precision_score`; that one takes equal scores as one step, here each image has a rank.

    Args:
        scores: (I, C) score of every image for every class.
        labels: (I, C) bool, which classes each image has.

    Raises:
        UserError: nothing to score, shapes differ, a score is not finite, or labels are not of type bool.
    """
    table, label = finite(scores, "scores", 2), np.asarray(labels)
    same_shape(table, label, "scores and labels")
    if label.dtype != np.bool_:
        raise UserError(f"Multi-label labels are of type {label.dtype}; expected bool, one column per class.")
    return np.array([_average_precision(table[:, c], label[:, c]) for c in range(table.shape[1])])


def _average_precision(scores: Floats, labels: NDArray[np.bool_]) -> float:
    ranks = np.flatnonzero(labels[np.argsort(-scores, kind="stable")])
    return float((np.arange(1, len(ranks) + 1) / (ranks + 1)).mean()) if len(ranks) else float("nan")


def mean_average_precision(scores: ArrayLike, labels: ArrayLike) -> float:
    """The mean of `average_precision_by_class` over the classes that have an image.

    Raises:
        UserError: as `average_precision_by_class`, or no image has a class.
    """
    found = average_precision_by_class(scores, labels)
    if np.isnan(found).all():
        raise UserError("No image has a class, so average precision is not defined; check the labels.")
    return float(np.nanmean(found))
