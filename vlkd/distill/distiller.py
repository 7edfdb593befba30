"""The module that is trained: a student, its heads towards the teachers, and the terms between them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

from vlkd.data.loader import Batch
from vlkd.distill.teachers import StoredTeacher, Teacher, trim_texts
from vlkd.distill.term import Term, wanted
from vlkd.errors import UserError
from vlkd.features import check_features
from vlkd.models.base import DualEncoderModule
from vlkd.models.composite import CompositeModel
from vlkd.models.heads import LinearHead


class Distiller(nn.Module):
    """Turns a batch into one loss per term.

    The teachers are not submodules: they are neither saved nor trained with the student. The heads are both saved and
    trained, and stay out of the exported student.

    Args:
        student: the model.
        terms: the method.
        teachers: by name.
        weights: one per teacher, in their order.
        towers: the features of frozen student towers, where only the projections are trained.
        gather: collects the rows of all ranks, with gradients; the identity on one rank.

    Raises:
        UserError: a term asks for a feature or a teacher that is not there.
    """

    def __init__(
        self,
        student: DualEncoderModule,
        terms: Sequence[Term],
        teachers: Mapping[str, Teacher],
        weights: Sequence[float],
        *,
        towers: StoredTeacher | None = None,
        gather: Callable[[Tensor], Tensor] = lambda rows: rows,
    ) -> None:
        super().__init__()
        self.student = student
        self.terms = tuple(terms)
        self.teachers = dict(teachers)
        self.weights = dict(zip(self.teachers, weights, strict=True))
        self.towers = towers
        self.gather = gather
        check_terms(self.terms, student, self.teachers)
        self.wanted_of_student = wanted(self.terms, "student")
        self.wanted_of_teachers = {name: wanted(self.terms, "teacher", name) for name in self.teachers}
        projecting = {term.teacher for term in self.terms if term.projects}
        self.heads = nn.ModuleDict(
            {name: LinearHead(student.width, self.teachers[name].width) for name in self.teachers if name in projecting}
        )

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """The raw loss of each term, (); a term without any captioned sample in the batch is left out."""
        captioned = self.gather(batch.captioned)
        match = self._match(batch) if any(term.match for term in self.terms) else None
        known = {f"student.{name}": value for name, value in self._gathered(self._student_features(batch)).items()}
        for name, teacher in self.teachers.items():
            targets = self._gathered(teacher.targets(batch, self.wanted_of_teachers[name]))
            known |= {f"{name}.{feature}": value for feature, value in targets.items()}
        losses: dict[str, Tensor] = {}
        for term in self.terms:
            if term.needs_caption and not captioned.any():
                continue
            inputs = [self._input(term, feature, known, captioned) for feature in term.features]
            losses[term.name] = term.objective(*inputs, **({"match": match} if term.match else {})).mean()
        return losses

    def weight_of(self, term: Term) -> float:
        """The term's weight times its teacher's."""
        return term.weight * self.weights.get(term.teacher, 1.0)

    def total(self, losses: Mapping[str, Tensor]) -> Tensor:
        """The weighted sum of the losses of one batch, (); zero where no sample takes part in any term."""
        parts = [self.weight_of(term) * losses[term.name] for term in self.terms if term.name in losses]
        return torch.stack(parts).sum() if parts else 0.0 * self.student.scale_features()["logit_scale"]

    def _student_features(self, batch: Batch) -> dict[str, Tensor]:
        want = self.wanted_of_student
        if self.towers is None:
            return trim_texts(self.student.encode(batch.inputs["student"], want), batch)
        assert isinstance(self.student, CompositeModel)
        pooled = self.towers.targets(batch, {name.replace("embed", "pooled") for name in want if "." in name})
        found = pooled | self.student.project(pooled) | self.student.scale_features()
        return {name: found[name].float() for name in want}

    def _gathered(self, features: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Rows of all ranks; sorted, because sets of strings have another order in each process."""
        return {
            name: self.gather(features[name]) if features[name].dim() else features[name] for name in sorted(features)
        }

    def _match(self, batch: Batch) -> Tensor:
        rows = self.gather(batch.rows.to(batch.captioned.device)[batch.captioned])
        captions = self.gather(batch.caption_ids)
        return (rows[:, None] == rows[None]) | (captions[:, None] == captions[None])

    def _input(self, term: Term, feature: str, known: Mapping[str, Tensor], captioned: Tensor) -> Tensor:
        source, _, name = feature.partition(".")
        value = known[f"{term.teacher}.{name}" if source == "teacher" else f"student.{name}"]
        if name.startswith("image.") and term.needs_caption and not captioned.all():
            value = value[captioned]
        return self.heads[term.teacher](value) if source == "projected" else value


def check_terms(terms: Sequence[Term], student: DualEncoderModule, teachers: Mapping[str, Teacher]) -> None:
    """Raise `UserError` unless names are unique, teachers exist, and student and teachers have what is asked for."""
    names = [term.name for term in terms]
    if not terms or len(set(names)) < len(names):
        raise UserError(
            f"Found the terms {names}, expected at least one and no name twice; check `terms` of the recipe."
        )
    for term in terms:
        if not term.weight >= 0:
            raise UserError(f"Term {term.name!r} has the weight {term.weight}, expected 0 or more.")
        if term.teacher and term.teacher not in teachers:
            raise UserError(f"Term {term.name!r} names the teacher {term.teacher!r}; there are {', '.join(teachers)}.")
    check_features(wanted(terms, "student"), student.provides, student.name)
    for name, teacher in teachers.items():
        check_features(wanted(terms, "teacher", name), teacher.provides, f"Teacher {name}")
