"""The order of samples of unequal length: batches of like lengths, so that little of a batch is padding."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np

from vlkd.data.conversations import Conversation
from vlkd.data.plan import Ids, Plan


class BucketedPlan(Plan):
    """A `Plan` whose order is sorted by length inside of windows, and whose batches are shuffled there.

    A window holds the rows of `window` consecutive batches of a `Plan` with the same seed. They are sorted by length,
    cut into batches, and these are put in an order drawn anew for each window of each epoch. So every row comes once
    per epoch, in a random one of its windows' batches, and a batch of all ranks, which begins at a multiple of
    `batch_size`, holds neighbours in length. A batch across the border of two epochs holds neighbours of each.

    Args:
        lengths: of each row, in any unit; see `text_lengths`.
        batch_size: of all ranks together.
        window: batches that are sorted together; 1 sorts within a batch alone and saves nothing, and as many as an
            epoch has make nearly the same batches in each of them.
        seed: of every draw.

    Raises:
        UserError: there is no sample.
        ValueError: batch size or window is below 1.
    """

    def __init__(self, lengths: Sequence[int], *, batch_size: int, window: int, seed: int) -> None:
        if batch_size < 1 or window < 1:
            raise ValueError("batch size and window must be 1 or more")
        super().__init__([[len(lengths)]], seed=seed)
        self.lengths = np.array(lengths, np.int64)
        self.batch_size = batch_size
        self.window = window
        self._ordered: tuple[tuple[int, int], Ids] | None = None

    def fingerprint(self) -> str:
        """A hash of everything on which the order depends, lengths, batch size and window among it."""
        state = repr((super().fingerprint(), self.batch_size, self.window)).encode()
        return hashlib.sha256(state + self.lengths.astype("<i8").tobytes()).hexdigest()[:16]

    def row(self, position: int) -> tuple[int, int]:
        """The row at a position from 0, and how often the rows were passed before."""
        epoch, step = divmod(position, self.rows)
        # Batches begin at multiples of the batch size, so the first one of an epoch may have begun in the last epoch.
        before = epoch * self.rows % self.batch_size
        number = (before + step) // (self.batch_size * self.window)
        first = max(0, number * self.batch_size * self.window - before)
        return int(self._rows(epoch, number, first, before)[step - first]), epoch

    def _rows(self, epoch: int, number: int, first: int, before: int) -> Ids:
        """The rows of a window, whose first one is the epoch's `first`, in their order."""
        if self._ordered is None or self._ordered[0] != (epoch, number):
            end = min(self.rows, (number + 1) * self.batch_size * self.window - before)
            drawn = np.array([super(BucketedPlan, self).row(epoch * self.rows + at)[0] for at in range(first, end)])
            by_length = drawn[np.argsort(self.lengths[drawn], kind="stable")]
            batch = (np.arange(first, end) + before) // self.batch_size
            batch -= batch[0]
            # Each batch has a place among the sorted lengths; what stands in it are the rows of that place.
            ranks = np.random.default_rng([self.seed, epoch, number, 1]).permutation(batch[-1] + 1)
            rows = np.empty_like(by_length)
            rows[np.argsort(ranks[batch], kind="stable")] = by_length
            self._ordered = ((epoch, number), rows)
        return self._ordered[1]


def text_lengths(conversations: Sequence[Conversation]) -> list[int]:
    """Bytes of what is said in each conversation, in UTF-8.

    They stand for its tokens, without a tokenizer, so that the order of samples is the same whichever models learn.
    """
    return [sum(len(turn.text.encode()) for turn in talk.turns) for talk in conversations]
