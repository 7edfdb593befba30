"""The stages of a run: what learns, from which terms, for how long."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from vlkd.distill.token_terms import TokenTerm
from vlkd.engine.vlm.settings import StageSettings
from vlkd.errors import UserError
from vlkd.models.generative import PARTS

SWITCH = "switch.logits"


@dataclass(frozen=True, kw_only=True)
class Stage:
    """Attributes: name. settings: of its length and rate. terms: whose weighted sum is its loss."""

    name: str
    settings: StageSettings
    terms: tuple[TokenTerm, ...]

    @property
    def steps(self) -> int:
        """Optimiser steps."""
        return self.settings.samples // self.settings.batch_size

    def reads(self, prefix: str) -> bool:
        """Whether a term reads a feature whose name begins so."""
        return any(feature.startswith(prefix) for term in self.terms for feature in term.features)

    @property
    def taught(self) -> bool:
        """Whether a term needs the teacher."""
        return self.reads("teacher.") or self.reads(SWITCH)


def wanted_stages(stages: Sequence[Stage], *, teacher: str, stored: str) -> tuple[Stage, ...]:
    """Those that have samples and terms.

    Args:
        stages: as the recipe lists them.
        teacher: its reference, "" for none.
        stored: the folder of its answers, "" for none.

    Raises:
        UserError: nothing is left, a stage is shorter than a batch, trains an unknown part or nothing, or reads a
            teacher that is not named or features that are not stored.
    """
    found = tuple(stage for stage in stages if stage.settings.samples)
    if not found:
        names = ", ".join(f"{stage.name}.samples" for stage in stages)
        raise UserError(f"Every stage has no samples; give at least one of {names} more than 0.")
    for stage in found:
        _check(stage, teacher, stored)
    return found


def _check(stage: Stage, teacher: str, stored: str) -> None:
    settings = stage.settings
    if not stage.terms:
        raise UserError(f"The stage {stage.name!r} has no term with a weight; give one, or {stage.name}.samples=0.")
    if settings.samples < settings.batch_size:
        raise UserError(
            f"{stage.name}.samples={settings.samples} is less than a batch of {settings.batch_size}; give more."
        )
    unknown = [part for part in settings.parts if part not in PARTS]
    if unknown or not settings.parts:
        raise UserError(
            f"{stage.name}.parts={','.join(settings.parts) or 'nothing'}: expected some of {', '.join(PARTS)}."
        )
    if settings.vision_lr and "vision" not in settings.parts:
        raise UserError(
            f"{stage.name}.vision_lr={settings.vision_lr}, and the vision tower does not learn in this stage; add "
            f"vision to {stage.name}.parts, or leave the rate out."
        )
    if stage.taught and not teacher:
        raise UserError(
            f"The stage {stage.name!r} reads a teacher and none is named; set teacher.ref=REF, or "
            f"{stage.name}.samples=0."
        )
    if not stored:
        return
    beyond = sorted(
        {
            feature
            for term in stage.terms
            for feature in term.features
            if feature == SWITCH or (feature.startswith("teacher.") and feature != "teacher.answer.logits")
        }
    )
    if beyond:
        raise UserError(
            f"The stage {stage.name!r} reads {', '.join(beyond)}, and teacher.stored holds answers alone; run the "
            "teacher beside the student with teacher.stored= (empty), or leave these terms out."
        )
