"""Batches in a deterministic order, with a state that continues it.

A batch of all ranks is B consecutive positions of the endless sample sequence; each rank takes its own consecutive part
of them. What is left of an epoch when a batch is full begins the next batch.
"""

from __future__ import annotations

import contextlib
import re
import threading
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Generic, Protocol, TypeVar, cast

import torch
from torch.utils.data import DataLoader, Dataset

from vlkd.data.plan import Coverage, Plan
from vlkd.data.sources import MAX_BAD_SHARE
from vlkd.errors import UserError

RECENT, MAX_BAD_RECENT = 1000, 100
"""A run ends when of the latest 1,000 samples more than half, and at least 100, cannot be used: a disk is gone, or a
server, or the data of a small source in a mixture."""
SHOWN_BAD = 5


class Handed(Protocol):
    """What the stream asks of a batch: keys of its samples, and what was left out, key to reason."""

    @property
    def keys(self) -> list[str]: ...
    @property
    def bad(self) -> dict[str, str]: ...


class Rows(Protocol):
    """What the stream asks of a table."""

    def __len__(self) -> int: ...
    def fingerprint(self) -> str: ...
    def prefetch(self, numbers: Iterable[int], /) -> None: ...


AnyBatch = TypeVar("AnyBatch", bound=Handed, covariant=True)


class Drawn(Protocol[AnyBatch]):
    """What the stream asks of a sequence: samples by their position, and batches of them."""

    @property
    def table(self) -> Rows: ...
    @property
    def plan(self) -> Plan: ...
    @property
    def seed(self) -> int: ...
    def __getitem__(self, position: int, /) -> Any: ...
    def collate(self, samples: Any, /) -> AnyBatch: ...


class _RankPositions:
    """For each step from `start` on, this rank's positions of the global batch."""

    def __init__(self, start: int, stop: int, batch_size: int, rank: int, world_size: int) -> None:
        self.range = range(start, stop - batch_size + 1, batch_size)
        self.share = batch_size // world_size
        self.rank = rank

    def __iter__(self) -> Iterator[list[int]]:
        for first in self.range:
            begin = first + self.rank * self.share
            yield list(range(begin, begin + self.share))

    def __len__(self) -> int:
        return len(self.range)


Which = TypeVar("Which", bound=Drawn[Handed], covariant=True)


class BatchStream(Generic[Which]):
    """The batches of one rank, from wherever the state says; iterating advances the state.

    Args:
        sequence: the samples.
        batch_size: of all ranks together.
        samples: where the stream ends.
        workers: processes that decode; 0 decodes in this one.
        rank: of this process.
        world_size: number of ranks.

    Raises:
        UserError: the batch does not divide among the ranks, or is larger than the table.
    """

    def __init__(
        self,
        sequence: Which,
        *,
        batch_size: int,
        samples: int,
        workers: int = 0,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        if batch_size % world_size:
            raise UserError(f"A batch of {batch_size} does not divide among {world_size} ranks; change the batch size.")
        if batch_size > len(sequence.table):
            raise UserError(
                f"A batch of {batch_size} is larger than the {len(sequence.table)} training images; "
                "set the batch size lower."
            )
        self.sequence = sequence
        self.batch_size = batch_size
        self.samples = samples
        self.workers = workers
        self.rank = rank
        self.world_size = world_size
        self.position = 0
        self.bad: dict[str, str] = {}
        self.unshared: dict[str, str] = {}
        self._recent: deque[tuple[int, int]] = deque()
        self.fingerprint = sequence.table.fingerprint()

    def set_epoch(self, epoch: int) -> None:
        """Go to where `epoch` times as many samples as the table has were drawn; for a loop of one's own.

        Without weights that is the first sample of an epoch, from 0; with weights each source has epochs of its own.
        """
        self.position = epoch * len(self.sequence.table)

    def coverage(self) -> list[Coverage]:
        """What was drawn so far of each source, or of all together where they have no weights."""
        return self.sequence.plan.coverage(self.position)

    def __iter__(self: BatchStream[Drawn[AnyBatch]]) -> Iterator[AnyBatch]:
        loader: DataLoader[Any] = DataLoader(
            cast("Dataset[Any]", self.sequence),
            batch_sampler=_RankPositions(self.position, self.samples, self.batch_size, self.rank, self.world_size),
            collate_fn=self.sequence.collate,
            num_workers=self.workers,
            prefetch_factor=4 if self.workers else None,
            # Otherwise each iterator draws a seed from torch's global generator, which after a resume would be one draw
            # ahead of an uninterrupted run's: dropout would differ.
            generator=torch.Generator(),
        )
        batches = iter(loader)
        ended = threading.Event()
        # Behind the workers' start, because a forked process must not have a thread's locks.
        self.sequence.table.prefetch(self._ahead(ended))
        try:
            for _ in range(len(loader)):
                with plain_errors():
                    batch = next(batches)
                self.position += self.batch_size
                self._count_bad(batch)
                yield batch
        finally:
            ended.set()

    def _ahead(self, ended: threading.Event) -> Iterator[int]:
        """Shards in the order of reading, each as soon as the block before its own is begun."""
        plan = self.sequence.plan
        block = plan.together * max(size for source in plan.sizes for size in source)
        for place, shard in plan.shards_from(self.position):
            while place - self.position > block and not ended.wait(0.2):
                pass
            if ended.is_set():
                return
            yield shard

    def _count_bad(self, batch: Handed) -> None:
        """Name what is left out, and refuse to go on without much of the data or of the latest samples."""
        for key, reason in batch.bad.items():
            if key not in self.bad:
                self.unshared[key] = reason
                if len(self.bad) < SHOWN_BAD:
                    print(f"left out: {key}: {reason}", flush=True)
            self.bad[key] = reason
        self._recent.append((len(batch.bad), len(batch.keys) + len(batch.bad)))
        while sum(drawn for _, drawn in self._recent) - self._recent[0][1] >= RECENT:
            self._recent.popleft()
        if not batch.bad:
            return
        first, reason = next(iter(batch.bad.items()))
        if len(self.bad) > max(1, MAX_BAD_SHARE * len(self.sequence.table)):
            raise UserError(
                f"{len(self.bad)} samples cannot be used, more than {MAX_BAD_SHARE:.0%} of the data (for instance "
                f"{first}: {reason}); mend or remove them."
            )
        bad, drawn = (sum(counts) for counts in zip(*self._recent, strict=True))
        if bad >= MAX_BAD_RECENT and 2 * bad > drawn:
            raise UserError(
                f"{bad} of the latest {drawn} samples cannot be used (for instance {first}: {reason}); see that the "
                "data can be read, then give the same command to continue."
            )

    def state_dict(self) -> dict[str, Any]:
        """Where the stream is, in samples of all ranks, and what it streams."""
        return {
            "epoch": self.position // len(self.sequence.table),
            "samples": self.position,
            "seed": self.sequence.seed,
            "plan": self.sequence.plan.fingerprint(),
            "data": self.fingerprint,
            "bad": self.bad,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from a state.

        Raises:
            UserError: it belongs to other data, another seed or another order.
        """
        own = self.state_dict()
        for name in ("seed", "data", "plan"):
            if state.get(name) != own[name]:
                raise UserError(
                    f"The checkpoint was made with {name} {state.get(name)}, found {own[name]}; "
                    "restore the data or start in another output folder."
                )
        self.position = int(state["samples"])
        self.bad = dict(state["bad"])


@contextlib.contextmanager
def plain_errors() -> Iterator[None]:
    """Give a worker's error as it was raised there, and a killed worker as a sentence."""
    try:
        yield
    except UserError as error:
        text = str(error).rstrip()
        # torch wraps the worker's whole traceback into the message; the last line is `module.Class: sentence`.
        if text.startswith("Caught "):
            raise UserError(text.rpartition("\n")[2].partition(": ")[2]) from None
        raise
    except RuntimeError as error:
        if not re.match(r"DataLoader worker \(pid.*\) (is killed|exited)", str(error)):
            raise
        raise UserError(
            "A worker that decodes images was killed, as when memory ends; set data.workers lower if it happens again, "
            "and give the same command to continue."
        ) from None
