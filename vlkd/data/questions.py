"""Questions one by one, each with its picture and the answer that is expected."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from vlkd.data.conversations import Conversation
from vlkd.data.sources import ImageFile
from vlkd.features import IMAGE_PLACEHOLDER


@dataclass(frozen=True, kw_only=True)
class Question:
    """A question about a picture.

    Attributes:
        key: that of the conversation with the question's number, `KEY#1` for the first.
        image: where the picture is.
        text: without `<image>`.
        answer: the expected one.
        kind: of question; "" for none.
        choices: those to choose from; () for an open question.
    """

    key: str
    image: ImageFile
    text: str
    answer: str
    kind: str = ""
    choices: tuple[str, ...] = ()


def questions_of(conversations: Iterable[Conversation]) -> list[Question]:
    """Each question with its answer alone, without the turns before it, in the order of the conversations."""
    found: list[Question] = []
    for talk in conversations:
        asked, answered = talk.turns[::2], talk.turns[1::2]
        found += [
            Question(
                key=f"{talk.key}#{number + 1}",
                image=talk.image,
                text=asked[number].text.replace(IMAGE_PLACEHOLDER, "").strip(),
                answer=answered[number].text,
                kind=talk.kinds[number] if talk.kinds else "",
                choices=talk.choices[number] if talk.choices else (),
            )
            for number in range(len(answered))
        ]
    return found
