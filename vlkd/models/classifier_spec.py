"""Building a classifier from settings: on any timm model, or on the image side of a dual encoder."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from vlkd.errors import UserError
from vlkd.models.classifier import FORMAT, VERSION, Classifier
from vlkd.models.composite import load_composite
from vlkd.models.preprocessing import PixelSettings, timm_settings
from vlkd.models.towers import build_image_tower, load_timm_weights


@dataclass(frozen=True, kw_only=True)
class ClassifierSpec:
    """What to build, in strings and numbers alone.

    Args:
        image: timm's name of the trunk.
        image_kwargs: a JSON object of further arguments of `timm.create_model`.
        image_weights: safetensors with timm's keys, or a vlkd folder whose timm tower is taken; "" starts at random.
        start: a vlkd dual-encoder folder whose image tower and projection are the trunk, in place of the three above.
        image_size: pixels of a side; 0 is that of the start, or timm's own.
        crop_fraction: see `PixelSettings`; 0 is that of the start, or timm's own with weights and 1 without.
        dropout: of the features before the heads.
        heads: "two", or "one" that learns from labels and teacher alike.
        language_init: the heads start from the text vectors of the start, so that it begins as a zero-shot classifier.
        align: the teacher head gives cosines over zeta with its rows, see `CosineHead`; needs `language_init`.
    """

    image: str = "mobilenetv3_small_100"
    image_kwargs: str = ""
    image_weights: str = ""
    start: str = ""
    image_size: int = 0
    crop_fraction: float = 0.0
    dropout: float = 0.0
    heads: Literal["two", "one"] = "two"
    language_init: bool = False
    align: bool = False


def build_classifier(
    spec: ClassifierSpec,
    classes: Sequence[str],
    *,
    class_vectors: Tensor | None = None,
    zeta: float = 0.01,
    name: str = "student",
) -> Classifier:
    """Build a classifier in training mode; what has no weights yet is random, from torch's global generator.

    Two heads start with alpha = 0.5 and beta = 1, which answer as a single head under lambda = 0.5 would (theorem 1 of
    DHO, Kang et al., 2025, arXiv:2505.07675).

    Args:
        spec: what to build.
        classes: C names, in the order of the labels.
        class_vectors: the start's own text vectors of the classes, (C, F), for `language_init`; heads start with these
            rows and without bias.
        zeta: the temperature of the aligned head, above 0; 1 / logit_scale of the teacher.
        name: for tables and errors.

    Raises:
        UserError: settings contradict each other, or a name, file, size or vector does not fit.
    """
    check_spec(spec, class_vectors)
    tower, projection, image, settings = start_side(spec) if spec.start else timm_side(spec)
    layout = {
        "format": FORMAT,
        "version": VERSION,
        "image": image,
        "heads": spec.heads,
        "align": spec.align,
        "zeta": float(zeta),
        "dropout": float(spec.dropout),
        "alpha": 0.5 if spec.heads == "two" else 1.0,
        "beta": 1.0,
        "classes": classes if isinstance(classes, str) else list(classes),
        "preprocessing": asdict(settings),
        "notes": {},
    }
    model = Classifier(name=name, layout=layout, tower=tower)
    if projection is not None:
        model.trunk[1].load_state_dict(projection.state_dict())
    if class_vectors is not None:
        start_heads(model, class_vectors)
    return model.train()


def check_spec(spec: ClassifierSpec, class_vectors: Tensor | None) -> None:
    """Raise `UserError` where settings contradict each other."""
    fresh = ClassifierSpec()
    chosen = [key for key in ("image", "image_kwargs", "image_weights") if getattr(spec, key) != getattr(fresh, key)]
    if spec.start and chosen:
        raise UserError(f"Found start={spec.start} beside {', '.join(chosen)}; expected one trunk, leave one out.")
    if spec.language_init and not spec.start:
        raise UserError(
            "Found language_init without start: a trunk without a text tower has no text vectors; name a dual encoder "
            "in start, or leave language_init out."
        )
    if spec.align and not spec.language_init:
        raise UserError("Found align without language_init: cosines with random rows mean nothing; set both or none.")
    if spec.language_init != (class_vectors is not None):
        found = "without" if spec.language_init else "not set, but found"
        raise UserError(
            f"language_init is {'set ' if spec.language_init else ''}{found} class vectors; give both or none."
        )


def timm_side(spec: ClassifierSpec) -> tuple[nn.Module, None, dict[str, Any], PixelSettings]:
    """The tower, its projection, the image part of the layout, and how the input is prepared."""
    tower = build_image_tower(spec.image, spec.image_kwargs)
    if spec.image_weights:
        load_timm_weights(tower, spec.image_weights)
    # Crop fractions and modes are habits of one set of pretrained weights; from scratch the whole shorter side is seen.
    crop_fraction = spec.crop_fraction or (0.0 if spec.image_weights else 1.0)
    crop_mode = "" if spec.image_weights else "center"
    settings = timm_settings(tower, size=spec.image_size, crop_fraction=crop_fraction, crop_mode=crop_mode)
    image = {
        "timm": spec.image,
        "kwargs": json.loads(spec.image_kwargs or "{}"),
        "pretrained": bool(spec.image_weights),
        "projection": [],
        "projection_dropout": 0.0,
    }
    return tower, None, image, settings


def start_side(spec: ClassifierSpec) -> tuple[nn.Module, nn.Module, dict[str, Any], PixelSettings]:
    """As `timm_side`, from a dual encoder."""
    start = load_composite(spec.start)
    settings = replace(
        start.settings,
        size=spec.image_size or start.settings.size,
        crop_fraction=spec.crop_fraction or start.settings.crop_fraction,
    )
    return start.image_tower, start.image_projection, dict(start.layout["image"]), settings


def start_heads(model: Classifier, class_vectors: Tensor) -> None:
    """Give the heads these rows and no bias.

    DHO's paper says "the text vectors"; its public code takes the student's own, as averages of embeddings at their
    length, and we take whatever length the vectors have.

    Raises:
        UserError: they are not (C, F), or one has no length or is not finite.
    """
    expected = (len(model.classes), model.width)
    if tuple(class_vectors.shape) != expected:
        raise UserError(
            f"The class vectors are {tuple(class_vectors.shape)}, expected {expected}: one row per class, as wide as "
            "the trunk's features; take them from the text tower of the start."
        )
    lengths = class_vectors.float().norm(dim=1)
    if not bool(((lengths > 0) & lengths.isfinite()).all()):
        raise UserError("A class vector has length 0 or is not finite; expected vectors of a working text tower.")
    with torch.no_grad():
        for head in (model.label_head, model.teacher_head):
            if head is None:
                continue
            head.weight.copy_(class_vectors)
            if head.bias is not None:
                head.bias.zero_()
