"""Image-text shards: ordinary WebDataset tars, indexed by their headers without being unpacked.

A sample is a run of adjacent members with one key, the path up to the first dot of its base name: `KEY.jpg` (or jpeg,
png, webp), `KEY.json` = {"captions": [...], ...} or {"caption": ...}, and `KEY.txt` with one caption per line. Reading
trusts nothing: every oddity becomes a `Problem`, and no sample with one is offered. Written by `shard_writer`.
"""

from __future__ import annotations

import io
import json
import os
import re
import tarfile
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from vlkd.data.shard_writer import IMAGE_EXTENSIONS, RawSample, write_shards
from vlkd.errors import UserError

__all__ = [
    "IMAGE_EXTENSIONS",
    "IndexedSample",
    "Member",
    "Problem",
    "RawSample",
    "ShardIndex",
    "captions_of",
    "index_shard",
    "join_captions",
    "parse_captions",
    "read_captions",
    "read_member",
    "write_shards",
]

TEXT_EXTENSIONS = ("json", "txt")
MAX_TEXT_BYTES = 1_000_000
MAX_IMAGE_BYTES = 100_000_000
MAX_CAPTIONS = 1000
"""Of one sample, in a scan: batches make room for the most that any sample has."""
_MAX_HEADER_BYTES = 1_000_000
_MAX_NAME_BYTES = 4096
_BLOCK = 512


@dataclass(frozen=True, kw_only=True)
class Member:
    """Where a member's data lie in its tar, in bytes, and its extension in lower case."""

    offset: int
    size: int
    extension: str


@dataclass(frozen=True, kw_only=True)
class IndexedSample:
    """A sample with exactly one image; without `texts` it is unlabelled."""

    key: str
    image: Member
    texts: tuple[Member, ...]


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
class ShardIndex:
    """What one shard offers, in tar order."""

    path: Path
    size: int
    samples: tuple[IndexedSample, ...]
    problems: tuple[Problem, ...]

    @property
    def problem_counts(self) -> dict[str, int]:
        """Problems per kind."""
        return dict(Counter(problem.kind for problem in self.problems))


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


def index_shard(path: Path) -> ShardIndex:
    """Index an uncompressed tar from its headers alone; grouping equals webdataset's on sound shards.

    Raises:
        UserError: for a missing file, or one whose first header is no tar header (compressed tars included).
    """
    problems: list[Problem] = []
    groups: list[tuple[str, list[Member]]] = []
    try:
        with _HeaderReader(path) as stream:
            size = os.fstat(stream.fileno()).st_size
            for tar_member in _members(stream, size, problems):
                _add_member(tar_member, groups, problems)
    except FileNotFoundError:
        raise UserError(f"There is no shard {path}; check the path.") from None
    except tarfile.TarError as error:
        raise UserError(
            f"{path} is not an uncompressed tar ({error}); unpack or rewrite it with `vlkd prep`."
        ) from None
    if groups and any(problem.kind in ("truncated", "no-end") for problem in problems):
        _drop_half_sample(groups, problems)
    return ShardIndex(path=path, size=size, samples=tuple(_samples(groups, problems)), problems=tuple(problems))


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


def _add_member(member: tarfile.TarInfo, groups: list[tuple[str, list[Member]]], problems: list[Problem]) -> None:
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


def _drop_half_sample(groups: list[tuple[str, list[Member]]], problems: list[Problem]) -> None:
    """Drop the last sample of a cut tar unless its members are those of the sample before."""
    extensions = [sorted(member.extension for member in members) for _, members in groups[-2:]]
    if len(groups) < 2 or extensions[0] != extensions[1]:
        problems.append(Problem(kind="half", name=groups.pop()[0]))


def _samples(groups: list[tuple[str, list[Member]]], problems: list[Problem]) -> Iterator[IndexedSample]:
    runs = Counter(key for key, _ in groups)
    reported: set[str] = set()
    for key, members in groups:
        images = [member for member in members if member.extension in IMAGE_EXTENSIONS]
        repeated = len({member.extension for member in members}) < len(members)
        if runs[key] > 1 or repeated:
            if key not in reported:
                problems.append(Problem(kind="duplicate", name=key))
            reported.add(key)
        elif len(images) != 1:
            problems.append(Problem(kind="images" if images else "no-image", name=key))
        else:
            texts = tuple(member for member in members if member.extension in TEXT_EXTENSIONS)
            yield IndexedSample(key=key, image=images[0], texts=texts)


def read_member(path: Path, offset: int, size: int) -> bytes:
    """The bytes of one member; raises `UserError` when the file ends before them."""
    with path.open("rb") as stream:
        stream.seek(offset)
        data = stream.read(size)
    if len(data) != size:
        raise UserError(f"{path} has {len(data)} of the {size} bytes at {offset}: it changed since it was indexed.")
    return data


def read_captions(path: Path, sample: IndexedSample) -> tuple[str, ...]:
    """All captions of a sample, those of its JSON member first, equal strings once; () when it has none."""
    try:
        return join_captions((text.extension, read_member(path, text.offset, text.size)) for text in sample.texts)
    except UserError as error:
        raise UserError(f"{path}, sample {sample.key}: {error}") from None


def join_captions(texts: Iterable[tuple[str, bytes]]) -> tuple[str, ...]:
    """All captions of a sample's caption members (extension, bytes), those of JSON first, equal strings once.

    Raises:
        UserError: as `parse_captions`.
    """
    ordered = sorted(texts, key=lambda text: TEXT_EXTENSIONS.index(text[0]))
    found = [caption for extension, data in ordered for caption in parse_captions(data, extension)]
    return tuple(dict.fromkeys(found))


def parse_captions(data: bytes, extension: str) -> tuple[str, ...]:
    """Captions of a `txt` member (one a line) or a `json` member, stripped, without empty ones.

    Raises:
        UserError: for more than a megabyte, bytes that are no UTF-8, or JSON whose `captions` (`caption`) is not a list
            of strings (a string or null).
    """
    if len(data) > MAX_TEXT_BYTES:
        raise UserError(f"a caption file of {len(data)} bytes; expected at most {MAX_TEXT_BYTES}.")
    try:
        text = data.decode("utf-8")
        captions = text.splitlines() if extension == "txt" else captions_of(json.loads(text))
        for caption in captions:
            caption.encode()  # JSON escapes can spell half a surrogate pair, which no tokenizer takes.
    except UserError:
        raise
    except (ValueError, RecursionError) as error:  # UTF-8, JSON, and integers of more digits than Python reads
        raise UserError(f"captions that are no UTF-8 {extension} ({error}).") from None
    return tuple(caption.strip() for caption in captions if caption.strip())


def captions_of(record: object) -> list[str]:
    """`captions` and `caption` of a JSON object; raises `UserError` unless they are a list of strings and a string."""
    if not isinstance(record, dict):
        raise UserError(f"a JSON {type(record).__name__} where an object with `captions` was expected.")
    captions, caption = record.get("captions"), record.get("caption")
    many = [] if captions is None else captions
    one = [] if caption is None else [caption]
    if not isinstance(many, list) or not all(isinstance(item, str) for item in one + many):
        raise UserError("`captions` must be a list of strings (or `caption` one string).")
    return one + many
