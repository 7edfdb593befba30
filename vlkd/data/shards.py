"""Image-text shards: ordinary WebDataset tars, indexed by their headers without being unpacked.

A sample is a run of adjacent members with one key, the path up to the first dot of its base name: `KEY.jpg` (or jpeg,
png, webp), `KEY.json` = {"captions": [...], ...} or {"caption": ...}, and `KEY.txt` with one caption per line. Reading
trusts nothing: every oddity becomes a `Problem`, and no sample with one is offered. Written by `shard_writer`.
"""

from __future__ import annotations

import json
import tarfile
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from vlkd.data.shard_writer import IMAGE_EXTENSIONS, RawSample, write_shards
from vlkd.data.tar_members import MAX_TEXT_BYTES, TEXT_EXTENSIONS, Member, MemberGroup, Problem, read_members
from vlkd.errors import UserError

__all__ = [
    "IMAGE_EXTENSIONS",
    "IndexedSample",
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

MAX_CAPTIONS = 1000
"""Of one sample, in a scan: batches make room for the most that any sample has."""


@dataclass(frozen=True, kw_only=True)
class IndexedSample:
    """A sample with exactly one image; without `texts` it is unlabelled."""

    key: str
    image: Member
    texts: tuple[Member, ...]


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


def index_shard(path: Path) -> ShardIndex:
    """Index an uncompressed tar from its headers alone; grouping equals webdataset's on sound shards.

    Raises:
        UserError: for a missing file, or one whose first header is no tar header (compressed tars included).
    """
    try:
        listing = read_members(path)
    except FileNotFoundError:
        raise UserError(f"There is no shard {path}; check the path.") from None
    except tarfile.TarError as error:
        raise UserError(
            f"{path} is not an uncompressed tar ({error}); unpack or rewrite it with `vlkd prep`."
        ) from None
    groups, problems = list(listing.groups), list(listing.problems)
    if groups and any(problem.kind in ("truncated", "no-end") for problem in problems):
        _drop_half_sample(groups, problems)
    return ShardIndex(path=path, size=listing.size, samples=tuple(_samples(groups, problems)), problems=tuple(problems))


def _drop_half_sample(groups: list[MemberGroup], problems: list[Problem]) -> None:
    """Drop the last sample of a cut tar unless its members are those of the sample before."""
    extensions = [sorted(member.extension for member in members) for _, members in groups[-2:]]
    if len(groups) < 2 or extensions[0] != extensions[1]:
        problems.append(Problem(kind="half", name=groups.pop()[0]))


def _samples(groups: list[MemberGroup], problems: list[Problem]) -> Iterator[IndexedSample]:
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
