"""Pretrain a CLIP-like student from streamed WebDataset shards, with or without teachers, with exact resume.

    vlkd prep scan shards/photos
    vlkd prep scan https://example.org/drawings/{000..099}.tar --out shards/drawings
    vlkd train pretrain data.train=shards/photos,shards/drawings data.weights=3,1 data.val=shards/val \\
        data.workers=8 train.samples=10000000 train.batch_size=4096 train.precision=bf16 out=runs/pretrain
    vlkd train pretrain data.train=shards/photos data.val=shards/val teachers.refs=runs/a/student \\
        teachers.folder=runs/cache method.matching=8 out=runs/distilled
    vlkd train pretrain smoke=true out=runs/smoke

Shards are read through the index of `vlkd prep scan`, in an order that is computed: the same command continues a killed
run in the middle of an epoch, on any number of workers or ranks, without a repeat or a gap. `data.weights` mixes the
sources. `method.loss=siglip` takes the sigmoid loss. Teachers are matched by their embeddings, `teachers.views=0` runs
them beside the student. `train.local_loss`, `train.shard`, `train.accumulate` and `train.spike_factor` are for large
batches, large models and long runs; `vlkd doctor --plan pretrain ...` tells beforehand what a run will take.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from vlkd.distill.term import Term
from vlkd.engine.settings import Data, Run, Train
from vlkd.errors import UserError
from vlkd.objectives import embedding_mse, info_nce, relational_kl, siglip


@dataclass(frozen=True, kw_only=True)
class Method:
    """The objectives and their weights.

    Args:
        loss: "clip" (softmax over the batch) or "siglip" (each pair on its own).
        contrastive: weight of that loss on the captions.
        matching: distance between the projected student's and the teachers' embeddings, of images and of captions.
        relational: KL between a teacher's and the student's image-caption similarities in the batch.
    """

    loss: Literal["clip", "siglip"] = "clip"
    contrastive: float = 1.0
    matching: float = 0.0
    relational: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Pretrain(Run):
    """The shared settings and the method's."""

    out: str = "runs/pretrain"
    data: Data = field(default_factory=lambda: Data(stream=True))
    train: Train = field(default_factory=lambda: Train(samples=10_000_000, batch_size=1024, ema=0.999))
    method: Method = field(default_factory=Method)


def config() -> Pretrain:
    """CLIP's loss on streamed shards."""
    return Pretrain()


def terms(cfg: Pretrain) -> tuple[Term, ...]:
    """The contrastive term, and per teacher those whose weight is not 0.

    Raises:
        UserError: a weight asks for a teacher and none is named, teachers are named and no weight asks for them, or the
            student lacks SigLIP's bias.
    """
    method = cfg.method
    asked = method.matching or method.relational
    if asked and not cfg.teacher_names:
        raise UserError("method.matching and relational match a teacher; name one with teachers.refs=REF.")
    if cfg.teacher_names and not asked:
        raise UserError("Teachers are named but matched by no term; set for instance method.matching=8.")
    if method.loss == "siglip" and cfg.model.logit_bias is None and not cfg.student.start:
        raise UserError("method.loss=siglip learns a bias; add model.logit_bias=-10 model.logit_scale=10, its start.")
    chosen = [contrastive(method)]
    for teacher in cfg.teacher_names:
        chosen += distilled(teacher, method)
    return tuple(term for term in chosen if term.weight)


def contrastive(method: Method) -> Term:
    """CLIP's or SigLIP's loss, with the scale (and bias) that it learns."""
    embeddings = ("student.image.embed", "student.text.embed", "student.logit_scale")
    objective, features = {
        "clip": (info_nce, embeddings),
        "siglip": (siglip, (*embeddings, "student.logit_bias")),
    }[method.loss]
    return Term(
        name="contrastive", objective=objective, features=features, weight=method.contrastive, match=True, by_rows=True
    )


def distilled(teacher: str, method: Method) -> list[Term]:
    """Embedding matching of images and of captions, and the relations between them."""
    matched = [
        Term(
            name=f"{teacher}/match_{side}",
            objective=embedding_mse,
            features=(f"projected.{side}.embed", f"teacher.{side}.embed"),
            weight=method.matching,
            teacher=teacher,
        )
        for side in ("image", "text")
    ]
    embeddings = (f"{model}.{side}.embed" for model in ("student", "teacher") for side in ("image", "text"))
    related = Term(
        name=f"{teacher}/relational",
        objective=relational_kl,
        features=(*embeddings, "student.logit_scale", "teacher.logit_scale"),
        weight=method.relational,
        teacher=teacher,
    )
    return [*matched, related]
