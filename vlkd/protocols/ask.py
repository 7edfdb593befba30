"""Asking a model about many pictures: batches of like length, decoding meanwhile, what cannot be read left out."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Protocol

from vlkd.errors import UserError
from vlkd.retrieval.progress import Progress

if TYPE_CHECKING:
    from PIL.Image import Image


class Answer(Protocol):
    """What answers questions about pictures, a batch at once."""

    def __call__(self, images: Sequence[Image], prompts: Sequence[str], /) -> Sequence[str]:
        """One answer per picture and prompt."""
        ...


def ask(
    answer: Answer,
    prompts: Sequence[str],
    picture: Callable[[int], Image],
    *,
    batch_size: int = 16,
    workers: int = 2,
    progress: bool = True,
) -> tuple[dict[int, str], dict[int, str]]:
    """Answers to prompts, and the reason for each whose picture cannot be read; both by position, in ascending order.

    Args:
        answer: the model.
        prompts: one per picture.
        picture: the decoded picture by its position; raises `UserError` or `OSError` for one that cannot be read.
            Several threads ask at once.
        batch_size: prompts answered together, of like length, the longest first.
        workers: threads that decode; the next batch is decoded meanwhile.
        progress: show a bar with rate and time left.

    Raises:
        UserError: `answer` gives another number of answers than it was asked.
    """
    # The longest first: what does not fit a model's context or memory is told at once.
    order = sorted(range(len(prompts)), key=lambda place: -len(prompts[place]))
    batches = [order[start : start + batch_size] for start in range(0, len(order), batch_size)]
    said: dict[int, str] = {}
    bad: dict[int, str] = {}

    def decode(place: int) -> Image | str:
        try:
            return picture(place)
        except (UserError, OSError) as error:
            return str(error)

    with (
        Progress(len(prompts), unit="question", description="questions", show=progress) as bar,
        ThreadPoolExecutor(workers, thread_name_prefix="decode") as pool,
    ):
        waiting: Iterator[Image | str] = iter(())
        for number, batch in enumerate([[], *batches]):
            decoded = list(waiting)
            if number < len(batches):
                waiting = pool.map(decode, batches[number])
            bad |= {place: one for place, one in zip(batch, decoded, strict=True) if isinstance(one, str)}
            images = [one for one in decoded if not isinstance(one, str)]
            there = [place for place in batch if place not in bad]
            if images:
                texts = answer(images, [prompts[place] for place in there])
                if len(texts) != len(images):
                    raise UserError(f"Found {len(texts)} answers to {len(images)} questions; expected one for each.")
                said |= dict(zip(there, texts, strict=True))
            if bad:
                bar.note(f"{len(bad)} unreadable")
            bar.advance(len(batch))
    return dict(sorted(said.items())), dict(sorted(bad.items()))
