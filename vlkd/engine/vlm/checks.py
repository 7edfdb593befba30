"""What a run of a generative model looks at before its first step, so that it does not fail hours later."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from torch import nn

from vlkd.data.conversations import Conversation
from vlkd.data.images import open_image
from vlkd.data.questions import Question
from vlkd.engine.vlm.stages import Stage
from vlkd.errors import UserError
from vlkd.features import IMAGE_PLACEHOLDER, Turn
from vlkd.models.base import batch_norms
from vlkd.models.generative import GenerativeVLM
from vlkd.protocols.vqa import form_of, prompt_of

LONGEST = 8
"""Questions whose tokens are counted, those of the most letters: to count all would take as long as an epoch does."""


def check_data(stages: Sequence[Stage], conversations: Mapping[str, Sequence[Conversation]]) -> None:
    """Refuse data with less than a batch.

    Raises:
        UserError: a stage has no conversation, or fewer than its batch.
    """
    for stage in stages:
        count, batch = len(conversations[stage.name]), stage.settings.batch_size
        if count < batch:
            raise UserError(
                f"The data of the stage {stage.name!r} hold {count} conversations, less than a batch of {batch}; give "
                f"more, or set {stage.name}.batch_size lower."
            )


def check_batch_norms(student: nn.Module, stages: Sequence[Stage]) -> None:
    """Refuse `freeze_batch_norm` where there is nothing to freeze.

    Raises:
        UserError: a stage sets it and the student has no batch norms.
    """
    for stage in stages:
        if stage.settings.freeze_batch_norm and not batch_norms(student):
            raise UserError(f"{stage.name}.freeze_batch_norm=true, and the student has no batch norms; leave it out.")


def check_questions(questions: Sequence[Question], models: Iterable[GenerativeVLM]) -> None:
    """Refuse questions that could not be asked when the time comes.

    Raises:
        UserError: the truth of one is none of its options, one does not fit a model's context, or none has a picture
            that can be read.
    """
    for question in questions:
        form_of(question)
    longest = sorted(questions, key=lambda one: len(prompt_of(one)) + len(one.answer))[-LONGEST:]
    for model in models:
        for question in longest:
            turns = [Turn("user", f"{IMAGE_PLACEHOLDER}\n{prompt_of(question)}"), Turn("assistant", question.answer)]
            if model.preprocessing.visual_tokens:
                model.preprocessing.encode(turns, key=question.key)
    if questions and not any(readable(question) for question in questions):
        raise UserError(
            f"None of the pictures of {len(questions)} questions can be read, first that of {questions[0].key!r}; "
            "check data.val and data.test."
        )


def readable(question: Question) -> bool:
    """Whether its picture can be decoded."""
    try:
        open_image(question.image.read())
    except (UserError, OSError):
        return False
    return True
