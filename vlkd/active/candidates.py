"""Which rows may still be chosen."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from vlkd.errors import UserError


def candidates(total: int, count: int, chosen: ArrayLike) -> NDArray[np.bool_]:
    """True where a row is not chosen yet: (N,).

    Raises:
        UserError: a chosen row lies outside [0, N), or fewer than `count` rows are left, or `count` is below 1.
    """
    rows: NDArray[Any] = np.asarray(chosen)
    if rows.size and (rows.ndim != 1 or rows.dtype.kind not in "iu" or rows.min() < 0 or rows.max() >= total):
        raise UserError(
            f"Found chosen rows of shape {rows.shape} and {rows.dtype}; expected (S,) row numbers in [0, {total})."
        )
    left = np.ones(total, dtype=np.bool_)
    left[rows.astype(np.int64)] = False
    if not 1 <= count <= left.sum():
        raise UserError(
            f"Found a count of {count}; expected 1 to {left.sum()}, the images that are left ({total} in all, "
            f"{total - left.sum()} already chosen)."
        )
    return left
