"""A generative student and what it is compared with: two vision passes, and up to three passes of language models."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from vlkd.data.conversation_sequence import ConversationBatch
from vlkd.distill.answers.dense import densify
from vlkd.distill.token_terms import (
    PROGRESS,
    SWITCH,
    TEACHER_ANSWERS,
    TokenTerm,
    check_token_terms,
    features_read,
)
from vlkd.errors import UserError
from vlkd.models.generative import GenerativeVLM
from vlkd.models.label_masks import answer_positions, answer_targets

STUDENT, TEACHER = "student", "teacher"


class TokenDistiller(nn.Module):
    """The student, the teacher and the terms of a method.

    Args:
        student: what learns.
        terms: of the method; nothing is computed that none of them reads.
        teacher: a model that is frozen here; None for none. Its blocks are recomputed if the caller said so
            (`GenerativeVLM.checkpointing`).
        bridge: (B, N, C of the student) to (B, N, C of the teacher) on the switch path, trained with the student and
            no part of it; a departure from Switch-KD, None for none.
        vocabulary: V that student and teacher share, from `vlkd.distill.gates.check_vocabulary`; by default the
            smaller of their widths.
        stored_vocabulary: V of the teacher whose answers the batches hold in `stored`, which then stand for z^T; 0
            runs the teacher.

    Raises:
        UserError: the terms read a teacher that is not there, or parts of it that cannot be had one by one, or the
            bridge has no use.
    """

    def __init__(
        self,
        student: GenerativeVLM,
        terms: Sequence[TokenTerm],
        teacher: GenerativeVLM | None = None,
        *,
        bridge: nn.Module | None = None,
        vocabulary: int | None = None,
        stored_vocabulary: int = 0,
    ) -> None:
        super().__init__()
        check_token_terms(terms)
        self.student = student
        self.terms = tuple(terms)
        self.reads = features_read(terms)
        self.teacher = None if teacher is None else teacher.freeze()
        self.bridge = bridge
        self.stored_vocabulary = stored_vocabulary
        widths = [student.vocabulary, *([teacher.vocabulary] if teacher else []), stored_vocabulary]
        self.vocabulary = min(width for width in widths if width) if vocabulary is None else vocabulary
        self._check_reads()

    def forward(self, batch: ConversationBatch, *, progress: float, tokens: float, images: float) -> dict[str, Tensor]:
        """The raw loss of each term, (), this batch's part of the mean over a step.

        Parts add up: with the counts of the whole step their sum over its batches is the loss of one large batch.

        Args:
            batch: conversations prepared for the student, and for the teacher if it is run.
            progress: share of the stage that is done, 0 to 1.
            tokens: answer tokens by which the sums of (A,) terms are divided.
            images: pictures by which the sums of (B,) terms are divided.

        Raises:
            UserError: student and teacher have different numbers of answer tokens.
        """
        known = self._student_features(batch.inputs[STUDENT])
        known |= self._teacher_features(batch, known)
        pictures = len(batch.keys)
        # One blank picture stands in a batch without a usable sample.
        known = {name: value[:pictures] if value.ndim == 3 else value for name, value in known.items()}
        known["answer.labels"] = answer_targets(batch.inputs[STUDENT]["labels"])
        answers = len(known["answer.labels"])
        _check_answers(known, answers)
        counts = {True: (answers, tokens), False: (pictures, images)}
        return {term.name: self._loss(term, known, progress, *counts[term.per_token]) for term in self.terms}

    def total(self, losses: Mapping[str, Tensor]) -> Tensor:
        """The weighted sum of `forward`'s losses, ()."""
        return torch.stack([term.weight * losses[term.name] for term in self.terms]).sum()

    def _loss(self, term: TokenTerm, known: Mapping[str, Tensor], progress: float, own: int, count: float) -> Tensor:
        inputs = [progress if name == PROGRESS else self._narrow(term, name, known[name]) for name in term.features]
        if not own:
            # Empty sums: zero, and yet every rank's parameters take part in the backward pass.
            found = [value.float().sum() for value in inputs if isinstance(value, Tensor)]
            return torch.stack(found).sum()
        value = term.objective(*inputs)
        return (value.sum() if value.ndim else value * own) / count

    def _narrow(self, term: TokenTerm, name: str, value: Tensor) -> Tensor:
        """Logits of the shared vocabulary, where they are compared with a teacher's."""
        if term.taught and name.endswith(".logits") and value.shape[1] > self.vocabulary:
            return value[:, : self.vocabulary]
        return value

    def _student_features(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        found: dict[str, Tensor] = {}
        if not self.student.switchable:
            return {"answer.logits": answer_logits(self.student, inputs)}
        found["image.tokens"] = self.student.vision(inputs["pixels"])
        if self.reads & {"answer.logits", "visual.tokens"}:
            found["visual.tokens"] = self.student.project(found["image.tokens"])
        if "answer.logits" in self.reads:
            found["answer.logits"] = answer_logits(self.student, inputs, found["visual.tokens"])
        return found

    def _teacher_features(self, batch: ConversationBatch, known: Mapping[str, Tensor]) -> dict[str, Tensor]:
        found: dict[str, Tensor] = {}
        asked = self.reads & {TEACHER_ANSWERS}
        if asked and self.stored_vocabulary:
            kept = batch.stored
            found[TEACHER_ANSWERS] = densify(kept["indices"], kept["values"], kept["rest"], self.stored_vocabulary)
            asked = frozenset()
        teacher = self.teacher
        if teacher is None:
            return found
        inputs = batch.inputs[TEACHER] if asked or self._reads_visual or SWITCH in self.reads else {}
        with torch.no_grad():
            if not teacher.switchable:
                return found | ({TEACHER_ANSWERS: answer_logits(teacher, inputs)} if asked else {})
            if asked or self._reads_visual:
                tokens = teacher.vision(inputs["pixels"])
                found |= {"teacher.image.tokens": tokens, "teacher.visual.tokens": teacher.project(tokens)}
            if asked:
                found[TEACHER_ANSWERS] = answer_logits(teacher, inputs, found["teacher.visual.tokens"])
        if SWITCH in self.reads:
            # The teacher's weights are constants; the gradient passes through them to the student's vision tower.
            tokens = known["image.tokens"] if self.bridge is None else self.bridge(known["image.tokens"])
            dtype = next(teacher.part_parameters("projector")).dtype
            found[SWITCH] = answer_logits(teacher, inputs, teacher.project(tokens.to(dtype)))
        return found

    @property
    def _reads_visual(self) -> bool:
        return bool(self.reads & {"teacher.image.tokens", "teacher.visual.tokens"})

    def _check_reads(self) -> None:
        taught = {name for name in self.reads if name.startswith("teacher.")} | (self.reads & {SWITCH})
        if self.stored_vocabulary:
            taught -= {TEACHER_ANSWERS}
        if taught and self.teacher is None:
            raise UserError(
                f"The terms read {', '.join(sorted(taught))} and no teacher is there; set teacher.ref=REF, or leave "
                "these terms out."
            )
        parts = {STUDENT: self.reads & {"image.tokens", "visual.tokens", SWITCH}, TEACHER: taught - {TEACHER_ANSWERS}}
        for name, model in ((STUDENT, self.student), (TEACHER, self.teacher)):
            if model is not None and not model.switchable and parts[name]:
                raise UserError(
                    f"The terms read {', '.join(sorted(parts[name]))}, and the {name} {model.name} cuts pictures by "
                    "their size, so that its parts are not run one by one; take a LLaVA, or leave these terms out."
                )
        if self.bridge is not None and SWITCH not in self.reads:
            raise UserError("A bridge is given and no term reads the switch path; leave it out.")


def answer_logits(model: GenerativeVLM, inputs: Mapping[str, Tensor], visual: Tensor | None = None) -> Tensor:
    """Logits (A, V) at the answer positions alone, by the labels of the model's own inputs.

    Args:
        model: the model.
        inputs: `pixels`, `ids`, `labels`, `mask` and what else its preprocessing gave.
        visual: (B, N, E), projected tokens in place of those of `pixels`.
    """
    keep = answer_positions(inputs["labels"])
    if visual is not None:
        return model.forward_logits(None, inputs["ids"], inputs["mask"], visual=visual, keep=keep)
    more = {name: value for name, value in inputs.items() if name not in ("pixels", "ids", "labels", "mask")}
    return model.forward_logits(inputs["pixels"], inputs["ids"], inputs["mask"], keep=keep, **more)


def _check_answers(known: Mapping[str, Tensor], answers: int) -> None:
    for name, value in known.items():
        if name.endswith(".logits") and len(value) != answers:
            raise UserError(
                f"Found {len(value)} answer tokens in {name} and {answers} of the student in one batch; expected the "
                "same answers: teacher and student need one tokenizer and one end of answers."
            )
