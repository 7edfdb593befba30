"""What a run does, written down while it does it: the keys that it draws, the files that it changes."""

from __future__ import annotations

import io
import json
import os
import re
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vlkd.data.loader import BatchStream
from vlkd.data.samples import Batch

_TEMPORARY = re.compile(r"(?<=\.)[a-z0-9_]{8}(?=/|$)|tmp[a-z0-9_]{8}|[0-9]+")
_FILE_EVENTS = ("os.rename", "os.mkdir", "os.remove", "os.rmdir", "os.truncate")


@dataclass(frozen=True, kw_only=True)
class Drawn:
    """One rank's part of a batch, as its stream gave it.

    Attributes:
        start: the position of the whole batch's first sample.
        rank: whose part it is.
        keys: of the samples that are trained on.
        bad: of those that were left out.
        at: seconds of the system's clock.
    """

    start: int
    rank: int
    keys: tuple[str, ...]
    bad: tuple[str, ...]
    at: float


def log_keys(path: Path, act: Callable[[int], object] | None = None) -> None:
    """Have the streams of this process append what they give to a file of JSON lines, before training sees it.

    Args:
        path: of the file.
        act: called with the start of each batch that is logged, for instance to do some harm.
    """
    draw = BatchStream.__iter__

    def logged(stream: BatchStream) -> Iterator[Batch]:
        for batch in draw(stream):
            start = stream.position - stream.batch_size
            row = {"start": start, "rank": stream.rank, "keys": batch.keys, "bad": list(batch.bad), "at": time.time()}
            file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
            os.write(file, (json.dumps(row) + "\n").encode())
            os.close(file)
            if act:
                act(start)
            yield batch

    BatchStream.__iter__ = logged  # type: ignore[method-assign]


def read_keys(path: Path) -> list[Drawn]:
    """What `log_keys` wrote, in the order of writing."""
    rows = map(json.loads, path.read_text().splitlines()) if path.exists() else []
    return [Drawn(**row | {"keys": tuple(row["keys"]), "bad": tuple(row["bad"])}) for row in rows]


def check_order(
    drawn: Sequence[Drawn], planned: Sequence[str], *, start: int, batch_size: int, ranks: int
) -> list[str]:
    """Repeats, gaps and strangers among what the ranks of a run drew from `start` on, in words.

    Args:
        drawn: by all ranks.
        planned: the keys of the whole sequence.
        start: position at which the run began.
        batch_size: of all ranks.
        ranks: how many there are.
    """
    share = batch_size // ranks
    wanted = dict.fromkeys(range(ranks), start)
    problems = []
    for part in drawn:
        if part.start != wanted[part.rank]:
            problems.append(f"rank {part.rank} drew a batch at {part.start}, expected {wanted[part.rank]}")
        wanted[part.rank] = part.start + batch_size
        begin = part.start + part.rank * share
        slots = planned[begin : begin + share]
        if list(part.keys) != [key for key in slots if key not in part.bad] or not set(part.bad) <= set(slots):
            problems.append(f"rank {part.rank} drew other keys at {part.start} than planned")
    return problems


def on_file_events(folder: Path, log: Path, kind: str = "", number: int = 1) -> None:
    """Log each change of a file under `folder` by this process as a kind, and die at one of them.

    A kind is an event and a path without numbers and random names: `open` and `os.rename` are about to happen, after
    `opened` a file was opened for writing and has nothing new in it yet.

    Args:
        folder: what is watched.
        log: of one kind a line.
        kind: at which the whole process group is killed; "" kills nothing.
        number: at the so manieth event of that kind.
    """
    file = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    seen: Counter[str] = Counter()
    owner = os.getpid()

    def note(event: str, path: object) -> None:
        name = os.fsdecode(path) if isinstance(path, str | bytes | os.PathLike) else ""
        if os.getpid() != owner or not name.startswith(f"{folder}/"):
            return
        found = f"{event} {_TEMPORARY.sub('#', name.removeprefix(f'{folder}/'))}"
        os.write(file, f"{found}\n".encode())
        seen[found] += 1
        if found == kind and seen[found] == number:
            os.killpg(0, signal.SIGKILL)

    def watch(event: str, args: tuple[Any, ...]) -> None:
        if event in _FILE_EVENTS:
            note(event, args[1] if event == "os.rename" else args[0])
        elif event == "open" and args[2] & (os.O_WRONLY | os.O_RDWR):
            note(event, args[0])

    open_file = io.open

    def opened(path: Any, mode: str = "r", *args: Any, **kwargs: Any) -> Any:
        stream = open_file(path, mode, *args, **kwargs)
        if set(mode) & set("wax+"):
            note("opened", path)
        return stream

    setattr(io, "open", opened)  # noqa: B010 - a module's function, by which pathlib opens files
    sys.addaudithook(watch)
