"""A bounded folder of local copies of remote shards, shared by many processes."""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

from filelock import FileLock, Timeout

from vlkd.data.download import disk, fetch, lock_of, part_of
from vlkd.data.remote import Pause, redacted
from vlkd.errors import UserError

RemoteShard = tuple[str, int, str]
"""URL, size in bytes, SHA-256 in hex digits."""
_Ensure = Callable[[RemoteShard, Pause], None]

_COPY_NAME = re.compile(r"[0-9a-f]{32}-[0-9a-f]{16}\.tar")
_WAIT_FOR_ROOM = 0.1


class LocalCopies:
    """Whole, verified local files of remote shards; the least recently used make room for others.

    A copy is named by a hash of the full URL and its content's hash, so equal base names in different folders, and new
    content under an old URL, are different copies. Processes and threads that ask for one shard together download it
    once. What is being downloaded counts towards the limit. A copy may be removed as soon as others need the room, but
    files that are open stay readable (POSIX), so take `open` where several processes share a small folder. Objects
    travel to other processes without their prefetching.

    Args:
        folder: made if absent; files in it that are no copies are left alone.
        limit_bytes: of all copies; give at least two shards per process that reads or prefetches.
        timeout: seconds, as in `download`.
        attempts: as in `download`.
    """

    def __init__(self, folder: Path, limit_bytes: int, *, timeout: float = 60.0, attempts: int = 8) -> None:
        self.folder = folder
        self.limit_bytes = limit_bytes
        self.timeout = timeout
        self.attempts = attempts
        self._ahead: _Ahead | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_ahead": None}

    def path(self, url: str, size: int, sha256: str) -> Path:
        """A local copy, downloaded if it is absent or has another size; the hash was checked when it was written.

        Raises:
            UserError: the shard is larger than the limit, or `download` fails.
        """
        target = self._target(url, sha256)
        # A forked child has its parent's object, not its thread.
        if self._ahead is not None and self._ahead.process == os.getpid():
            self._ahead.asked_for(target.name)
        self._ensure(target, url, size, sha256, time.sleep)
        return target

    def open(self, url: str, size: int, sha256: str) -> BinaryIO:
        """An open local copy, which no other process can take away; raises `UserError` as `path` does."""
        for _ in range(self.attempts):
            with contextlib.suppress(FileNotFoundError):
                return self.path(url, size, sha256).open("rb")
        raise UserError(
            f"The copy of {redacted(url)} was removed {self.attempts} times before it could be read; raise the limit "
            f"of {self.limit_bytes} bytes for {self.folder}."
        )

    def prefetch(self, shards: Iterable[RemoteShard], *, ahead: int = 2) -> None:
        """Download in the background, one at a time, what `path` will be asked for; takes the place of an earlier call.

        Errors are left for `path` to meet, and the iterable is advanced in the background, too.

        Args:
            shards: in the order in which they are needed, each once.
            ahead: shards fetched that were not asked for yet; the limit must hold them and those in use.
        """
        self.close()

        def ensure(shard: RemoteShard, pause: Pause) -> None:
            url, size, sha256 = shard
            self._ensure(self._target(url, sha256), url, size, sha256, pause)

        named = ((self._target(url, sha256).name, (url, size, sha256)) for url, size, sha256 in shards)
        self._ahead = _Ahead(named, ensure, ahead)

    def close(self) -> None:
        """Stop prefetching; waits for the piece under way, at most `timeout` seconds."""
        if self._ahead is not None and self._ahead.process == os.getpid():
            self._ahead.stop(self.timeout)
        self._ahead = None

    def _target(self, url: str, sha256: str) -> Path:
        return self.folder / f"{hashlib.sha256(url.encode()).hexdigest()[:32]}-{sha256[:16]}.tar"

    def _ensure(self, target: Path, url: str, size: int, sha256: str, pause: Pause) -> None:
        if _touch(target, size):
            return
        if size > self.limit_bytes:
            raise UserError(
                f"{redacted(url)} has {size} bytes, more than the limit of {self.limit_bytes} for local copies in "
                f"{self.folder}; raise the limit."
            )
        with disk(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
        with _held(lock_of(target)):
            if _touch(target, size):
                return
            while not self._reserve(target, size):
                pause(_WAIT_FOR_ROOM)
            fetch(url, target, size=size, sha256=sha256, timeout=self.timeout, attempts=self.attempts, pause=pause)

    def _reserve(self, target: Path, size: int) -> bool:
        """Make room and take it with a part of full length; False while other downloads hold it."""
        with _held(FileLock(self.folder / ".room.lock")), disk(self.folder):
            target.unlink(missing_ok=True)
            room = self.limit_bytes - size - sum(self._parts_of_others(target))
            if room < 0:
                return False
            copies = [(path.stat(), path) for path in self.folder.iterdir() if _COPY_NAME.fullmatch(path.name)]
            used = sum(stat.st_size for stat, _ in copies)
            for stat, path in sorted(copies, key=lambda copy: copy[0].st_mtime_ns):
                if used <= room:
                    break
                path.unlink()
                used -= stat.st_size
            with part_of(target).open("ab") as part:
                part.truncate(size)
            return True

    def _parts_of_others(self, target: Path) -> Iterator[int]:
        """Sizes of what is being downloaded; parts whose owner is gone are removed."""
        for part in self.folder.glob(".*.part"):
            name = part.name.removeprefix(".").removesuffix(".part")
            if name == target.name or not _COPY_NAME.fullmatch(name):
                continue
            with contextlib.suppress(FileNotFoundError):
                try:
                    with lock_of(self.folder / name).acquire(timeout=0):
                        part.unlink()
                except Timeout:
                    yield part.stat().st_size


def _touch(target: Path, size: int) -> bool:
    """Whether the copy is there with its size; it counts as just used then."""
    with contextlib.suppress(FileNotFoundError):
        if target.stat().st_size == size:
            os.utime(target)
            return True
    return False


@contextlib.contextmanager
def _held(lock: FileLock) -> Iterator[None]:
    with disk(Path(lock.lock_file)):
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


class _Stopped(Exception):
    pass


class _Ahead:
    """The thread that prefetches, and which of its shards were not asked for yet."""

    def __init__(self, shards: Iterator[tuple[str, RemoteShard]], ensure: _Ensure, ahead: int) -> None:
        self.process = os.getpid()
        self._changed = threading.Condition()
        self._stopped = False
        self._waiting: deque[str] = deque()
        self._seen: set[str] = set()
        self._thread = threading.Thread(target=self._run, args=(shards, ensure, ahead), daemon=True, name="prefetch")
        self._thread.start()

    def asked_for(self, name: str) -> None:
        with self._changed:
            if name not in self._waiting:
                self._seen.add(name)
            # Those before it were skipped by the reader.
            while name in self._waiting:
                self._waiting.popleft()
            self._changed.notify_all()

    def stop(self, timeout: float) -> None:
        with self._changed:
            self._stopped = True
            self._changed.notify_all()
        self._thread.join(timeout)

    def _run(self, shards: Iterator[tuple[str, RemoteShard]], ensure: _Ensure, ahead: int) -> None:
        with contextlib.suppress(_Stopped):
            for name, shard in shards:
                with self._changed:
                    self._changed.wait_for(lambda: self._stopped or len(self._waiting) < ahead)
                    if self._stopped:
                        return
                    if name in self._seen:
                        self._seen.remove(name)
                        continue
                    self._waiting.append(name)
                with contextlib.suppress(UserError):
                    ensure(shard, self._pause)

    def _pause(self, seconds: float) -> None:
        with self._changed:
            if self._changed.wait_for(lambda: self._stopped, seconds):
                raise _Stopped
