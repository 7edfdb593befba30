"""Figures by class and group, and calibration, against scikit-learn, closed forms and loops."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from vlkd.errors import UserError
from vlkd.metrics import (
    expected_calibration_error,
    f1_macro,
    group_accuracy,
    jaccard,
    mean_per_class_recall,
    per_class_recall,
    worst_group,
)

CLASSES = 9


@pytest.fixture(scope="module", params=[0, 1, 2])
def answers(request):
    """Labels of which some classes are absent, predictions over all."""
    rng = np.random.default_rng(request.param)
    label = rng.choice([0, 2, 3, 5, 8], size=70)
    return np.where(rng.random(70) < 0.5, label, rng.integers(CLASSES, size=70)), label


def test_recall_by_class_against_a_loop(answers):
    predicted, label = answers
    recall = per_class_recall(predicted == label, label, CLASSES)
    assert recall.shape == (CLASSES,)
    for c in range(CLASSES):
        if (label == c).any():
            assert recall[c] == pytest.approx(np.mean(predicted[label == c] == c))
        else:
            assert np.isnan(recall[c])


@pytest.mark.filterwarnings("ignore:y_pred contains classes not in y_true")
def test_mean_recall_and_f1_are_scikit_learns(answers):
    sklearn = pytest.importorskip("sklearn.metrics")
    predicted, label = answers
    balanced = sklearn.balanced_accuracy_score(label, predicted)
    assert mean_per_class_recall(predicted == label, label, CLASSES) == pytest.approx(balanced)
    expected = sklearn.f1_score(label, predicted, average="macro", labels=np.unique(label))
    assert f1_macro(predicted, label, CLASSES) == pytest.approx(expected)
    over_all = sklearn.f1_score(label, predicted, average="macro", labels=np.arange(CLASSES), zero_division=0)
    assert expected > over_all, "the trap: classes without an image would be averaged in"


def test_f1_by_hand():
    # Class 0: TP 1, FN 1; class 1: TP 1, FP 1; class 2 is never a label.
    assert f1_macro([0, 1, 1], [0, 0, 1], 3) == pytest.approx((2 / 3 + 2 / 3) / 2)
    assert f1_macro([2, 2], [0, 1], 3) == 0.0


def test_calibration_of_one_bin_and_of_perfect_confidence():
    assert expected_calibration_error([0.9] * 10, [1.0] * 6 + [0.0] * 4) == pytest.approx(0.3)
    assert expected_calibration_error([1.0, 1.0, 0.0], [1, 1, 0]) == 0.0
    assert expected_calibration_error([1.0, 1.0], [0, 0]) == 1.0


def test_calibration_against_the_loop_of_its_paper():
    rng = np.random.default_rng(3)
    confidence = np.concatenate([rng.random(400), np.linspace(0.1, 1, 10)])
    correct = rng.random(410) < confidence**2
    for bins in (1, 4, 10, 15):
        edges, total = np.linspace(0, 1, bins + 1), 0.0
        for low, high in itertools.pairwise(edges):
            inside = (confidence > low) & (confidence <= high)
            if inside.any():
                total += abs(correct[inside].mean() - confidence[inside].mean()) * inside.mean()
        assert expected_calibration_error(confidence, correct, bins) == pytest.approx(total)
    assert expected_calibration_error([0.5], [1.0], 2) == 0.5


def test_calibration_does_not_cancel_across_bins():
    # Over-confident above, under-confident below: one bin would report 0.
    confidence, correct = [0.9] * 10 + [0.1] * 10, [1] * 5 + [0] * 5 + [1] * 5 + [0] * 5
    assert expected_calibration_error(confidence, correct, 1) == pytest.approx(0)
    assert expected_calibration_error(confidence, correct) == pytest.approx(0.4)


def test_groups_of_top_1_and_top_5_hits():
    groups = [7, 7, -2, -2, -2, 40]
    top1, top5 = [1, 0, 0, 0, 1, 1], [1, 1, 1, 0, 1, 1]
    assert list(group_accuracy(top1, groups)) == [-2, 7, 40]
    assert group_accuracy(top1, groups) == pytest.approx({-2: 1 / 3, 7: 1 / 2, 40: 1.0})
    assert worst_group(top1, groups) == pytest.approx(1 / 3)
    assert worst_group(top5, groups) == pytest.approx(2 / 3)
    assert worst_group(top1, groups, left_out=[-2]) == 0.5
    # Shares of the groups weigh up to the accuracy.
    shares = {7: 2 / 6, -2: 3 / 6, 40: 1 / 6}
    assert sum(shares[g] * value for g, value in group_accuracy(top1, groups).items()) == pytest.approx(np.mean(top1))


def test_jaccard_by_hand_and_as_scikit_learns():
    assert jaccard({1, 2, 3}, {2, 3, 4}) == 0.5
    assert jaccard({"a"}, {"b"}) == 0.0
    assert jaccard({"a"}, set()) == 0.0
    sklearn = pytest.importorskip("sklearn.metrics")
    rng = np.random.default_rng(4)
    for _ in range(20):
        chosen, gold = rng.random((2, 12)) < 0.5
        expected = sklearn.jaccard_score(gold, chosen)
        assert jaccard(set(np.flatnonzero(chosen)), set(np.flatnonzero(gold))) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("call", "sentence"),
    [
        (lambda: per_class_recall([1.0], [0, 1], 2), "hits and labels have the shapes"),
        (lambda: per_class_recall([], [], 2), "none empty"),
        (lambda: per_class_recall([np.nan], [0], 2), "NaN"),
        (lambda: per_class_recall([1.0], [2], 2), "labels go from 2 to 2; expected ids from 0 to 1"),
        (lambda: per_class_recall([1.0], [0.0], 2), "integers"),
        (lambda: per_class_recall([1.0], [0], 0), "classes = 0"),
        (lambda: f1_macro([-1], [0], 2), "predictions go from -1"),
        (lambda: f1_macro([0, 1], [0], 2), "predictions and labels"),
        (lambda: expected_calibration_error([1.1], [1]), "expected probabilities"),
        (lambda: expected_calibration_error([0.5], [1, 0]), "confidences and hits"),
        (lambda: expected_calibration_error([0.5], [1], 0), "bins = 0"),
        (lambda: group_accuracy([1.0], [0, 1]), "hits and groups"),
        (lambda: group_accuracy([1.0], [0.5]), "integers"),
        (lambda: worst_group([1.0], [3], left_out={3}), "No group is left"),
        (lambda: jaccard(set(), set()), "empty sets"),
    ],
)
def test_bad_input_is_refused(call, sentence):
    with pytest.raises(UserError, match=sentence):
        call()
