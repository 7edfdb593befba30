"""What the metrics ask of their input; each check raises a sentence."""

from __future__ import annotations

import operator

import numpy as np
from numpy.typing import ArrayLike, NDArray

from vlkd.errors import UserError

Floats = NDArray[np.float64]
Integers = NDArray[np.int64]


def finite(values: ArrayLike, name: str, dimensions: int = 1) -> Floats:
    """The values as float64.

    Raises:
        UserError: another number of dimensions, no value, or NaN or infinity among them.
    """
    array = np.asarray(values, np.float64)
    if array.ndim != dimensions or not array.size:
        raise UserError(f"The {name} have the shape {array.shape}; expected {dimensions} dimension(s), none empty.")
    if not np.isfinite(array).all():
        raise UserError(f"The {name} hold NaN or infinity; expected finite numbers: check what computed them.")
    return array


def same_shape(a: NDArray[np.generic], b: NDArray[np.generic], names: str) -> None:
    """Raises `UserError` if the two do not go together, value by value."""
    if a.shape != b.shape:
        raise UserError(f"The {names} have the shapes {a.shape} and {b.shape}; give as many of one as of the other.")


def at_least_one(value: int, name: str) -> int:
    """The value as an int.

    Raises:
        UserError: it is below 1.
    """
    if value < 1:
        raise UserError(f"{name} = {value}; expected 1 or more.")
    return operator.index(value)


def whole(values: ArrayLike, name: str, dimensions: int = 1) -> Integers:
    """The values as int64.

    Raises:
        UserError: another number of dimensions, no value, or other than whole numbers.
    """
    array = np.asarray(values)
    if array.ndim != dimensions or not array.size or array.dtype.kind not in "iu":
        raise UserError(
            f"The {name} have the shape {array.shape} and the type {array.dtype}; expected {dimensions} dimension(s) "
            "of integers, none empty."
        )
    return array.astype(np.int64)


def class_ids(values: ArrayLike, name: str, classes: int) -> Integers:
    """The values as int64 class ids.

    Raises:
        UserError: as `whole`, or an id outside 0 to `classes` - 1.
    """
    array = whole(values, name)
    if array.min() < 0 or array.max() >= classes:
        raise UserError(f"The {name} go from {array.min()} to {array.max()}; expected ids from 0 to {classes - 1}.")
    return array
