"""A classifier as an encoder of whole lists of images: its trunk's features, and from these what its heads answer."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from vlkd.errors import UserError
from vlkd.models.base import DualEncoderModule, evaluating
from vlkd.models.classifier import Classifier, is_classifier, load_classifier, mixed_probabilities
from vlkd.models.load import load_image_encoder

if TYPE_CHECKING:
    from PIL.Image import Image

ROWS = 4096
"""Features that pass the heads together."""
STUDENT = "student"
"""The folder of the model inside the folder of a run."""


class ClassifierImages(nn.Module):
    """What encodes images where a dual encoder could stand, too, with the trunk's features as `image.embed`.

    Args:
        classifier: the model; it is neither copied nor changed.

    Attributes:
        provides: `image.embed` alone.
        width: F.
        layout, preprocessing, name: the classifier's.
    """

    provides = frozenset({"image.embed"})

    def __init__(self, classifier: Classifier) -> None:
        super().__init__()
        self.classifier = classifier
        self.name, self.width, self.layout = classifier.name, classifier.width, classifier.layout
        self.preprocessing = classifier.preprocessing

    @property
    def classes(self) -> tuple[str, ...]:
        """(C,) names in the order of the columns."""
        return self.classifier.classes

    @property
    def device(self) -> torch.device:
        """Where the parameters are."""
        return self.classifier.device

    def encode_image(self, images: Sequence[Image], *, batch_size: int = 64) -> Tensor:
        """z (B, F) float32 of decoded RGB images, prepared as in evaluation, on the model's device.

        Raises:
            UserError: the list is empty.
        """
        if not len(images):
            raise UserError(f"{self.name}: found no image to encode, expected a list with at least one.")
        found = []
        with torch.no_grad(), evaluating(self.classifier):
            for start in range(0, len(images), batch_size):
                batch = images[start : start + batch_size]
                pixels = torch.stack([self.preprocessing.image_transform(image) for image in batch])
                found.append(self.classifier.features(pixels.to(self.device)).float())
        return torch.cat(found)

    def probabilities(self, features: Tensor) -> dict[str, Tensor]:
        """`mix`, and `label` and `teacher` where there are two heads: (N, C) float64 on the CPU, rows that sum to 1.

        As `Classifier.probabilities`, the teacher head's at temperature beta.

        Args:
            features: (N, F) of `encode_image`, on any device.

        Raises:
            UserError: a logit is not finite.
        """
        model, parts = self.classifier, []
        with torch.no_grad(), evaluating(model):
            for block in torch.split(features, ROWS):
                logits = model.logits(block.to(self.device))
                parts.append((logits["label"].double().cpu(), logits["teacher"].double().cpu()))
        label, teacher = (torch.cat(own) for own in zip(*parts, strict=True))
        if not bool(label.isfinite().all() and teacher.isfinite().all()):
            raise UserError(f"{self.name} gives logits that are not finite; check its weights, or train it again.")
        tables = {"mix": mixed_probabilities(label, teacher, alpha=model.alpha, beta=model.beta)}
        if model.teacher_head is not None:
            tables |= {"label": label.softmax(dim=1), "teacher": (teacher / model.beta).softmax(dim=1)}
        return tables


def load_for_images(ref: str, *, device: str | torch.device = "cpu") -> DualEncoderModule | ClassifierImages:
    """A classifier's folder as `ClassifierImages`, anything else by `load_image_encoder`, whose errors these are."""
    if is_classifier(ref):
        return ClassifierImages(load_classifier(ref, device))
    return load_image_encoder(ref, device=device)


def student_of(ref: str) -> str:
    """The student's folder for the folder of a run; any other reference as it is. A run that has not ended is told.

    Raises:
        UserError: the run has no student yet.
    """
    folder = Path(ref)
    if not ref or not folder.is_dir() or (folder / "model.json").is_file():
        return ref
    if (folder / STUDENT / "model.json").is_file():
        if (folder / "metrics.jsonl").is_file() and not (folder / "results.jsonl").is_file():
            print(f"The run {ref} has not ended: this is its student so far.", file=sys.stderr)
        return str(folder / STUDENT)
    if any((folder / name).exists() for name in ("metrics.jsonl", "checkpoints", "start")):
        raise UserError(
            f"The run {ref} has no student yet, expected {folder / STUDENT}; train it to its end, the same command "
            "continues it."
        )
    return ref
