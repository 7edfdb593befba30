"""Augmented views: which crop, flip and colours an image gets is a function of (seed, key, view number) alone.

Crops are fractions of the picture, so that one view means the same at every resolution: the teacher sees the student's
crop at its own size, and a stored teacher feature belongs to a view that can be made again.
"""

from __future__ import annotations

import hashlib
import math
import struct
from dataclasses import dataclass

from PIL import Image, ImageEnhance


@dataclass(frozen=True, kw_only=True)
class ViewSettings:
    """How views are drawn.

    Args:
        crop_scale: the crop's share of the picture's area, lowest and highest; (1, 1) keeps the whole picture.
        crop_ratio: the crop's width over height relative to the picture's, lowest and highest; a crop of the drawn area
            that would be longer than the picture is as long as the picture.
        flip: probability of a mirrored view; 0 where left and right carry meaning.
        color: largest change of brightness, contrast and saturation, as a fraction; for the student alone.
    """

    crop_scale: tuple[float, float] = (0.5, 1.0)
    crop_ratio: tuple[float, float] = (0.75, 1.3333)
    flip: float = 0.5
    color: float = 0.0


@dataclass(frozen=True)
class View:
    """One view: box as fractions (left, top, right, bottom), mirrored or not, three colour factors."""

    box: tuple[float, float, float, float]
    flip: bool
    color: tuple[float, float, float]


WHOLE = View((0.0, 0.0, 1.0, 1.0), False, (1.0, 1.0, 1.0))


def draws(seed: int, key: str, number: int, purpose: str) -> tuple[float, ...]:
    """Eight uniform numbers in [0, 1) that depend on nothing but the arguments, 53 bits of a hash each."""
    digest = hashlib.blake2b(f"{seed}\0{key}\0{number}\0{purpose}".encode(), digest_size=64).digest()
    return tuple([(bits >> 11) * 2.0**-53 for bits in struct.unpack("<8Q", digest)])


def view_of(settings: ViewSettings, seed: int, key: str, number: int) -> View:
    """The view `number` of the picture `key`."""
    uniform = draws(seed, key, number, "view")
    area = settings.crop_scale[0] + uniform[0] * (settings.crop_scale[1] - settings.crop_scale[0])
    low, high = (math.log(ratio) for ratio in settings.crop_ratio)
    # Beyond these bounds a side would leave the picture, and cutting it would make the area smaller than drawn.
    ratio = math.exp(min(max(low + uniform[1] * (high - low), math.log(area)), -math.log(area)))
    width, height = min(1.0, math.sqrt(area * ratio)), min(1.0, math.sqrt(area / ratio))
    left, top = uniform[2] * (1 - width), uniform[3] * (1 - height)
    brightness, contrast, saturation = (1 + settings.color * (2 * value - 1) for value in uniform[5:])
    return View((left, top, left + width, top + height), uniform[4] < settings.flip, (brightness, contrast, saturation))


def geometry(image: Image.Image, view: View) -> Image.Image:
    """The crop and flip of a view: what student and teacher both see."""
    width, height = image.size
    left, top, right, bottom = view.box
    box = (round(left * width), round(top * height), round(right * width), round(bottom * height))
    if box != (0, 0, width, height):
        image = image.crop((box[0], box[1], max(box[2], box[0] + 1), max(box[3], box[1] + 1)))
    return image.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if view.flip else image


def colors(image: Image.Image, view: View) -> Image.Image:
    """The brightness, contrast and saturation of a view: what the student alone sees."""
    enhancers = (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color)
    for enhancer, factor in zip(enhancers, view.color, strict=True):
        if factor != 1.0:
            image = enhancer(image).enhance(factor)
    return image
