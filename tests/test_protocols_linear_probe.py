"""The linear probe against scikit-learn's logistic regression, and that test images choose nothing."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from vlkd.errors import UserError
from vlkd.protocols.linear_probe import fit_logistic, linear_probe, validation_rows


def names(count):
    return [f"class {i}" for i in range(count)]


def drawn(train=400, test=300, classes=7, width=12, seed=0):
    rng = np.random.default_rng(seed)
    centres = rng.normal(size=(classes, width))
    labels = rng.integers(0, classes, train + test)
    x = centres[labels] + 1.3 * rng.normal(size=(len(labels), width))
    return x[:train], labels[:train], x[train:], labels[train:]


def unit(x):
    return x / np.linalg.norm(x, axis=1, keepdims=True)


@pytest.mark.parametrize("l2", [1e-2, 1e-4])
def test_weights_and_predictions_are_scikit_learns(l2):
    linear = pytest.importorskip("sklearn.linear_model")
    train, known, test, labels = drawn()
    model = linear.LogisticRegression(C=1 / (len(train) * l2), tol=1e-9, max_iter=5000).fit(unit(train), known)
    weights, steps = fit_logistic(torch.from_numpy(unit(train)), torch.from_numpy(known), 7, l2)
    assert 5 < steps < 1000
    np.testing.assert_allclose(weights[:, :-1], model.coef_, atol=2e-3 * np.abs(model.coef_).max())
    bias = weights[:, -1].numpy()
    np.testing.assert_allclose(bias - bias.mean(), model.intercept_ - model.intercept_.mean(), atol=0.01)
    found = linear_probe(train, known, test, labels, classes=names(7), l2_grid=(l2,))
    np.testing.assert_array_equal(found.per_item["prediction"], model.predict(unit(test)))
    assert found.score == pytest.approx(model.score(unit(test), labels))
    order = np.argsort(-model.decision_function(unit(test)), axis=1)[:, :5]
    assert found.metrics["acc5"] == pytest.approx((order == labels[:, None]).any(1).mean())


def test_the_penalty_is_the_best_on_the_held_out_fifth():
    linear = pytest.importorskip("sklearn.linear_model")
    train, known, test, labels = drawn()
    grid = (1e-4, 1.0, 1e-2)
    found = linear_probe(train, known, test, labels, classes=names(7), l2_grid=grid, seed=3)
    held = validation_rows(known, 3)
    scores = {}
    for l2 in sorted(grid, reverse=True):
        model = linear.LogisticRegression(C=1 / ((~held).sum() * l2), tol=1e-9, max_iter=5000)
        scores[l2] = model.fit(unit(train[~held]), known[~held]).score(unit(train[held]), known[held])
    best = max(scores, key=scores.get)
    assert found.notes["l2"] == best
    assert found.notes["validation_acc1"] == pytest.approx(scores[best])
    assert found.notes["validation_images"] == held.sum()
    again = linear.LogisticRegression(C=1 / (len(train) * best), tol=1e-9, max_iter=5000).fit(unit(train), known)
    np.testing.assert_array_equal(found.per_item["prediction"], again.predict(unit(test)))


def test_a_fifth_of_each_class_is_held_out():
    labels = np.repeat(np.arange(5), [1, 2, 4, 50, 100])
    held = validation_rows(labels, 0)
    assert np.bincount(labels[held], minlength=5).tolist() == [0, 1, 1, 10, 20]
    np.testing.assert_array_equal(held, validation_rows(labels, 0))
    assert (held != validation_rows(labels, 1)).any()


def test_test_images_choose_nothing():
    """Other test labels and fewer test images leave every prediction and the penalty as they were."""
    train, known, test, labels = drawn()
    found = linear_probe(train, known, test, labels, classes=names(7))
    other = linear_probe(train, known, test[:50], (labels[:50] + 1) % 7, classes=names(7))
    assert other.notes == found.notes
    np.testing.assert_array_equal(other.per_item["prediction"], found.per_item["prediction"][:50])
    assert other.score != found.score
    again = linear_probe(torch.tensor(train), list(known), test, labels, classes=names(7))
    assert again.metrics == found.metrics


def test_a_class_without_training_images_is_never_predicted():
    train, known, test, labels = drawn()
    known, labels = np.where(known >= 2, known + 1, known), np.where(labels >= 2, labels + 1, labels)
    found = linear_probe(train, known, test, labels, classes=names(8))
    assert found.counts["classes_without_training_images"] == 1
    assert 2 not in found.per_item["prediction"]
    assert found.score > 0.4
    few = linear_probe(torch.eye(2), [0, 6], torch.eye(2), [6, 1], classes=names(7), l2_grid=(1e-3,))
    assert few.metrics["acc1"] == 0
    assert few.metrics["acc5"] == 0.5


def test_a_collapsed_model_predicts_the_most_frequent_class():
    known = np.repeat([0, 1, 2], [10, 30, 20])
    found = linear_probe(np.ones((60, 4)), known, np.ones((3, 4)), [0, 1, 2], classes=names(3))
    assert found.per_item["prediction"].tolist() == [1, 1, 1]


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"train_labels": [0, 0, 0, 0]}, "All training images have one class"),
        ({"train_labels": [0, 0, 1, 3]}, "go from 0 to 2"),
        ({"test_labels": [0.0, 0.0, 1.0, 2.0]}, "float32"),
        ({"test_labels": [0]}, "4 images but labels"),
        ({"train_embed": torch.full((4, 3), math.nan)}, "training embeddings: row 0 holds NaN"),
        ({"test_embed": torch.zeros(4, 3)}, "test embeddings: row 0 has length zero"),
        ({"test_embed": torch.ones(4, 5)}, "expected vectors of width 3, found 5"),
        ({"l2_grid": ()}, r"penalties are \(\)"),
        ({"l2_grid": (0.0, 1.0)}, "numbers above 0"),
        ({"classes": ["a"], "train_labels": [0] * 4, "test_labels": [0] * 4}, "Found 1 class"),
    ],
)
def test_bad_input_is_refused(change, sentence):
    points = torch.tensor([[1.0, 0, 0], [1.0, 0, 0], [0, 1.0, 0], [0, 0, 1.0]])
    good = {
        "train_embed": points, "train_labels": [0, 0, 1, 2], "test_embed": points, "test_labels": [0, 0, 1, 2],
        "classes": names(3),
    }  # fmt: skip
    assert linear_probe(**good).score == 1
    with pytest.raises(UserError, match=sentence):
        linear_probe(**(good | change))


def test_one_shot_needs_a_single_penalty():
    with pytest.raises(UserError, match="No class has two training images"):
        linear_probe(torch.eye(3), [0, 1, 2], torch.eye(3), [0, 1, 2], classes=names(3))
    assert linear_probe(torch.eye(3), [0, 1, 2], torch.eye(3), [0, 1, 2], classes=names(3), l2_grid=(1e-3,)).score == 1
