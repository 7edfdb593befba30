"""The questions that a run asks: some of validation now and then, all of the test when training has ended."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from random import Random
from typing import TYPE_CHECKING

from vlkd.data.conversations import open_conversations
from vlkd.data.images import open_image
from vlkd.data.questions import Question, questions_of
from vlkd.data.sources import source_name
from vlkd.engine.vlm.settings import VlmRun, VlmTrain
from vlkd.models.generative import GenerativeVLM
from vlkd.protocols.vqa import MeasuredAnswers, measure_vqa

if TYPE_CHECKING:
    from PIL.Image import Image


@dataclass(frozen=True, kw_only=True)
class AskedQuestions:
    """Attributes: watched: during training. final: at the end, by split, "val" and "test"."""

    watched: tuple[Question, ...]
    final: dict[str, list[Question]]


def open_asked(config: VlmRun) -> AskedQuestions:
    """The questions of `data.val` and `data.test`; those that are watched are drawn by the seed.

    Kinds of several sources carry the source's name, `photos/count`.

    Raises:
        UserError: a source cannot be opened.
    """
    refs = {"val": config.data.val, "test": config.data.test}
    final = {split: questions_of_all(own) for split, own in refs.items() if own}
    watched = final.get("val", [])
    count = config.train.val_questions
    if 0 < count < len(watched):
        watched = Random(config.seed).sample(watched, count)
    return AskedQuestions(watched=tuple(watched), final=final)


def questions_of_all(refs: Sequence[str]) -> list[Question]:
    """Those of each source, one after another."""
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


def ask(
    model: GenerativeVLM, questions: Sequence[Question], settings: VlmTrain, *, progress: bool = False
) -> MeasuredAnswers:
    """The model's greedy answers to questions, each asked alone."""
    answer = partial(model.answer, batch_size=settings.eval_batch, max_new_tokens=settings.max_new_tokens)

    def picture(place: int) -> Image:
        return open_image(questions[place].image.read())

    return measure_vqa(answer, questions, picture, batch_size=settings.eval_batch, progress=progress)


@dataclass(frozen=True, kw_only=True)
class Watch:
    """Attributes: asked: questions of validation. settings: of answering."""

    asked: Sequence[Question]
    settings: VlmTrain

    def __call__(self, student: GenerativeVLM) -> dict[str, float]:
        """Accuracy over all and per kind, as it is logged; {} without questions."""
        if not self.asked:
            return {}
        found = ask(student, self.asked, self.settings)
        kinds = {f"val/kinds/{kind}": own.accuracy for kind, own in found.kinds.items()}
        return {"val/accuracy": found.total.accuracy, "val/parse_failures": found.total.parse_failures, **kinds}
