"""Questions one by one, each with its picture and the answer that is expected."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from vlkd.data.conversations import Conversation, open_conversations
from vlkd.data.sources import ImageFile, source_name
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


def open_questions(refs: Sequence[str]) -> list[Question]:
    """Those of each source, one after another; kinds of several sources carry the source's name, `photos/count`.

    Raises:
        UserError: a source cannot be opened.
    """
    # One opening for all, because a key that stands in two sources gets another name.
    together = open_conversations(refs)
    if len(refs) == 1:
        return questions_of(together)
    found: list[Question] = []
    for ref, name in zip(refs, short_names(refs), strict=True):
        count = len(open_conversations([ref]))
        own, together = together[:count], together[count:]
        found += [replace(one, kind=f"{name}/{one.kind}" if one.kind else name) for one in questions_of(own)]
    return found


def short_names(refs: Sequence[str]) -> list[str]:
    """Names of sources without the words that end all of them, such as `test`."""
    words = [source_name(ref).split("-") for ref in refs]
    while min(map(len, words)) > 1 and len({own[-1] for own in words}) == 1:
        words = [own[:-1] for own in words]
    return ["-".join(own) for own in words]
