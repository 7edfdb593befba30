"""Galleries of answers to questions about pictures: wrong ones and right ones, taken evenly over the kinds."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

from PIL.Image import Image

from vlkd.errors import UserError
from vlkd.report.gallery import Exhibit, ExhibitLine, Gallery

SHOWN = 12
"""Answers in each gallery."""


class AnsweredQuestion(Protocol):
    """A question, what was said and what is true."""

    @property
    def key(self) -> str:
        """Its name."""
        ...

    @property
    def kind(self) -> str:
        """What is asked for."""
        ...

    @property
    def question(self) -> str:
        """Its words."""
        ...

    @property
    def choices(self) -> tuple[str, ...]:
        """The options, A first; () for an open question."""
        ...

    @property
    def truth(self) -> str:
        """The true answer."""
        ...

    @property
    def answer(self) -> str:
        """What was said."""
        ...

    @property
    def right(self) -> bool:
        """Whether that is true."""
        ...


def answer_galleries(
    rows: Sequence[AnsweredQuestion], picture: Callable[[str], Image], *, of: str = ""
) -> list[Gallery]:
    """At most `SHOWN` wrong answers, then as many right ones; a gallery that would be empty is left out.

    Args:
        rows: all answers.
        picture: the decoded picture of a question by its key; raises `UserError` or `OSError` where it cannot be read.
        of: words behind the titles.
    """
    galleries = []
    for title, own in (
        ("Wrong answers", [row for row in rows if not row.right]),
        ("Right answers", [row for row in rows if row.right]),
    ):
        if cards := [card for row in _spread(own) if (card := _card(row, picture)) is not None]:
            note = f"{len(cards)} of {len(own):,}, taken evenly over the kinds' questions."
            galleries.append(Gallery(title=f"{title}{of}", items=cards, note=note))
    return galleries


def _spread(rows: Sequence[AnsweredQuestion]) -> list[AnsweredQuestion]:
    """At most `SHOWN`, evenly over the rows in the order of their kinds."""
    ordered = sorted(rows, key=lambda row: row.kind)
    count = min(SHOWN, len(ordered))
    return [ordered[(2 * place + 1) * len(ordered) // (2 * count)] for place in range(count)]


def _card(row: AnsweredQuestion, picture: Callable[[str], Image]) -> Exhibit | None:
    try:
        image = picture(row.key)
    except (UserError, OSError):  # It was readable before.
        return None
    options = [ExhibitLine(who=chr(ord("A") + place), text=words) for place, words in enumerate(row.choices)]
    return Exhibit(
        images=[(image, row.key)],
        verdict=row.kind,
        good=row.right,
        lines=[
            ExhibitLine(who="asked", text=row.question),
            *options,
            ExhibitLine(who="truth", text=row.truth),
            ExhibitLine(who="answer", text=row.answer or "(nothing)", right=row.right),
        ],
    )
