"""The module that is trained: a student, its heads towards the teachers, and the terms between them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from vlkd.data.samples import Batch
from vlkd.distill.teachers import CachedTeacher, Teacher, trim_blanks
from vlkd.distill.term import Term, wanted
from vlkd.errors import UserError
from vlkd.features import check_features
from vlkd.models.base import DualEncoderModule
from vlkd.models.composite import CompositeModel, tower_names
from vlkd.models.heads import LinearHead


class Compared(NamedTuple):
    """What a batch gives.

    Attributes:
        losses: the raw loss of each term, (); a term without any captioned sample is left out.
        anchors: per side the student's embeddings of the whole batch, (B, D) or (T, D), before any head.
    """

    losses: dict[str, Tensor]
    anchors: dict[str, Tensor]


class Distiller(nn.Module):
    """Turns a batch into one loss per term.

    The teachers are not submodules: they are neither saved nor trained with the student. The heads, and objectives that
    have parameters, are both saved and trained, and stay out of the exported student.

    Args:
        student: the model.
        terms: the method.
        teachers: by name.
        towers: the features of frozen student towers, where only the projections are trained.
        banks: per teacher its class vectors by feature name, (K, D); a teacher without one takes the batch's.
        gather: collects the rows of all ranks, with gradients; the identity on one rank.

    Raises:
        UserError: a term asks for a feature or a teacher that is not there.
    """

    def __init__(
        self,
        student: DualEncoderModule,
        terms: Sequence[Term],
        teachers: Mapping[str, Teacher],
        *,
        towers: CachedTeacher | None = None,
        banks: Mapping[str, Mapping[str, Tensor]] | None = None,
        gather: Callable[[Tensor], Tensor] = lambda rows: rows,
    ) -> None:
        super().__init__()
        self.student = student
        self.terms = tuple(terms)
        self.teachers = dict(teachers)
        self.towers = towers
        self.banks = dict(banks or {})
        self.gather = gather
        check_terms(self.terms, student, self.teachers)
        self.wanted_of_student = wanted(self.terms, "student")
        self.wanted_of_teachers = {name: wanted(self.terms, "teacher", name) for name in self.teachers}
        projecting = {term.teacher for term in self.terms if term.projects}
        self.heads = nn.ModuleDict(
            {name: LinearHead(student.width, self.teachers[name].width) for name in self.teachers if name in projecting}
        )
        self.objectives = nn.ModuleDict(
            {term.name: term.objective for term in self.terms if isinstance(term.objective, nn.Module)}
        )

    def forward(self, batch: Batch) -> Compared:
        """The student's features of a batch, compared with the targets."""
        return self.compare(self.student_features(batch), batch)

    def student_features(self, batch: Batch) -> dict[str, Tensor]:
        """The student's features of this rank's batch, float32."""
        want = self.wanted_of_student
        if self.towers is None:
            return trim_blanks(self.student.encode(batch.inputs["student"], want), batch)
        assert isinstance(self.student, CompositeModel)
        held = self.towers.targets(batch, tower_names(want))
        found = held | self.student.project(held) | self.student.scale_features()
        return {name: found[name].float() if found[name].is_floating_point() else found[name] for name in want}

    def compare(self, features: Mapping[str, Tensor], batch: Batch) -> Compared:
        """The losses of the batches of all ranks together, from this rank's features of the student."""
        captioned = self.gather(batch.captioned)
        match = self._match(batch) if any(term.match for term in self.terms) else None
        own = self._gathered(features)
        known = {f"student.{name}": value for name, value in own.items()}
        for name, teacher in self.teachers.items():
            targets = self._gathered(teacher.targets(batch, self.wanted_of_teachers[name]))
            known |= {f"{name}.{feature}": value for feature, value in targets.items()}
            known |= self._class_vectors(name, targets, batch)
        losses: dict[str, Tensor] = {}
        for term in self.terms:
            if term.needs_caption and not captioned.any():
                continue
            inputs = [self._input(term, feature, known, captioned) for feature in term.features]
            if any(len(value) == 0 for value in inputs if value.dim()):
                continue
            losses[term.name] = term.objective(*inputs, **_match_of(term, match)).mean()
        anchors = {name.partition(".")[0]: value for name, value in own.items() if name.endswith(".embed")}
        return Compared(losses, anchors)

    def total(self, losses: Mapping[str, Tensor], teacher_weights: Mapping[str, float]) -> Tensor:
        """The weighted sum of the losses of one batch, (); zero where no sample takes part in any term.

        Args:
            losses: raw, by term.
            teacher_weights: of each term that belongs to a teacher, the weight of that teacher, by term.
        """
        parts = [
            term.weight * teacher_weights.get(term.name, 1.0) * losses[term.name]
            for term in self.terms
            if term.name in losses
        ]
        return torch.stack(parts).sum() if parts else 0.0 * self.student.scale_features()["logit_scale"]

    def _gathered(self, features: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Rows of all ranks; sorted, because sets of strings have another order in each process."""
        return {
            name: self.gather(features[name]) if features[name].dim() else features[name] for name in sorted(features)
        }

    def _match(self, batch: Batch) -> Tensor:
        """(T, T), true where text j is one of image i's captions."""
        captions = self.gather(batch.caption_ids)
        return (self.gather(batch.own_ids)[:, None, :] == captions[None, :, None]).any(dim=-1)

    def _class_vectors(self, name: str, targets: Mapping[str, Tensor], batch: Batch) -> dict[str, Tensor]:
        """The class vectors that the terms of a teacher read: of its bank, or of the batch, equal ones merged."""
        asked = {feature for term in self.terms if term.teacher == name for feature in term.features}
        ids = {"image.embed": batch.rows.to(batch.captioned.device), "text.embed": batch.caption_ids}
        bank = self.banks.get(name, {})
        return {
            f"{name}.classes.{feature}": bank[feature]
            if feature in bank
            else targets[feature][first_of_each(self.gather(ids[feature]))]
            for feature in ids
            if f"classes.{feature}" in asked
        }

    def _input(self, term: Term, feature: str, known: Mapping[str, Tensor], captioned: Tensor) -> Tensor:
        source, _, name = feature.partition(".")
        if source == "classes":
            return known[f"{term.teacher}.classes.{name}"]
        value = known[f"{term.teacher}.{name}" if source == "teacher" else f"student.{name}"]
        if name.startswith("image.") and term.needs_caption and not captioned.all():
            value = value[captioned]
        return self.heads[term.teacher](value) if source == "projected" else value


def first_of_each(ids: Tensor) -> Tensor:
    """The first row of each distinct id, in the order of the rows: (K,) of ids (B,)."""
    _, inverse = torch.unique(ids, return_inverse=True)
    first = torch.full((len(ids),), len(ids), device=ids.device)
    first.scatter_reduce_(0, inverse, torch.arange(len(ids), device=ids.device), "amin")
    return first[first < len(ids)].sort().values


def _match_of(term: Term, match: Tensor | None) -> dict[str, Tensor]:
    """`match` as the term reads it: rows are of the modality of its first feature."""
    if not term.match:
        return {}
    assert match is not None
    return {"match": match.T if ".text." in term.features[0] else match}


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
