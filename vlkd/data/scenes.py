"""Captioned scenes drawn from a seed: the embedded default data, with true boxes, attributes, questions and answers.

`shapes` places 1 to 3 of ten shapes in eight colours and two sizes and needs nothing; `icons` places 1 to 3 of some
3,600 named pictograms (see `icons`). Scene `index` of a split depends on (kind, seed, split, index, image size,
vocabulary) alone. Which content a split may hold is the business of `scene_splits`.
"""

from __future__ import annotations

import functools
import io
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from random import Random
from typing import Literal

import numpy as np
from PIL import Image

from vlkd.data import icons
from vlkd.data.scene_splits import check_split, fits_split, is_held_out_noun
from vlkd.data.scene_words import COLOURS, SceneObject, captions, questions
from vlkd.data.shapes import SHAPES, shape_mask
from vlkd.data.shards import RawSample
from vlkd.errors import UserError

Kind = Literal["shapes", "icons"]

BACKGROUNDS = {
    "white": (250, 250, 250),
    "cream": (250, 241, 214),
    "mint": (206, 238, 220),
    "lavender": (226, 219, 246),
    "grey": (212, 214, 217),
    "peach": (252, 222, 202),
}
"""Pale grounds, on which every object colour stands out; no name is an object's colour."""

_LAYOUTS: dict[int, tuple[tuple[tuple[float, float], ...], ...]] = {
    2: tuple(((x, y), (1 - x, 1 - y)) for x, y in ((0.27, 0.5), (0.73, 0.5), (0.5, 0.27), (0.5, 0.73))),
    3: tuple(
        (apex, *others)
        for apex, others in (
            ((0.5, 0.26), ((0.26, 0.74), (0.74, 0.74))),
            ((0.5, 0.74), ((0.74, 0.26), (0.26, 0.26))),
            ((0.26, 0.5), ((0.74, 0.26), (0.74, 0.74))),
            ((0.74, 0.5), ((0.26, 0.74), (0.26, 0.26))),
        )
    ),
}
"""Centres as fractions of the image. Of three objects the first lies on one side of both others."""

_MAX_TRIES = 20_000


@dataclass(frozen=True, kw_only=True)
class _Artist:
    """What a kind draws: its nouns, a mask per noun, and the extent of an object (fraction of the image) by size."""

    nouns: tuple[str, ...]
    mask: Callable[[str, Random], Image.Image]
    alone: dict[str | None, tuple[float, float]]
    in_company: dict[str | None, tuple[float, float]]


def generate_scenes(
    kind: Kind,
    *,
    count: int,
    seed: int,
    split: str,
    image_size: int = 96,
    vocabulary: int | None = None,
) -> Iterator[RawSample]:
    """Yield scenes 0 .. count - 1 of a split as JPEG samples with captions.

    `extra` holds `split`, `background`, `objects` (noun, colour, size or null, box as x0, y0, x1, y1 in pixels,
    half-open) and `questions` (question, answer).

    Args:
        kind: "shapes" or "icons".
        count: number of scenes.
        seed: another seed, other scenes; the held-out content stays the same.
        split: one of `scene_splits.SPLITS`.
        image_size: side in pixels, at least 32.
        vocabulary: only the so many most common nouns (icons).

    Raises:
        UserError: for an unknown kind or split, a size below 32, a vocabulary too small to hold anything out, or icons
            without `qtawesome`.
    """
    check_split(split)
    if image_size < 32:
        raise UserError(f"image_size is {image_size}; objects need at least 32 pixels to be told apart.")
    artist = _artist(kind, vocabulary)
    nouns = tuple(noun for noun in artist.nouns if is_held_out_noun(noun) == (split == "test_noun"))
    if len(nouns) < 2:
        raise UserError(f"The vocabulary of {len(artist.nouns)} nouns leaves {len(nouns)} for {split}; enlarge it.")
    for index in range(count):
        rng = Random(f"{kind}/{seed}/{split}/{index}")
        yield _scene(artist, nouns, split, image_size, rng, key=f"{kind}-{split}-{seed}-{index:06d}")


def _artist(kind: Kind, vocabulary: int | None) -> _Artist:
    if kind == "shapes":
        return _Artist(
            nouns=SHAPES,
            mask=lambda noun, _: shape_mask(noun),
            alone={"small": (0.24, 0.32), "large": (0.52, 0.70)},
            in_company={"small": (0.19, 0.24), "large": (0.38, 0.46)},
        )
    if kind == "icons":
        return _Artist(
            nouns=tuple(icons.catalogue())[:vocabulary],
            mask=icons.icon_mask,
            alone={None: (0.55, 0.80)},
            in_company={None: (0.40, 0.48)},
        )
    raise UserError(f"There is no kind of scene called {kind!r}; expected shapes or icons.")


def _scene(artist: _Artist, nouns: Sequence[str], split: str, image_size: int, rng: Random, *, key: str) -> RawSample:
    content = _content(nouns, split, rng)
    ground = rng.choice(tuple(BACKGROUNDS))
    image = background(ground, image_size, rng)
    extents = artist.alone if len(content) == 1 else artist.in_company
    layout = rng.choice(_LAYOUTS[len(content)]) if len(content) > 1 else (None,)
    objects = []
    for (colour, noun), centre in zip(content, layout, strict=True):
        size = rng.choice(tuple(extents))
        side = rng.uniform(*extents[size]) * image_size
        box = paste(image, artist.mask(noun, rng), colour, side, centre, rng)
        objects.append(SceneObject(noun=noun, colour=colour, size=size, box=box))
    extra = {
        "split": split,
        "background": ground,
        "objects": [asdict(item) for item in objects],
        "questions": questions(objects, _absent(content, nouns, split, rng), rng),
    }
    with io.BytesIO() as stream:
        image.save(stream, format="JPEG", quality=92, subsampling=0)
        data = stream.getvalue()
    return RawSample(
        key=key, image=data, extension="jpg", captions=captions(objects, ground, image_size, rng), extra=extra
    )


def _content(nouns: Sequence[str], split: str, rng: Random) -> list[tuple[str, str]]:
    """(colour, noun) of 1 to 3 objects with different nouns; the number is drawn first, so no rule skews it."""
    number = min(rng.choices((1, 2, 3), weights=(4, 4, 2))[0], len(nouns))
    for _ in range(_MAX_TRIES):
        content = [(rng.choice(tuple(COLOURS)), noun) for noun in rng.sample(nouns, number)]
        if fits_split(content, split):
            return content
    raise UserError(f"Among {len(nouns)} nouns no scene fits the split {split}; enlarge the vocabulary.")


def _absent(content: Sequence[tuple[str, str]], nouns: Sequence[str], split: str, rng: Random) -> str | None:
    """A noun that is not shown, for a question answered with no; none that would betray held-out content."""
    shown = {noun for _, noun in content}
    candidates = [noun for noun in rng.sample(nouns, min(4, len(nouns))) if noun not in shown]
    allowed = "test_noun" if split == "test_noun" else "train"
    return next(
        (noun for noun in candidates if all(fits_split([(colour, noun)], allowed) for colour, _ in content)), None
    )


def background(name: str, image_size: int, rng: Random) -> Image.Image:
    """A pale ground of the named tint with one of sixteen faint textures."""
    tint = BACKGROUNDS[name]
    darker = tuple(round(0.9 * value) for value in tint)
    size = (image_size, image_size)
    return Image.composite(
        Image.new("RGB", size, darker), Image.new("RGB", size, tint), rng.choice(_textures(image_size))
    )


@functools.lru_cache(maxsize=4)
def _textures(image_size: int) -> tuple[Image.Image, ...]:
    """Masks of slopes, stripes, dots and soft noise; the same for every seed."""
    noise = np.random.default_rng(0)
    y, x = np.mgrid[0:image_size, 0:image_size] / image_size
    fields = []
    for turn in range(4):
        angle = 0.4 + turn * np.pi / 4
        along = x * np.cos(angle) + y * np.sin(angle)
        across = y * np.cos(angle) - x * np.sin(angle)
        cells = Image.fromarray(noise.integers(0, 256, (6, 6), dtype=np.uint8))
        fields += [
            (along - along.min()) / np.ptp(along),
            0.5 * (np.sin(along * 2 * np.pi * (5 + turn)) > 0),
            0.9 * ((np.sin(along * 2 * np.pi * 6) * np.sin(across * 2 * np.pi * 6)) > 0.6),
            np.asarray(cells.resize((image_size, image_size), Image.Resampling.BICUBIC)) / 255,
        ]
    return tuple(Image.fromarray((255 * field).astype(np.uint8)) for field in fields)


def paste(
    image: Image.Image,
    mask: Image.Image,
    colour: str,
    side: float,
    centre: tuple[float, float] | None,
    rng: Random,
) -> tuple[int, int, int, int]:
    """Draw a mask in a jittered colour, turned by up to 12 degrees; return its box (x0, y0, x1, y1), half-open.

    Args:
        image: drawn on in place; square.
        mask: mode L.
        colour: a name of `COLOURS`.
        side: the longer side of the drawn object in pixels.
        centre: as fractions of the image, jittered slightly; None for anywhere.
        rng: decides angle, place and shade.
    """
    turned = mask.rotate(rng.uniform(-12, 12), resample=Image.Resampling.BICUBIC, expand=True)
    turned = turned.crop(turned.getbbox())
    scale = side / max(turned.size)
    width, height = (max(1, round(scale * extent)) for extent in turned.size)
    drawn = turned.resize((width, height), Image.Resampling.LANCZOS)
    left, top = (
        _offset(extent, image.width, None if centre is None else centre[axis], rng)
        for axis, extent in enumerate((width, height))
    )
    shade = tuple(min(255, max(0, value + rng.randint(-12, 12))) for value in COLOURS[colour])
    image.paste(shade, (left, top), drawn)
    x0, y0, x1, y1 = drawn.getbbox() or (0, 0, width, height)
    return left + x0, top + y0, left + x1, top + y1


def _offset(extent: int, image_size: int, centre: float | None, rng: Random) -> int:
    """Where an object starts along one axis, with a margin of 2 % that it never leaves."""
    margin = max(1, round(0.02 * image_size))
    room = image_size - margin - extent
    if centre is None:
        return rng.randint(margin, max(margin, room))
    wanted = (centre + rng.uniform(-0.03, 0.03)) * image_size - extent / 2
    return round(min(max(wanted, margin), max(margin, room)))
