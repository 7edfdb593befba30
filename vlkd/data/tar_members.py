"""The members of a tar by its headers alone, grouped by key as webdataset groups them; nothing in it is trusted."""

from __future__ import annotations

import io
import os
import re
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from vlkd.data.shard_writer import IMAGE_EXTENSIONS

TEXT_EXTENSIONS = ("json", "txt")
MAX_TEXT_BYTES = 1_000_000
MAX_IMAGE_BYTES = 100_000_000
_MAX_HEADER_BYTES = 1_000_000
_MAX_NAME_BYTES = 4096
_BLOCK = 512


@dataclass(frozen=True, kw_only=True)
class Member:
    """Where a member's data lie in its tar, in bytes, and its extension in lower case."""

    offset: int
    size: int
    extension: str


MemberGroup = tuple[str, list[Member]]
"""Adjacent members of one key, and the key."""


@dataclass(frozen=True, kw_only=True)
class Problem:
    """Something a shard should not hold.

    Kinds: `refused` (a member: link, device, path outside, name that is no UTF-8, too large), `duplicate` (a key that
    comes back, or a member twice; the samples are dropped), `images` (several in one sample; dropped), `no-image`
    (dropped), `captions` (unreadable ones, found by the scan; dropped), `half` (the last sample of a cut tar; dropped),
    `truncated` (data or header cut), `no-end` (end-of-archive blocks missing), `damaged` (an unreadable header: the
    rest of the shard is lost), `trailing` (data after the end of the archive).
    """

    kind: str
    name: str

    def __str__(self) -> str:
        return f"{self.kind}: {self.name}"


@dataclass(frozen=True, kw_only=True)
class TarListing:
    """What the headers of a tar of `size` bytes say, in its order."""

    size: int
    groups: tuple[MemberGroup, ...]
    problems: tuple[Problem, ...]


class _HeaderReader(io.FileIO):
    """A file of which little is read between two `renew()`: tarfile reads whatever an extended header claims.

    Some headers claim it in one read, others (the maps of sparse files) in as many small ones.
    """

    left = _MAX_HEADER_BYTES

    def renew(self) -> None:
        """Allow as much again, for the next member."""
        self.left = _MAX_HEADER_BYTES

    def read(self, size: int | None = -1, /) -> bytes:
        if size is None or not 0 <= size <= self.left:
            raise tarfile.ReadError(f"a header claims {size} bytes")
        self.left -= size
        return super().read(size) or b""


def read_members(path: Path) -> TarListing:
    """List an uncompressed tar; links, hostile names and too large members are left out and named in `problems`.

    Raises:
        OSError: when the file cannot be read.
        tarfile.TarError: when its first header is no tar header (compressed tars included).
    """
    problems: list[Problem] = []
    groups: list[MemberGroup] = []
    with _HeaderReader(path) as stream:
        size = os.fstat(stream.fileno()).st_size
        for member in _members(stream, size, problems):
            _add_member(member, groups, problems)
    return TarListing(size=size, groups=tuple(groups), problems=tuple(problems))


def _members(stream: _HeaderReader, size: int, problems: list[Problem]) -> Iterator[tarfile.TarInfo]:
    """Whole members in order; how the archive ends is checked, because tarfile stops silently at a damaged header."""
    with tarfile.open(fileobj=stream, mode="r:") as tar:
        end = -1
        while True:
            stream.renew()
            try:
                member = tar.next()
            except (tarfile.TarError, ValueError, OverflowError, RecursionError) as error:
                kind = "truncated" if tar.offset >= size else "damaged"
                problems.append(Problem(kind=kind, name=f"the header at byte {tar.offset} ({error})"))
                return
            if member is None:
                break
            # A negative size would send the reader backwards for ever.
            if member.size < 0 or tar.offset <= end:
                problems.append(Problem(kind="damaged", name=f"{member.name} has size {member.size}"))
                return
            end = tar.offset
            if member.isreg() and not member.issparse() and member.offset_data + member.size > size:
                problems.append(Problem(kind="truncated", name=member.name))
                return
            yield member
    problem = _end_problem(stream, tar.offset, size)
    if problem:
        problems.append(problem)


def _end_problem(stream: _HeaderReader, offset: int, size: int) -> Problem | None:
    stream.seek(offset)
    stream.renew()
    block = stream.read(2 * _BLOCK)
    if any(block[:_BLOCK]):
        kind = "truncated" if len(block) < _BLOCK else "damaged"
        return Problem(kind=kind, name=f"the header at byte {offset}")
    if len(block) < 2 * _BLOCK:
        return Problem(kind="no-end", name=f"the tar stops at byte {size}")
    while block:
        if any(block):
            return Problem(kind="trailing", name=f"data after the end of the archive at byte {offset}")
        stream.renew()
        block = stream.read(_MAX_HEADER_BYTES)
    return None


def _add_member(member: tarfile.TarInfo, groups: list[MemberGroup], problems: list[Problem]) -> None:
    if member.isdir():
        return
    if not member.isreg() or member.issparse():
        problems.append(Problem(kind="refused", name=f"{member.name} is a link, a device or sparse"))
        return
    if member.name.startswith("/") or ".." in member.name.split("/"):
        problems.append(Problem(kind="refused", name=f"{member.name} leaves the archive"))
        return
    if not _is_text(member.name):
        name = ascii(member.name[:100])
        problems.append(Problem(kind="refused", name=f"{name} is no UTF-8 name of at most {_MAX_NAME_BYTES} bytes"))
        return
    match = re.fullmatch(r"((?:.*/)?[^./]+)\.([^/]*)", member.name, flags=re.DOTALL)
    if match is None or re.match(r"__[^/]*__($|/)", member.name):
        return
    key, extension = match[1], match[2].lower()
    if not groups or groups[-1][0] != key:
        groups.append((key, []))
    limit = MAX_IMAGE_BYTES if extension in IMAGE_EXTENSIONS else MAX_TEXT_BYTES
    if extension in IMAGE_EXTENSIONS + TEXT_EXTENSIONS and member.size > limit:
        problems.append(Problem(kind="refused", name=f"{member.name} has {member.size} bytes, more than {limit}"))
        return
    groups[-1][1].append(Member(offset=member.offset_data, size=member.size, extension=extension))


def _is_text(name: str) -> bool:
    """Tarfile spells the bytes of a name that are no UTF-8 as halves of surrogate pairs."""
    try:
        return len(name.encode()) <= _MAX_NAME_BYTES
    except UnicodeEncodeError:
        return False
