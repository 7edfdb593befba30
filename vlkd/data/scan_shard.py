"""Reading one shard once: its members' places and CRC-32, its captions and its hash, into its index."""

from __future__ import annotations

import hashlib
import os
import stat
import zlib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from vlkd.data.shard_rows import Extent, Row, ShardHeader, write_rows
from vlkd.data.shards import MAX_CAPTIONS, IndexedSample, index_shard, join_captions
from vlkd.data.tar_members import TEXT_EXTENSIONS, Member, Problem
from vlkd.errors import UserError

CHUNK = 1 << 20
LISTED_PROBLEMS = 100
MAX_PROBLEM_CHARACTERS = 200
_MAX_GAP = 2**31 - 1


class BadShard(UserError):
    """A shard that cannot be used as a whole: missing, unreadable, no tar, or changing while it is read."""


@dataclass(frozen=True)
class _Read:
    """A member as it was read; `data` of caption members alone."""

    crc: int
    data: bytes = b""


def scan_shard(shard: Path, sidecar: Path, *, name: str) -> ShardHeader:
    """Index a local tar, write its sidecar and return the sidecar's header.

    The file is read twice, its headers first; memory holds one sample's captions at a time. A sample whose captions
    cannot be read is dropped as a problem of kind `captions`.

    Args:
        shard: an uncompressed tar.
        sidecar: the file to write, whole or not at all.
        name: what the header calls the shard; with `://` it is a URL, and the file only a passing copy of it.

    Raises:
        BadShard: the shard cannot be used.
        UserError: the sidecar cannot be written.
    """
    try:
        before = os.stat(shard)
        if not stat.S_ISREG(before.st_mode):
            raise BadShard(f"{shard} is no file; expected an uncompressed tar.")
        index = index_shard(shard)
        reader = _Reader(shard, index.samples)
        problems = list(index.problems)
        rows = list(_rows(index.samples, reader, problems))
        after = os.stat(shard)
    except BadShard:
        raise
    except UserError as error:
        raise BadShard(str(error)) from None
    except OSError as error:
        raise BadShard(f"{shard} cannot be read ({error.strerror}); restore it, or leave it out.") from None
    if (before.st_size, before.st_mtime_ns) != (after.st_size, after.st_mtime_ns) or reader.size != after.st_size:
        raise BadShard(f"{shard} changed while it was read; scan it when it is whole.")
    header = ShardHeader(
        file=name,
        bytes=reader.size,
        mtime_ns=0 if "://" in name else after.st_mtime_ns,
        sha256=reader.digest.hexdigest(),
        samples=len(rows),
        labelled=sum(row.captions > 0 for row in rows),
        captions=sum(row.captions for row in rows),
        most_captions=max((row.captions for row in rows), default=0),
        problems=dict(Counter(problem.kind for problem in problems)),
        problem_list=tuple(_short(problem) for problem in problems[:LISTED_PROBLEMS]),
    )
    write_rows(sidecar, header, rows)
    return header


def _short(problem: Problem) -> str:
    """Names may hold anything: other bytes than UTF-8, and control characters for the terminal."""
    text = "".join(char if char.isprintable() else ascii(char)[1:-1] for char in str(problem))
    return text[:MAX_PROBLEM_CHARACTERS]


class _Reader:
    """Reads a shard from its first byte to its last, and gives the members of each sample on the way.

    Attributes:
        digest: SHA-256 of what was read so far.
        size: its bytes.
    """

    def __init__(self, shard: Path, samples: Sequence[IndexedSample]) -> None:
        self.shard = shard
        self.digest = hashlib.sha256()
        self.size = 0
        members = [(number, member) for number, sample in enumerate(samples) for member in _members(sample)]
        self._wanted = sorted(members, key=lambda item: item[1].offset)

    def samples(self) -> Iterator[tuple[int, dict[Member, _Read]]]:
        """Sample numbers and members, in tar order: the members of a sample lie side by side."""
        found: dict[Member, _Read] = {}
        last = 0
        for number, member, read in self._read_members():
            if number != last:
                yield last, found
                last, found = number, {}
            found[member] = read
        if found:
            yield last, found

    def _read_members(self) -> Iterator[tuple[int, Member, _Read]]:
        buffer = memoryview(bytearray(CHUNK))
        position, crc, data = 0, 0, bytearray()
        with self.shard.open("rb", buffering=0) as stream:
            while count := stream.readinto(buffer):
                chunk = buffer[:count]
                self.digest.update(chunk)
                start, self.size = self.size, self.size + count
                while position < len(self._wanted) and self._wanted[position][1].offset < self.size:
                    number, member = self._wanted[position]
                    end = member.offset + member.size
                    part = chunk[max(0, member.offset - start) : end - start]
                    crc = zlib.crc32(part, crc)
                    if member.extension in TEXT_EXTENSIONS:
                        data += part
                    if end > self.size:
                        break
                    yield number, member, _Read(crc, bytes(data))
                    position, crc, data = position + 1, 0, bytearray()
        # Empty members at the very end have no byte to be found by; all others were in reach of the index.
        for number, member in self._wanted[position:]:
            if member.size or member.offset > self.size:
                raise BadShard(f"{self.shard} changed while it was read; scan it when it is whole.")
            yield number, member, _Read(0)


def _members(sample: IndexedSample) -> tuple[Member, ...]:
    return (sample.image, *sample.texts)


def _rows(samples: Sequence[IndexedSample], reader: _Reader, problems: list[Problem]) -> Iterator[Row]:
    for number, found in reader.samples():
        sample = samples[number]
        try:
            captions = join_captions((text.extension, found[text].data) for text in sample.texts)
            if len(captions) > MAX_CAPTIONS:
                raise UserError(f"{len(captions)} captions, more than {MAX_CAPTIONS}")
            if any(abs(text.offset - sample.image.offset) > _MAX_GAP for text in sample.texts):
                raise UserError("captions more than 2 GiB away from their image")
        except UserError as error:
            problems.append(Problem(kind="captions", name=f"{sample.key}: {error}"))
            continue
        yield Row(
            key=sample.key,
            image=_extent(sample.image, found),
            texts={text.extension: _extent(text, found) for text in sample.texts},
            captions=len(captions),
        )


def _extent(member: Member, found: Mapping[Member, _Read]) -> Extent:
    return Extent(member.offset, member.size, found[member].crc)
