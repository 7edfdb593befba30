"""Where the time of a step goes: waiting for data, the teachers, messages between ranks; the student has the rest."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from typing import ParamSpec, TypeVar

import torch
from torch import Tensor

from vlkd.data.samples import Batch
from vlkd.distill.teachers import Teacher
from vlkd.features import Preprocessing

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")

PARTS = ("data", "teacher", "sync", "aside")
"""`aside` is evaluation and saving, which no rate counts."""


class Clock:
    """Adds up the seconds of named parts.

    On a GPU a part is the time between two events of the current stream, so that nothing is made to wait; waiting for
    data, evaluating and saving happen on the host and are taken from its clock.

    Args:
        device: where the step runs.
    """

    def __init__(self, device: torch.device) -> None:
        self.events = device.type == "cuda"
        self.started = time.perf_counter()
        self.seconds = dict.fromkeys(PARTS, 0.0)
        self._pending: list[tuple[str, torch.cuda.Event, torch.cuda.Event]] = []

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Count what happens inside."""
        if self.events and name in ("teacher", "sync"):
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
            begin.record()
            yield
            end.record()
            self._pending.append((name, begin, end))
        else:
            started = time.perf_counter()
            yield
            self.seconds[name] += time.perf_counter() - started

    def counted(self, name: str, function: Callable[Arguments, Result]) -> Callable[Arguments, Result]:
        """The function, its calls counted."""

        def call(*args: Arguments.args, **kwargs: Arguments.kwargs) -> Result:
            with self.part(name):
                return function(*args, **kwargs)

        return call

    def split(self) -> tuple[float, dict[str, float]]:
        """The seconds of training since the last call, and each part's share of them; starts anew."""
        if self._pending:
            self._pending[-1][2].synchronize()
        for name, begin, end in self._pending:
            self.seconds[name] += begin.elapsed_time(end) / 1000
        now = time.perf_counter()
        seconds = max(1e-9, now - self.started - self.seconds["aside"])
        shares = {name: self.seconds[name] / seconds for name in PARTS if name != "aside"}
        shares["student"] = max(0.0, 1 - sum(shares.values()))
        self.started, self.seconds, self._pending = now, dict.fromkeys(PARTS, 0.0), []
        return seconds, shares


class CountedTeacher:
    """A teacher whose time is counted."""

    def __init__(self, teacher: Teacher, clock: Clock) -> None:
        self.teacher = teacher
        self.clock = clock
        self.name, self.width = teacher.name, teacher.width
        self.provides: frozenset[str] = teacher.provides
        self.preprocessing: Preprocessing | None = teacher.preprocessing

    def targets(self, batch: Batch, want: Collection[str]) -> dict[str, Tensor]:
        """The teacher's."""
        with self.clock.part("teacher"):
            return self.teacher.targets(batch, want)
