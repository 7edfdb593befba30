"""A hash of everything on which a model's features depend."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from vlkd.models.base import DualEncoderModule
from vlkd.models.golden import SENTENCES, probe_images

if TYPE_CHECKING:
    from vlkd.models.generative import GenerativeVLM

PROJECTIONS = ("image_projection.", "text_projection.")


def model_fingerprint(model: DualEncoderModule, *, towers: bool = False) -> str:
    """A hash of the weights, of the layout, and of what the preprocessing makes of fixed pictures and sentences.

    Args:
        model: the model; it is only read.
        towers: leave the projections out, for features that lie before them.
    """
    transform = model.preprocessing
    state = hashlib.sha256(repr((transform.image_size, transform.context_length)).encode())
    layout = getattr(model, "layout", None)
    # A library's model says by its modules what equal weights do not: GELU or QuickGELU, heads, pooling.
    built = repr(model) if layout is None else without_projections(layout) if towers else layout
    state.update(repr(built).encode())
    tensors = [
        part(image) for image in probe_images() for part in (transform.image_transform, transform.view_transform)
    ]
    tensors += [value for _, value in sorted(transform.tokenize(SENTENCES).items())]
    named = [*((f"input.{i}", value) for i, value in enumerate(tensors)), *sorted(model.state_dict().items())]
    hash_tensors(state, ((name, value) for name, value in named if not (towers and name.startswith(PROJECTIONS))))
    return state.hexdigest()[:16]


def generative_fingerprint(model: GenerativeVLM) -> str:
    """A hash of a generative model: weights, modules, and what it makes of fixed pictures and questions.

    Args:
        model: the model; it is only read. Its mode, gradients and checkpointing do not count.
    """
    state = hashlib.sha256(repr((model.visual_tokens, model.vocabulary, model.stop_ids)).encode())
    state.update(repr(model).encode())
    inputs = model.preprocessing.image_inputs(probe_images())
    hash_tensors(state, sorted(inputs.items()))
    asked = ((f"ids.{i}", model.preprocessing.prompt_ids(sentence)) for i, sentence in enumerate(SENTENCES))
    hash_tensors(state, asked)
    hash_tensors(state, sorted(model.state_dict().items()))
    return state.hexdigest()[:16]


def hash_tensors(state: Any, named: Iterable[tuple[str, Tensor]]) -> None:
    """Feed names and bytes to a hash."""
    for name, value in named:
        state.update(name.encode())
        state.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())


def without_projections(layout: Mapping[str, Any]) -> list[tuple[str, Any]]:
    """What a `model.json` says of the two towers."""
    return [
        (f"{side}.{key}", value)
        for side in ("image", "text")
        for key, value in sorted(layout[side].items())
        if not key.startswith("projection")
    ]
