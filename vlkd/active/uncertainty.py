"""Rankings by uncertainty, and the random choice that every strategy must beat."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from vlkd.active.candidates import candidates
from vlkd.errors import UserError

Floats = NDArray[np.float64]
_ENTRIES = 2**20


def entropy(probabilities: NDArray[Any]) -> Floats:
    """-sum_c p_c log p_c in nats, with 0 log 0 = 0: (N,) from (N, C); between 0 and log C, the most uncertain."""
    values = [
        -(part * np.log(part, out=np.zeros_like(part), where=part > 0)).sum(axis=1) for part in _parts(probabilities)
    ]
    # The sum of a certain row is -0.
    return np.concatenate([np.empty(0), *values]) + 0.0


def margin(probabilities: NDArray[Any]) -> Floats:
    """The largest probability minus the second one (0 where C = 1): (N,) from (N, C); 0 is the most uncertain."""
    values = [
        np.diff(np.partition(np.pad(part, ((0, 0), (1, 0))), -2, axis=1)[:, -2:])[:, 0]
        for part in _parts(probabilities)
    ]
    return np.concatenate([np.empty(0), *values])


def most_uncertain(uncertainty: NDArray[Any], count: int, chosen: ArrayLike) -> NDArray[np.int64]:
    """The rows of the highest values of (N,) that are not chosen yet, highest first: (count,); ties by smaller row.

    `entropy` ranks by entropy, `-margin` by margin.

    Raises:
        UserError: a value is NaN, or as `candidates`.
    """
    values = np.asarray(uncertainty, dtype=np.float64)
    if values.ndim != 1 or np.isnan(values).any():
        raise UserError(f"Found NaN, or the shape {values.shape}, in uncertainties; expected one number per image.")
    rows = np.flatnonzero(candidates(len(values), count, chosen))
    return rows[np.argsort(-values[rows], kind="stable")[:count]]


def random_choice(total: int, count: int, chosen: ArrayLike, *, seed: int) -> NDArray[np.int64]:
    """Rows that are not chosen yet, drawn without repeats: (count,); of one seed, fewer are the beginning of more.

    Raises:
        UserError: as `candidates`.
    """
    rows = np.flatnonzero(candidates(total, count, chosen))
    return np.random.default_rng(seed).permutation(rows)[:count]


def _parts(probabilities: NDArray[Any]) -> Iterator[Floats]:
    """Blocks of rows in double precision."""
    rows = max(1, _ENTRIES // probabilities.shape[1])
    for start in range(0, len(probabilities), rows):
        yield probabilities[start : start + rows].astype(np.float64)
