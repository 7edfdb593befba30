"""The questions that a run asks: some of validation now and then, all of the test when training has ended."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from random import Random
from typing import TYPE_CHECKING

from vlkd.data.images import open_image
from vlkd.data.questions import Question, open_questions
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

    Raises:
        UserError: a source cannot be opened.
    """
    refs = {"val": config.data.val, "test": config.data.test}
    final = {split: open_questions(own) for split, own in refs.items() if own}
    watched = final.get("val", [])
    count = config.train.val_questions
    if 0 < count < len(watched):
        watched = Random(config.seed).sample(watched, count)
    return AskedQuestions(watched=tuple(watched), final=final)


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
