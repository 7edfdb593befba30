"""What is seen of a classifier on validation images: both heads, their mix, and which state was the best so far."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from vlkd.data.labelled import Labelled
from vlkd.engine.classify.mix import accuracy, choose_mix
from vlkd.engine.classify.settings import Mix
from vlkd.errors import UserError
from vlkd.models.base import evaluating
from vlkd.models.classifier import Classifier, mixed_probabilities
from vlkd.retrieval.encode import encode_images

if TYPE_CHECKING:
    from PIL.Image import Image

BATCH = 128


class _Logits:
    """Both heads' logits of decoded images side by side, for what encodes whole data sets."""

    def __init__(self, student: Classifier) -> None:
        self.student = student

    def encode_image(self, images: Sequence[Image], *, batch_size: int = BATCH) -> Tensor:
        found = []
        for start in range(0, len(images), batch_size):
            prepared = [self.student.preprocessing.image_transform(one) for one in images[start : start + batch_size]]
            logits = self.student.logits(self.student.features(torch.stack(prepared).to(self.student.device)))
            found.append(torch.cat([logits["label"], logits["teacher"]], dim=1).float())
        return torch.cat(found)


@dataclass(frozen=True, kw_only=True)
class HeadLogits:
    """Attributes: label, teacher: (I, C) logits. labels: (I,) class ids. keys: I names. bad: key and reason."""

    label: Tensor
    teacher: Tensor
    labels: Tensor
    keys: tuple[str, ...]
    bad: tuple[tuple[str, str], ...]


def head_logits(student: Classifier, images: Labelled, *, progress: bool = False) -> HeadLogits:
    """Both heads on every readable image, prepared as in evaluation, on the CPU.

    Raises:
        UserError: none can be read, or a logit is not finite.
    """
    with torch.no_grad(), evaluating(student):
        found = encode_images(_Logits(student), images, batch_size=BATCH, progress=progress)
    if not found.embed.isfinite().all():
        raise UserError(f"{student.name} gives logits that are not finite; check its weights and training rate.")
    label, teacher = found.embed.chunk(2, dim=1)
    return HeadLogits(
        label=label,
        teacher=teacher,
        labels=torch.from_numpy(images.labels[found.index]),
        keys=tuple(images.keys[i] for i in found.index.tolist()),
        bad=found.bad,
    )


@dataclass(frozen=True, kw_only=True)
class Seen:
    """Attributes: figures: to be logged. score: accuracy of the mix. alpha, beta: with which it was reached."""

    figures: dict[str, float]
    score: float
    alpha: float
    beta: float


@dataclass(frozen=True, kw_only=True)
class Watch:
    """Attributes: images: of validation. mix: of the heads. trained: the heads that are, "label" and "teacher"."""

    images: Labelled
    mix: Mix
    trained: tuple[str, ...]

    def __call__(self, student: Classifier) -> Seen:
        """Measure a state of the student."""
        found = head_logits(student, self.images)
        heads = {"label": found.label, "teacher": found.teacher}
        figures = {name: accuracy(logits, found.labels) for name, logits in heads.items()}
        alpha, beta = self.constants(student, found)
        mixed = mixed_probabilities(found.label, found.teacher, alpha=alpha, beta=beta)
        score = accuracy(mixed, found.labels)
        figures = {f"val/acc1_{name}": value for name, value in figures.items()} | {"val/acc1": score}
        return Seen(figures=figures | {"mix/alpha": alpha, "mix/beta": beta}, score=score, alpha=alpha, beta=beta)

    def constants(self, student: Classifier, found: HeadLogits) -> tuple[float, float]:
        """alpha and beta: a head that is not trained has no share."""
        if student.teacher_head is None or "teacher" not in self.trained:
            return 1.0, 1.0
        if "label" not in self.trained:
            return 0.0, 1.0
        if self.mix.tune:
            return choose_mix(found.label, found.teacher, found.labels)[:2]
        return self.mix.alpha, self.mix.beta
