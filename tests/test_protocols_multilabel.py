"""Mean average precision against scikit-learn and by counting."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch

from vlkd.errors import UserError
from vlkd.protocols.multilabel import (
    _weighted_mean_average_precision,
    multilabel,
    random_average_precision,
)


def names(count):
    return [f"class {i}" for i in range(count)]


def drawn(images=400, classes=12, seed=0):
    rng = np.random.default_rng(seed)
    vectors = rng.normal(size=(classes, 20))
    labels = rng.random((images, classes)) < 0.15
    labels[:, 4] = False
    return labels @ vectors + 2 * rng.normal(size=(images, 20)), vectors, labels


def average_precision(order, label):
    """By walking down the list."""
    found, total = 0, 0.0
    for place, i in enumerate(order, start=1):
        if label[i]:
            found += 1
            total += found / place
    return total / found


def test_against_scikit_learn():
    metrics = pytest.importorskip("sklearn.metrics")
    images, vectors, labels = drawn()
    unit = [x / np.linalg.norm(x, axis=1, keepdims=True) for x in (images, vectors)]
    scores = unit[0] @ unit[1].T
    wanted = {f"class {c}": metrics.average_precision_score(labels[:, c], scores[:, c]) for c in range(12) if c != 4}
    found = multilabel(images, vectors, labels, classes=names(12))
    assert found.per_class == pytest.approx(wanted, abs=1e-9)
    assert found.score == found.metrics["mean_average_precision"] == pytest.approx(np.mean(list(wanted.values())))
    assert found.metrics["label_ranking_average_precision"] == pytest.approx(
        metrics.label_ranking_average_precision_score(labels, scores), abs=1e-9
    )
    assert found.per_item["correct"].shape == (400,)
    assert found.per_item["correct"].mean() == found.metrics["label_ranking_average_precision"]
    empty = ~labels.any(1)
    assert found.counts == {
        "images": 400, "classes": 12, "classes_without_images": 1, "images_without_classes": empty.sum(),
        "labels": labels.sum(),
    }  # fmt: skip
    assert (found.per_item["correct"][empty] == 1).all()
    low, high = found.interval
    assert 0.02 < high - low < 0.2
    assert low < found.score < high


def test_a_collapsed_model_has_the_order_of_the_images():
    """All cosines tie; labels in the last images are found last, whatever the sort."""
    labels = np.zeros((50, 2), bool)
    labels[40:, 0] = True
    labels[:5, 1] = True
    found = multilabel(torch.ones(50, 3), torch.ones(2, 3), labels, classes=names(2))
    assert found.per_class["class 0"] == pytest.approx(np.mean([i / (40 + i) for i in range(1, 11)]))
    assert found.per_class["class 1"] == 1


@pytest.mark.parametrize(("images", "positives"), [(1, 1), (5, 1), (6, 3), (6, 6)])
def test_random_score_is_the_mean_over_all_orders(images, positives):
    orders = [[i in chosen for i in range(images)] for chosen in itertools.combinations(range(images), positives)]
    wanted = np.mean([average_precision(range(images), label) for label in orders])
    assert random_average_precision(np.array([positives]), images)[0] == pytest.approx(wanted, abs=1e-12)


def test_weights_stand_for_copies():
    """Weights of 0 and 1 leave images out exactly; a weight of 2 is near to the image written down twice."""
    rng = np.random.default_rng(0)
    scores, labels = rng.normal(size=(60, 3)), rng.random((60, 3)) < 0.3
    order = np.argsort(-scores, axis=0)
    weight = rng.integers(0, 2, (4, 60)).astype(float)
    for row, found in zip(weight, _weighted_mean_average_precision(weight, order, labels), strict=True):
        kept = row > 0
        wanted = [average_precision(np.argsort(-scores[kept, c]), labels[kept, c]) for c in range(3)]
        assert found == pytest.approx(np.mean(wanted), abs=1e-12)
    row = rng.integers(0, 4, 60)
    copies = np.repeat(np.arange(60), row)
    wanted = [average_precision(np.argsort(-scores[copies, c], kind="stable"), labels[copies, c]) for c in range(3)]
    assert _weighted_mean_average_precision(row[None].astype(float), order, labels)[0] == pytest.approx(
        np.mean(wanted), abs=0.01
    )


def test_interval_does_not_depend_on_blocks(monkeypatch):
    images, vectors, labels = drawn(images=90)
    found = multilabel(images, vectors, labels, classes=names(12)).interval
    monkeypatch.setattr("vlkd.protocols.multilabel._BLOCK", 1)
    assert multilabel(images, vectors, labels, classes=names(12)).interval == found


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"labels": np.eye(3)}, "float64; expected"),
        ({"labels": [0, 1, 2]}, r"\(3,\), int64; expected \(3, 3\)"),
        ({"labels": 2 * np.eye(3, dtype=int)}, "values from 0 to 2"),
        ({"labels": np.zeros((3, 3), bool)}, "No image has a class"),
        ({"classes": ["a"]}, "1 class names but 3"),
        ({"image_embed": torch.full((3, 3), math.nan)}, "row 0 holds NaN"),
        ({"class_vectors": torch.zeros(3, 3)}, "row 0 has length zero"),
    ],
)
def test_bad_input_is_refused(change, sentence):
    good = {
        "image_embed": torch.eye(3), "class_vectors": torch.eye(3), "labels": np.eye(3, dtype=np.int64),
        "classes": names(3),
    }  # fmt: skip
    assert multilabel(**good).score == 1
    with pytest.raises(UserError, match=sentence):
        multilabel(**(good | change))
