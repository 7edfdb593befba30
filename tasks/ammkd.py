"""Distil a lightweight retriever from several teachers whose weights follow their gradients (AMMKD-style).

    vlkd cache embeddings --teacher runs/a/student runs/b/student --data shards/train --views 4 --out runs/cache
    vlkd train ammkd data.train=shards/train data.val=shards/val teachers.refs=runs/a/student,runs/b/student \\
        teachers.views=4 teachers.folder=runs/cache out=runs/ammkd
    vlkd train ammkd smoke=true teachers.refs=first,second out=runs/smoke

Each teacher's stored embeddings are class vectors: the student's images are matched with the teacher's distribution
over its text vectors, the student's captions with that over its image vectors. The teachers' weights are found anew at
every step, for each tower, from the gradients at the student's embedding. The contrastive term stands outside of them.

AMMKD (Li et al., 2025, arXiv:2509.00039) has no public code, and its abstract is all that could be read; the weighting
follows AE-KD (Du et al., NeurIPS 2020), hence "-style". Both towers are trained, so search needs no teacher;
`report.asymmetric=true` also exports the student's image tower beside each teacher's text encoder.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial
from typing import Literal

from vlkd.distill.term import Term
from vlkd.engine.settings import Run
from vlkd.errors import UserError
from vlkd.objectives import class_kl, info_nce
from vlkd.weighting import Fixed, GradientBalanced, LossRelative, Weighting, fixed_weights, uniform_weights


@dataclass(frozen=True, kw_only=True)
class Method:
    """The objectives and the teachers' weights.

    Args:
        contrastive: weight of CLIP's loss on the captions, outside the teachers' weights.
        distillation: weight of the KL over class vectors, all teachers together.
        temperature: tau of that KL.
        weighting: "balanced" (min-norm at each step), "relative" (by the recent relative change of each teacher's
            loss), or "fixed" (`teachers.weights`; uniform without any).
        bound: C, the largest weight of one teacher when balanced; 1 is the min-norm point, 1/M uniform. A value below
            1/M counts as 1/M.
        normalised: balance directions instead of gradients.
        window: steps over which "relative" averages.
    """

    contrastive: float = 0.5
    distillation: float = 1.0
    temperature: float = 2.0
    weighting: Literal["balanced", "relative", "fixed"] = "balanced"
    bound: float = 0.6
    normalised: bool = False
    window: int = 500


@dataclass(frozen=True, kw_only=True)
class Ammkd(Run):
    """The shared settings and the method's."""

    out: str = "runs/ammkd"
    method: Method = field(default_factory=Method)


def config() -> Ammkd:
    """Gradient-balanced with C = 0.6; name the teachers."""
    return Ammkd()


def terms(cfg: Ammkd) -> tuple[Term, ...]:
    """The contrastive term, and per teacher one term for each tower.

    Raises:
        UserError: no teacher is named, or the temperature is not above 0.
    """
    if not cfg.method.temperature > 0:
        raise UserError(f"method.temperature={cfg.method.temperature}: expected more than 0.")
    if not cfg.teacher_names:
        raise UserError("AMMKD needs teachers; name one or several with teachers.refs=REF,REF.")
    contrastive = Term(
        name="contrastive",
        objective=info_nce,
        features=("student.image.embed", "student.text.embed", "student.logit_scale"),
        weight=cfg.method.contrastive,
        match=True,
        by_rows=True,
    )
    distilled = [
        Term(
            name=f"{teacher}/{side}",
            objective=partial(class_kl, tau=cfg.method.temperature),
            features=(
                f"projected.{side}.embed",
                f"teacher.{side}.embed",
                f"classes.{other}.embed",
                "teacher.logit_scale",
            ),
            weight=cfg.method.distillation,
            teacher=teacher,
        )
        for teacher in cfg.teacher_names
        for side, other in (("image", "text"), ("text", "image"))
    ]
    return tuple(term for term in (contrastive, *distilled) if term.weight)


def weighting(cfg: Ammkd) -> Weighting:
    """How the teachers' weights are found at each step.

    Raises:
        UserError: `teachers.weights` are given and would not be used, or a setting is outside its range.
    """
    teachers = len(cfg.teacher_names)
    method = cfg.method
    if cfg.teachers.weights and method.weighting != "fixed":
        raise UserError(
            f"teachers.weights are for method.weighting=fixed, found {method.weighting}; set one of the two."
        )
    return {
        "balanced": lambda: GradientBalanced(bound=max(method.bound, 1 / teachers), normalised=method.normalised),
        "relative": lambda: LossRelative(window=method.window),
        "fixed": lambda: Fixed(fixed_weights(cfg.teachers.weights or uniform_weights(teachers), teachers)),
    }[method.weighting]()
