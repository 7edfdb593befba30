"""The order of samples: which row stands at a position of the endless sequence, computed and never stored.

Nothing here knows of workers or ranks, so that the sequence of rows is the same on any number of them.
"""

from __future__ import annotations

import hashlib
import heapq
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from vlkd.errors import UserError

Ids = NDArray[np.int64]
Which = TypeVar("Which")
What = TypeVar("What")

CYCLE = 4096
"""Samples in which a mixture has its weights exactly, each source's share rounded to a whole number."""


@dataclass(frozen=True)
class Coverage:
    """What was drawn of one source: `drawn` samples in all, `distinct` of its `rows`; `epochs` is drawn / rows."""

    drawn: int
    distinct: int
    rows: int

    @property
    def epochs(self) -> float:
        """Passes over the source."""
        return self.drawn / max(1, self.rows)


class Plan:
    """Rows in shuffled order, every one once per epoch of its source.

    Block shuffle: an epoch draws an order of the shards, takes `together` of them at a time, and mixes their samples
    completely. So at most 2 * `together` shards of a source are read at any moment (a batch may lie across two blocks),
    and a source of at most `together` shards is shuffled as a whole. What is left of an epoch when a batch is full
    begins the next batch.

    Without weights all sources are one. With weights, every `CYCLE` samples hold each source in proportion to its
    weight, in an order drawn anew for each cycle, and each source runs through its own epochs.

    Args:
        sizes: per source the number of samples in each of its shards; rows are numbered through in this order.
        seed: of every draw.
        weights: one per source, 0 or more, or () for none.
        together: shards mixed at a time.

    Raises:
        UserError: there is no sample, or the weights are not one per source with a sum above 0.
    """

    def __init__(
        self, sizes: Sequence[Sequence[int]], *, seed: int, weights: Sequence[float] = (), together: int = 8
    ) -> None:
        self.sizes = [list(source) for source in sizes]
        self.seed = seed
        self.weights = tuple(float(weight) for weight in weights)
        self.together = together
        self.rows = sum(map(sum, self.sizes))
        if weights:
            check_weights(self.weights, self.sizes)
        if not self.rows:
            raise UserError("The data hold no sample; name others with data.train.")
        merged = self.sizes if weights else [[size for source in self.sizes for size in source]]
        first_rows = np.cumsum([0, *map(sum, merged)])
        first_shards = np.cumsum([0, *map(len, merged)])
        self.sources = [
            _Source(own, int(first_rows[i]), int(first_shards[i]), seed, i, together) for i, own in enumerate(merged)
        ]
        self.quotas = quotas(self.weights, CYCLE) if weights else np.array([CYCLE])
        self._cycle: tuple[int, Ids, Ids] | None = None

    def __len__(self) -> int:
        return self.rows

    def fingerprint(self) -> str:
        """A hash of everything on which the order depends."""
        state = repr((self.sizes, self.seed, self.weights, self.together, CYCLE))
        return hashlib.sha256(state.encode()).hexdigest()[:16]

    def row(self, position: int) -> tuple[int, int]:
        """The row at a position from 0, and how often its source was passed before."""
        source, index = self._source(position)
        return self.sources[source].row(index)

    def coverage(self, position: int) -> list[Coverage]:
        """What positions below `position` hold of each source; of all sources together where there are no weights."""
        cycle, slot = divmod(position, CYCLE)
        drawn = cycle * self.quotas
        if len(self.sources) == 1:
            drawn = np.array([position])
        elif slot:
            drawn = drawn + np.bincount(self._schedule(cycle)[0][:slot], minlength=len(drawn))
        return [
            Coverage(int(n), min(int(n), source.rows), source.rows)
            for n, source in zip(drawn, self.sources, strict=True)
        ]

    def shards_from(self, position: int) -> Iterator[tuple[int, int]]:
        """The shards (numbered through all sources) in the order in which they are needed, each behind the position
        at which, to within a cycle, its block begins."""
        begins = [coverage.drawn for coverage in self.coverage(position)]
        shares = self.quotas / CYCLE
        streams = [
            source.shards_from(begin, position, float(share))
            for source, begin, share in zip(self.sources, begins, shares, strict=True)
            if share
        ]
        yield from heapq.merge(*streams)

    def _source(self, position: int) -> tuple[int, int]:
        """The source at a position, and the number of the sample among those of its source."""
        if len(self.sources) == 1:
            return 0, position
        cycle, slot = divmod(position, CYCLE)
        schedule, before = self._schedule(cycle)
        source = int(schedule[slot])
        return source, int(cycle * self.quotas[source] + before[slot])

    def _schedule(self, cycle: int) -> tuple[Ids, Ids]:
        """The sources of a cycle's samples, and how many of the same source precede each of them there."""
        if self._cycle is None or self._cycle[0] != cycle:
            members = np.repeat(np.arange(len(self.quotas)), self.quotas)
            schedule = np.random.default_rng([self.seed, cycle]).permutation(members)
            before = np.empty(CYCLE, np.int64)
            for source, quota in enumerate(self.quotas):
                before[schedule == source] = np.arange(quota)
            self._cycle = (cycle, schedule, before)
        return self._cycle[1:]


class _Source:
    """One source's epochs."""

    def __init__(
        self, sizes: Sequence[int], first_row: int, first_shard: int, seed: int, number: int, together: int
    ) -> None:
        self.sizes = np.array(sizes, np.int64)
        self.first_rows = first_row + np.cumsum(self.sizes) - self.sizes
        self.first_shard = first_shard
        self.rows = int(self.sizes.sum())
        self.key = (seed, number)
        self.together = together
        self._epochs: dict[int, tuple[Ids, Ids]] = {}
        self._blocks: dict[tuple[int, int], Ids] = {}

    def row(self, index: int) -> tuple[int, int]:
        epoch, step = divmod(index, self.rows)
        _, ends = self._epoch(epoch)
        block = int(np.searchsorted(ends, step, side="right"))
        return int(self._block(epoch, block)[step - (ends[block - 1] if block else 0)]), epoch

    def shards_from(self, index: int, position: int, share: float) -> Iterator[tuple[int, int]]:
        """Shards in order of need from the block of its sample `index` on, which stands at `position` of the whole;
        each behind the position of its block's first sample."""
        epoch, step = divmod(index, self.rows)
        _, ends = self._epoch(epoch)
        block = int(np.searchsorted(ends, step, side="right"))
        while True:
            order, ends = self._epoch(epoch)
            for number in range(block, len(ends)):
                begin = epoch * self.rows + (int(ends[number - 1]) if number else 0)
                place = position + int(max(0, begin - index) / share)
                for shard in order[number * self.together : (number + 1) * self.together]:
                    yield place, self.first_shard + int(shard)
            epoch, block = epoch + 1, 0

    def _epoch(self, epoch: int) -> tuple[Ids, Ids]:
        """The order of the shards, and where each block ends."""

        def draw() -> tuple[Ids, Ids]:
            order = np.random.default_rng([*self.key, epoch]).permutation(len(self.sizes))
            starts = np.arange(0, len(order), self.together)
            return order, np.cumsum(np.add.reduceat(self.sizes[order], starts))

        return _remembered(self._epochs, epoch, draw)

    def _block(self, epoch: int, block: int) -> Ids:
        """The rows of a block in their order."""

        def draw() -> Ids:
            order, _ = self._epoch(epoch)
            shards = order[block * self.together : (block + 1) * self.together]
            rows = np.concatenate([np.arange(self.sizes[i]) + self.first_rows[i] for i in shards])
            return np.random.default_rng([*self.key, epoch, block]).permutation(rows)

        return _remembered(self._blocks, (epoch, block), draw)


def _remembered(known: dict[Which, What], which: Which, draw: Callable[[], What]) -> What:
    """What `draw` gives, of the latest two asked for: a batch may lie across a border."""
    if which not in known:
        while len(known) > 1:
            del known[next(iter(known))]
        known[which] = draw()
    return known[which]


def quotas(weights: Sequence[float], total: int) -> Ids:
    """Whole numbers that add up to `total`, in proportion to the weights, by largest remainders; above 0 for each
    weight above 0."""
    shares = np.array(weights) / math.fsum(weights) * total
    whole = np.maximum(np.floor(shares), shares > 0).astype(np.int64)
    missing = total - int(whole.sum())
    order = np.argsort(-(shares - whole), kind="stable")
    for i in range(abs(missing)):
        # Lifting tiny shares to 1 may have taken too much: the largest source gives it back.
        whole[order[i % len(order)] if missing > 0 else int(np.argmax(whole))] += 1 if missing > 0 else -1
    return whole


def check_weights(weights: Sequence[float], sizes: Sequence[Sequence[int]]) -> None:
    """Raise `UserError` unless there is one weight per source, each 0 or more and finite, and a sample to draw."""
    if len(weights) != len(sizes):
        raise UserError(f"data.weights has {len(weights)} numbers for {len(sizes)} sources; give one per source.")
    if not all(math.isfinite(weight) and weight >= 0 for weight in weights) or not any(weights):
        raise UserError(f"data.weights is {list(weights)}; expected numbers of 0 or more, at least one above 0.")
    for number, (weight, own) in enumerate(zip(weights, sizes, strict=True), 1):
        if weight and not sum(own):
            raise UserError(f"Source {number} of data.train has a weight and no sample; leave it out.")
