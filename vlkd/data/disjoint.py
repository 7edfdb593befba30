"""Proof that no picture is in two sets: by key, and byte for byte, whatever the files are called."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

from vlkd.data.sources import ImageFile
from vlkd.errors import UserError


@dataclass(frozen=True)
class ImageSet:
    """Images by the name of what they are.

    Attributes:
        name: in the plural, as in "labelled images".
        keys: (I,) stable names.
        files: (I,) where they are.
        advice: what to do about one of them that another set has, too.
    """

    name: str
    keys: Sequence[str]
    files: Sequence[ImageFile]
    advice: str


def disjoint(*comparisons: tuple[ImageSet, ImageSet]) -> None:
    """Compare sets two by two; the bytes are read of those alone whose length occurs on the other side.

    A file that cannot be read, or is empty, is no picture to either side and has no content to compare.

    Raises:
        UserError: an image of the first set of a comparison is in the second, by its key or its bytes; it is named.
    """
    known: dict[ImageFile, bytes] = {}
    for one, other in comparisons:
        shared = set(one.keys) & set(other.keys)
        if shared:
            first = next(key for key in one.keys if key in shared)
            raise UserError(
                f"{len(shared)} of {len(one.keys)} {one.name} have a key that {other.name} have, too, first {first!r}; "
                f"expected none: {one.advice}."
            )
        found = copies(one.files, other.files, known)
        if found:
            i, j = next(iter(found.items()))
            raise UserError(
                f"{len(found)} of {len(one.keys)} {one.name} are byte for byte among the {other.name}, too, first "
                f"{one.keys[i]!r}, which is {other.keys[j]!r} there; expected none: {one.advice}."
            )


def copies(
    one: Sequence[ImageFile], other: Sequence[ImageFile], known: dict[ImageFile, bytes] | None = None
) -> dict[int, int]:
    """For each image of `one` that is byte for byte in `other`, the first such image there, by number.

    `known` keeps content hashes from one call to the next.
    """
    known = {} if known is None else known
    lengths = [_length(file) for file in one]
    other_lengths = [_length(file) for file in other]
    both = (set(lengths) & set(other_lengths)) - {0}
    place: dict[bytes, int] = {}
    for j, file in enumerate(other):
        if other_lengths[j] in both and (digest := _digest(file, known)):
            place.setdefault(digest, j)
    return {
        i: place[digest]
        for i, file in enumerate(one)
        if lengths[i] in both and (digest := _digest(file, known)) in place
    }


def _length(file: ImageFile) -> int:
    """In bytes; 0 for a file that is gone."""
    try:
        return file.length()
    except UserError:
        return 0


def _digest(file: ImageFile, known: dict[ImageFile, bytes]) -> bytes:
    """Of the content; nothing for a file that cannot be read."""
    if file not in known:
        try:
            known[file] = hashlib.blake2b(file.read(), digest_size=16).digest()
        except UserError:
            known[file] = b""
    return known[file]
