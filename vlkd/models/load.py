"""One reference grammar names any model: a folder, `open_clip:NAME@TAG`, `hf:NAME`, or `timm:NAME` for images alone."""

from __future__ import annotations

from pathlib import Path

import torch

from vlkd.errors import UserError
from vlkd.models.base import DualEncoderModule

GRAMMAR = (
    "a folder (with model.json, open_clip_config.json or config.json), open_clip:NAME@TAG, "
    "open_clip:NAME@FILE.safetensors, open_clip:hf-hub:OWNER/NAME, hf:OWNER/NAME, or 'IMAGES + TEXTS', two of these"
)
JOIN = " + "
"""Between the reference of the model that encodes images and that of the one that encodes texts."""


def load(ref: str, *, device: str | torch.device = "cpu") -> DualEncoderModule:
    """Load any dual encoder, in evaluation mode, with float32 weights.

    An existing folder wins over every prefix, so a path may contain any character. Golden embeddings, where a model
    folder carries them, are recomputed on the CPU and compared.

    Args:
        ref: see `GRAMMAR`.
        device: where the model goes.

    Raises:
        UserError: nothing answers to the reference, or what does is damaged, pickled, or no dual encoder.
    """
    ref = str(ref)
    model = load_folder(ref, Path(ref)) if ref and Path(ref).is_dir() else load_named(ref)
    return _ready(model, device)


def load_image_encoder(ref: str, *, device: str | torch.device = "cpu") -> DualEncoderModule:
    """Load whatever encodes images, in evaluation mode, with float32 weights: a dual encoder or a timm tower.

    Of a timm tower `provides` lacks `text.embed`, and what needs texts is refused by it with a sentence.

    Args:
        ref: see `GRAMMAR`; also `timm:NAME@FILE.safetensors` or `timm:NAME`.
        device: where the model goes.

    Raises:
        UserError: nothing answers to the reference, or what does is damaged, pickled, or no encoder of images.
    """
    ref = str(ref)
    family, _, rest = ref.partition(":")
    if family != "timm" or not rest or JOIN in rest or Path(ref).is_dir():
        return load(ref, device=device)
    from vlkd.models.via_timm import load_timm

    return _ready(load_timm(ref, rest), device)


def _ready(model: DualEncoderModule, device: str | torch.device) -> DualEncoderModule:
    """In evaluation mode, on the device; raises `UserError` where there is no such device."""
    try:
        return model.to(device).eval()
    except (RuntimeError, AssertionError) as error:
        raise UserError(
            f"The device {device} cannot be used ({str(error).splitlines()[0]}); name another one."
        ) from None


def load_folder(ref: str, folder: Path) -> DualEncoderModule:
    """Load a folder by the configuration file that it holds."""
    if (folder / "model.json").is_file():
        from vlkd.models.composite import load_composite
        from vlkd.models.golden import check_golden

        model = load_composite(folder, name=ref)
        check_golden(model, folder)
        return model
    if (folder / "student" / "model.json").is_file():
        raise UserError(f"{ref!r} is a run's folder, expected a model; its model is {str(folder / 'student')!r}.")
    if (folder / "open_clip_config.json").is_file():
        from vlkd.models.via_open_clip import load_open_clip

        return load_open_clip(ref, ref)
    if (folder / "config.json").is_file():
        from vlkd.models.via_transformers import load_transformers

        return load_transformers(ref, ref)
    raise UserError(
        f"The folder {ref!r} holds none of model.json, open_clip_config.json, config.json; expected a model folder, "
        "check the path."
    )


def load_named(ref: str) -> DualEncoderModule:
    """Load by prefix, or two models joined."""
    images, join, texts = ref.partition(JOIN)
    if join:
        from vlkd.models.joined import JoinedModel

        return JoinedModel(load(images), load(texts))
    family, separator, rest = ref.partition(":")
    if separator and rest and family == "open_clip":
        from vlkd.models.via_open_clip import load_open_clip

        return load_open_clip(ref, rest)
    if separator and rest and family == "hf":
        if Path(rest).is_dir() and not (Path(rest) / "config.json").is_file():
            raise UserError(f"Found no config.json in {rest}, expected a transformers folder; check the path.")
        from vlkd.models.via_transformers import load_transformers

        return load_transformers(ref, rest)
    if separator and family == "timm":
        raise UserError(
            f"{ref!r} is an image tower without a text tower, expected a dual encoder; "
            f"use it as the image tower of a student (model.image={rest.partition('@')[0]}) or of a prepared teacher, "
            "or measure it where images alone do: linear probe, k-NN, speed."
        )
    raise UserError(f"Found no model {ref!r}; expected {GRAMMAR}.")
