"""Runs in forked children that are watched, hurt and killed: what tests of faults are made of.

A child starts in a fraction of the time of a command, as its parent has imported everything. The parent must not have
computed gradients beside a GPU, or opened connections: what these leave behind does not survive a fork.
"""

from __future__ import annotations

import fcntl
import json
import multiprocessing
import os
import re
import signal
import socket
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from helpers.trace import Drawn, check_order, log_keys, read_keys

from vlkd.engine.checkpoint import STATE, whole_checkpoints

_PIPE_BYTES = 2**20


class Child:
    """A function in a forked process of its own group, with its output kept.

    Args:
        work: what it does; the child leaves with the exit code of a command.
        environment: variables beside this process's own.
    """

    def __init__(self, work: Callable[[], object], environment: Mapping[str, str] | None = None) -> None:
        # No file: a limit on files would end the child's own words.
        self._out, end = os.pipe()
        fcntl.fcntl(end, fcntl.F_SETPIPE_SZ, _PIPE_BYTES)
        self._text = b""
        self._process = multiprocessing.get_context("fork").Process(target=_in_child, args=(work, end, environment))
        self._process.start()
        os.close(end)
        with suppress(OSError):
            os.setpgid(self.pid, self.pid)

    @property
    def pid(self) -> int:
        """Of the process and its group."""
        assert self._process.pid is not None
        return self._process.pid

    def wait(self, seconds: float) -> int | None:
        """The exit code, below 0 for a signal, or None while it still runs."""
        self._process.join(seconds)
        return self._process.exitcode

    def kill(self) -> None:
        """`kill -9` of the whole group, and of what it left behind."""
        with suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)
        self._process.join()

    def output(self) -> str:
        """What it and its children have said, once."""
        if self._out >= 0:
            os.set_blocking(self._out, False)
            with suppress(BlockingIOError):
                while part := os.read(self._out, _PIPE_BYTES):
                    self._text += part
            os.close(self._out)
            self._out = -1
        return self._text.decode(errors="replace")


def _in_child(work: Callable[[], object], end: int, environment: Mapping[str, str] | None) -> None:
    os.setpgid(0, 0)
    os.dup2(end, 1)
    os.dup2(end, 2)
    os.environ.update(environment or {})
    work()


@dataclass(frozen=True, kw_only=True)
class Attempt:
    """One start of a run, by however many ranks.

    Attributes:
        start: samples seen by the checkpoint that it found.
        code: exit code of the first rank that failed, or 0; below 0 for a signal, None where it hung.
        killed: whether it was running when its time to be killed came.
        drawn: by its ranks.
        began: seconds of the system's clock.
        output: of all ranks.
        problems: what must never happen, in words.
    """

    start: int
    code: int | None
    killed: bool
    drawn: list[Drawn]
    began: float
    output: str
    problems: list[str]

    @property
    def sentence(self) -> str:
        """The one sentence in which a command ends."""
        found = re.findall(r"vlkd: ([^\r\n]*)", self.output)
        return found[0] if found else ""


@dataclass(kw_only=True)
class TrialRun:
    """A training run, started as often as needed by one and the same command.

    Attributes:
        out: its folder.
        command: runs `vlkd` in this process with the words it is given.
        words: recipe and settings.
        planned: the keys of the whole sequence.
        batch_size: of all ranks.
        limit: seconds after which an attempt counts as hanging.
        attempts: so far.
    """

    out: Path
    command: Callable[[Sequence[str]], None]
    words: Sequence[str]
    planned: Sequence[str]
    batch_size: int
    limit: float = 180.0
    attempts: list[Attempt] = field(default_factory=list)

    def go(
        self,
        *words: str,
        ranks: int = 1,
        kill_after: float | None = None,
        prepare: Callable[[], object] | None = None,
        act: Callable[[int], object] | None = None,
    ) -> Attempt:
        """Start it, and wait for its end.

        Args:
            words: settings that may differ from start to start.
            ranks: as `torchrun` starts them on one machine: when one fails, the others are killed.
            kill_after: seconds after which all its processes are killed.
            prepare: called in each child beforehand.
            act: called by each rank with the start of each batch; RANK is in the environment where there are several.
        """
        start, began = self.position(), time.time()
        log = self.out.with_name(f"{self.out.name}.keys-{len(self.attempts):03d}.jsonl")

        def work() -> None:
            if prepare:
                prepare()
            log_keys(log, act)
            self.command(["train", *self.words, *words, f"out={self.out}"])

        places = [{}] if ranks == 1 else _rank_environments(ranks)
        children = [Child(work, place) for place in places]
        code, killed = _end(children, self.limit if kill_after is None else kill_after)
        hung = killed and kill_after is None
        drawn, output = read_keys(log), "".join(child.output() for child in children)
        problems = check_order(drawn, self.planned, start=start, batch_size=self.batch_size, ranks=ranks)
        if hung:
            problems.append(f"it hung for {self.limit:.0f} s")
        if code not in (0, 2) and not killed and code != -signal.SIGKILL:
            problems.append(f"exit code {code}: {output.strip().splitlines()[-1:]}")
        attempt = Attempt(
            start=start,
            code=None if hung else code,
            killed=killed,
            drawn=drawn,
            began=began,
            output=output,
            problems=problems,
        )
        if code == 2 and (output.count("vlkd: ") < 1 or output.count("vlkd: ") > ranks or "Traceback" in output):
            problems.append(f"exit code 2 without one sentence: {output[-300:]}")
        self.attempts.append(attempt)
        return attempt

    def position(self) -> int:
        """Samples seen by the newest checkpoint."""
        found = whole_checkpoints(self.out / "checkpoints")
        return int(json.loads((found[-1] / STATE).read_text())["stream"]["samples"]) if found else 0

    def weights(self) -> bytes:
        """Of the exported student, b"" where there is none."""
        path = self.out / "student" / "model.safetensors"
        return path.read_bytes() if path.is_file() else b""

    def losses(self) -> list[tuple[int, int, float]]:
        """Step, samples and loss of each line of `metrics.jsonl` that has one."""
        rows = [json.loads(line) for line in (self.out / "metrics.jsonl").read_text().splitlines()]
        return [(row["step"], row["samples"], row["loss"]) for row in rows if "loss" in row]

    def survived(self) -> list[Drawn]:
        """What went into the weights: of each attempt what came before the checkpoint from which the next one began."""
        ends = [attempt.start for attempt in self.attempts[1:]] + [len(self.planned)]
        parts = [
            part for attempt, end in zip(self.attempts, ends, strict=True) for part in attempt.drawn if part.start < end
        ]
        return sorted(parts, key=lambda part: (part.start, part.rank))

    def problems(self) -> list[str]:
        """Of all attempts, and of the finished run: samples missing or twice, steps logged twice or never."""
        found = [f"attempt {i}: {text}" for i, attempt in enumerate(self.attempts) for text in attempt.problems]
        if not self.attempts or self.attempts[-1].code != 0:
            return [*found, f"it did not end well: {self.attempts[-1].output[-300:] if self.attempts else ''}"]
        total = len(self.planned) // self.batch_size
        counts = Counter(part.start for part in self.survived() if part.rank == 0)
        if counts != Counter(range(0, total * self.batch_size, self.batch_size)):
            found.append("the batches that went into the weights are not each one once")
        if [row[:2] for row in self.losses()] != [(i + 1, (i + 1) * self.batch_size) for i in range(total)]:
            found.append("metrics.jsonl has not each step once")
        return found


def _end(children: Sequence[Child], seconds: float) -> tuple[int | None, bool]:
    """Wait for all, or for one that fails; the exit code, and whether they still ran when the time was over."""
    until = time.monotonic() + seconds
    try:
        while time.monotonic() < until:
            # One child is waited for without polling.
            left = max(0.0, until - time.monotonic())
            codes = [child.wait(left if len(children) == 1 else 0.02) for child in children]
            failed = [code for code in codes if code]
            if failed or None not in codes:
                return (failed or [0])[0], False
        return None, True
    finally:
        for child in children:
            child.kill()


def _rank_environments(ranks: int) -> list[dict[str, str]]:
    """What `torchrun` tells its processes."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1]), "GLOO_SOCKET_IFNAME": "lo"}
    shared |= {"WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks)}
    return [shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(ranks)]
