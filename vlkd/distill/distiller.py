"""The module that is trained: a student, its heads towards the teachers, and the terms between them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

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
        losses: the raw loss of each term over the batches of all ranks, (), the same on each; a term without any
            captioned sample is left out.
        anchors: per side the student's embeddings of the whole batch, (B, D) or (T, D), before any head.
        local: names of the terms whose gradient differs between ranks, their mean being that of the loss; every other
            term has the gradient of the loss on every rank.
    """

    losses: dict[str, Tensor]
    anchors: dict[str, Tensor]
    local: frozenset[str] = frozenset()


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
        local: each of W ranks computes its own rows alone of the terms that are `by_rows`: B / W times B logits instead
            of B times B, the same losses and gradients.
        share: given this rank's rows, where they lie among those that `gather` collects, and W.
        mean: of a tensor over ranks, the same bits on each, without gradient; the identity on one rank.

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
        local: bool = False,
        share: Callable[[Tensor], tuple[slice, int]] = lambda rows: (slice(0, len(rows)), 1),
        mean: Callable[[Tensor], Tensor] = lambda tensor: tensor,
    ) -> None:
        super().__init__()
        self.student = student
        self.terms = tuple(terms)
        self.teachers = dict(teachers)
        self.towers = towers
        self.banks = dict(banks or {})
        self.gather = gather
        self.share = share
        self.mean = mean
        self.local = frozenset(term.name for term in self.terms if local and term.by_rows)
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
        matches, shares = self._matches(batch), self._shares(batch)
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
            options = self._match_of(term, matches)
            if term.name in self.local:
                rows, ranks = shares[term.needs_caption]
                # The ranks' parts add up to the loss, and gradients are averaged over ranks.
                losses[term.name] = ranks * term.objective(*inputs, rows=rows, **options)
            else:
                losses[term.name] = term.objective(*inputs, **options).mean()
        anchors = {name.partition(".")[0]: value for name, value in own.items() if name.endswith(".embed")}
        return Compared(self._agreed(losses), anchors, self.local)

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

    def _shares(self, batch: Batch) -> dict[bool, tuple[slice, int]]:
        """For local terms that need captions (True) or not, this rank's rows among those of all W ranks, and W."""
        asked = {term.needs_caption for term in self.terms if term.name in self.local}
        return {needs: self.share(batch.caption_ids if needs else batch.captioned) for needs in sorted(asked)}

    def _matches(self, batch: Batch) -> dict[bool, tuple[Tensor, Tensor]]:
        """Which captions are among which image's, images by texts and texts by images, as far as terms ask for it.

        Under False for all T rows, (T, T) each; under True for this rank's t rows alone, (t, T) each.
        """
        asked = {term.name in self.local for term in self.terms if term.match}
        if not asked:
            return {}
        captions, owned = self.gather(batch.caption_ids), self.gather(batch.own_ids)
        found: dict[bool, tuple[Tensor, Tensor]] = {}
        if False in asked:
            match = among(captions, owned)
            found[False] = match, match.T
        if True in asked:
            found[True] = among(captions, batch.own_ids), among(batch.caption_ids, owned).T
        return found

    def _match_of(self, term: Term, matches: Mapping[bool, tuple[Tensor, Tensor]]) -> dict[str, Any]:
        """`match` as the term reads it: rows are of the modality of its first feature."""
        if not term.match:
            return {}
        local = term.name in self.local
        first, second = reversed(matches[local]) if ".text." in term.features[0] else matches[local]
        return {"match": (first, second) if local else first}

    def _agreed(self, losses: dict[str, Tensor]) -> dict[str, Tensor]:
        """The losses, local ones with the value of all ranks' rows and the gradient of this rank's."""
        local = [name for name in losses if name in self.local]
        if not local:
            return losses
        values = self.mean(torch.stack([losses[name].detach() for name in local]))
        # What is added is exactly 0: ranks that decide by these values must find the same bits.
        return losses | {
            name: value + (losses[name] - losses[name].detach()) for name, value in zip(local, values, strict=True)
        }

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


def among(ids_T: Tensor, sets_SP: Tensor) -> Tensor:
    """Whether id t is in set s: (S, T) bool, in a few times its memory, whatever P is."""
    found_ST = torch.zeros(len(sets_SP), len(ids_T), dtype=torch.bool, device=ids_T.device)
    # Sets are padded at their end, to the largest of the whole table.
    longest = int(sets_SP.ge(0).sum(dim=1).amax()) if len(sets_SP) else 0
    for members_S in sets_SP[:, :longest].unbind(dim=1):
        found_ST |= members_S[:, None] == ids_T
    return found_ST


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
