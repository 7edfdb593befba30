"""A classifier and what it is compared with: one pass of the student over labelled images and pool together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from vlkd.data.samples import Batch
from vlkd.distill.class_teacher import ClassTeacher
from vlkd.distill.class_terms import GROUPS, ClassTerm, check_class_terms, reads
from vlkd.models.classifier import Classifier

STUDENT = "student"


class ClassDistiller(nn.Module):
    """The student, the teacher and the terms of a method.

    Batch statistics of the trunk are those of both parts together.

    Args:
        student: the classifier.
        terms: of the method.
        labels: (N,) class ids by row of the table; those of unlabelled rows are never read.
        teacher: gives targets, None for none.

    Raises:
        UserError: the terms do not fit (`check_class_terms`).
    """

    labels: Tensor

    def __init__(
        self, student: Classifier, terms: Sequence[ClassTerm], labels: Tensor, teacher: ClassTeacher | None = None
    ) -> None:
        super().__init__()
        check_class_terms(terms, teacher=teacher is not None)
        self.student = student
        self.terms = tuple(terms)
        self.teacher = teacher
        self.register_buffer("labels", labels, persistent=False)
        self.projection: nn.Module | None = None
        if teacher is not None and reads(terms, ("projected",)):
            self.projection = nn.Linear(student.width, teacher.width)

    def forward(self, batches: Mapping[str, Batch]) -> dict[str, Tensor]:
        """The raw loss of each term, (), float32.

        Args:
            batches: per part that the terms read, the batch of this rank.
        """
        known = self._student_features(batches)
        if self.teacher is not None and reads(self.terms, ("target_logits", "target_embed")):
            for part, batch in batches.items():
                known |= {f"{part}.{name}": value for name, value in self.teacher.targets(batch).items()}
        if "labelled" in batches:
            known["labelled.labels"] = self.labels[batches["labelled"].rows.to(self.labels.device)]
        losses = {}
        for term in self.terms:
            inputs = [known[feature] for feature in term.features]
            # Where no image of a part could be read it has no loss.
            if len(inputs[0]):
                losses[term.name] = term.objective(*inputs).mean()
        return losses

    def sums(self, losses: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The weighted sum of the losses of each group that has one."""
        found: dict[str, Tensor] = {}
        for group in GROUPS:
            parts = [
                term.weight * losses[term.name] for term in self.terms if term.group == group and term.name in losses
            ]
            if parts:
                found[group] = torch.stack(parts).sum()
        return found

    def _student_features(self, batches: Mapping[str, Batch]) -> dict[str, Tensor]:
        pixels = torch.cat([batch.inputs[STUDENT]["pixels"] for batch in batches.values()])
        features = self.student.features(pixels)
        logits = self.student.logits(features)
        whole = {"features": features, "label_logits": logits["label"], "teacher_logits": logits["teacher"]}
        if self.projection is not None:
            whole["projected"] = self.projection(features)
        found: dict[str, Tensor] = {}
        first = 0
        for part, batch in batches.items():
            # A part without a readable image passes one blank picture, which is dropped here.
            passed = len(batch.inputs[STUDENT]["pixels"])
            rows = slice(first, first + min(passed, len(batch.keys)))
            found |= {f"{part}.{name}": value[rows].float() for name, value in whole.items()}
            first += passed
        return found
