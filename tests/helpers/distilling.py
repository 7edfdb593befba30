"""A student without batch statistics, teachers of other widths, tokenizers and resolutions, and their batches."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial

import torch
from helpers.tiny_models import CAPTIONS, tiny_composite, tiny_tokenizer
from torch import nn

from vlkd.data.samples import Batch, Consumer, SampleSequence
from vlkd.data.sources import Pairs
from vlkd.data.views import ViewSettings
from vlkd.distill.term import Term
from vlkd.models.base import DualEncoderModule
from vlkd.models.composite import CompositeModel
from vlkd.models.spec import CompositeSpec, build_composite
from vlkd.models.tokenizer import train_tokenizer
from vlkd.objectives import class_kl, embedding_mse, info_nce, interactive_contrastive, relational_kl, siglip

TEXTS: Sequence[Sequence[str]] = (CAPTIONS[:2], CAPTIONS[2:3], (), CAPTIONS[3:], CAPTIONS[2:3], (), CAPTIONS[:1], ())
"""Three images are unlabelled; two others share their only caption."""

VIEWS = ViewSettings(color=0.3)

STUDENT_PAIR = ("student.image.embed", "student.text.embed")


CONTRASTIVE = Term(
    name="contrastive",
    objective=info_nce,
    features=(*STUDENT_PAIR, "student.logit_scale"),
    match=True,
)


def tiny_student(seed: int = 0, logit_bias: float | None = None) -> CompositeModel:
    """32 px, width 12, timm's `test_vit`: layer norms alone, so that rows do not depend on their batch."""
    torch.manual_seed(seed)
    spec = CompositeSpec(
        image="test_vit",
        image_kwargs='{"img_size": 32}',
        image_size=32,
        text_width=16,
        text_layers=1,
        text_heads=2,
        context_length=12,
        width=12,
        logit_bias=logit_bias,
    )
    model = build_composite(spec, tokenizer=tiny_tokenizer(), name="student")
    assert not any(isinstance(module, nn.BatchNorm2d) for module in model.modules())
    return model


def tiny_teachers() -> dict[str, CompositeModel]:
    """Two of different resolution, width, context length and tokenizer, both unlike the student."""
    first = tiny_composite(seed=1, width=20, image_size=40)
    torch.manual_seed(2)
    spec = CompositeSpec(
        image="resnet10t",
        image_kwargs='{"channels": [8, 8, 8, 8], "stem_width": 8}',
        image_size=48,
        text_width=24,
        text_layers=1,
        text_heads=2,
        context_length=7,
        width=9,
        logit_scale=30.0,
    )
    tokenizer = train_tokenizer(CAPTIONS, vocab_size=60, min_frequency=1)
    return {"one": first, "two": build_composite(spec, tokenizer=tokenizer, name="two").eval()}


def terms_of(teacher: str = "one") -> tuple[Term, ...]:
    """Contrastive with matches, projected matching of images and texts, relations."""
    return (
        CONTRASTIVE,
        Term(
            name="images",
            objective=embedding_mse,
            features=("projected.image.embed", "teacher.image.embed"),
            teacher=teacher,
            weight=2.0,
        ),
        Term(
            name="texts",
            objective=embedding_mse,
            features=("projected.text.embed", "teacher.text.embed"),
            teacher=teacher,
            weight=0.5,
        ),
        Term(
            name="relations",
            objective=relational_kl,
            features=(
                *STUDENT_PAIR,
                "teacher.image.embed",
                "teacher.text.embed",
                "student.logit_scale",
                "teacher.logit_scale",
            ),
            teacher=teacher,
        ),
    )


def class_terms(*teachers: str) -> tuple[Term, ...]:
    """Per teacher the KL over class vectors, of images and of captions."""
    return tuple(
        Term(
            name=f"{teacher}/{side}",
            objective=partial(class_kl, tau=2.0),
            features=(
                f"projected.{side}.embed",
                f"teacher.{side}.embed",
                f"classes.{other}.embed",
                "teacher.logit_scale",
            ),
            teacher=teacher,
        )
        for teacher in teachers
        for side, other in (("image", "text"), ("text", "image"))
    )


def by_rows_terms(objective: str, match: bool) -> tuple[Term, ...]:
    """Terms that ranks may share by rows: "info_nce", "siglip", "interactive" (two teachers) or "images" (no texts)."""
    if objective in ("info_nce", "siglip"):
        bias = ("student.logit_bias",) if objective == "siglip" else ()
        return (
            Term(
                name=objective,
                objective=siglip if bias else info_nce,
                features=(*STUDENT_PAIR, "student.logit_scale", *bias),
                match=match,
                by_rows=True,
            ),
        )
    sides = (("image", "text"), ("text", "image")) if objective == "interactive" else (("image", "image"),)
    return tuple(
        Term(
            name=f"{teacher}/{side}~{other}",
            objective=interactive_contrastive,
            features=(f"projected.{side}.embed", f"teacher.{other}.embed", "student.logit_scale"),
            teacher=teacher,
            match=match,
            by_rows=True,
        )
        for teacher in ("one", "two")
        for side, other in sides
    )


def sequence_of(
    pairs: Pairs, models: Mapping[str, DualEncoderModule], *, view_cycle: int = 0, settings: ViewSettings = VIEWS
) -> SampleSequence:
    """Samples for the student and the teachers that run beside it, all with pixels and text."""
    consumers = {
        name: Consumer(preprocessing=model.preprocessing, image=True, text=True, student=name == "student")
        for name, model in models.items()
    }
    return SampleSequence(pairs, consumers, settings, seed=4, view_cycle=view_cycle)


def batch_of(sequence: SampleSequence, rows: Sequence[int]) -> Batch:
    """The batch of these rows of the table, in the first epoch."""
    position = {sequence.row_and_view(number)[0]: number for number in range(len(sequence.table))}
    return sequence.collate([sequence[position[row]] for row in rows])
