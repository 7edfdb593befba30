"""Distil a lightweight retriever from one or several dual encoders, or train it without any (the baseline).

    vlkd train retriever data.train=shards/train data.val=shards/val teachers.refs=runs/teacher/student \\
        method.matching=8 method.relational=2 out=runs/retriever
    vlkd train retriever smoke=true out=runs/smoke

Four objectives, each with its weight (0 leaves it out): contrastive training on the captions, matching of the teachers'
embeddings, contrastive-relational KL and interactive contrast (the CLIP-KD family, arXiv 2307.12732). Both towers are
trained, so search needs no teacher; `report.asymmetric=true` also exports the student's image tower beside each
teacher's text encoder. Images without captions take part in the matching of image embeddings.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from vlkd.distill.term import Term
from vlkd.engine.settings import Run
from vlkd.errors import UserError
from vlkd.objectives import embedding_cosine, embedding_mse, info_nce, interactive_contrastive, relational_kl


@dataclass(frozen=True, kw_only=True)
class Method:
    """Weights of the objectives; those that match a teacher need `teachers.refs`.

    Args:
        contrastive: CLIP's loss on the captions.
        matching: distance between the projected student's and the teacher's embeddings, of images and of captions.
        distance: "mse" (summed over D, of unit vectors) or "cosine" (half of it).
        relational: KL between the teacher's and the student's image-caption similarities in the batch.
        interactive: the student's images against the teacher's captions, and the other way round.
    """

    contrastive: float = 1.0
    matching: float = 0.0
    distance: Literal["mse", "cosine"] = "mse"
    relational: float = 0.0
    interactive: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Retriever(Run):
    """The shared settings and the method's."""

    out: str = "runs/retriever"
    method: Method = field(default_factory=Method)


def config() -> Retriever:
    """The baseline's settings; name teachers and weights to distil."""
    return Retriever()


def terms(cfg: Retriever) -> tuple[Term, ...]:
    """One contrastive term, and per teacher those whose weight is not 0.

    Raises:
        UserError: a weight asks for a teacher and none is named, or teachers are named and no weight asks for them.
    """
    method = cfg.method
    asked = any((method.matching, method.relational, method.interactive))
    if asked and not cfg.teacher_names:
        raise UserError("method.matching, relational and interactive match a teacher; name one with teachers.refs=REF.")
    if cfg.teacher_names and not asked:
        raise UserError("Teachers are named but matched by no term; set for instance method.matching=8.")
    chosen = [
        Term(
            name="contrastive",
            objective=info_nce,
            features=("student.image.embed", "student.text.embed", "student.logit_scale"),
            weight=method.contrastive,
            match=True,
            by_rows=True,
        )
    ]
    for teacher in cfg.teacher_names:
        chosen += [*matching(teacher, method), *relations(teacher, method)]
    return tuple(term for term in chosen if term.weight)


def matching(teacher: str, method: Method) -> list[Term]:
    """Embedding matching: an image term that needs no caption, and a caption term."""
    objective = embedding_mse if method.distance == "mse" else embedding_cosine
    return [
        Term(
            name=f"{teacher}/match_{side}",
            objective=objective,
            features=(f"projected.{side}.embed", f"teacher.{side}.embed"),
            weight=method.matching,
            teacher=teacher,
        )
        for side in ("image", "text")
    ]


def relations(teacher: str, method: Method) -> list[Term]:
    """What is matched between samples: similarity distributions, and contrast across the two models."""
    return [
        Term(
            name=f"{teacher}/relational",
            objective=relational_kl,
            features=(
                "student.image.embed",
                "student.text.embed",
                "teacher.image.embed",
                "teacher.text.embed",
                "student.logit_scale",
                "teacher.logit_scale",
            ),
            weight=method.relational,
            teacher=teacher,
        ),
        *(
            Term(
                name=f"{teacher}/interactive_{side}",
                objective=interactive_contrastive,
                features=(f"projected.{side}.embed", f"teacher.{other}.embed", "student.logit_scale"),
                weight=method.interactive,
                teacher=teacher,
                match=True,
                by_rows=True,
            )
            for side, other in (("image", "text"), ("text", "image"))
        ),
    ]
