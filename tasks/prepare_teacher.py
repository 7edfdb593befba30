"""Make a CLIP-like teacher for your pairs from pretrained image and text towers.

    vlkd train prepare_teacher data.train=shards/train data.val=shards/val model.image=tf_efficientnet_lite0 \\
        model.image_weights=lite0.safetensors model.text=minilm-l6-v2 method.fusion=1 out=runs/teacher
    vlkd train prepare_teacher smoke=true out=runs/smoke

By default the towers stay frozen: their features of `teachers.views` augmented views are computed once, and only the
projections into the joint space are trained, in minutes on a CPU. `student.frozen_towers=false` fine-tunes everything.
`method.fusion` adds image-text matching through a feature-fusion network, AMMKD-style (arXiv 2509.00039): it reads
image and text tokens through the same projections, and is dropped when they are trained.
The teacher is the folder `student` of the run, with golden embeddings that are recomputed whenever it is loaded.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from vlkd.data.views import ViewSettings
from vlkd.distill.fusion import FusionMatching
from vlkd.distill.term import Term
from vlkd.engine.settings import Run, Student, Teachers, Train
from vlkd.models.spec import CompositeSpec
from vlkd.objectives import info_nce


@dataclass(frozen=True, kw_only=True)
class Method:
    """What is trained beside the contrastive loss.

    Args:
        fusion: weight of image-text matching through the fusion network; 0 leaves it out. With frozen towers it also
            holds their tokens in memory.
        fusion_layers: how often the network's two modalities read each other.
        fusion_dropout: inside the network.
    """

    fusion: float = 0.0
    fusion_layers: int = 1
    fusion_dropout: float = 0.1


@dataclass(frozen=True, kw_only=True)
class PrepareTeacher(Run):
    """The shared settings, with a teacher's defaults."""

    out: str = "runs/teacher"
    views: ViewSettings = field(default_factory=lambda: ViewSettings(crop_scale=(0.6, 1.0)))
    model: CompositeSpec = field(
        default_factory=lambda: CompositeSpec(
            image="tf_efficientnet_lite0",
            image_projection="mlp",
            text_projection="mlp",
            projection_dropout=0.3,
            width=256,
            context_length=64,
        )
    )
    student: Student = field(default_factory=lambda: Student(frozen_towers=True))
    teachers: Teachers = field(default_factory=lambda: Teachers(views=4))
    train: Train = field(
        default_factory=lambda: Train(samples=100_000, batch_size=512, lr=1e-3, ema=0.99, eval_samples=20_000)
    )
    method: Method = field(default_factory=Method)


def config() -> PrepareTeacher:
    """Frozen towers, trained projections."""
    return PrepareTeacher()


def terms(cfg: PrepareTeacher) -> tuple[Term, ...]:
    """Contrastive training on the captions, and image-text matching if asked for; equal captions are positives."""
    contrastive = Term(
        name="contrastive",
        objective=info_nce,
        features=("student.image.embed", "student.text.embed", "student.logit_scale"),
        match=True,
        by_rows=True,
    )
    return (contrastive, fusion(cfg)) if cfg.method.fusion else (contrastive,)


def fusion(cfg: PrepareTeacher) -> Term:
    """Whether the fusion network tells the batch's pairs from hard negatives; see `FusionMatching` for our reading."""
    method = cfg.method
    return Term(
        name="fusion",
        objective=FusionMatching(cfg.model.width, layers=method.fusion_layers, dropout=method.fusion_dropout),
        features=(
            "student.image.token_embeds",
            "student.text.token_embeds",
            "student.text.mask",
            "student.image.embed",
            "student.text.embed",
            "student.logit_scale",
        ),
        weight=method.fusion,
        match=True,
    )
