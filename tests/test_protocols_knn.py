"""The weighted vote of the nearest neighbours against scikit-learn and by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from vlkd.errors import UserError
from vlkd.protocols.knn import knn


def names(count):
    return [f"class {i}" for i in range(count)]


def drawn(train=600, test=300, classes=9, width=8, seed=0):
    rng = np.random.default_rng(seed)
    centres = rng.normal(size=(classes, width))
    labels = rng.integers(0, classes, train + test)
    x = centres[labels] + 0.9 * rng.normal(size=(len(labels), width))
    return x[:train], labels[:train], x[train:], labels[train:]


@pytest.mark.parametrize(("k", "temperature"), [(1, 0.07), (20, 0.07), (20, 0.5), (600, 0.1)])
def test_against_scikit_learn(k, temperature):
    neighbors = pytest.importorskip("sklearn.neighbors")
    train, known, test, labels = drawn()
    unit = [x / np.linalg.norm(x, axis=1, keepdims=True) for x in (train, test)]
    # scikit-learn hands over cosine distances, 1 - s.
    model = neighbors.KNeighborsClassifier(
        k, metric="cosine", algorithm="brute", weights=lambda d: np.exp((1 - d) / temperature)
    )
    model.fit(unit[0], known)
    found = knn(train, known, test, labels, classes=names(9), k=k, temperature=temperature)
    np.testing.assert_array_equal(found.per_item["prediction"], model.predict(unit[1]))
    assert found.score == pytest.approx(model.score(unit[1], labels))
    chance = model.predict_proba(unit[1])
    order = np.argsort(-chance, axis=1, kind="stable")[:, :5]
    voted = np.take_along_axis(chance, order, 1) > 0
    assert found.metrics["acc5"] == pytest.approx(((order == labels[:, None]) & voted).any(1).mean())
    assert found.random_score == 1 / 9


def test_by_hand():
    """Two far votes beat one near one if the temperature is high enough: 2 exp(0.8 / t) > exp(1 / t)."""
    train = torch.tensor([[1.0, 0.0], [0.8, 0.6], [0.8, -0.6]])
    test = torch.tensor([[1.0, 0.0]])
    found = [
        knn(train, [1, 0, 0], test, [0], classes=names(2), k=3, temperature=t).score for t in (0.1, 0.28, 0.30, 1e-6)
    ]
    assert found == [0, 0, 1, 0]
    assert 2 * math.exp(0.8 / 0.28) < math.exp(1 / 0.28)
    assert 2 * math.exp(0.8 / 0.30) > math.exp(1 / 0.30)


def test_equal_votes_go_to_the_smaller_class_and_equal_neighbours_to_the_first():
    train = torch.tensor([[1.0, 1.0], [1.0, -1.0], [1.0, 1.0]])
    test = torch.tensor([[1.0, 0.0]])
    assert knn(train[:2], [1, 0], test, [0], classes=names(2), k=2).score == 1
    assert knn(train, [1, 0, 0], train[:1], [1], classes=names(2), k=1).score == 1


def test_a_class_without_a_vote_is_never_among_the_first_five():
    """One neighbour, of class 7: classes 0 to 3 would fill the first five by their ids."""
    labels = [7, 0, 1, 2]
    found = knn(torch.eye(4), [7, 7, 7, 7], torch.eye(4), labels, classes=names(8), k=1)
    assert found.metrics["acc1"] == found.metrics["acc5"] == 0.25
    assert found.counts["classes_without_training_images"] == 7
    assert found.counts["training_images"] == 4


def test_collapsed_and_any_order_of_the_test_images(monkeypatch):
    train, known, test, labels = drawn()
    found = knn(train, known, test, labels, classes=names(9))
    order = np.random.default_rng(1).permutation(len(test))
    monkeypatch.setattr("vlkd.protocols.knn._ROWS_AT_ONCE", 7)
    moved = knn(train, known, test[order], labels[order], classes=names(9))
    np.testing.assert_array_equal(moved.per_item["prediction"], found.per_item["prediction"][order])
    assert moved.metrics == found.metrics
    flat = knn(np.ones((600, 3)), known, np.ones((300, 3)), labels, classes=names(9), k=20)
    votes = np.bincount(known[:20], minlength=9)
    assert set(flat.per_item["prediction"]) == {votes.argmax()}


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"k": 4}, "k = 4 neighbours asked from a gallery of 3"),
        ({"k": 0}, "k = 0 neighbours"),
        ({"temperature": 0.0}, "temperature is 0.0"),
        ({"temperature": math.nan}, "temperature is nan"),
        ({"train_labels": [0, 1, 3]}, "go from 0 to 2"),
        ({"test_labels": [0.0, 1.0, 2.0]}, "float32"),
        ({"train_labels": [0, 1]}, "3 images but labels"),
        ({"train_embed": torch.full((3, 3), math.nan)}, "training embeddings: row 0 holds NaN"),
        ({"test_embed": torch.zeros(3, 3)}, "test embeddings: row 0 has length zero"),
        ({"classes": ["a"], "train_labels": [0] * 3, "test_labels": [0] * 3}, "Found 1 class"),
    ],
)
def test_bad_input_is_refused(change, sentence):
    good = {
        "train_embed": torch.eye(3), "train_labels": [0, 1, 2], "test_embed": torch.eye(3), "test_labels": [0, 1, 2],
        "classes": names(3), "k": 1,
    }  # fmt: skip
    assert knn(**good).score == 1
    with pytest.raises(UserError, match=sentence):
        knn(**(good | change))
