"""Building a composite model from settings: a student from scratch or from pretrained towers, or a new teacher."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from copy import deepcopy
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from vlkd.errors import UserError
from vlkd.models.composite import FORMAT, VERSION, CompositeModel, load_reference
from vlkd.models.heads import LinearHead
from vlkd.models.preprocessing import CompositePreprocessing, timm_settings
from vlkd.models.tokenizer import BorrowedTokenizer, CompactTokenizer, TextTokenizer, TransformersTokenizer
from vlkd.models.towers import (
    CompactText,
    TransformersText,
    build_image_tower,
    build_transformers_text,
    load_timm_weights,
    set_dropout,
)


@dataclass(frozen=True, kw_only=True)
class CompositeSpec:
    """What to build, in strings and numbers alone.

    Args:
        image: timm's name of the image tower.
        image_kwargs: a JSON object of further arguments of `timm.create_model`.
        image_weights: safetensors with timm's keys, or a vlkd folder whose timm tower is taken; "" starts at random.
        image_size: pixels of a side; 0 is timm's own size.
        crop_fraction: see `PixelSettings`; 0 is timm's own with pretrained weights and 1 without.
        text: "compact", or a transformers folder whose weights and tokenizer start the text tower.
        text_pooling: "mean" or "cls", for a transformers folder.
        text_width: C of the compact tower.
        text_layers: its layers.
        text_heads: its attention heads.
        tokenizer: the compact tower's tokenizer.json.
        context_length: the largest number of tokens of a text.
        dropout: of the text tower; None keeps the probabilities of a transformers folder and is 0 for the compact one.
        width: D, the joint width.
        image_projection: "linear", "mlp" or "none".
        text_projection: the same.
        projection_dropout: inside "mlp" projections.
        logit_scale: the initial factor on cosines (CLIP starts at 1/0.07).
        logit_bias: the initial bias for a sigmoid loss (SigLIP starts at -10); None has none.
    """

    image: str = "resnet10t"
    image_kwargs: str = ""
    image_weights: str = ""
    image_size: int = 0
    crop_fraction: float = 0.0
    text: str = "compact"
    text_pooling: str = "mean"
    text_width: int = 256
    text_layers: int = 4
    text_heads: int = 4
    tokenizer: str = ""
    context_length: int = 32
    dropout: float | None = None
    width: int = 256
    image_projection: str = "linear"
    text_projection: str = "linear"
    projection_dropout: float = 0.0
    logit_scale: float = 1 / 0.07
    logit_bias: float | None = None


def build_composite(
    spec: CompositeSpec, *, tokenizer: CompactTokenizer | None = None, name: str = "student"
) -> CompositeModel:
    """Build a model; towers without pretrained weights are random, from torch's global generator.

    Args:
        spec: what to build.
        tokenizer: the compact tower's tokenizer, in place of the file that `spec.tokenizer` names.
        name: for tables and errors.

    Raises:
        UserError: a name, file, size or weight does not fit.
    """
    if spec.context_length < 2 or spec.width < 1 or not spec.logit_scale > 0:
        raise UserError(
            f"Found context_length={spec.context_length}, width={spec.width}, logit_scale={spec.logit_scale}; "
            "expected at least 2, at least 1, and more than 0."
        )
    image_tower = build_image_tower(spec.image, spec.image_kwargs)
    if spec.image_weights:
        load_timm_weights(image_tower, spec.image_weights)
    # Crop fractions and modes are habits of one set of pretrained weights; from scratch the whole shorter side is seen.
    crop_fraction = spec.crop_fraction or (0.0 if spec.image_weights else 1.0)
    crop_mode = "" if spec.image_weights else "center"
    settings = timm_settings(image_tower, size=spec.image_size, crop_fraction=crop_fraction, crop_mode=crop_mode)
    text_tower, text_tokenizer, text = build_text(spec, tokenizer)
    layout = {
        "format": FORMAT,
        "version": VERSION,
        "image": {
            "timm": spec.image,
            "kwargs": json.loads(spec.image_kwargs or "{}"),
            "pretrained": bool(spec.image_weights),
            "projection": [[spec.image_projection, spec.width]],
            "projection_dropout": spec.projection_dropout,
        },
        "text": text
        | {"projection": [[spec.text_projection, spec.width]], "projection_dropout": spec.projection_dropout},
        "width": spec.width,
        "context_length": spec.context_length,
        "logit_bias": spec.logit_bias is not None,
        "preprocessing": asdict(settings),
    }
    model = CompositeModel(
        name=name,
        layout=layout,
        image_tower=image_tower,
        text_tower=text_tower,
        preprocessing=CompositePreprocessing(settings, text_tokenizer, spec.context_length),
    )
    torch.nn.init.constant_(model.log_logit_scale, math.log(spec.logit_scale))
    if model.logit_bias is not None and spec.logit_bias is not None:
        torch.nn.init.constant_(model.logit_bias, spec.logit_bias)
    return model


def build_text(
    spec: CompositeSpec, tokenizer: CompactTokenizer | None
) -> tuple[CompactText | TransformersText, TextTokenizer, dict[str, Any]]:
    """The text tower, its tokenizer, and its part of the layout."""
    if spec.text == "compact":
        own = tokenizer or CompactTokenizer.load(spec.tokenizer)
        sizes = {
            "vocab_size": own.vocab_size,
            "width": spec.text_width,
            "layers": spec.text_layers,
            "heads": spec.text_heads,
        }
        dropout = spec.dropout or 0.0
        tower = CompactText(**sizes, context_length=spec.context_length, dropout=dropout)
        return tower, own, {"kind": "compact", **sizes, "dropout": dropout}
    pretrained = build_transformers_text(spec.text, pooling=spec.text_pooling, weights=True)
    positions = getattr(pretrained.config, "max_position_embeddings", spec.context_length)
    if spec.context_length > positions:
        raise UserError(f"Found context_length={spec.context_length}; {spec.text} has at most {positions} positions.")
    if spec.dropout is not None:
        set_dropout(pretrained, spec.dropout)
    text = {"kind": "transformers", "pooling": spec.text_pooling, "dropout": spec.dropout}
    return pretrained, TransformersTokenizer.load(spec.text), text


def with_text_of(model: CompositeModel, ref: str, *, heads: Sequence[LinearHead] = ()) -> CompositeModel:
    """The model's image side beside another model's text side, for asymmetric search.

    Args:
        model: the student; it is copied, not changed.
        ref: the model that lends its text side, such as the teacher; a folder is kept as an absolute path.
        heads: linear maps after the student's image projection, such as the distiller's projection to the teacher.

    Raises:
        UserError: the reference cannot be loaded, or the widths do not meet.
    """
    if Path(ref).is_dir():
        ref = str(Path(ref).resolve())
    layout = deepcopy(model.layout)
    layout["image"]["projection"] += [["linear", head.out_features] for head in heads]
    layout["width"] = layout["image"]["projection"][-1][1]
    layout["text"] = {"kind": "reference", "ref": ref}
    reference = load_reference(ref, Path(), layout["width"])
    tokenizer = BorrowedTokenizer(reference.preprocessing)
    context_length = reference.preprocessing.context_length
    result = CompositeModel(
        name=model.name,
        layout=layout,
        image_tower=deepcopy(model.image_tower),
        text_tower=None,
        preprocessing=CompositePreprocessing(model.settings, tokenizer, context_length),
        reference=reference,
    )
    projections = [*model.image_projection, *heads]
    for own, given in zip(result.image_projection, projections, strict=True):
        own.load_state_dict(given.state_dict())
    result.log_logit_scale.data.copy_(model.log_logit_scale.data)
    if result.logit_bias is not None and model.logit_bias is not None:
        result.logit_bias.data.copy_(model.logit_bias.data)
    return result.to(model.device).train(model.training)
