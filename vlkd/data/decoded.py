"""Decoded pictures held in memory."""

from __future__ import annotations

from typing import Any

import numpy as np
from PIL import Image
from tqdm import tqdm

from vlkd.data.images import BadImage
from vlkd.data.table import Table


class Decoded:
    """Decoded images held in memory at a small size, so that later epochs pay no decoder.

    Args:
        pairs: the table.
        short_side: pixels to which larger images are reduced.
    """

    def __init__(self, pairs: Table, short_side: int) -> None:
        self.arrays: list[np.ndarray[Any, np.dtype[np.uint8]] | None] = []
        for i in tqdm(range(len(pairs)), desc="decoding", unit="image"):
            try:
                self.arrays.append(np.asarray(shrink(pairs.image(i, size_hint=short_side), short_side)))
            except BadImage:
                self.arrays.append(None)

    def image(self, i: int) -> Image.Image:
        """Image `i` as RGB; raises `BadImage` where it could not be decoded."""
        array = self.arrays[i]
        if array is None:
            raise BadImage("the picture could not be decoded.")
        return Image.fromarray(array)


def shrink(image: Image.Image, short_side: int) -> Image.Image:
    """Reduced so that its short side is `short_side`; a smaller image stays as it is."""
    scale = short_side / min(image.size)
    if scale >= 1:
        return image
    return image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC)
