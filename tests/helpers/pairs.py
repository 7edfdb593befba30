"""Small tables of noise pictures on disk."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from vlkd.data.sources import ImageFile, Pairs


def noise(seed: int, size: tuple[int, int] = (48, 36)) -> Image.Image:
    """A smooth random picture: coarse noise, enlarged."""
    coarse = np.random.default_rng(seed).integers(0, 256, (5, 6, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC)


def picture_pairs(folder: Path, captions: Sequence[Sequence[str]], *, broken: Collection[int] = ()) -> Pairs:
    """One PNG per entry of `captions`; those in `broken` cannot be decoded."""
    folder.mkdir(parents=True, exist_ok=True)
    files = []
    for number in range(len(captions)):
        path = folder / f"p{number}.png"
        noise(number).save(path)
        if number in broken:
            path.write_bytes(path.read_bytes()[:60])
        files.append(ImageFile(path))
    return Pairs([path.path.stem for path in files], [tuple(own) for own in captions], files)
