"""Average precision by class against scikit-learn, loops with ties, and closed forms."""

from __future__ import annotations

import numpy as np
import pytest

from vlkd.errors import UserError
from vlkd.metrics import average_precision_by_class, mean_average_precision


def test_without_ties_it_is_scikit_learns():
    sklearn = pytest.importorskip("sklearn.metrics")
    rng = np.random.default_rng(0)
    scores, labels = rng.normal(size=(150, 12)).astype(np.float32), rng.random((150, 12)) < 0.15
    expected = [sklearn.average_precision_score(labels[:, c], scores[:, c]) for c in range(12)]
    assert average_precision_by_class(scores, labels) == pytest.approx(expected)
    assert mean_average_precision(scores, labels) == pytest.approx(np.mean(expected))


def test_equal_scores_go_in_the_order_of_the_images():
    rng = np.random.default_rng(1)
    scores, labels = rng.integers(0, 4, (60, 5)).astype(float), rng.random((60, 5)) < 0.3
    expected = []
    for c in range(5):
        order = sorted(range(60), key=lambda i: (-scores[i, c], i))
        relevant = [labels[i, c] for i in order]
        expected.append(np.mean([sum(relevant[: r + 1]) / (r + 1) for r in range(60) if relevant[r]]))
    assert average_precision_by_class(scores, labels) == pytest.approx(expected)


def test_a_constant_scorer_gains_nothing_from_ties():
    # All equal: the positive's rank is its number.
    for place in (0, 3, 9):
        labels = np.arange(10)[:, None] == place
        assert average_precision_by_class(np.full((10, 1), 0.5), labels).tolist() == [1 / (place + 1)]


def test_a_class_without_an_image_is_no_term_of_the_mean():
    scores = np.array([[0.9, 0.1, 0.5], [0.2, 0.3, 0.4]])
    labels = np.array([[True, False, False], [False, False, True]])
    found = average_precision_by_class(scores, labels)
    assert found[[0, 2]].tolist() == [1.0, 0.5]
    assert np.isnan(found[1])
    assert mean_average_precision(scores, labels) == 0.75


def test_negative_scores_do_not_matter():
    rng = np.random.default_rng(2)
    scores, labels = rng.normal(size=(30, 3)), rng.random((30, 3)) < 0.4
    shifted = average_precision_by_class(scores - 100, labels)
    assert shifted.tolist() == average_precision_by_class(scores, labels).tolist()


@pytest.mark.parametrize(
    ("scores", "labels", "sentence"),
    [
        ([[0.5, np.nan]], [[True, False]], "NaN"),
        ([[0.5, 0.1]], [[True]], "scores and labels have the shapes"),
        ([[0.5]], [[1]], "expected bool"),
        (np.zeros((0, 3)), np.zeros((0, 3), bool), "none empty"),
        ([0.5], [True], "2 dimension"),
    ],
)
def test_bad_input_is_refused(scores, labels, sentence):
    with pytest.raises(UserError, match=sentence):
        average_precision_by_class(scores, labels)


def test_no_label_at_all_is_refused():
    with pytest.raises(UserError, match="No image has a class"):
        mean_average_precision([[0.5]], [[False]])
