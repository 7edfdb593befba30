"""Near-duplicates between training data and an evaluation set: equal bytes, and pictures that look the same.

A picture that was saved again, resized, or mirrored keeps its difference hash (which of two neighbouring patches is
brighter) nearly, and what the hash proposes is confirmed on small thumbnails. Crops, collages and strong changes of
colour are not found that way; the embeddings of a model find some of them.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from vlkd.data.images import open_image
from vlkd.data.sources import ImageFile
from vlkd.errors import UserError
from vlkd.retrieval.encode import ImageEncoder, encode_images
from vlkd.retrieval.progress import Progress
from vlkd.retrieval.search import topk

Kind = Literal["same file", "near", "mirrored", "similar"]
Pixels = NDArray[np.uint8]

THRESHOLD = 0.25
"""Distance of thumbnails (`thumbnail_distance`) up to which two pictures are the same."""
BITS = 12
"""Bits of 64 in which the hashes of two proposals may differ."""
_MARGIN = 3
"""Grey levels by which a patch has to be brighter: on plain areas the noise of a codec would set bits at random."""
_SIDE = 16
_FLAT = 4.0
"""Grey levels; below such a contrast differences are not magnified further."""
_BLOCK, _WIDE, _CONFIRMED = 256, 1 << 16, 4096


class Pictures(Protocol):
    """A set of pictures: evaluation data or training data of any form."""

    @property
    def keys(self) -> list[str]:
        """(I,) names."""
        ...

    @property
    def files(self) -> list[ImageFile]:
        """(I,) where the bytes are."""
        ...

    @property
    def captions(self) -> list[tuple[str, ...]]:
        """(I,) captions, possibly none."""
        ...

    def image(self, i: int, /) -> Image.Image:
        """Picture i, decoded."""
        ...

    def __len__(self) -> int: ...


@dataclass(frozen=True, kw_only=True)
class Duplicate:
    """A picture of the training data that is also in the evaluation set.

    Attributes:
        train: row of the training data.
        data: row of the evaluation set.
        kind: `same file` (equal bytes), `near`, `mirrored`, or `similar` by a model's embeddings.
        distance: of the thumbnails; None for `similar`.
        similarity: cosine of the embeddings; None without a model.
    """

    train: int
    data: int
    kind: Kind
    distance: float | None = None
    similarity: float | None = None


@dataclass(frozen=True, kw_only=True)
class Found:
    """All duplicates, ordered by row of the evaluation set, and the pictures of either side that cannot be read."""

    duplicates: tuple[Duplicate, ...]
    unreadable_train: tuple[str, ...]
    unreadable_data: tuple[str, ...]

    def images(self, kind: Kind) -> int:
        """How many evaluation pictures have a duplicate of this kind."""
        return len({pair.data for pair in self.duplicates if pair.kind == kind})


@dataclass(frozen=True, kw_only=True)
class Look:
    """What is kept of a picture.

    Attributes:
        digest: SHA-256 of its bytes.
        hash: its 64 bits, see `difference_hash`.
        mirrored: the bits of its mirror image.
        thumbnail: (16, 16, 3) RGB.
    """

    digest: bytes
    hash: int
    mirrored: int
    thumbnail: Pixels


def find_duplicates(
    train: Pictures, data: Pictures, *, threshold: float = THRESHOLD, workers: int = 2, progress: bool = True
) -> Found:
    """Compare every training picture with every evaluation picture; only the looks of the latter stay in memory.

    Args:
        train: the training data.
        data: the evaluation set.
        threshold: largest distance of thumbnails, 0 for equal ones; unrelated pictures lie around 1.4.
        workers: threads that decode.
        progress: show a bar for each side.

    Raises:
        UserError: either side is empty, or has no picture that can be read.
    """
    rows: list[int] = []
    kept: list[Look] = []

    def keep(row: int, look: Look) -> None:
        rows.append(row)
        kept.append(look)

    bad_data = _scan(data, "evaluation pictures", workers, progress, keep)
    if not kept:
        raise UserError(f"None of the {len(data)} evaluation pictures can be read; check the data.")
    index = _Index(kept, np.array(rows), threshold)
    pairs: list[Duplicate] = []
    waiting: list[tuple[int, Look]] = []

    def take(row: int, look: Look) -> None:
        waiting.append((row, look))
        if len(waiting) == _BLOCK:
            pairs.extend(index.matches(waiting))
            waiting.clear()

    bad_train = _scan(train, "training pictures", workers, progress, take)
    pairs.extend(index.matches(waiting))
    if len(bad_train) == len(train):
        raise UserError(f"None of the {len(train)} training pictures can be read; check the data.")
    pairs.sort(key=lambda pair: (pair.data, pair.train))
    return Found(duplicates=tuple(pairs), unreadable_train=tuple(bad_train), unreadable_data=tuple(bad_data))


def find_similar(
    model: ImageEncoder, train: Pictures, data: Pictures, known: Sequence[Duplicate], *, similarity: float
) -> list[Duplicate]:
    """The nearest training picture of each evaluation picture by a model, where the cosine is high and it is not known.

    Raises:
        UserError: as `encode_images`.
    """
    theirs, ours = (encode_images(model, pictures) for pictures in (train, data))
    score, place = topk(ours.embed, theirs.embed, 1)
    seen = {(pair.train, pair.data) for pair in known}
    found = []
    for row, best, near in zip(ours.index.tolist(), score[:, 0].tolist(), place[:, 0].tolist(), strict=True):
        other = int(theirs.index[near])
        if best >= similarity and (other, row) not in seen:
            found.append(Duplicate(train=other, data=row, kind="similar", similarity=best))
    return found


def look_at(content: bytes) -> Look:
    """Hash and thumbnail of a picture; raises `BadImage` for one that cannot be decoded."""
    image = open_image(content, size_hint=64)
    grey = np.asarray(image.convert("L").resize((9, 8), Image.Resampling.BOX), np.int16)
    return Look(
        digest=hashlib.sha256(content).digest(),
        hash=difference_hash(grey),
        mirrored=difference_hash(grey[:, ::-1]),
        thumbnail=np.asarray(image.resize((_SIDE, _SIDE), Image.Resampling.BOX)),
    )


def difference_hash(grey: NDArray[np.int16]) -> int:
    """64 bits of (8, 9) grey levels: 1 where a patch is clearly brighter than its right neighbour (Krawetz's dHash)."""
    bits = grey[:, :-1] > grey[:, 1:] + _MARGIN
    return int.from_bytes(np.packbits(bits).tobytes(), "big")


def thumbnail_distance(a: Pixels, b: Pixels) -> NDArray[np.float64]:
    """Root mean square difference of thumbnails divided by their contrast.

    d = sqrt(mean((a - b)^2)) / max(sqrt((var a + var b) / 2), 4 levels), var over the pixels of each channel. Equal
    pictures have 0, unrelated ones sqrt(2) or more.

    Args:
        a: (P, S, S, 3).
        b: (P, S, S, 3).

    Returns:
        (P,) distances.
    """
    x, y = a.astype(np.float64), b.astype(np.float64)
    spread = (x.var(axis=(1, 2)).mean(axis=1) + y.var(axis=(1, 2)).mean(axis=1)) / 2
    distance: NDArray[np.float64] = np.sqrt(((x - y) ** 2).mean(axis=(1, 2, 3))) / np.maximum(np.sqrt(spread), _FLAT)
    return distance


class _Index:
    """The looks of the evaluation set, to be asked with blocks of training pictures."""

    def __init__(self, looks: Sequence[Look], rows: NDArray[np.int64], threshold: float) -> None:
        self.rows, self.threshold = rows, threshold
        self.hashes = {
            "near": np.array([look.hash for look in looks], np.uint64),
            "mirrored": np.array([look.mirrored for look in looks], np.uint64),
        }
        self.thumbnails = np.stack([look.thumbnail for look in looks])
        self.by_digest: dict[bytes, list[int]] = {}
        for place, look in enumerate(looks):
            self.by_digest.setdefault(look.digest, []).append(place)

    def matches(self, asked: Sequence[tuple[int, Look]]) -> list[Duplicate]:
        """The duplicates of some training pictures; of a pair the most exact kind."""
        found: dict[tuple[int, int], tuple[Kind, float]] = {}
        for number, (_, look) in enumerate(asked):
            for place in self.by_digest.get(look.digest, ()):
                found[number, place] = ("same file", 0.0)
        if asked:
            hashes = np.array([look.hash for _, look in asked], np.uint64)
            thumbnails = np.stack([look.thumbnail for _, look in asked])
            for kind in ("near", "mirrored"):
                for number, place, distance in self._confirmed(kind, hashes, thumbnails):
                    found.setdefault((number, place), (kind, distance))
        return [
            Duplicate(train=asked[number][0], data=int(self.rows[place]), kind=kind, distance=distance)
            for (number, place), (kind, distance) in found.items()
        ]

    def _confirmed(
        self, kind: Literal["near", "mirrored"], hashes: NDArray[np.uint64], thumbnails: Pixels
    ) -> Iterator[tuple[int, int, float]]:
        own = self.hashes[kind]
        for start in range(0, len(own), _WIDE):
            differing = np.bitwise_count(hashes[:, None] ^ own[None, start : start + _WIDE])
            numbers, places = np.nonzero(differing <= BITS)
            for first in range(0, len(numbers), _CONFIRMED):
                number = numbers[first : first + _CONFIRMED]
                place = places[first : first + _CONFIRMED] + start
                other = self.thumbnails[place]
                other = other[:, :, ::-1] if kind == "mirrored" else other
                distance = thumbnail_distance(thumbnails[number], other)
                for i in np.flatnonzero(distance <= self.threshold).tolist():
                    yield int(number[i]), int(place[i]), float(distance[i])


def _scan(
    pictures: Pictures, name: str, workers: int, progress: bool, take: Callable[[int, Look], object]
) -> list[str]:
    """Hand over the look of every picture in order; returns the names of those that cannot be read."""
    if not len(pictures):
        raise UserError(f"There are no {name}; give data with at least one.")

    def look(row: int) -> Look | None:
        try:
            return look_at(pictures.files[row].read())
        except (UserError, OSError):
            return None

    bad: list[str] = []
    with (
        ThreadPoolExecutor(workers) as pool,
        Progress(len(pictures), unit="image", description=name, show=progress) as bar,
    ):
        for start in range(0, len(pictures), _BLOCK):
            block = range(start, min(start + _BLOCK, len(pictures)))
            for row, seen in zip(block, pool.map(look, block), strict=True):
                if seen is None:
                    bad.append(pictures.keys[row])
                    bar.note(f"{len(bad)} unreadable")
                else:
                    take(row, seen)
                bar.advance()
    return bad
