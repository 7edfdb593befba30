"""What must hold before a generative teacher teaches: one vocabulary, parts that fit, and a teacher that sees."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional as F

from vlkd.data.conversation_sequence import ConversationBatch
from vlkd.data.conversations import Conversation
from vlkd.distill.token_distiller import TEACHER, answer_logits
from vlkd.errors import UserError
from vlkd.features import IGNORED, IMAGE_PLACEHOLDER, Turn
from vlkd.models.base import evaluating
from vlkd.models.generative import GenerativeVLM
from vlkd.models.golden import SENTENCES, probe_images
from vlkd.models.label_masks import answer_targets, encode_conversation
from vlkd.models.tokenizer import first_line
from vlkd.objectives.token_logits import token_kl

if TYPE_CHECKING:
    from PIL.Image import Image

LEAST = 1e-3
"""Nats of change per answer token below which a teacher counts as blind."""

PROBE = (*SENTENCES, "No, 12 of 345.", "yes")
"""Answers that two models must write in the same tokens."""

ASKED = ("What?", "Is it red?")
"""Questions that must have the same answers together as one by one, short enough for any context."""


def check_vocabulary(student: GenerativeVLM, teacher: GenerativeVLM) -> int:
    """V of the logits that can be compared: up to the smaller width, or to the first token that only one has.

    Args:
        student: its logits may be wider by padding.
        teacher: likewise.

    Raises:
        UserError: an id stands for different tokens, words (and not only added tokens) are known to one alone, or the
            two write the same answers in different tokens.
    """
    ours, theirs = (_tokens_by_id(model) for model in (student, teacher))
    for token_id in sorted(ours.keys() & theirs.keys()):
        if ours[token_id] != theirs[token_id]:
            raise UserError(
                f"The id {token_id} is {ours[token_id]!r} for the student {student.name} and {theirs[token_id]!r} for "
                f"the teacher {teacher.name}; build the student with the teacher's tokenizer (model.tokenizer=FOLDER)."
            )
    alone, last = sorted(ours.keys() ^ theirs.keys()), max(ours.keys() & theirs.keys(), default=0)
    for model, own in ((student, ours), (teacher, theirs)):
        added = model.tokenizer.added_tokens_decoder
        words = [own[at] for at in alone if at in own and (at < last or at not in added)]
        if words:
            raise UserError(
                f"{model.name} alone has {len(words)} tokens, such as {words[0]!r}, and would cut texts otherwise; "
                "build the student with the teacher's tokenizer (model.tokenizer=FOLDER)."
            )
    answers = [labels[labels != IGNORED].tolist() for _, labels in map(probe_conversation, (student, teacher))]
    if answers[0] != answers[1]:
        raise UserError(
            f"{student.name} writes the answers of one conversation as {len(answers[0])} tokens and {teacher.name} as "
            f"{len(answers[1])}, or as others; give both one tokenizer, and chat templates that end answers alike."
        )
    return min(student.vocabulary, teacher.vocabulary, *alone[:1])


def check_switch(
    student: GenerativeVLM, teacher: GenerativeVLM, trained: Collection[str], *, bridge: bool = False
) -> None:
    """Raise `UserError` unless the student's vision tower can stand in for the teacher's, and learns.

    Args:
        student: whose vision tower enters.
        teacher: whose projector takes its tokens.
        trained: the parts of the student that learn.
        bridge: a trained map between the two widths is wanted.
    """
    for model in (student, teacher):
        if not model.switchable:
            raise UserError(
                f"{model.name} cuts pictures by their size, so its parts cannot be switched; take a LLaVA, or set the "
                "weight of the switch term to 0."
            )
    if student.visual_tokens != teacher.visual_tokens:
        raise UserError(
            f"{student.name} has {student.visual_tokens} tokens for a picture and {teacher.name} has "
            f"{teacher.visual_tokens}; the switch needs equal numbers: choose image_size and patch_size of the student "
            "so that they are."
        )
    equal = student.visual_width == teacher.visual_width
    if not equal and not bridge:
        raise UserError(
            f"The vision tower of {student.name} is {student.visual_width} wide and that of {teacher.name} "
            f"{teacher.visual_width}; the switch needs equal widths, or teacher.bridge=true (not in Switch-KD)."
        )
    if equal and bridge:
        raise UserError(
            f"teacher.bridge=true, and both vision towers are {student.visual_width} wide; leave the bridge out."
        )
    if "vision" not in trained:
        raise UserError(
            f"The switch term teaches the vision tower alone, and what learns is {', '.join(sorted(trained))}; add "
            "vision to the stage's parts, or set the weight of the switch term to 0."
        )


def probe_conversation(model: GenerativeVLM) -> tuple[Tensor, Tensor]:
    """Ids (T,) and labels (T,) of one conversation with the answers `PROBE`, one place for its picture."""
    # Short contexts of tiny models are no matter of the vocabulary.
    chat = replace(model.preprocessing.chat, context_length=0)
    turns = [Turn("user", f"{IMAGE_PLACEHOLDER}\nWhat is it?")]
    for text in PROBE:
        turns += [Turn("assistant", text), Turn("user", text)]
    return encode_conversation(chat, turns[:-1], visual_tokens=1)


def check_alone(models: Iterable[GenerativeVLM], conversations: Iterable[Conversation]) -> None:
    """Raise `UserError` unless each model answers questions that share a row as it answers each by itself.

    Not every language model takes an attention mask and positions of our own.

    Args:
        models: they are only read.
        conversations: without questions that stand alone nothing is looked at.
    """
    if not any(talk.alone and len(talk.turns) > 2 for talk in conversations):
        return
    image = probe_images()[0]
    turns = [turn for text in PROBE for turn in (Turn("user", f"{IMAGE_PLACEHOLDER}\n{text}"), Turn("assistant", text))]
    for model in models:
        # Short contexts of tiny models are no matter here.
        prepared = replace(model.preprocessing, chat=replace(model.preprocessing.chat, context_length=0))
        together = [prepared.encode_questions(turns, image=image)]
        alone = [prepared.encode(turns[first : first + 2], image=image) for first in range(0, len(turns), 2)]
        try:
            with torch.no_grad(), evaluating(model):
                found, wanted = (_probe_logits(model, rows, image) for rows in (together, alone))
        except (RuntimeError, ValueError, TypeError, IndexError, NotImplementedError) as error:
            raise UserError(
                f"{model.name} cannot answer questions that share a picture ({first_line(error)}): its language model "
                "takes no attention mask or no positions of its own; give each question a conversation of its own."
            ) from error
        if found.shape != wanted.shape or not torch.allclose(found, wanted, rtol=1e-3, atol=1e-3):
            raise UserError(
                f"{model.name} answers questions otherwise where they share a picture than one by one: its language "
                "model takes no attention mask or no positions of its own; give each question a conversation of its "
                "own."
            )


def _probe_logits(model: GenerativeVLM, rows: Sequence[tuple[Tensor, ...]], image: Image) -> Tensor:
    """Logits of encoded conversations about one picture, (A, V) float32."""
    inputs = model.preprocessing.image_inputs([image] * len(rows)) | model.preprocessing.pad(rows)
    return answer_logits(model, {name: value.to(model.device) for name, value in inputs.items()}).float()


def check_sees(teacher: GenerativeVLM, batches: Iterable[ConversationBatch]) -> dict[str, float]:
    """Show that the teacher's answers depend on the picture.

    Each picture is replaced by a blank one, zero behind normalisation, and by that of a sample of its batch that has
    another answer.

    Args:
        teacher: it is only read.
        batches: prepared for it, with several samples each.

    Returns:
        Means over answer tokens, in nats: `blank_kl` and `shuffled_kl`, KL from the distribution with the own picture
        to that without; `nll` of the answers, and `blank_nll_rise` and `shuffled_nll_rise`, by how much it grows.
        `tokens` and `shuffled_tokens` are how many were compared.

    Raises:
        UserError: there is no answer to look at, or `blank_kl` or `shuffled_kl` is below `LEAST`.
    """
    sums: dict[str, float] = {}
    with torch.no_grad(), evaluating(teacher):
        for batch in batches:
            if batch.keys:
                for name, value in _seen(teacher, batch.inputs[TEACHER]).items():
                    sums[name] = sums.get(name, 0.0) + value
    tokens, shuffled = sums.pop("tokens", 0.0), sums.pop("shuffled_tokens", 0.0)
    if not tokens:
        raise UserError(f"Found no answer on which to see whether {teacher.name} looks at pictures; check the data.")
    found = {
        name: value / max(shuffled if name.startswith("shuffled") else tokens, 1.0) for name, value in sums.items()
    }
    moves = (found["blank_kl"], found["shuffled_kl"] if shuffled else LEAST)
    # Logits that are no numbers compare as neither more nor less.
    if not all(move >= LEAST for move in moves):
        raise UserError(
            f"{teacher.name} does not look at pictures: its answers move by {found['blank_kl']:.2g} nats per token "
            f"with a blank one and by {found['shuffled_kl']:.2g} with another's, expected {LEAST} or more of both; "
            "train the teacher, or teach from another."
        )
    return found | {"tokens": tokens, "shuffled_tokens": shuffled}


def _seen(teacher: GenerativeVLM, inputs: Mapping[str, Tensor]) -> dict[str, float]:
    """Sums over the answer tokens of one batch."""
    labels = inputs["labels"]
    targets = answer_targets(labels)
    partner = other_answers(inputs)
    moved = (partner != torch.arange(len(partner), device=partner.device)).repeat_interleave(
        (labels[:, 1:] != IGNORED).sum(dim=1)
    )
    own = answer_logits(teacher, inputs).float()
    blank = answer_logits(teacher, {**inputs, "pixels": torch.zeros_like(inputs["pixels"])}).float()
    other = answer_logits(teacher, {**inputs, "pixels": inputs["pixels"][partner]}).float()
    own_nll, blank_nll, other_nll = (F.cross_entropy(z, targets, reduction="none") for z in (own, blank, other))
    found = {
        "tokens": torch.tensor(len(targets)),
        "shuffled_tokens": moved.sum(),
        "nll": own_nll.sum(),
        "blank_kl": token_kl(own, blank, tau=1.0).sum(),
        "blank_nll_rise": (blank_nll - own_nll).sum(),
        "shuffled_kl": token_kl(own, other, tau=1.0)[moved].sum(),
        "shuffled_nll_rise": (other_nll - own_nll)[moved].sum(),
    }
    return {name: float(value) for name, value in found.items()}


def other_answers(inputs: Mapping[str, Tensor]) -> Tensor:
    """For each row (B,) the next one with other answers, and a picture of the same size; the row itself for none."""
    sizes = inputs["image_sizes"].tolist() if "image_sizes" in inputs else [None] * len(inputs["labels"])
    rows = [
        (size, tuple(row[row != IGNORED].tolist())) for size, row in zip(sizes, inputs["labels"].cpu(), strict=True)
    ]
    count = len(rows)
    partner = [
        next(
            (j % count for j in range(i + 1, i + count)
             if rows[j % count][0] == rows[i][0] and rows[j % count][1] != rows[i][1]),
            i,
        )
        for i in range(count)
    ]  # fmt: skip
    return torch.tensor(partner, device=inputs["labels"].device)


def _tokens_by_id(model: GenerativeVLM) -> dict[int, str]:
    return {int(token_id): token for token, token_id in model.tokenizer.get_vocab().items()}
