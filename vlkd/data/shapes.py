"""Ten plain shapes as masks, for scenes that need no package beyond Pillow."""

from __future__ import annotations

import functools
import math

from PIL import Image, ImageDraw

MASTER_SIZE = 96
"""Pixels across a mask."""
_CANVAS = 4 * MASTER_SIZE

SHAPES = ("circle", "square", "triangle", "star", "heart", "diamond", "cross", "ring", "hexagon", "crescent")


@functools.cache
def shape_mask(noun: str) -> Image.Image:
    """The shape as a tight mask (mode L, 255 inside, antialiased), `MASTER_SIZE` pixels across."""
    mask = Image.new("L", (_CANVAS, _CANVAS))
    draw = ImageDraw.Draw(mask)
    if noun in ("circle", "ring", "crescent"):
        draw.ellipse((0, 0, _CANVAS - 1, _CANVAS - 1), fill=255)
        if noun == "ring":
            draw.ellipse((0.27 * _CANVAS, 0.27 * _CANVAS, 0.73 * _CANVAS, 0.73 * _CANVAS), fill=0)
        if noun == "crescent":
            draw.ellipse((0.34 * _CANVAS, -0.02 * _CANVAS, 1.2 * _CANVAS, 0.84 * _CANVAS), fill=0)
    else:
        draw.polygon([(x * (_CANVAS - 1), y * (_CANVAS - 1)) for x, y in _outline(noun)], fill=255)
    small = mask.reduce(4)
    return small.crop(small.getbbox())


def _outline(noun: str) -> list[tuple[float, float]]:
    """Corners in the unit square, y downwards."""
    a, b = 0.34, 0.66
    match noun:
        case "square":
            return [(0.05, 0.05), (0.95, 0.05), (0.95, 0.95), (0.05, 0.95)]
        case "triangle":
            return [(0.5, 0.05), (1.0, 0.93), (0.0, 0.93)]
        case "diamond":
            return [(0.5, 0.0), (0.84, 0.5), (0.5, 1.0), (0.16, 0.5)]
        case "cross":
            return [(a, 0), (b, 0), (b, a), (1, a), (1, b), (b, b), (b, 1), (a, 1), (a, b), (0, b), (0, a), (a, a)]
        case "hexagon":
            return [(0.25, 0.07), (0.75, 0.07), (1.0, 0.5), (0.75, 0.93), (0.25, 0.93), (0.0, 0.5)]
        case "star":
            radii = (0.52, 0.215)
            turns = [(radii[k % 2], k * math.pi / 5) for k in range(10)]
            return [(0.5 + r * math.sin(t), 0.53 - r * math.cos(t)) for r, t in turns]
        case "heart":
            curve = [k * math.pi / 60 for k in range(120)]
            return [(0.5 + math.sin(t) ** 3 / 2, 0.47 - _heart_height(t) / 33) for t in curve]
    raise ValueError(f"no shape is called {noun!r}")


def _heart_height(t: float) -> float:
    """The common heart curve, y = 13 cos t - 5 cos 2t - 2 cos 3t - cos 4t."""
    return 13 * math.cos(t) - 5 * math.cos(2 * t) - 2 * math.cos(3 * t) - math.cos(4 * t)
