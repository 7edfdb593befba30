"""Make a CLIP-like teacher for your pairs from pretrained image and text towers.

    vlkd train prepare_teacher data.train=shards/train data.val=shards/val model.image=tf_efficientnet_lite0 \\
        model.image_weights=lite0.safetensors model.text=minilm-l6-v2 out=runs/teacher
    vlkd train prepare_teacher smoke=true out=runs/smoke

By default the towers stay frozen: their features of `teachers.views` augmented views are computed once, and only the
projections into the joint space are trained, in minutes on a CPU. `student.frozen_towers=false` fine-tunes everything.
The teacher is the folder `student` of the run, with golden embeddings that are recomputed whenever it is loaded.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from vlkd.data.views import ViewSettings
from vlkd.distill.term import Term
from vlkd.engine.settings import Run, Student, Teachers, Train
from vlkd.models.spec import CompositeSpec
from vlkd.objectives import info_nce


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


def config() -> PrepareTeacher:
    """Frozen towers, trained projections."""
    return PrepareTeacher()


def terms(cfg: PrepareTeacher) -> tuple[Term, ...]:  # noqa: ARG001 - a recipe's terms may not depend on its settings
    """Contrastive training on the captions; equal captions are positives."""
    return (
        Term(
            name="contrastive",
            objective=info_nce,
            features=("student.image.embed", "student.text.embed", "student.logit_scale"),
            match=True,
        ),
    )
