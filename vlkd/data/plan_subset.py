"""The order of samples drawn from some rows of a larger table, such as its labelled images."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from vlkd.data.plan import Plan
from vlkd.errors import UserError


class SubsetPlan(Plan):
    """A `Plan` over some rows alone: shuffled anew for each of their own epochs, every one of them once.

    Fewer rows than a batch has samples are no special case: positions run on through the next epochs, so one batch
    holds a row several times, each time as another view. It is drawn apart from a `Plan` of the whole table with the
    same seed: where the rows are all of the table, the two streams are still not in step.

    `len`, `coverage` and the epoch of `row` count the subset's own rows. `BatchStream` counts those of its table in
    `set_epoch` and in the `epoch` of its state, and compares the batch size with the table.

    Args:
        rows: (L,) row numbers of the table, without repeats.
        seed: of every draw.

    Raises:
        UserError: there is no row.
        ValueError: a row number is negative or repeated.
    """

    def __init__(self, rows: NDArray[np.int64], *, seed: int) -> None:
        if not len(rows):
            raise UserError("There is no image to draw from, expected one or more; give more shots.")
        if rows.min() < 0 or len(np.unique(rows)) < len(rows):
            raise ValueError("row numbers must be 0 or more and differ")
        self.of_table = np.array(rows, dtype=np.int64)
        own_seed = int.from_bytes(hashlib.blake2b(f"{seed}\0subset".encode(), digest_size=8).digest(), "little")
        super().__init__([[len(rows)]], seed=own_seed)

    def fingerprint(self) -> str:
        """A hash of everything on which the order depends, the rows among it."""
        state = super().fingerprint().encode() + self.of_table.astype("<i8").tobytes()
        return hashlib.sha256(state).hexdigest()[:16]

    def row(self, position: int) -> tuple[int, int]:
        """The table's row at a position from 0, and how often the subset was passed before."""
        number, epoch = super().row(position)
        return int(self.of_table[number]), epoch

    def shards_from(self, position: int) -> Iterator[tuple[int, int]]:  # noqa: ARG002
        """None: scattered rows are read when they are needed, because most of a shard would be fetched for nothing."""
        yield from ()
