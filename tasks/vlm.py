"""Train a small model that answers questions about pictures: vision tower, projector and language model.

    vlkd train vlm data.train=vqa/train data.val=vqa/val supervised.samples=40000 out=runs/vlm
    vlkd train vlm start=LLAVA_FOLDER data.train=mine.json projector.samples=0 supervised.lr=2e-5 out=runs/tuned
    vlkd train vlm smoke=true out=runs/smoke

The two stages of LLaVA (Liu et al., 2023, arXiv:2304.08485): first the projector alone, then everything, from the
cross-entropy of the answers' tokens. `data.train` takes LLaVA files and VQA shards; `vlkd prep easy_vqa`,
`scene_questions` and `box_questions` write some. The student is a folder that `vlkd eval vqa`, `vlkd predict` and, with
a CLIP or SigLIP tower, plain transformers open.

A random language model learns to read a pretrained tower before it pays to move that: at rates that suit the one, the
other forgets what no answer asked for yet.

    vlkd train vlm model.vision=timm:NAME model.vision_weights=FILE data.train=vqa/train projector.samples=24000 \\
        projector.parts=projector,language supervised.samples=10000 supervised.vision_lr=2e-4 out=runs/vlm
"""

from __future__ import annotations

from dataclasses import dataclass, field

from vlkd.distill.token_terms import TokenTerm
from vlkd.engine.vlm.settings import StageSettings, VlmRun
from vlkd.engine.vlm.stages import Stage
from vlkd.objectives import token_cross_entropy


@dataclass(frozen=True, kw_only=True)
class Vlm(VlmRun):
    """The shared settings and the stages'."""

    out: str = "runs/vlm"
    projector: StageSettings = field(default_factory=lambda: StageSettings(samples=0, parts=("projector",)))
    supervised: StageSettings = field(default_factory=lambda: StageSettings(samples=40_000))


def config() -> Vlm:
    """Everything learns from the first step; `projector.samples` puts LLaVA's first stage in front."""
    return Vlm()


def stages(cfg: Vlm) -> tuple[Stage, ...]:
    """The projector alone, then all parts."""
    answers = TokenTerm(name="answers", objective=token_cross_entropy, features=("answer.logits", "answer.labels"))
    return (
        Stage(name="projector", settings=cfg.projector, terms=(answers,)),
        Stage(name="supervised", settings=cfg.supervised, terms=(answers,)),
    )
