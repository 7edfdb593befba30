"""Fetching one remote shard whole and verified, in ranges, from servers that drop, stall and lie."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import io
import os
import re
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from filelock import FileLock

from vlkd.data.remote import (
    HTTP,
    Fault,
    Pause,
    Status,
    call_limits,
    file_system_of,
    raise_if_final,
    redacted,
    scheme_of,
    wait_before,
)
from vlkd.errors import UserError

if TYPE_CHECKING:
    from aiohttp import ClientResponse

PIECE_BYTES = 8 * 2**20
"""Asked for in one request."""
BLOCK_BYTES = 64 * 2**10
"""What must arrive within one time-out: a server that drips is as good as one that stalls."""

_Write = Callable[[bytes], None]
_ReadPiece = Callable[[int, int | None, _Write], int]


def lock_of(target: Path) -> FileLock:
    """The lock between processes and threads that writing `target` needs: an empty file `.NAME.lock` that stays."""
    return FileLock(target.parent / f".{target.name}.lock")


def part_of(target: Path) -> Path:
    """Where `target` grows; whoever holds `lock_of(target)` may remove it, since its owner is gone."""
    return target.parent / f".{target.name}.part"


@contextlib.contextmanager
def disk(target: Path) -> Iterator[None]:
    """Turn an error of the file system under `target` into a sentence."""
    try:
        yield
    except OSError as error:
        raise UserError(
            f"{target} cannot be written ({error.strerror or error}); free space there or choose another folder."
        ) from None


def download(
    url: str,
    target: Path,
    *,
    size: int | None = None,
    sha256: str | None = None,
    timeout: float = 60.0,
    attempts: int = 8,
    pause: Pause = time.sleep,
) -> None:
    """Fetch one object into `target`, which appears whole or not at all.

    Ranges of 8 MiB are appended to `.NAME.part` beside `target`; after an error the next request begins where the last
    good block ended. A server without ranges is read from the start and what is there already is skipped. Without
    `size` and `sha256` the server's own, consistent word about the length is all there is to check.

    Args:
        url: one URL, no pattern.
        target: replaced if it exists; its folder is made. An empty `.NAME.lock` stays beside it.
        size: bytes expected.
        sha256: of the content, in hex digits; a wrong one is fetched a second time.
        timeout: seconds for a connection, an answer, and each 64 KiB of it (of stores other than http(s): a request).
        attempts: without any progress, before giving up.
        pause: waits before a retry, at random longer or shorter; also called with 0 before each piece.

    Raises:
        UserError: the object is missing or refused, differs from `size` or `sha256`, the server keeps failing, or
            `target` cannot be written; nothing but the old `target` is left then.
    """
    with disk(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        lock = lock_of(target)
        lock.acquire()
    try:
        fetch(url, target, size=size, sha256=sha256, timeout=timeout, attempts=attempts, pause=pause)
    finally:
        lock.release()


def fetch(
    url: str,
    target: Path,
    *,
    size: int | None,
    sha256: str | None,
    timeout: float,
    attempts: int,
    pause: Pause,
) -> None:
    """`download` for a caller that holds `lock_of(target)`."""
    part = part_of(target)
    try:
        read = _piece_reader(url, timeout)
        with disk(target):
            stream = io.FileIO(os.open(part, os.O_RDWR | os.O_CREAT, 0o666), "r+")
        with stream:
            found = _fill(stream, read, url, target, size, attempts, pause)
            if sha256 not in (None, found):
                found = _fill(stream, read, url, target, size, attempts, pause)
            if sha256 not in (None, found):
                raise UserError(
                    f"{redacted(url)} has SHA-256 {found} where {sha256} was expected, twice: it changed or is "
                    "damaged; restore it, or scan the shards again."
                )
            with disk(target):
                os.fsync(stream.fileno())
        with disk(target):
            os.replace(part, target)
    finally:
        part.unlink(missing_ok=True)


def _fill(
    stream: io.FileIO, read: _ReadPiece, url: str, target: Path, size: int | None, attempts: int, pause: Pause
) -> str:
    """Write the whole object from the start of the stream; return its SHA-256."""
    state = hashlib.sha256()

    def write(data: bytes) -> None:
        with disk(target):
            rest = memoryview(data)
            while rest:
                rest = rest[stream.write(rest) :]
        state.update(data)

    with disk(target):
        stream.seek(0)
        stream.truncate(size or 0)
    failures = 0
    while size is None or stream.tell() < size:
        pause(0)
        begin = stream.tell()
        try:
            size = read(begin, size, write)
        except UserError:
            raise
        except Exception as error:
            end = stream.tell()
            failures = failures + 1 if end == begin else 1
            raise_if_final(error, url, failures >= attempts, f"be read at byte {end} in {failures} attempts")
            pause(wait_before(failures))
        else:
            failures = 0
    return state.hexdigest()


def _piece_reader(url: str, timeout: float) -> _ReadPiece:
    file_system, path = file_system_of(url, timeout)
    if scheme_of(url) not in HTTP:
        return partial(_read_store, file_system, path, timeout)
    from fsspec.asyn import sync

    return partial(sync, file_system.loop, _read_http, file_system, url, timeout)


def _read_store(file_system: Any, path: str, timeout: float, start: int, size: int | None, write: _Write) -> int:
    limits = call_limits(file_system, timeout)
    total = file_system.info(path, **limits)["size"] if start == 0 or size is None else size
    _check_total(total, size)
    end = min(start + PIECE_BYTES, total)
    data = file_system.cat_file(path, start=start, end=end, **limits) if start < end else b""
    if len(data) > end - start or (not data and start < end):
        raise Fault(f"{len(data)} bytes where {end - start} were asked for")
    write(data)
    return int(total)


async def _read_http(file_system: Any, url: str, timeout: float, start: int, size: int | None, write: _Write) -> int:
    """Write the next bytes from `start` on; return the object's length.

    fsspec's own reading trusts the status and the headers, and holds an answer of any length in memory.
    """
    import aiohttp

    stop = start + PIECE_BYTES if size is None else min(start + PIECE_BYTES, size)
    headers = {"Range": f"bytes={start}-{stop - 1}", "Accept-Encoding": "identity"}
    session = await file_system.set_session()
    try:
        async with asyncio.timeout(timeout):
            # The session's limit is for whole answers; here each block has its own.
            unlimited = aiohttp.ClientTimeout(total=None)
            response = await session.get(file_system.encode_url(url), headers=headers, timeout=unlimited)
    except aiohttp.ClientResponseError as error:
        # Its status is the proxy's, or made up when the answer is no HTTP.
        raise Fault(f"an unusable answer, {error.status} {error.message}") from None
    async with response:
        skipped, length, total = _extent(response, start, stop)
        _check_total(total, size)
        for left, keep in ((skipped, False), (length, True)):
            for position in range(0, left, BLOCK_BYTES):
                async with asyncio.timeout(timeout):
                    block = await response.content.readexactly(min(BLOCK_BYTES, left - position))
                if keep:
                    write(block)
    return total


def _extent(response: ClientResponse, start: int, stop: int) -> tuple[int, int, int]:
    """Of an answer to bytes `start` to `stop` - 1: bytes to skip, bytes to keep, and the length of the object."""
    ranges = response.headers.get("Content-Range", "")
    length = response.content_length
    if response.status == 416 and (empty := re.fullmatch(r"bytes \*/(\d+)", ranges)) and int(empty[1]) == start:
        return 0, 0, start
    if response.status >= 400:
        raise Status(response.status)
    if response.status == 200 and length is not None and length >= start:
        return start, length - start, length
    match = re.fullmatch(r"bytes (\d+)-(\d+)/(\d+)", ranges)
    if response.status != 206 or match is None:
        raise Fault(f"HTTP {response.status} with Content-Range {ranges!r} and Content-Length {length}")
    first, last, total = (int(group) for group in match.groups())
    if first != start or not first <= last < min(stop, total) or length not in (None, last - first + 1):
        raise Fault(f"{ranges} and Content-Length {length} where bytes {start}-{stop - 1} were asked for")
    return 0, last - first + 1, total


def _check_total(total: object, size: int | None) -> None:
    if not isinstance(total, int) or size not in (None, total):
        raise Fault(f"a length of {total} bytes where {'any' if size is None else size} was expected")
