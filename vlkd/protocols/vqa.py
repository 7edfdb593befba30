"""Questions about pictures, answered in words: open ones, yes or no, and multiple choice, overall and by kind."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, Protocol

import numpy as np

from vlkd.errors import UserError
from vlkd.features import CHOICE_REQUEST, with_choices
from vlkd.metrics import yes_no_figures
from vlkd.metrics.answers import (
    Tally,
    exact_match,
    normalize_answer,
    parse_choice,
    parse_yes_no,
    tally,
    tally_by_kind,
)
from vlkd.protocols.ask import Answer, ask
from vlkd.protocols.measured import Measured

if TYPE_CHECKING:
    from PIL.Image import Image

Form = Literal["open", "yes or no", "multiple choice"]


class Asked(Protocol):
    """A question about one picture, with its true answer."""

    @property
    def key(self) -> str:
        """Its name, without repeats."""
        ...

    @property
    def text(self) -> str:
        """The question, without a mark for the picture."""
        ...

    @property
    def answer(self) -> str:
        """The truth; of a question with options one option's letter or words."""
        ...

    @property
    def kind(self) -> str:
        """What is asked for, such as `colour`; "" where nobody says."""
        ...

    @property
    def choices(self) -> tuple[str, ...]:
        """The options, () for an open question."""
        ...


@dataclass(frozen=True, kw_only=True)
class Answered:
    """One question and what became of it.

    Attributes:
        key: its name.
        kind: as it was given, or the form where it was "".
        form: `multiple choice` where there are options, `yes or no` where the truth is one of these words, else
            `open`.
        question: the words.
        choices: the options.
        truth: the true answer in the form that counts: an option's letter, or as of `normalize_answer`.
        answer: what the model said.
        parsed: the same in the form that counts; None for an answer that is neither yes nor no, names no option, or
            has no word.
        right: `parsed` is `truth`.
    """

    key: str
    kind: str
    form: Form
    question: str
    choices: tuple[str, ...]
    truth: str
    answer: str
    parsed: str | None
    right: bool

    def as_row(self) -> dict[str, object]:
        """A flat row for strict JSON."""
        return {**vars(self), "choices": list(self.choices)}


@dataclass(frozen=True, kw_only=True)
class MeasuredAnswers:
    """The answers of one model.

    Attributes:
        measured: the figures, main metric `answer_accuracy`, and 1 or 0 per question to compare models by.
        rows: every question whose picture could be read, in the order given.
        total: the counts of all of them.
        kinds: of each kind, in alphabetical order.
        unreadable: key and reason of every question whose picture could not be read; no figure knows of them.
    """

    measured: Measured
    rows: tuple[Answered, ...]
    total: Tally
    kinds: Mapping[str, Tally]
    unreadable: tuple[tuple[str, str], ...]


def prompt_of(question: Asked) -> str:
    """The words that a model is asked (`with_choices`)."""
    return with_choices(question.text, question.choices)


def letter(place: int) -> str:
    """A, B, C and so on."""
    return chr(ord("A") + place)


def form_of(question: Asked) -> tuple[Form, str]:
    """The form of a question and its true answer in it.

    Raises:
        UserError: there is one option or more than 26, or the truth is none of the options.
    """
    if not question.choices:
        truth = normalize_answer(question.answer)
        return ("yes or no" if truth in ("yes", "no") else "open"), truth
    if not 2 <= len(question.choices) <= 26:
        raise UserError(
            f"The question {question.key!r} has {len(question.choices)} options; expected 2 to 26, or none."
        )
    place = parse_choice(question.answer, question.choices)
    if place is None:
        raise UserError(
            f"The answer of the question {question.key!r} is {question.answer!r}, expected the letter or the words of "
            f"one of its {len(question.choices)} options; mend the data."
        )
    return "multiple choice", letter(place)


def too_long(questions: Sequence[Asked], tokens: Sequence[int], most: int) -> str:
    """A sentence about open questions whose true answer has more tokens than an answer may; "" for none.

    Args:
        questions: whatever is asked.
        tokens: of each one's true answer.
        most: tokens of an answer.
    """
    long = [
        (one.key, count)
        for one, count in zip(questions, tokens, strict=True)
        if count > most and form_of(one)[0] == "open"
    ]
    if not long:
        return ""
    return (
        f"{len(long)} of {len(questions)} questions have true answers of more than {most} tokens, up to "
        f"{max(count for _, count in long)}, first {long[0][0]!r}, and cannot be answered right; allow more tokens."
    )


def parse(form: Form, answer: str, choices: Sequence[str]) -> str | None:
    """An answer in the form that counts, None where it has none; see `Answered.parsed`."""
    if form == "multiple choice":
        place = parse_choice(answer, choices)
        return None if place is None else letter(place)
    if form == "yes or no":
        said = parse_yes_no(answer)
        return None if said is None else "yes" if said else "no"
    return normalize_answer(answer) or None


def measure_vqa(
    answer: Answer,
    questions: Sequence[Asked],
    picture: Callable[[int], Image],
    *,
    batch_size: int = 16,
    workers: int = 2,
    progress: bool = True,
) -> MeasuredAnswers:
    """Ask every question once, in batches of prompts of like length, the longest first.

    An open answer is right if it equals the truth in the form of `normalize_answer`. Whether a question is one of yes
    or no is told by its truth; the answer's first word counts. Metrics, besides `answer_accuracy` over all questions:
    `exact_match` over those without options; `parse_failures`; `commonest_answer`, the accuracy of one who knows of
    each kind its commonest truth and no picture; `yes_no_*` as of `vlkd.metrics.yes_no_figures`, whose yes ratio is of
    the predictions (lmms-eval 0.7 has that of the truths under this name, which no model can change);
    `choice_accuracy` and `choice_unparsed`.

    Args:
        answer: the model.
        questions: whatever is asked, with different keys.
        picture: the decoded picture of a question by its position; raises `UserError` or `OSError` for one that
            cannot be read. Several threads ask at once.
        batch_size: questions asked together.
        workers: threads that decode; the next batch is decoded meanwhile.
        progress: show a bar with rate and time left.

    Raises:
        UserError: there is no question, a key stands for two, the truth of one is none of its options, no picture can
            be read, or `answer` gives another number of answers than it was asked.
    """
    keys = Counter(question.key for question in questions)
    if not keys or keys.most_common(1)[0][1] > 1:
        found = f"the key {keys.most_common(1)[0][0]!r} for two questions" if keys else "no question"
        raise UserError(f"Found {found}; expected one or more with different keys: check the data.")
    forms = [form_of(question) for question in questions]
    prompts = [prompt_of(question) for question in questions]
    said, bad = ask(answer, prompts, picture, batch_size=batch_size, workers=workers, progress=progress)
    unreadable = tuple((questions[place].key, reason) for place, reason in bad.items())
    if not said:
        first, reason = unreadable[0]
        raise UserError(f"None of the pictures of {len(bad)} questions can be read; the first: {first}: {reason}")
    rows = []
    for place, text in said.items():
        question, (form, truth) = questions[place], forms[place]
        parsed = parse(form, text, question.choices)
        rows.append(
            Answered(
                key=question.key,
                kind=question.kind or form,
                form=form,
                question=question.text,
                choices=question.choices,
                truth=truth,
                answer=text,
                parsed=parsed,
                right=parsed == truth,
            )
        )
    parses = [row.parsed is not None for row in rows]
    total = tally([row.right for row in rows], parses)
    kinds = tally_by_kind([row.kind for row in rows], [row.right for row in rows], parses)
    return MeasuredAnswers(
        measured=_measured(rows, total, kinds), rows=tuple(rows), total=total, kinds=kinds, unreadable=unreadable
    )


def _measured(rows: Sequence[Answered], total: Tally, kinds: Mapping[str, Tally]) -> Measured:
    yes_no = [row for row in rows if row.form == "yes or no"]
    choice = [row for row in rows if row.form == "multiple choice"]
    plain = [row for row in rows if row.form != "multiple choice"]
    figures = {
        "answer_accuracy": total.accuracy,
        "parse_failures": total.parse_failures,
        "commonest_answer": _commonest(rows),
    }
    if plain:
        figures["exact_match"] = sum(exact_match(row.answer, row.truth) for row in plain) / len(plain)
    if yes_no:
        said = [None if row.parsed is None else row.parsed == "yes" for row in yes_no]
        found = yes_no_figures(said, [row.truth == "yes" for row in yes_no])
        figures |= {f"yes_no_{name}": value for name, value in found.items()}
    if choice:
        figures["choice_accuracy"] = sum(row.right for row in choice) / len(choice)
        figures["choice_unparsed"] = sum(row.parsed is None for row in choice) / len(choice)
    places = {kind: place for place, kind in enumerate(kinds)}
    return Measured(
        protocol="vqa",
        task="vqa",
        metrics=figures,
        main_metric="answer_accuracy",
        interval=total.interval,
        random_score=None,
        counts={
            "questions": len(rows), "open": len(plain) - len(yes_no), "yes_or_no": len(yes_no),
            "multiple_choice": len(choice), "kinds": len(kinds),
        },
        per_item={
            "correct": np.array([row.right for row in rows], np.float64),
            "label": np.array([places[row.kind] for row in rows], np.int64),
        },
        per_class={kind: own.accuracy for kind, own in kinds.items()},
        notes={"normaliser": "vlkd.metrics.answers.normalize_answer", "choice_request": CHOICE_REQUEST},
    )  # fmt: skip


def _commonest(rows: Sequence[Answered]) -> float:
    """Share of questions whose truth is the commonest one of their kind."""
    truths: dict[str, Counter[str]] = {}
    for row in rows:
        truths.setdefault(row.kind, Counter())[row.truth] += 1
    return sum(own.most_common(1)[0][1] for own in truths.values()) / len(rows)
