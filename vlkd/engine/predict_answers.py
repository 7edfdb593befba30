"""Answers of a generative model to one question about each of many pictures."""

from __future__ import annotations

import time
from dataclasses import dataclass
from functools import partial

from vlkd.data.sources import Pairs
from vlkd.errors import UserError
from vlkd.models.generative import GenerativeVLM
from vlkd.protocols.ask import ask


@dataclass(frozen=True, kw_only=True)
class Answers:
    """What a model says of the images that could be read.

    Attributes:
        texts: answers by their rows in the table of images, ascending.
        bad: key and reason of every image that could not be read.
        seconds: of reading and answering.
    """

    texts: dict[int, str]
    bad: tuple[tuple[str, str], ...]
    seconds: float


def answer_images(
    model: GenerativeVLM,
    images: Pairs,
    question: str,
    *,
    batch_size: int = 16,
    max_new_tokens: int = 16,
    workers: int = 2,
) -> Answers:
    """Ask the same of every image, greedily, with progress; images that cannot be read are listed.

    Args:
        model: whatever answers.
        images: one or more.
        question: the words alone; the model's own template says where the picture stands.
        batch_size: images at a time, which changes no answer.
        max_new_tokens: of an answer, at most.
        workers: threads that decode.

    Raises:
        UserError: no image can be read, or the question is too long for the model.
    """
    started = time.perf_counter()
    said, unreadable = ask(
        partial(model.answer, batch_size=batch_size, max_new_tokens=max_new_tokens),
        [question] * len(images),
        images.image,
        batch_size=batch_size,
        workers=workers,
    )
    bad = tuple((images.keys[row], reason) for row, reason in unreadable.items())
    if not said:
        raise UserError(f"None of the {len(images)} images can be read; the first: {bad[0][0]}: {bad[0][1]}")
    return Answers(texts=said, bad=bad, seconds=time.perf_counter() - started)
