"""Writing questions about pictures into shards, as `vlkd.data.conversations` reads them; whole or not at all."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vlkd.data.shard_writer import RawSample, write_shards
from vlkd.errors import UserError
from vlkd.features import IMAGE_PLACEHOLDER


@dataclass(frozen=True, kw_only=True)
class QA:
    """A question and its answer; `kind` is "" for none, `choices` () for an open answer."""

    question: str
    answer: str
    kind: str = ""
    choices: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class VqaSample:
    """One picture as it is stored, jpg, png or webp by its suffix (with or without the dot), and its questions."""

    key: str
    image: bytes
    suffix: str
    qa: tuple[QA, ...]


def write_vqa_shards(samples: Iterable[VqaSample], out: Path, *, name: str, shard_size: int = 1000) -> dict[str, Any]:
    """Write `out/NAME-000000.tar`, ... and `out/manifest.json`, which is returned with the number of `questions`.

    A sample is KEY.jpg (png, webp) and KEY.json = {"qa": [{"question", "answer", "kind"?, "choices"?}, ...]}. Equal
    samples give equal bytes; the folder appears whole or not at all.

    Raises:
        UserError: a question or an answer without words, `<image>` inside of one, no question, or what `write_shards`
            refuses; the sentence has the sample's key.
    """
    counted = 0

    def raw() -> Iterator[RawSample]:
        nonlocal counted
        for sample in samples:
            _check(sample)
            counted += len(sample.qa)
            extra = {"qa": [_entry(qa) for qa in sample.qa]}
            extension = sample.suffix.removeprefix(".").lower()
            yield RawSample(key=sample.key, image=sample.image, extension=extension, extra=extra)

    return {**write_shards(raw(), out, samples_per_shard=shard_size, name=name), "questions": counted}


def _check(sample: VqaSample) -> None:
    if not sample.qa:
        raise UserError(f"{sample.key}: no question; write one, or leave the picture out.")
    for qa in sample.qa:
        if not qa.question.strip() or not qa.answer.strip():
            raise UserError(
                f"{sample.key}: the question {qa.question!r} with the answer {qa.answer!r}; expected words in both."
            )
        if IMAGE_PLACEHOLDER in qa.question + qa.answer:
            raise UserError(
                f"{sample.key}: {IMAGE_PLACEHOLDER} in the question {qa.question!r} or its answer; leave it out, "
                "the reader puts it before the first question."
            )


def _entry(qa: QA) -> dict[str, object]:
    optional: dict[str, object] = {"kind": qa.kind} if qa.kind else {}
    if qa.choices:
        optional["choices"] = list(qa.choices)
    return {"question": qa.question.strip(), "answer": qa.answer.strip(), **optional}
