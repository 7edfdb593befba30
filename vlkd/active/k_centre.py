"""Greedy k-centre: each choice is the point farthest from all that were chosen before."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from vlkd.active.candidates import candidates
from vlkd.errors import UserError

_ENTRIES = 2**18
"""Entries of a temporary block: it stays in the processor's cache, and memory is O(N) however many are chosen."""


def k_centre(
    points: NDArray[Any],
    count: int,
    chosen: ArrayLike,
    *,
    seed: int,
    on_pick: Callable[[], object] | None = None,
) -> NDArray[np.int64]:
    """The rows that cover the points best, in the order of choice: (count,).

    Adds argmax over x of min over j in S of |x - x_j|, with S the rows already chosen, `count` times (Gonzalez, 1985;
    a 2-approximation of the smallest covering radius). On features it is CoreSet (Sener and Savarese, ICLR 2018,
    arXiv:1708.00489, its greedy form); on class probabilities PCoreSet of ActiveKD (Kang et al., 2025,
    arXiv:2506.00910), whose public code takes the mean of both heads' softmax, 0.5 each, and computes every distance
    again at each step, O(N k^2 D) altogether. Here each point keeps its distance to the nearest of S: O(N k D).

    A product in single precision, |x|^2 - 2 x.c + |c|^2 with its rounding as slack, tells which points may come nearer
    to a new centre; their distances, few after the first centres, are then computed from differences. So points that
    lie close together are told apart, which that formula alone would not. Ties go to the smaller row, a row is never
    chosen twice, and duplicates of chosen rows come last. Without a chosen row the first one is drawn by `seed`, which
    has no effect otherwise.

    Args:
        points: (N, D), read as float32.
        count: how many to choose.
        chosen: (S,) rows already chosen, for example labelled; may be empty.
        seed: of the first row where none is chosen.
        on_pick: called after each choice.

    Raises:
        UserError: a point is not finite or too long for single precision, or as `candidates`.
    """
    points = np.ascontiguousarray(points, dtype=np.float32)
    if points.ndim != 2 or not points.size:
        raise UserError(f"Found points of shape {points.shape}; expected (N, D), one row per image.")
    with np.errstate(over="ignore", invalid="ignore"):
        squares = np.einsum("nd,nd->n", points, points)
    if not (bad := np.isfinite(8 * squares)).all():
        raise UserError(
            f"Found NaN, infinite or huge numbers in {np.count_nonzero(~bad)} of {len(points)} points, first in row "
            f"{int(bad.argmin())}; expected finite ones; look for a model that diverged."
        )
    left = candidates(len(points), count, chosen)
    nearest = np.full(len(points), np.inf, dtype=np.float32)
    for block in np.array_split(np.flatnonzero(~left), max(1, (~left).sum() * points.shape[1] // _ENTRIES)):
        if len(block):
            _come_nearer(nearest, points, squares, block)
    nearest[~left] = -1
    picks = np.empty(count, dtype=np.int64)
    for number in range(count):
        first = left.all() and not number
        pick = int(np.random.default_rng(seed).integers(len(points)) if first else nearest.argmax())
        picks[number] = pick
        if number + 1 < count:
            _come_nearer(nearest, points, squares, picks[number : number + 1])
        nearest[pick] = -1
        if on_pick:
            on_pick()
    return picks


def _come_nearer(
    nearest: NDArray[np.float32], points: NDArray[np.float32], squares: NDArray[np.float32], centres: NDArray[np.int64]
) -> None:
    """Lower each point's squared distance to what it is from the new centres, if one of them is nearer."""
    # Twice the bound on the rounding of two squares and a product of D terms, relative to |x|^2 + |c|^2.
    rounding = np.float32(2 * (points.shape[1] + 8) * np.finfo(np.float32).eps)
    rows = max(1, _ENTRIES // len(centres))
    columns = np.ascontiguousarray(points[centres].T)
    for start in range(0, len(points), rows):
        part = slice(start, start + rows)
        sums = squares[part, None] + squares[centres]
        estimate = points[part] @ columns
        estimate *= -2
        estimate += sums
        sums *= rounding
        most = np.minimum(nearest[part], (estimate + sums).min(axis=1))
        estimate -= sums
        row, which = np.nonzero(estimate <= most[:, None])
        _replace(nearest[part], points[part], row, points[centres], which)


def _replace(
    nearest: NDArray[np.float32],
    points: NDArray[np.float32],
    rows: NDArray[np.int64],
    centres: NDArray[np.float32],
    which: NDArray[np.int64],
) -> None:
    """The same for these pairs of a point and a centre, from differences in double precision."""
    pairs = max(1, _ENTRIES // points.shape[1])
    for start in range(0, len(rows), pairs):
        row = rows[start : start + pairs]
        difference = points[row].astype(np.float64)
        difference -= centres[which[start : start + pairs]]
        np.minimum.at(nearest, row, np.einsum("nd,nd->n", difference, difference).astype(np.float32))
