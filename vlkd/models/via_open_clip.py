"""open_clip models: a name with a pretrained tag or a weights file, a repository on the hub, or a local folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import open_clip
import torch
from open_clip.pretrained import download_pretrained, download_pretrained_from_hf, get_pretrained_cfg
from open_clip.transform import PreprocessCfg, image_transform_v2
from torch import Tensor

from vlkd.errors import UserError
from vlkd.models.base import DualEncoderModule, ImageConfiguration
from vlkd.models.preprocessing import OpenClipPreprocessing
from vlkd.models.tokenizer import first_line

CONFIG = "open_clip_config.json"
WEIGHTS = ("open_clip_model.safetensors", "open_clip_pytorch_model.safetensors")
OFFLINE = "check the spelling and the network, or download the model elsewhere and pass its folder"


class OpenClipModel(DualEncoderModule):
    """An open_clip model of any kind that has `encode_image` and `encode_text`."""

    image_prefixes = ("model.visual.",)

    def __init__(self, *, name: str, width: int, model: Any, tokenizer: Any) -> None:
        features = {"image.embed", "text.embed", "logit_scale"}
        if model.logit_bias is not None:
            features.add("logit_bias")
        settings = PreprocessCfg(**model.visual.preprocess_cfg)
        super().__init__(
            name=name,
            width=width,
            provides=frozenset(features),
            preprocessing=make_preprocessing(settings, tokenizer),
        )
        self.model = model

    def image_features(self, pixels: Tensor) -> dict[str, Tensor]:
        return {"image.embed": self.model.encode_image(pixels)}

    def text_features(self, ids: Tensor, mask: Tensor) -> dict[str, Tensor]:  # noqa: ARG002 - open_clip masks by itself
        return {"text.embed": self.model.encode_text(ids)}

    def scale_features(self) -> dict[str, Tensor]:
        found = {"logit_scale": self.model.logit_scale.exp().reshape(())}
        if self.model.logit_bias is not None:
            found["logit_bias"] = self.model.logit_bias.reshape(())
        return found

    def library_configuration(self) -> ImageConfiguration:
        settings = PreprocessCfg(**self.model.visual.preprocess_cfg)
        return ImageConfiguration(
            size=pair(settings.size),
            mean=tuple(settings.mean),
            std=tuple(settings.std),
            interpolation=settings.interpolation,
        )


def pair(size: int | tuple[int, int]) -> tuple[int, int]:
    """Height and width of open_clip's size, which may be one number."""
    return (size, size) if isinstance(size, int) else (int(size[0]), int(size[1]))


def make_preprocessing(settings: Any, tokenizer: Any) -> OpenClipPreprocessing:
    """The weight-free half of a model from open_clip's settings and tokenizer."""
    squash = PreprocessCfg(**{**vars(settings), "size": pair(settings.size), "resize_mode": "squash"})
    inner = getattr(tokenizer, "tokenizer", None)
    if inner is None:
        end_id, pad_id = tokenizer.eot_token_id, 0
    else:
        pad_id = inner.pad_token_id
        end_id = pad_id if pad_id == inner.eos_token_id else None
    return OpenClipPreprocessing(
        image_size=pair(settings.size),
        context_length=int(tokenizer.context_length),
        transform=image_transform_v2(settings, is_train=False),
        squash=image_transform_v2(squash, is_train=False),
        tokenizer=tokenizer,
        end_id=end_id,
        pad_id=pad_id,
    )


def load_open_clip(ref: str, source: str) -> OpenClipModel:
    """Load `NAME@TAG`, `NAME@FILE.safetensors`, `hf-hub:OWNER/NAME` or a folder.

    Args:
        ref: the reference as the user wrote it, for the model's name.
        source: the part after `open_clip:`, or the folder.

    Raises:
        UserError: unknown name or tag, no network, weights that are pickled, missing or of another model.
    """
    if Path(source).is_dir():
        return load_folder(ref, Path(source))
    if source.startswith("hf-hub:"):
        return _create(ref, source, None, lambda: download_pretrained_from_hf(source.removeprefix("hf-hub:")))
    name, found, tag = source.partition("@")
    if name not in open_clip.list_models() or not found or not tag:
        raise UserError(
            f"{ref!r} names no open_clip model; expected open_clip:NAME@TAG with a pair from "
            "open_clip.list_pretrained(), or open_clip:NAME@FILE.safetensors."
        )
    if Path(tag).is_file():
        return _create(ref, name, tag, lambda: tag)
    known = get_pretrained_cfg(name, tag)
    if not known:
        tags = ", ".join(open_clip.list_pretrained_tags_by_model(name)) or "none"
        raise UserError(f"{ref!r}: {tag!r} is no file and no tag of {name}; its tags are {tags}.")
    return _create(ref, name, tag, lambda: download_pretrained(known))


def load_folder(ref: str, folder: Path) -> OpenClipModel:
    """Load a folder that open_clip's `local-dir:` scheme reads.

    Raises:
        UserError: the configuration or the safetensors weights are missing or of another model.
    """
    if not (folder / CONFIG).is_file():
        raise UserError(f"Found no {CONFIG} in {folder}, expected an open_clip folder; check the path.")
    weights = next((folder / name for name in WEIGHTS if (folder / name).is_file()), None)
    if weights is None:
        raise UserError(f"Found no {WEIGHTS[0]} in {folder}; vlkd never unpickles, convert the weights to safetensors.")
    return _create(ref, f"local-dir:{folder}", None, lambda: str(weights))


def _create(ref: str, name: str, pretrained: str | None, fetch: Any) -> OpenClipModel:
    """Fetch the weights, refuse pickled ones before the library sees them, then let the library load them."""
    try:
        path = fetch()
        if not str(path).endswith(".safetensors"):
            raise UserError(f"{ref!r}: {path} is not safetensors; vlkd never unpickles, convert the weights first.")
        config = open_clip.get_model_config(name)
        if "trust_remote_code" in json.dumps(config):
            raise UserError(
                f"The {CONFIG} of {ref!r} asks for remote code, which vlkd never runs; choose another model."
            )
        model = open_clip.create_model(name, pretrained, require_pretrained=True, weights_only=True)
        tokenizer = open_clip.get_tokenizer(name)
        width = int(config["embed_dim"])
    except UserError:
        raise
    except (OSError, RuntimeError, ValueError, KeyError, TypeError, ImportError) as error:
        raise UserError(f"open_clip cannot load {ref!r} ({first_line(error)}); {OFFLINE}.") from error
    return OpenClipModel(name=ref, width=width, model=model.to(torch.float32).eval(), tokenizer=tokenizer)
