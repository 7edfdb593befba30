"""The index of one shard, a sidecar file: key, places and CRC-32 of every member, without opening the shard.

Columns of a safetensors file, one row per sample in tar order; those of `json` or `txt` members are absent where no
sample has one. What is held in memory is 36 bytes a sample and its key, 48 where both kinds of captions occur.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from vlkd.data.files import check_counts, strict_json, write_whole
from vlkd.data.tar_members import MAX_IMAGE_BYTES, MAX_TEXT_BYTES, TEXT_EXTENSIONS
from vlkd.errors import UserError

FORMAT, VERSION, METADATA = "vlkd-shard-index", 1, "vlkd"
SUFFIX = ".index.safetensors"
_IMAGE = {"image_offset": "<i8", "image_size": "<u4", "image_crc": "<u4"}
_REST = {"captions": "<i4", "key_ends": "<u4", "keys": "u1"}
_SAFETENSORS_NAMES = {"<i8": "I64", "<i4": "I32", "<u4": "U32", "u1": "U8"}

Columns = Mapping[str, NDArray[Any]]


@dataclass(frozen=True, slots=True)
class Extent:
    """Where a member's data lie in the shard, in bytes, and their CRC-32."""

    offset: int
    size: int
    crc: int


@dataclass(frozen=True, kw_only=True)
class Row:
    """One sample: its key, its image, its caption members by extension, and how many captions they hold."""

    key: str
    image: Extent
    texts: Mapping[str, Extent] = field(default_factory=dict)
    captions: int = 0


@dataclass(frozen=True, kw_only=True)
class ShardHeader:
    """What is known of a shard as a whole.

    Attributes:
        file: its place as `scan.json` names it: relative to the folder of the index, or a URL.
        bytes: its size.
        mtime_ns: when it was changed, 0 for a URL.
        sha256: of the whole file.
        samples, labelled, captions, most_captions: rows, those with captions, all captions, the most of one row.
        problems: how many of each kind of `Problem`.
        problem_list: the first of them, in words.
    """

    file: str
    bytes: int
    mtime_ns: int
    sha256: str
    samples: int
    labelled: int
    captions: int
    most_captions: int
    problems: Mapping[str, int] = field(default_factory=dict)
    problem_list: tuple[str, ...] = ()


class ShardRows:
    """The rows of one index, in memory."""

    def __init__(self, header: ShardHeader, columns: Columns) -> None:
        self.header = header
        self._columns = {name: column for name, column in columns.items() if name not in ("keys", "captions")}
        self._keys = columns["keys"].tobytes()
        self._caption_ends = np.cumsum(columns["captions"], dtype=np.int32)

    def __len__(self) -> int:
        return self.header.samples

    @property
    def nbytes(self) -> int:
        """Bytes in memory."""
        return sum(column.nbytes for column in self._columns.values()) + len(self._keys) + self._caption_ends.nbytes

    @property
    def counts(self) -> NDArray[np.int32]:
        """(n,) captions of each row; made anew at every call, unlike `caption_range`."""
        return np.diff(self._caption_ends, prepend=np.int32(0))

    @property
    def first_caption(self) -> NDArray[np.int64]:
        """(n,) captions before each row; made anew at every call, unlike `caption_range`."""
        return (self._caption_ends - self.counts).astype(np.int64)

    def caption_range(self, i: int) -> range:
        """The numbers of a row's captions among those of the shard."""
        return _span(self._caption_ends, i)

    def key(self, i: int) -> str:
        """The key of a row."""
        span = _span(self._columns["key_ends"], i)
        return self._keys[span.start : span.stop].decode()

    def all_keys(self) -> list[str]:
        """The keys of all rows."""
        return [self.key(i) for i in range(len(self))]

    def image(self, i: int) -> Extent:
        """The image of a row."""
        offset, size, crc = (int(self._columns[f"image_{part}"][i]) for part in ("offset", "size", "crc"))
        return Extent(offset, size, crc)

    def texts(self, i: int) -> tuple[tuple[str, Extent], ...]:
        """The caption members of a row with their extensions, `json` first; empty ones are as good as none."""
        start = int(self._columns["image_offset"][i])
        found = []
        for extension in TEXT_EXTENSIONS:
            if f"{extension}_size" in self._columns:
                offset, size, crc = (int(self._columns[f"{extension}_{part}"][i]) for part in ("offset", "size", "crc"))
                if size:
                    found.append((extension, Extent(start + offset, size, crc)))
        return tuple(found)


def _span(ends: NDArray[Any], i: int) -> range:
    return range(int(ends[i - 1]) if i else 0, int(ends[i]))


def columns_of(rows: Sequence[Row]) -> dict[str, NDArray[Any]]:
    """The columns of rows.

    Raises:
        UserError: a text lies further than 2 GiB from its image, or the keys have more than 4 GiB together.
    """
    keys = [row.key.encode() for row in rows]
    values: dict[str, Any] = {
        "image_offset": [row.image.offset for row in rows],
        "image_size": [row.image.size for row in rows],
        "image_crc": [row.image.crc for row in rows],
        "captions": [row.captions for row in rows],
        "key_ends": np.cumsum([len(key) for key in keys], dtype=np.int64).tolist(),
        "keys": np.frombuffer(b"".join(keys), dtype=np.uint8),
    }
    for extension in TEXT_EXTENSIONS:
        if any(extension in row.texts for row in rows):
            extents = [row.texts.get(extension) for row in rows]
            images = values["image_offset"]
            offsets = [e.offset - image if e else 0 for e, image in zip(extents, images, strict=True)]
            values[f"{extension}_offset"] = offsets
            values[f"{extension}_size"] = [e.size if e else 0 for e in extents]
            values[f"{extension}_crc"] = [e.crc if e else 0 for e in extents]
    try:
        return {name: np.asarray(values[name], dtype=dtype) for name, dtype in _dtypes(values).items()}
    except OverflowError:
        raise UserError("A shard too large for an index (4 GiB of keys, 2 GiB in a sample); split it.") from None


def write_rows(path: Path, header: ShardHeader, rows: Sequence[Row]) -> None:
    """Write an index whole or not at all; raises `UserError` as `columns_of` and `write_columns`."""
    write_columns(path, header, columns_of(rows))


def write_columns(path: Path, header: ShardHeader, columns: Columns) -> None:
    """The same from finished columns; raises `UserError` where they contradict the header, or the disk is full."""
    _check(path, header, columns)
    metadata = {"format": FORMAT, "version": VERSION, **asdict(header), "columns": _checksum(columns)}
    write_whole(path, save(dict(columns), metadata={METADATA: json.dumps(metadata, allow_nan=False)}))


def read_header(path: Path) -> ShardHeader:
    """The header of an index alone; raises `UserError` for what is no index."""
    return _opened(path, rows=False)[0]


def read_rows(path: Path) -> ShardRows:
    """Read and check an index.

    Raises:
        UserError: it is missing, damaged, of another format, or contradicts itself.
    """
    header, columns = _opened(path, rows=True)
    return ShardRows(header, columns)


def _opened(path: Path, *, rows: bool) -> tuple[ShardHeader, dict[str, NDArray[Any]]]:
    columns: dict[str, NDArray[Any]] = {}
    try:
        with safe_open(str(path), framework="np") as file:
            header, checksum = _header(path, (file.metadata() or {}).get(METADATA))
            if rows:
                names = set(file.keys())
                expected = _dtypes(names)
                found = {name: file.get_slice(name).get_dtype() for name in names}
                if found != {name: _SAFETENSORS_NAMES[dtype] for name, dtype in expected.items()}:
                    raise _refusal(path, f"the columns {', '.join(sorted(names)) or 'of nothing'}")
                columns = {name: file.get_tensor(name) for name in expected}
    except FileNotFoundError:
        raise UserError(f"There is no index {path}; run `vlkd prep scan` again.") from None
    except (SafetensorError, OSError) as error:
        raise _refusal(path, f"no whole safetensors file ({error})") from None
    if rows:
        _check(path, header, columns)
        if _checksum(columns) != checksum:
            raise _refusal(path, "damaged columns (their checksum differs)")
    return header, columns


def _dtypes(names: Mapping[str, Any] | set[str]) -> dict[str, str]:
    """The dtypes of the columns there should be beside these."""
    texts = {
        f"{extension}_{part}": dtype
        for extension in TEXT_EXTENSIONS
        if f"{extension}_size" in names
        for part, dtype in (("offset", "<i4"), ("size", "<u4"), ("crc", "<u4"))
    }
    return {**_IMAGE, **texts, **_REST}


def _checksum(columns: Columns) -> int:
    """CRC-32 of all columns, so that a flipped bit never becomes another key or place."""
    crc = 0
    for name in sorted(columns):
        crc = zlib.crc32(np.ascontiguousarray(columns[name]).data, zlib.crc32(name.encode(), crc))
    return crc


def _header(path: Path, text: str | None) -> tuple[ShardHeader, int]:
    if text is None:
        raise _refusal(path, "a safetensors file of another kind")
    try:
        found = strict_json(text)
        if not isinstance(found, dict) or found.get("format") != FORMAT:
            raise ValueError("of another kind")
        if found.get("version") != VERSION:
            raise ValueError(f"version {found.get('version')!r}, expected {VERSION}")
        values = {name.name: found[name.name] for name in fields(ShardHeader)}
        checksum, problems = found["columns"], values["problem_list"]
        if not isinstance(values["file"], str):
            raise ValueError("file is no text")
        if not isinstance(problems, list) or not all(isinstance(problem, str) for problem in problems):
            raise ValueError("problem_list is no list of texts")
        values["problem_list"] = tuple(problems)
        check_counts({**values, "columns": checksum}, "mtime_ns", "columns")
        return ShardHeader(**values), checksum
    except KeyError as error:
        raise _refusal(path, f"a header without {error}") from None
    except ValueError as error:
        raise _refusal(path, f"a header that cannot be read ({error})") from None


def _check(path: Path, header: ShardHeader, columns: Columns) -> None:
    """Raise `UserError` unless columns fit the header, members lie in the shard, and keys are UTF-8."""
    for name, column in columns.items():
        if column.ndim != 1 or (name != "keys" and len(column) != header.samples):
            raise _refusal(path, f"{column.shape} values in {name} for {header.samples} samples")
    counts = columns["captions"].astype(np.int64)
    totals = (int((counts > 0).sum()), int(counts.sum()), int(counts.max(initial=0)))
    if counts.min(initial=0) < 0 or totals != (header.labelled, header.captions, header.most_captions):
        raise _refusal(path, "other captions than its header says")
    if header.captions >= 2**31:
        raise _refusal(path, f"{header.captions} captions, more than an index holds")
    start = columns["image_offset"].astype(np.int64)
    sound = (start >= 0) & _inside(start, columns["image_size"], header.bytes, MAX_IMAGE_BYTES)
    for extension in TEXT_EXTENSIONS:
        if f"{extension}_size" in columns and sound.all():
            offset, size = start + columns[f"{extension}_offset"].astype(np.int64), columns[f"{extension}_size"]
            sound = (size == 0) | ((offset >= 0) & _inside(offset, size, header.bytes, MAX_TEXT_BYTES))
    if not sound.all():
        raise _refusal(path, f"the row {int(np.argmin(sound))}, which lies outside of the shard's {header.bytes} bytes")
    _check_keys(path, columns["key_ends"].astype(np.int64), columns["keys"])


def _inside(offset: NDArray[np.int64], size: NDArray[Any], total: int, limit: int) -> NDArray[np.bool_]:
    return (size <= limit) & (offset <= np.int64(total) - size.astype(np.int64))


def _check_keys(path: Path, ends: NDArray[np.int64], keys: NDArray[np.uint8]) -> None:
    starts = np.concatenate([[0], ends])
    if (np.diff(starts) <= 0).any() or starts[-1] != len(keys):
        raise _refusal(path, "keys of impossible lengths")
    try:
        keys.tobytes().decode()
    except UnicodeDecodeError:
        raise _refusal(path, "keys that are no UTF-8") from None
    # A key that begins inside of a character would be no UTF-8 by itself.
    if (keys[starts[:-1]] & 0xC0 == 0x80).any():
        raise _refusal(path, "keys that are no UTF-8")


def _refusal(path: Path, found: str) -> UserError:
    return UserError(
        f"{path} holds {found}; expected a shard's index of version {VERSION}: run `vlkd prep scan` again."
    )
