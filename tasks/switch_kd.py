"""Distil a small model that answers questions about pictures from a larger one, through its own language model too.

    vlkd train switch_kd teacher.ref=runs/teacher/student data.train=vqa/train data.val=vqa/val out=runs/switch
    vlkd train switch_kd method.switch=0 method.match=kl teacher.ref=TEACHER data.train=vqa/train out=runs/token_kl
    vlkd train switch_kd smoke=true teacher.ref=any out=runs/smoke

With V, P, L for vision tower, projector and language model, and S, T for student and teacher,

    L = CE + align * DBiLD(z^T, z^S) + switch * DBiLD(z^T, z^switch),   z^switch = L^T(P^T(V^S(x)))

on answer tokens: the teacher's frozen language model reads what the student's vision tower sees, and tells it by its
gradient what it missed. Needs equally many visual tokens of equal width, one tokenizer, and a student's vision tower
that learns; each is checked at the start, and so is that the teacher looks at the picture at all.

Source: Switch-KD (Sun et al., 2026, arXiv:2604.14629, equations 1, 4 and 6), which leaves open: the bounds of k (ours:
3 to 256; with k = 2 the loss vanishes), rates, and which stage is distilled (ours: the last of three). What it is
compared with are settings of this file, at equal student samples:

    answers alone          method.align=0 method.switch=0
    token KL               method.switch=0 method.match=kl
    reverse token KL       method.switch=0 method.match=reverse_kl
    TAID                   method.switch=0 method.match=taid
    DBiLD without switch   method.switch=0
    BiLD                   method.switch=0 method.k=8 method.reverse=false
    visual tokens          method.visual=1
    relations              method.relation=1
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial
from typing import Literal

from torch import Tensor

from vlkd.distill.token_terms import TokenTerm
from vlkd.engine.vlm.settings import StageSettings, VlmRun
from vlkd.engine.vlm.stages import Stage
from vlkd.errors import UserError
from vlkd.objectives import dbild, relation_loss, taid_kl, token_cross_entropy, token_kl, visual_feature_matching


@dataclass(frozen=True, kw_only=True)
class Method:
    """The weights of the terms, and how logits are compared.

    Args:
        supervised: of the cross-entropy of the answers.
        align: lambda_1, of what compares the student's logits with the teacher's.
        switch: lambda_2, of DBiLD between the teacher's logits and those of the switch path.
        match: what `align` weighs: "dbild", "kl" or "reverse_kl" of all tokens, or "taid", the KL towards a target that
            moves from the student to the teacher.
        visual: of the squared difference of the two vision towers' tokens, which must be of equal width.
        relation: of one minus the cosine between the projected visual tokens' similarities, in the manner of LLaVA-KD.
        tau: temperature of DBiLD and of both KL; the KL carry tau^2, DBiLD as published does not.
        k_min: the smallest number of logits that DBiLD compares.
        k_max: the largest. Where every knee is beyond it, it is the k of all positions and Kneedle chooses nothing.
        k: one number for all instead of Kneedle's; 0 lets Kneedle choose.
        reverse: DBiLD's KL from the student to the teacher, as in Switch-KD; otherwise forward, as in BiLD.
        pairs: one softmax over all pairs ("upper"), or one for each logit against those below it ("rows").
        on: the curve whose knee is k: of "logits" or of "probabilities".
        taid_start: the teacher's share at the beginning of "taid"; it rises evenly to 1.
    """

    supervised: float = 1.0
    align: float = 1.0
    switch: float = 1.0
    match: Literal["dbild", "kl", "reverse_kl", "taid"] = "dbild"
    visual: float = 0.0
    relation: float = 0.0
    tau: float = 3.0
    k_min: int = 3
    k_max: int = 256
    k: int = 0
    reverse: bool = True
    pairs: Literal["upper", "rows"] = "upper"
    on: Literal["logits", "probabilities"] = "logits"
    taid_start: float = 0.4


@dataclass(frozen=True, kw_only=True)
class SwitchKd(VlmRun):
    """The shared settings, the stages' and the method's."""

    out: str = "runs/switch_kd"
    projector: StageSettings = field(default_factory=lambda: StageSettings(samples=0, parts=("projector",)))
    supervised: StageSettings = field(default_factory=lambda: StageSettings(samples=0))
    distilled: StageSettings = field(default_factory=lambda: StageSettings(samples=40_000))
    method: Method = field(default_factory=Method)


def config() -> SwitchKd:
    """The distilled stage alone, lambda_1 = lambda_2 = 1, tau = 3."""
    return SwitchKd()


def stages(cfg: SwitchKd) -> tuple[Stage, ...]:
    """The projector from answers, all parts from answers, all parts from answers and teacher."""
    answers = TokenTerm(name="answers", objective=token_cross_entropy, features=("answer.logits", "answer.labels"))
    return (
        Stage(name="projector", settings=cfg.projector, terms=(answers,)),
        Stage(name="supervised", settings=cfg.supervised, terms=(answers,)),
        Stage(name="distilled", settings=cfg.distilled, terms=terms(cfg.method)),
    )


def terms(method: Method) -> tuple[TokenTerm, ...]:
    """Those that have a weight.

    Raises:
        UserError: a weight is below 0.
    """
    difference = partial(
        dbild,
        tau=method.tau,
        k_min=method.k_min,
        k_max=method.k_max,
        k=method.k or None,
        reverse=method.reverse,
        pairs=method.pairs,
        on=method.on,
    )
    align = {
        "dbild": difference,
        "kl": partial(token_kl, tau=method.tau),
        "reverse_kl": partial(token_kl, tau=method.tau, reverse=True),
        "taid": partial(taid, start=method.taid_start),
    }[method.match]
    moving = ("progress",) if method.match == "taid" else ()
    every = (
        TokenTerm(name="answers", objective=token_cross_entropy, features=("answer.logits", "answer.labels"),
                  weight=method.supervised),
        TokenTerm(name="align", objective=align, features=("teacher.answer.logits", "answer.logits", *moving),
                  weight=method.align),
        TokenTerm(name="switch", objective=difference, features=("teacher.answer.logits", "switch.logits"),
                  weight=method.switch),
        TokenTerm(name="visual", objective=visual_feature_matching, features=("image.tokens", "teacher.image.tokens"),
                  weight=method.visual),
        TokenTerm(name="relation", objective=relation_loss, features=("teacher.visual.tokens", "visual.tokens"),
                  weight=method.relation),
    )  # fmt: skip
    for term in every:
        if not term.weight >= 0:
            raise UserError(f"The term {term.name!r} has the weight {term.weight}; expected 0 or more.")
    return tuple(term for term in every if term.weight)


def taid(teacher_AV: Tensor, student_AV: Tensor, progress: float, *, start: float) -> Tensor:
    """TAID's KL with the teacher's share rising evenly from `start` to 1; its adaptive schedule is left out: (A,)."""
    return taid_kl(teacher_AV, student_AV, t=start + (1 - start) * progress)
