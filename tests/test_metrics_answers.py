"""Answers in words: the stated rules by hand tables, VQA's own examples among them, and counts by hand."""

from __future__ import annotations

import pytest

from vlkd.errors import UserError
from vlkd.metrics import wilson_interval, yes_no_figures
from vlkd.metrics.answers import (
    CONTRACTIONS,
    exact_match,
    normalize_answer,
    parse_choice,
    parse_yes_no,
    tally,
    tally_by_kind,
)


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("Red", "red"),
        ("  Red\n and\tBLUE ", "red and blue"),
        ("100,978", "100978"),  # the page's own example
        ("1,2, 3", "12 3"),
        ("red, blue", "red blue"),
        ("It is 2.5 m.", "it is 2.5 m"),
        (".5", ".5"),
        ("U.S.A.", "usa"),
        ("girl's", "girl's"),  # the page's own example
        ("girl\u2019s", "girl's"),
        ("2:50 pm", "2:50 pm"),  # the page's own example
        ("t-shirt/jacket", "t shirt jacket"),
        ("(red) [blue]; green!?", "red blue green"),
        ("**red** \u201cbox\u201d", "red box"),
        ("50%", "50"),
        ("two", "2"),
        ("Ten dogs and none more", "10 dogs and 0 more"),
        ("eleven", "eleven"),
        ("a dog on the table", "dog on table"),
        ("an", "an"),
        ("A", "a"),
        ("dont", "don't"),  # the page's own example
        ("don't", "don't"),
        ("Its 5 oclock", "its 5 o'clock"),
        ("we were well", "we were well"),
        ("\u00c9T\u00c9", "\u00e9t\u00e9"),
        ("E\u0301te\u0301", "\u00e9t\u00e9"),
        ("...", ""),
        ("", ""),
    ],
)
def test_the_rules(text, wanted):
    assert normalize_answer(text) == wanted
    assert normalize_answer(wanted) == wanted


def test_no_contraction_is_another_word_without_its_apostrophe():
    assert CONTRACTIONS["wouldnt"] == "wouldn't"
    assert not {"its", "lets", "were", "well", "wed", "shed", "shell", "hell", "ill", "id", "whore"} & set(CONTRACTIONS)


@pytest.mark.parametrize(
    ("answer", "truth", "equal"),
    [
        ("The red.", "red", True),
        ("Two", "2", True),
        ("red box", "red", False),
        ("A", "an", False),
        ("!", "?", False),
        ("", "red", False),
    ],
)
def test_exact_match(answer, truth, equal):
    assert exact_match(answer, truth) is exact_match(truth, answer) is equal


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("yes", True),
        ("Yes, there is a dog.", True),
        ("\nYES!", True),
        ("no", False),
        ("No. There is none.", False),
        ("no one", False),
        ("yeah", None),
        ("nope", None),
        ("none", None),
        ("north", None),
        ("There is no dog", None),
        ("", None),
    ],
)
def test_yes_and_no(text, wanted):
    assert parse_yes_no(text) is wanted


PETS = ("a cat", "dog", "two birds")


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("B", 1),
        ("b", 1),
        ("(b)", 1),
        ("B.", 1),
        ("B)", 1),
        (" (C): ", 2),
        ("A. dog", 0),
        ("b) the cat", 1),
        ("D", None),
        ("B dog", None),
        ("dog", 1),
        ("A dog.", 1),
        ("cat", 0),
        ("2 birds", 2),
        ("It is a dog", None),
        ("bird", None),
        ("", None),
        ("!", None),
    ],
)
def test_choices(text, wanted):
    assert parse_choice(text, PETS) == wanted


def test_words_that_two_options_share_choose_none():
    assert parse_choice("the dog", ("a dog", "dog", "cat")) is None
    assert parse_choice("b", ("a dog", "dog", "cat")) == 1
    assert parse_choice("!", ("!", "cat")) is None


def test_counts_have_wilsons_interval():
    found = tally([True, False, True, False], [True, True, True, False])
    assert (found.questions, found.right, found.unparsed) == (4, 2, 1)
    assert (found.accuracy, found.parse_failures) == (0.5, 0.25)
    # (0.5 + z2/8 -+ z sqrt(1/16 + z2/64)) / (1 + z2/4) with z2 = 3.8415
    assert found.interval == pytest.approx((0.15004, 0.84996), abs=1e-5)


def test_every_kind_is_counted_alone():
    kinds = ["count", "colour", "count", "count", "colour"]
    found = tally_by_kind(kinds, [True, True, False, False, True], [True, True, True, False, True])
    assert list(found) == ["colour", "count"]
    assert [(own.questions, own.right, own.unparsed) for own in found.values()] == [(2, 2, 0), (3, 1, 1)]
    assert found["count"].interval == wilson_interval(1, 3)


def test_popes_counts_from_answers_in_words():
    """The counts that https://github.com/haotian-liu/LLaVA/issues/626 prints for LLaVA-1.5 on POPE's random part."""
    said = ["Yes."] * 1183 + ["yes, a dog"] * 31 + ["No"] * 1379 + ["no!"] * 317
    gold = [True] * 1183 + [False] * 31 + [False] * 1379 + [True] * 317
    figures = yes_no_figures([parse_yes_no(text) for text in said], gold)
    assert figures["accuracy"] == pytest.approx((1183 + 1379) / 2910)
    assert figures["precision"] == pytest.approx(1183 / 1214)
    assert figures["recall"] == pytest.approx(1183 / 1500)
    assert figures["f1"] == pytest.approx(2 * 1183 / (1214 + 1500))
    # Of the predictions: of the truths it is 1500 / 2910, whatever a model says.
    assert figures["yes_ratio"] == pytest.approx(1214 / 2910)
    assert figures["unparsed"] == 0


@pytest.mark.parametrize(
    ("call", "sentence"),
    [
        (lambda: tally([], []), "0 verdicts"),
        (lambda: tally([True], [True, True]), "1 verdicts and 2 parses"),
        (lambda: tally([True], [False]), "is called right"),
        (lambda: tally_by_kind(["a"], [True, True], [True, True]), "1 kinds of 2 questions"),
    ],
)
def test_bad_input_is_refused(call, sentence):
    with pytest.raises(UserError, match=sentence):
        call()
