"""The work of a scan on many shards: in processes of its own, with progress in bytes."""

from __future__ import annotations

import errno
import hashlib
import multiprocessing
import os
import shutil
import signal
import threading
from collections.abc import Generator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vlkd.data.scan_shard import BadShard, scan_shard
from vlkd.data.shard_refs import shown
from vlkd.data.shard_rows import ShardHeader, ShardRows, read_rows
from vlkd.errors import UserError


@dataclass(frozen=True, kw_only=True)
class Task:
    """A shard to index: its absolute path or URL, what the index calls it, where the index goes."""

    place: str
    name: str
    index: Path
    again: bool


@dataclass(frozen=True, kw_only=True)
class Done:
    """What became of a task: the header of its index, or the reason why there is none.

    Attributes:
        hashes: (n,) uint64 of the keys.
        fresh: whether the shard was read, because its index was missing or of another file.
    """

    header: ShardHeader | None = None
    reason: str = ""
    hashes: NDArray[np.uint64] = field(default_factory=lambda: np.empty(0, np.uint64))
    fresh: bool = True


def run(tasks: Sequence[Task], workers: int) -> Generator[tuple[int, Done]]:
    """Numbers and outcomes of tasks as they are ready; `workers` of 1 or less works in this process.

    Raises:
        UserError: an index cannot be written, or a process died.
    """
    if min(workers, len(tasks)) < 2:
        yield from enumerate(map(_work, tasks))
        return
    pool = ProcessPoolExecutor(
        min(workers, len(tasks)), mp_context=multiprocessing.get_context("spawn"), initializer=_follow_parent
    )
    try:
        numbers = {pool.submit(_work, task): number for number, task in enumerate(tasks)}
        for future in as_completed(numbers):
            yield numbers[future], future.result()
    except BrokenProcessPool:
        raise UserError("A process of the scan was killed; run it again with fewer --workers: it continues.") from None
    finally:
        pool.shutdown(cancel_futures=True)


def _follow_parent() -> None:
    """Leave interrupts to the parent, and end with it: it may be killed, and its processes would wait for ever."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    assert parent is not None

    def follow() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=follow, daemon=True).start()


def _work(task: Task) -> Done:
    rows = None if task.again else _current(task)
    fresh = rows is None
    if rows is None:
        try:
            _read_shard(task)
        except BadShard as error:
            return Done(reason=str(error))
        rows = read_rows(task.index)
    if not len(rows):
        problems = "; ".join(rows.header.problem_list[:3]) or "it is empty"
        return Done(reason=f"{shown(task.place)} holds no usable sample ({problems}).", fresh=fresh)
    digests = b"".join(hashlib.blake2b(key.encode(), digest_size=8).digest() for key in rows.all_keys())
    return Done(header=rows.header, hashes=np.frombuffer(digests, dtype=np.uint64), fresh=fresh)


def _current(task: Task) -> ShardRows | None:
    """The index of a shard where it is whole and of this very file; of a URL, of this URL."""
    try:
        rows = read_rows(task.index)
        if rows.header.file != task.name:
            return None
        if "://" in task.place:
            return rows
        found = os.stat(task.place)
    except (UserError, OSError):
        return None
    return rows if (rows.header.bytes, rows.header.mtime_ns) == (found.st_size, found.st_mtime_ns) else None


def _read_shard(task: Task) -> None:
    if "://" not in task.place:
        scan_shard(Path(task.place), task.index, name=task.name)
        return
    from vlkd.data.download import download

    folder = task.index.with_name(f".{task.index.name}.tar.{os.getpid()}.partial")
    try:
        download(task.place, folder / "shard.tar")
        scan_shard(folder / "shard.tar", task.index, name=task.name)
    except BadShard as error:
        raise BadShard(f"{shown(task.place)}: {error}") from None
    except UserError as error:
        # The sentence does not tell a full disk, which no other shard can escape, from a server that fails.
        if getattr(error.__context__, "errno", None) in (errno.ENOSPC, errno.EDQUOT, errno.EROFS):
            raise
        raise BadShard(str(error)) from None
    finally:
        shutil.rmtree(folder, ignore_errors=True)


class Progress:
    """A bar of bytes read. What URLs hold is estimated from those that were read, as their sizes are not known."""

    def __init__(self, tasks: Sequence[Task]) -> None:
        from tqdm import tqdm

        self._sizes = [None if "://" in task.place else _size(task.place) for task in tasks]
        self._local = sum(size or 0 for size in self._sizes)
        self._unread, self._read, self._read_bytes = self._sizes.count(None), 0, 0
        self._bar: Any = tqdm(total=self._local, unit="B", unit_scale=True, desc=f"scan of {len(tasks)} shards")

    def update(self, number: int, done: Done) -> None:
        """Count a finished task; one whose shard was not read makes the whole shorter."""
        size = self._sizes[number]
        if size is None:
            self._unread -= 1
            size = done.header.bytes if done.header and done.fresh else 0
            self._read, self._read_bytes = self._read + bool(size), self._read_bytes + size
        elif not done.fresh:
            self._local, size = self._local - size, 0
        mean = self._read_bytes / max(1, self._read)
        self._bar.total = self._local + self._read_bytes + round(mean * self._unread)
        self._bar.update(size)

    def close(self) -> None:
        """Leave the bar as it is."""
        self._bar.close()


def _size(place: str) -> int:
    try:
        return os.stat(place).st_size
    except OSError:
        return 0
