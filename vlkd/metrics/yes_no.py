"""Answers of yes or no, as POPE counts them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from vlkd.errors import UserError


def yes_no_figures(predicted: Sequence[bool | None], gold: Sequence[bool]) -> dict[str, float]:
    """Figures of yes-no answers, yes being the positive class (POPE: Li et al., 2023, https://arxiv.org/abs/2305.10355).

    An answer that could not be parsed is wrong, whatever the truth: it lowers accuracy, and recall where the truth is
    yes; it is no prediction, so precision and the yes ratio leave it out.

    Args:
        predicted: per question True for yes, False for no, None for an answer that is neither.
        gold: per question the truth.

    Returns:
        As `from_counts`.

    Raises:
        UserError: no question, lengths differ, or an answer is something else.
    """
    if len(predicted) != len(gold):
        raise UserError(f"{len(predicted)} answers to {len(gold)} questions; give one answer, or None, for each.")
    count = Counter(zip(predicted, gold, strict=True))
    odd = [pair for pair in count if pair[0] not in (True, False, None) or pair[1] not in (True, False)]
    if odd:
        raise UserError(f"Found the answer {odd[0][0]!r} to a truth of {odd[0][1]!r}; expected True, False or None.")
    return from_counts(
        count[True, True],
        count[True, False],
        count[False, False],
        count[False, True],
        unparsed_yes=count[None, True],
        unparsed_no=count[None, False],
    )


def from_counts(tp: int, fp: int, tn: int, fn: int, *, unparsed_yes: int = 0, unparsed_no: int = 0) -> dict[str, float]:
    """The figures from the counts of answers.

    Args:
        tp: yes to a truth of yes.
        fp: yes to a truth of no.
        tn: no to a truth of no.
        fn: no to a truth of yes.
        unparsed_yes: neither, to a truth of yes.
        unparsed_no: neither, to a truth of no.

    Returns:
        accuracy = (tp + tn) / all; precision = tp / (tp + fp); recall = tp / (truths of yes); f1 = their harmonic mean;
        yes_ratio = (tp + fp) / (answers of yes or no); unparsed = share of answers that are neither. A share of
        nothing is 0.

    Raises:
        UserError: a count is negative, or all are zero.
    """
    counts = (tp, fp, tn, fn, unparsed_yes, unparsed_no)
    if min(counts) < 0 or not any(counts):
        raise UserError(f"Counts of answers are {counts}; expected no negative one, and at least one answer.")
    unparsed = unparsed_yes + unparsed_no
    questions = sum(counts)
    wanted = tp + fn + unparsed_yes
    return {
        "accuracy": (tp + tn) / questions,
        "precision": _share(tp, tp + fp),
        "recall": _share(tp, wanted),
        "f1": _share(2 * tp, tp + fp + wanted),
        "yes_ratio": _share(tp + fp, questions - unparsed),
        "unparsed": unparsed / questions,
    }


def _share(part: int, whole: int) -> float:
    return part / whole if whole else 0.0
