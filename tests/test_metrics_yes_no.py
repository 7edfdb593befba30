"""Figures of yes and no: scikit-learn where every answer parses, by hand where not."""

from __future__ import annotations

import numpy as np
import pytest

from vlkd.errors import UserError
from vlkd.metrics import from_counts, yes_no_figures


def test_parsed_answers_give_scikit_learns_figures():
    sklearn = pytest.importorskip("sklearn.metrics")
    rng = np.random.default_rng(0)
    gold, predicted = rng.random(200) < 0.5, rng.random(200) < 0.6
    figures = yes_no_figures(predicted.tolist(), gold.tolist())
    assert figures == pytest.approx(
        {
            "accuracy": sklearn.accuracy_score(gold, predicted),
            "precision": sklearn.precision_score(gold, predicted),
            "recall": sklearn.recall_score(gold, predicted),
            "f1": sklearn.f1_score(gold, predicted),
            "yes_ratio": predicted.mean(),
            "unparsed": 0.0,
        }
    )
    assert yes_no_figures(list(predicted), list(gold)) == figures


def test_an_unparsed_answer_is_wrong_but_no_prediction():
    figures = yes_no_figures([True, None, False, None], [True, True, False, False])
    assert figures == {
        "accuracy": 0.5,
        "precision": 1.0,
        "recall": 0.5,
        "f1": pytest.approx(2 / 3),
        "yes_ratio": 0.5,
        "unparsed": 0.5,
    }


def test_one_answer_to_everything():
    # The yes ratio is of the predictions: of the truths it would be 1/4 both times.
    gold = [True, False, False, False]
    assert yes_no_figures([True] * 4, gold)["yes_ratio"] == 1.0
    no = yes_no_figures([False] * 4, gold)
    assert (no["yes_ratio"], no["precision"], no["recall"], no["f1"], no["accuracy"]) == (0, 0, 0, 0, 0.75)
    assert yes_no_figures([None] * 4, gold) == dict.fromkeys(no, 0.0) | {"unparsed": 1.0}


@pytest.mark.parametrize(
    ("call", "sentence"),
    [
        (lambda: yes_no_figures([True], [True, False]), "1 answers to 2 questions"),
        (lambda: yes_no_figures([], []), "at least one answer"),
        (lambda: yes_no_figures(["yes"], [True]), "'yes'"),
        (lambda: yes_no_figures([True], [None]), "truth of None"),
        (lambda: from_counts(1, -1, 0, 0), "no negative one"),
    ],
)
def test_bad_input_is_refused(call, sentence):
    with pytest.raises(UserError, match=sentence):
        call()
