"""Figures of one label per image: by class, by group, calibration; and the overlap of two sets."""

from __future__ import annotations

from collections.abc import Collection, Hashable
from collections.abc import Set as AbstractSet

import numpy as np
from numpy.typing import ArrayLike

from vlkd.errors import UserError
from vlkd.metrics.checks import Floats, at_least_one, class_ids, finite, same_shape, whole


def per_class_recall(correct: ArrayLike, labels: ArrayLike, classes: int) -> Floats:
    """(C,) mean of `correct` over the images of each class, NaN where a class has no image.

    Args:
        correct: (I,) 1 where the prediction is right, else 0 (or whether a top-k prediction holds the label).
        labels: (I,) class ids.
        classes: C.

    Raises:
        UserError: no image, lengths differ, a value is not finite, or a label is none of the classes.
    """
    hits, label = finite(correct, "hits"), class_ids(labels, "labels", at_least_one(classes, "classes"))
    same_shape(hits, label, "hits and labels")
    count = np.bincount(label, minlength=classes)
    total = np.bincount(label, weights=hits, minlength=classes)
    recall: Floats = np.divide(total, count, out=np.full(classes, np.nan), where=count > 0)
    return recall


def mean_per_class_recall(correct: ArrayLike, labels: ArrayLike, classes: int) -> float:
    """The mean of `per_class_recall` over the classes that have an image; scikit-learn's balanced accuracy."""
    return float(np.nanmean(per_class_recall(correct, labels, classes)))


def f1_macro(predicted: ArrayLike, labels: ArrayLike, classes: int) -> float:
    """The mean over the classes that have an image of F1 = 2 TP / (2 TP + FP + FN).

    It is scikit-learn's `f1_score(labels, predicted, average="macro", labels=unique(labels))`, as WILDS and DataComp
    use for iWildCam: a class that is only predicted costs the others their recall, but is no term of the mean.

    Args:
        predicted: (I,) class ids.
        labels: (I,) class ids.
        classes: C.

    Raises:
        UserError: no image, lengths differ, or an id is none of the classes.
    """
    guess = class_ids(predicted, "predictions", at_least_one(classes, "classes"))
    label = class_ids(labels, "labels", classes)
    same_shape(guess, label, "predictions and labels")
    right = np.bincount(label[guess == label], minlength=classes)
    there = np.bincount(label, minlength=classes)
    # 2 TP + FP + FN is the number of predictions and of labels of the class together.
    both = there + np.bincount(guess, minlength=classes)
    return float((2 * right[there > 0] / both[there > 0]).mean())


def expected_calibration_error(confidence: ArrayLike, correct: ArrayLike, bins: int = 15) -> float:
    """ECE = sum over bins of |mean correct - mean confidence| * (share of the images in the bin).

    Bins have equal width; bin m holds confidences in ((m - 1) / bins, m / bins], the first one also 0 (Guo et al.,
    2017, https://arxiv.org/abs/1706.04599).

    Args:
        confidence: (I,) probability of the predicted class.
        correct: (I,) 1 where the prediction is right, else 0.
        bins: number of bins.

    Raises:
        UserError: no image, lengths differ, a value is not finite, a confidence outside 0 to 1, or bins below 1.
    """
    sure, hits = finite(confidence, "confidences"), finite(correct, "hits")
    same_shape(sure, hits, "confidences and hits")
    if sure.min() < 0 or sure.max() > 1:
        raise UserError(f"Confidences go from {sure.min()} to {sure.max()}; expected probabilities, from 0 to 1.")
    edges = np.linspace(0, 1, at_least_one(bins, "bins") + 1)[1:-1]
    gap = np.bincount(np.searchsorted(edges, sure, side="left"), weights=hits - sure, minlength=bins)
    return float(np.abs(gap).sum() / len(sure))


def group_accuracy(correct: ArrayLike, groups: ArrayLike) -> dict[int, float]:
    """Mean of `correct` within each group, by group id in ascending order.

    Args:
        correct: (I,) hits of any kind: of the first class, or of the first five (DataComp's `acc_top5` groups).
        groups: (I,) group ids.

    Raises:
        UserError: no image, lengths differ, a hit that is not finite, or groups that are not integers.
    """
    hits, group = finite(correct, "hits"), whole(groups, "groups")
    same_shape(hits, group, "hits and groups")
    names, index, sizes = np.unique(group, return_inverse=True, return_counts=True)
    means = np.bincount(index, weights=hits) / sizes
    return {int(name): float(mean) for name, mean in zip(names, means, strict=True)}


def worst_group(correct: ArrayLike, groups: ArrayLike, *, left_out: Collection[int] = ()) -> float:
    """The lowest `group_accuracy`.

    DataComp's `acc_wg` from the hits of the first class and `acc_top5_wg` from those of the first five (Gadre et al.,
    2023, https://arxiv.org/abs/2304.14108); WILDS' worst region of FMoW leaves out the group "Other" (Koh et al., 2021,
    https://arxiv.org/abs/2012.07421).

    Args:
        correct: (I,) hits of any kind.
        groups: (I,) group ids.
        left_out: ids of groups that do not count.

    Raises:
        UserError: as `group_accuracy`, or no group is left.
    """
    found = {group: value for group, value in group_accuracy(correct, groups).items() if group not in left_out}
    if not found:
        raise UserError(f"No group is left without {sorted(left_out)}; the worst needs at least one.")
    return min(found.values())


def jaccard(chosen: AbstractSet[Hashable], gold: AbstractSet[Hashable]) -> float:
    """|A & B| / |A or B|, the score of a WinoGAViL item (Bitton et al., 2022, https://arxiv.org/abs/2207.12576).

    Raises:
        UserError: both sets are empty, so that it is not defined.
    """
    if not chosen and not gold:
        raise UserError("Two empty sets have no overlap to measure; give at least one item.")
    return len(chosen & gold) / len(chosen | gold)
