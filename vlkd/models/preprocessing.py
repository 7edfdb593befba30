"""How models prepare their input: objects without weights, which travel to worker processes."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from vlkd.errors import UserError

if TYPE_CHECKING:
    from vlkd.models.tokenizer import TextTokenizer

RESAMPLING = {
    "nearest": Image.Resampling.NEAREST,
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
}
CROP_MODES = ("center", "squash")


@dataclass(frozen=True, kw_only=True)
class PixelSettings:
    """timm's evaluation transform in six values, for square input.

    Args:
        size: height and width in pixels.
        mean: per channel, of pixels in [0, 1].
        std: per channel.
        interpolation: a key of `RESAMPLING`.
        crop_fraction: the part of the resized side that is kept; 1 keeps the whole shorter side.
        crop_mode: "center" keeps the aspect ratio and crops, "squash" does not keep it.

    Raises:
        UserError: a value is outside its range.
    """

    size: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    interpolation: str
    crop_fraction: float
    crop_mode: str = "center"

    def __post_init__(self) -> None:
        if self.size < 1 or len(self.mean) != 3 or len(self.std) != 3 or not all(value > 0 for value in self.std):
            raise UserError(
                f"Found preprocessing with size {self.size}, mean {self.mean}, std {self.std}; "
                "expected a positive size, three means and three positive deviations."
            )
        if self.interpolation not in RESAMPLING or self.crop_mode not in CROP_MODES or not 0 < self.crop_fraction <= 1:
            raise UserError(
                f"Found preprocessing with interpolation {self.interpolation!r}, crop_mode {self.crop_mode!r}, "
                f"crop_fraction {self.crop_fraction}; expected one of {', '.join(RESAMPLING)}, one of "
                f"{', '.join(CROP_MODES)}, and a fraction above 0 and at most 1."
            )


@dataclass(frozen=True)
class CompositePreprocessing:
    """uint8 pixels by Pillow alone (the model normalises them), ids by the model's own tokenizer."""

    settings: PixelSettings
    tokenizer: TextTokenizer
    context_length: int

    @property
    def image_size(self) -> tuple[int, int]:
        return (self.settings.size, self.settings.size)

    def image_transform(self, image: Image.Image) -> Tensor:
        """timm's resize and centre crop: (3, H, W) uint8."""
        size = self.settings.size
        scaled = math.floor(size / self.settings.crop_fraction)
        width, height = image.size
        if self.settings.crop_mode == "squash":
            new_width, new_height = scaled, scaled
        elif width <= height:
            new_width, new_height = scaled, int(scaled * height / width)
        else:
            new_width, new_height = int(scaled * width / height), scaled
        resized = image.resize((new_width, new_height), RESAMPLING[self.settings.interpolation])
        left, top = round((new_width - size) / 2.0), round((new_height - size) / 2.0)
        return pil_to_uint8(resized.crop((left, top, left + size, top + size)))

    def view_transform(self, image: Image.Image) -> Tensor:
        """The whole view squashed to the input size: (3, H, W) uint8."""
        size = self.settings.size
        return pil_to_uint8(image.resize((size, size), RESAMPLING[self.settings.interpolation]))

    def tokenize(self, texts: Sequence[str]) -> dict[str, Tensor]:
        """`ids` and `mask` (B, N), N the longest text of the batch."""
        return self.tokenizer.tokenize(texts, self.context_length)


@dataclass(frozen=True)
class OpenClipPreprocessing:
    """open_clip's own evaluation transform and tokenizer; pixels are float and normalised.

    Args:
        image_size: height and width.
        context_length: N, to which open_clip's tokenizers always pad.
        transform: the library's evaluation transform.
        squash: the library's transform of the same settings with `resize_mode="squash"`.
        tokenizer: the library's tokenizer.
        end_id: the id that ends every text, where padding cannot be told from words; else None.
        pad_id: the padding id.
    """

    image_size: tuple[int, int]
    context_length: int
    transform: Callable[[Image.Image], Tensor]
    squash: Callable[[Image.Image], Tensor]
    tokenizer: Callable[[list[str]], Tensor]
    end_id: int | None
    pad_id: int

    def image_transform(self, image: Image.Image) -> Tensor:
        return self.transform(image)

    def view_transform(self, image: Image.Image) -> Tensor:
        return self.squash(image)

    def tokenize(self, texts: Sequence[str]) -> dict[str, Tensor]:
        """`ids` and `mask` (B, N), N the context length; the library gives ids alone, so the mask is read from them."""
        ids = self.tokenizer(list(texts)).to(torch.int64)
        if self.end_id is None:
            return {"ids": ids, "mask": ids != self.pad_id}
        # The padding id may be a word, too (CLIP pads with "!"): a text is real up to and including its first end.
        stop = (ids == self.end_id).int()
        return {"ids": ids, "mask": stop.cumsum(dim=1) - stop == 0}


@dataclass(frozen=True)
class TransformersPreprocessing:
    """The model's own transformers image processor and tokenizer; pixels are float and normalised."""

    image_size: tuple[int, int]
    context_length: int
    processor: Any
    tokenizer: TextTokenizer

    def image_transform(self, image: Image.Image) -> Tensor:
        return self._process(image)

    def view_transform(self, image: Image.Image) -> Tensor:
        height, width = self.image_size
        # A processor without a crop rejects nothing: the switch is read by those that have one.
        return self._process(image, do_resize=True, size={"height": height, "width": width}, do_center_crop=False)

    def _process(self, image: Image.Image, **changes: Any) -> Tensor:
        pixels: Tensor = self.processor(images=image, return_tensors="pt", **changes)["pixel_values"][0]
        return pixels

    def tokenize(self, texts: Sequence[str]) -> dict[str, Tensor]:
        return self.tokenizer.tokenize(texts, self.context_length)


def pil_to_uint8(image: Image.Image) -> Tensor:
    """An RGB image as (3, H, W) uint8."""
    return torch.from_numpy(np.array(image, dtype=np.uint8)).permute(2, 0, 1).contiguous()


def timm_settings(tower: Any, *, size: int, crop_fraction: float, crop_mode: str = "") -> PixelSettings:
    """The settings that timm publishes for an image tower; 0 and "" keep its own size, crop fraction and crop mode.

    timm's values are per model: EfficientNet-Lite ported from TensorFlow wants mean and std 0.5, not ImageNet's.

    Raises:
        UserError: timm names a crop mode that vlkd does not have, or a size that is not square.
    """
    from timm.data import resolve_model_data_config

    found = resolve_model_data_config(tower)
    height, width = found["input_size"][-2:]
    if not size and height != width:
        raise UserError(f"timm's own input size is {height} x {width}, expected a square; set the image size yourself.")
    return PixelSettings(
        size=int(size or height),
        mean=tuple(found["mean"]),
        std=tuple(found["std"]),
        interpolation=found["interpolation"],
        crop_fraction=crop_fraction or float(found["crop_pct"]),
        crop_mode=crop_mode or found["crop_mode"],
    )
