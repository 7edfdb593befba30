"""Which images may show their labels, and which are held out for validation: drawn by seed and key alone.

Every image has a place in its class, by a hash of the seed and its key, so that neither the order of the files nor
other classes change a draw, and fewer shots are always among more.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from vlkd.data.labelled import read_lines
from vlkd.errors import UserError

Ids = NDArray[np.int64]

SHARE = re.compile(r"([0-9]{1,3}(?:\.[0-9]{1,9})?)%")
NUMBER = re.compile(r"[0-9]{1,9}")
_LISTED = 5


def choose_shots(labels: Ids, classes: Sequence[str], shots: str, *, seed: int, keys: Sequence[str]) -> Ids:
    """The rows whose labels may be used.

    Args:
        labels: (N,) class id of each row, -1 for a row of no known class.
        classes: (C,) names by class id.
        shots: a whole number, of each class, of which a smaller one has all its images; a share such as `1%` of all
            rows with a label, in each class in proportion and at least one; `all`; or a text file of keys, one a line.
        seed: of the draw, which the last two do without.
        keys: (N,) the rows' stable names, without repeats.

    Returns:
        (L,) rows in ascending order. Those of fewer shots, or of a smaller share, are among those of more.

    Raises:
        UserError: no row has a label, labels and classes or keys do not match, a class is left without a row, a key of
            the file is unknown or has no label, or `shots` is none of these.
    """
    _check(labels, keys)
    known = labels >= 0
    if not known.any():
        raise UserError("The pool holds no image with a label; expected one or more of each class, so add some.")
    if int(labels.max()) >= len(classes):
        raise UserError(
            f"The labels go up to {labels.max()}, and there are {len(classes)} class names, so up to "
            f"{len(classes) - 1} was expected; give the class list that belongs to the labels."
        )
    chosen = _chosen(labels, shots, seed, keys)
    _check_every_class(labels[chosen], classes, shots)
    return chosen


def split_validation(labels: Ids, *, share: float, seed: int, keys: Sequence[str]) -> tuple[Ids, Ids]:
    """Hold out a share of the rows that have a label, in each class in proportion, one or more staying in each.

    Args:
        labels: (N,) class ids, -1 for none: such a row is never held out.
        share: of the rows with a label, above 0 and below 1.
        seed: of the draw.
        keys: (N,) the rows' stable names.

    Returns:
        The rows that stay and those held out, each in ascending order and together all N.

    Raises:
        UserError: the share is out of range, keys and labels do not match, or no class can spare an image.
    """
    _check(labels, keys)
    if not 0 < share < 1:
        raise UserError(f"A share of {share:g} cannot be held out for validation; expected more than 0 and below 1.")
    hashes = _hashes(keys, seed, "validation")
    places = _places(labels, hashes)
    sizes = _class_sizes(labels)
    spare = np.flatnonzero((labels >= 0) & (places < sizes - 1))
    if not len(spare):
        raise UserError(
            "No class has two images, so none can be held out for validation; add images or name a validation split."
        )
    depth = (places[spare] + 0.5) / sizes[spare]
    count = max(1, round(share * int((labels >= 0).sum())))
    held = np.sort(spare[np.lexsort((hashes[spare], depth))[:count]])
    return np.setdiff1d(np.arange(len(labels)), held), held


def listed_keys(shots: str) -> list[str]:
    """The keys of a file that `shots` names, in its order; [] where `shots` is a number, a share or `all`.

    Raises:
        UserError: it is neither, or the file cannot be read or is empty.
    """
    if shots == "all" or NUMBER.fullmatch(shots) or SHARE.fullmatch(shots):
        return []
    if not os.path.isfile(shots):
        raise UserError(
            f"shots is {shots!r}; expected a number per class such as 16, a share such as 10%, all, or a text file of "
            "keys, and there is no such file: check it."
        )
    keys = [key for key in read_lines(Path(shots)) if key]
    if not keys:
        raise UserError(f"{shots} is empty; expected one key of a training image per line.")
    return keys


def _chosen(labels: Ids, shots: str, seed: int, keys: Sequence[str]) -> Ids:
    listed = listed_keys(shots)
    if listed:
        return _rows_of(listed, labels, keys, shots)
    known = np.flatnonzero(labels >= 0)
    if shots == "all":
        return known
    hashes = _hashes(keys, seed, "shots")
    places = _places(labels, hashes)[known]
    share = SHARE.fullmatch(shots)
    if share is None:
        if not int(shots):
            raise UserError("shots is 0; expected 1 or more of each class, or train without the terms that use labels.")
        return known[places < int(shots)]
    if not 0 < float(share[1]) <= 100:
        raise UserError(f"shots is {shots}; expected more than 0% and at most 100%.")
    # The first of each class comes before all others, so that each has one.
    depth = np.where(places == 0, -1.0, (places + 0.5) / _class_sizes(labels)[known])
    count = max(int((places == 0).sum()), round(float(share[1]) / 100 * len(known)))
    return np.sort(known[np.lexsort((hashes[known], depth))[:count]])


def _rows_of(listed: Sequence[str], labels: Ids, keys: Sequence[str], file: str) -> Ids:
    row_of = {key: row for row, key in enumerate(keys)}
    missing = [key for key in listed if key not in row_of]
    if missing:
        raise UserError(
            f"{file} lists {len(missing)} of {len(listed)} keys that no training image has, first {missing[0]!r}; "
            f"expected keys such as {keys[0]!r}: mend or remove them."
        )
    rows = np.unique(np.array([row_of[key] for key in listed], dtype=np.int64))
    bare = rows[labels[rows] < 0]
    if len(bare):
        raise UserError(
            f"{file} lists {len(bare)} images without a known class, first {keys[int(bare[0])]!r}; put them into the "
            "class folders of the training split or take them off the list."
        )
    return rows


def _check(labels: Ids, keys: Sequence[str]) -> None:
    if len(labels) != len(keys):
        raise UserError(f"There are {len(labels)} labels for {len(keys)} keys; expected one for each image.")


def _check_every_class(labels: Ids, classes: Sequence[str], shots: str) -> None:
    counts = np.bincount(labels, minlength=len(classes))
    without = [repr(name) for name, count in zip(classes, counts, strict=True) if not count]
    if without:
        names = ", ".join(without[:_LISTED]) + (", ..." if len(without) > _LISTED else "")
        raise UserError(
            f"{len(without)} of {len(classes)} classes have no labelled image with shots={shots}: {names}; expected "
            "one or more of each, so label some or leave those classes out."
        )


def _hashes(keys: Sequence[str], seed: int, purpose: str) -> NDArray[np.uint64]:
    """(N,) 64 bits for each key."""
    start = f"{seed}\0{purpose}\0"
    digests = [hashlib.blake2b((start + key).encode(errors="surrogateescape"), digest_size=8).digest() for key in keys]
    return np.frombuffer(b"".join(digests), dtype="<u8").astype(np.uint64)


def _places(labels: Ids, hashes: NDArray[np.uint64]) -> Ids:
    """(N,) how many rows of its class come before each, by their hashes."""
    order = np.lexsort((hashes, labels))
    in_order = labels[order]
    places = np.empty(len(labels), dtype=np.int64)
    places[order] = np.arange(len(labels)) - np.searchsorted(in_order, in_order)
    return places


def _class_sizes(labels: Ids) -> Ids:
    """(N,) of each row the number of rows of its class."""
    _, inverse, counts = np.unique(labels, return_inverse=True, return_counts=True)
    return counts[inverse].astype(np.int64)
