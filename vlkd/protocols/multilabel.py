"""Images with several classes each: mean average precision over the classes."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

from vlkd.errors import UserError
from vlkd.metrics import average_precision_by_class
from vlkd.protocols.classified import by_class, check_classes
from vlkd.protocols.measured import Measured
from vlkd.protocols.scores import cosines
from vlkd.retrieval.search import Vectors, check_embeddings

_BLOCK = 1 << 21

Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]


def multilabel(
    image_embed: Vectors,
    class_vectors: Vectors,
    labels: ArrayLike,
    *,
    classes: Sequence[str],
    seed: int = 0,
    resamples: int = 300,
) -> Measured:
    """Rank all images for each class by their cosine; equal cosines go in the order of the images.

    `mean_average_precision`, the main metric, is the mean over the classes that have an image of AP = the mean over
    their images of the precision at the image's rank. `correct` of an image is the average precision of the classes
    ranked for it (label ranking average precision, 1 for an image without a class as in scikit-learn, equal cosines in
    the order of the class ids); its mean is `label_ranking_average_precision`.

    The interval is a bootstrap over images. An image drawn twice raises AP a little, so the percentiles are moved by
    what the mean of the resamples differs from the figure.

    Args:
        image_embed: (I, D), not necessarily normalised.
        class_vectors: (C, D).
        labels: (I, C) bool, or 0 and 1.
        classes: C names.
        seed: of the bootstrap.
        resamples: of the bootstrap.

    Raises:
        UserError: bad embeddings (`check_embeddings`), fewer than two classes, another number of names than of vectors,
            labels of another shape or with other values, or no image with a class.
    """
    images = check_embeddings(image_embed, "image embeddings")
    vectors = check_embeddings(class_vectors, "class vectors", images.shape[1])
    check_classes(classes, len(vectors))
    label = _check_labels(labels, len(images), len(classes))
    scores = cosines(images, vectors)
    precision = average_precision_by_class(scores, label)
    there = label.any(axis=0)
    found = float(precision[there].mean())
    ranking = label_ranking_average_precision(scores, label)
    return Measured(
        protocol="multilabel",
        task="zeroshot_classification",
        metrics={"mean_average_precision": found, "label_ranking_average_precision": float(ranking.mean())},
        main_metric="mean_average_precision",
        interval=_interval(scores[:, there], label[:, there], found, seed, resamples),
        random_score=float(random_average_precision(label.sum(axis=0)[there], len(images)).mean()),
        counts={
            "images": len(images),
            "classes": len(classes),
            "classes_without_images": int((~there).sum()),
            "images_without_classes": int((~label.any(axis=1)).sum()),
            "labels": int(label.sum()),
        },
        per_item={"correct": ranking},
        per_class=by_class(precision, classes),
        notes={"seed": seed, "resamples": resamples, "ties": "smaller image number"},
    )


def _check_labels(labels: ArrayLike, images: int, classes: int) -> Bools:
    label = np.asarray(labels)
    wanted = f"expected ({images}, {classes}), one row per image, of true and false or 1 and 0"
    if label.shape != (images, classes) or label.dtype.kind not in "biu":
        raise UserError(f"Multi-label labels are {label.shape}, {label.dtype}; {wanted}.")
    if label.dtype.kind != "b" and not np.isin(label, (0, 1)).all():
        raise UserError(f"Multi-label labels hold values from {label.min()} to {label.max()}; {wanted}.")
    if not label.any():
        raise UserError("No image has a class; mean average precision needs at least one label: check the labels.")
    return label.astype(np.bool_)


def label_ranking_average_precision(scores: NDArray[np.float32], labels: Bools) -> Floats:
    """(I,) AP of the classes ranked for each image; 1 for an image without a class."""
    order = np.argsort(-scores, axis=1, kind="stable")
    right = np.take_along_axis(labels, order, 1)
    precision = np.cumsum(right, axis=1) / np.arange(1, labels.shape[1] + 1)
    number = right.sum(axis=1)
    return np.where(number > 0, (precision * right).sum(axis=1) / np.maximum(number, 1), 1.0)


def random_average_precision(positives: NDArray[np.int64], images: int) -> Floats:
    """(C,) expected AP of a random order of N images with R positives: (H + (N - H) (R - 1) / (N - 1)) / N.

    H is the N-th harmonic number: position i holds a positive with probability R / N, and of the i - 1 before it
    (R - 1) / (N - 1) are positives on average.
    """
    harmonic = (1 / np.arange(1, images + 1)).sum()
    return np.asarray((harmonic + (images - harmonic) * (positives - 1) / max(1, images - 1)) / images)


def _interval(
    scores: NDArray[np.float32], labels: Bools, found: float, seed: int, resamples: int
) -> tuple[float, float]:
    """Every class in its one order of the images, which are weighed by how often they were drawn."""
    count = len(scores)
    order = np.argsort(-scores, axis=0, kind="stable")
    rng = np.random.default_rng(seed)
    step = max(1, _BLOCK // count)
    means = []
    for start in range(0, resamples, step):
        drawn = rng.integers(count, size=(min(step, resamples - start), count))
        weight = np.stack([np.bincount(row, minlength=count) for row in drawn]).astype(np.float64)
        means.append(_weighted_mean_average_precision(weight, order, labels))
    values = np.concatenate(means)
    values = values[np.isfinite(values)]
    low, high = np.percentile(values, [2.5, 97.5]) + (found - values.mean())
    return max(0.0, float(low)), min(1.0, float(high))


def _weighted_mean_average_precision(weight: Floats, order: NDArray[np.int64], labels: Bools) -> Floats:
    """(B,) mAP for (B, I) weights; an image of weight w stands w times, taken at the middle of its copies."""
    total, number = np.zeros(len(weight)), np.zeros(len(weight))
    for column in range(order.shape[1]):
        own = weight[:, order[:, column]]
        right = own[:, labels[order[:, column], column]]
        middle = (1 - right) / 2
        before = np.cumsum(own, axis=1)[:, labels[order[:, column], column]] + middle
        precision = (np.cumsum(right, axis=1) + middle) / np.maximum(before, 1)
        size = right.sum(axis=1)
        total += np.where(size > 0, (precision * right).sum(axis=1) / np.maximum(size, 1), 0)
        number += size > 0
    means: Floats = np.divide(total, number, out=np.full(len(weight), np.nan), where=number > 0)
    return means
