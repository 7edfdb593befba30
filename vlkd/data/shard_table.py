"""A table of image-text shards that is never held in memory: rows are read through the shards' indexes."""

from __future__ import annotations

import hashlib
import math
import os
import sys
import time
import zlib
from bisect import bisect_right
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

from PIL.Image import Image

from vlkd.data.images import BadImage, Unavailable, open_image
from vlkd.data.local_copies import LocalCopies
from vlkd.data.remote import is_remote
from vlkd.data.scan import SCAN_FILE, Scan, ShardEntry, entry_place, read_scan, scan_shards
from vlkd.data.shard_rows import SUFFIX, Extent, ShardRows, read_rows
from vlkd.data.shards import join_captions
from vlkd.data.sources import ImageFile, place_of, row_state, spread
from vlkd.data.table import Part
from vlkd.errors import UserError

OPENED, OPENED_COPIES = 64, 16
"""Indexes and local files held open, and copies of remote shards: one that is removed to make room for others takes its
space as long as it is open."""
RETRIED_AFTER = 600.0
"""Seconds until a shard that could not be opened is looked for again."""
LOOKED_INTO = 8
"""Shards from which rows are taken to look at."""


@dataclass(frozen=True, kw_only=True)
class IndexedShard:
    """A shard and its index.

    Attributes:
        place: absolute path or URL.
        index: of its rows.
        entry: what the scan found.
        prefix: in front of keys that occur in several shards.
    """

    place: str
    index: Path
    entry: ShardEntry
    prefix: str = ""


class ShardTable:
    """Rows of indexed shards, one shard after the other.

    A row costs no memory; the indexes of the shards being read do, some 50 bytes a sample. Every member is compared
    with the CRC-32 that the scan wrote down, so that a damaged or exchanged shard is noticed and never trained on.
    It travels to workers, where files are opened anew.

    Args:
        shards: of all sources, in order.
        copies: where remote shards are kept; local ones need none.
        problems: what the scan left out, in words.
        opened: shards read at a time, of which more than `OPENED` are held open only if this says so.

    Raises:
        UserError: an index is missing, or a local shard is, or has another size than when it was scanned.
    """

    def __init__(
        self,
        shards: Sequence[IndexedShard],
        copies: LocalCopies | None = None,
        *,
        problems: Sequence[str] = (),
        opened: int = 0,
    ) -> None:
        self.shards = tuple(shards)
        self.copies = copies
        self.problems = tuple(problems)
        for shard in self.shards:
            _check_files(shard)
        self.opened = max(OPENED, opened)
        remote = any(is_remote(shard.place) for shard in self.shards)
        self.opened_files = max(OPENED_COPIES, opened) if remote else self.opened
        # Lists, because a single number is looked up in them many times faster than in an array.
        self.ends = list(accumulate(shard.entry.samples for shard in self.shards))
        self.text_ends = list(accumulate(shard.entry.captions for shard in self.shards))
        # The oldest go first; one that is still being read is opened again.
        self._rows: dict[int, ShardRows] = {}
        self._files: dict[int, int] = {}
        self._lost: dict[int, tuple[float, str]] = {}

    def __len__(self) -> int:
        return self.ends[-1] if self.ends else 0

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_rows": {}, "_files": {}, "_lost": {}}

    @property
    def captioned(self) -> int:
        """Rows with a caption."""
        return sum(shard.entry.labelled for shard in self.shards)

    @property
    def caption_total(self) -> int:
        """Captions of all rows."""
        return self.text_ends[-1] if self.text_ends else 0

    @property
    def most_captions(self) -> int:
        """Of any row."""
        return max((shard.entry.most_captions for shard in self.shards), default=0)

    def parts(self) -> list[Part]:
        """The shards."""
        return [
            Part(shard.index.name.removesuffix(SUFFIX), entry.samples, entry.captions, entry.sha256)
            for shard in self.shards
            for entry in [shard.entry]
        ]

    def sizes(self) -> list[int]:
        """The samples of each shard."""
        return [shard.entry.samples for shard in self.shards]

    def spread_rows(self, count: int) -> list[int]:
        """Rows to look at, spread over the first shards alone, so that few are opened or fetched."""
        return spread(int(self.ends[:LOOKED_INTO][-1]), count) if len(self) else []

    def fingerprint(self) -> str:
        """A hash of the shards' content, wherever they lie."""
        state = "".join(f"{shard.entry.sha256} {shard.entry.samples}\n" for shard in self.shards)
        return hashlib.sha256(state.encode()).hexdigest()[:16]

    def key(self, row: int) -> str:
        """The name of a row."""
        number, i = self._locate(row)
        return self.shards[number].prefix + self._index(number).key(i)

    def first_text(self, row: int) -> int:
        """The number of a row's first caption among all."""
        number, i = self._locate(row)
        before = self.text_ends[number - 1] if number else 0
        return before + self._index(number).caption_range(i).start

    def captions_of(self, row: int) -> tuple[str, ...]:
        """The captions of a row; raises `BadImage` where they are not those that were scanned."""
        number, i = self._locate(row)
        rows = self._index(number)
        if not rows.caption_range(i):
            return ()
        return join_captions((extension, self._read(number, extent, i)) for extension, extent in rows.texts(i))

    def image(self, row: int, size_hint: int | None = None) -> Image:
        """Decode an image; raises `BadImage` for one that is not what was scanned, or cannot be decoded."""
        number, i = self._locate(row)
        rows = self._index(number)
        return open_image(self._read(number, rows.image(i), i), size_hint=size_hint)

    def row_state(self, row: int) -> str:
        """As that of the same row of `Pairs`."""
        number, i = self._locate(row)
        rows = self._index(number)
        extent = rows.image(i)
        file = ImageFile(self._local(number), extent.offset, extent.size)
        return row_state(rows.key(i), self.captions_of(row), file, name=self.shards[number].place.rpartition("/")[2])

    def prefetch(self, numbers: Iterable[int]) -> None:
        """Copy remote shards in this order, beside the reading, as fast as the iterator gives them."""
        if self.copies is not None:
            wanted = (self.shards[number] for number in numbers)
            self.copies.prefetch(
                ((shard.place, shard.entry.bytes, shard.entry.sha256) for shard in wanted if is_remote(shard.place)),
                # Workers ask for shards in processes of their own; the iterator itself keeps pace with the reading.
                ahead=sys.maxsize,
            )

    def _locate(self, row: int) -> tuple[int, int]:
        number = bisect_right(self.ends, row)
        return number, row - (self.ends[number - 1] if number else 0)

    def _index(self, number: int) -> ShardRows:
        """A shard's index; raises `UserError` where it is not the one that was scanned."""
        if (rows := self._rows.get(number)) is None:
            shard = self.shards[number]
            rows = read_rows(shard.index)
            if rows.header.sha256 != shard.entry.sha256 or len(rows) != shard.entry.samples:
                raise UserError(f"{shard.index} is of another scan than its scan.json; run `vlkd prep scan` again.")
            if len(self._rows) >= self.opened:
                del self._rows[next(iter(self._rows))]
            self._rows[number] = rows
        return rows

    def _read(self, number: int, extent: Extent, i: int) -> bytes:
        """The bytes of a member of sample `i`."""
        if (file := self._files.get(number)) is None:
            file = self._open(number)
            if len(self._files) >= self.opened_files:
                os.close(self._files.pop(next(iter(self._files))))
            self._files[number] = file
        try:
            data = os.pread(file, extent.size, extent.offset)
        except OSError as error:
            reason = f"cannot be read ({error.strerror})"
            raise Unavailable(f"{self._index(number).key(i)} of {self.shards[number].entry.place} {reason}.") from None
        if len(data) != extent.size or zlib.crc32(data) != extent.crc:
            key = self._index(number).key(i)
            raise BadImage(f"{key} of {self.shards[number].entry.place} has changed since it was scanned.")
        return data

    def _open(self, number: int) -> int:
        # A shard that is gone is not looked for again with every sample: each look at a remote one may take minutes.
        since, reason = self._lost.get(number, (-math.inf, ""))
        if time.monotonic() - since > RETRIED_AFTER:
            try:
                return self._opened(number)
            except OSError as error:
                reason = f"{self.shards[number].entry.place} cannot be opened ({error.strerror})."
            except UserError as error:
                reason = str(error)
            self._lost[number] = time.monotonic(), reason
        raise Unavailable(reason)

    def _opened(self, number: int) -> int:
        shard = self.shards[number]
        if not is_remote(shard.place):
            return os.open(shard.place, os.O_RDONLY)
        assert self.copies is not None
        with self.copies.open(shard.place, shard.entry.bytes, shard.entry.sha256) as file:
            return os.dup(file.fileno())

    def _local(self, number: int) -> Path:
        shard = self.shards[number]
        if not is_remote(shard.place):
            return Path(shard.place)
        assert self.copies is not None
        return self.copies.path(shard.place, shard.entry.bytes, shard.entry.sha256)


def open_shards(ref: str, copies: LocalCopies | None = None) -> ShardTable:
    """A folder of shards that `vlkd prep scan` has indexed; local shards without an index are scanned first.

    Args:
        ref: the folder that holds `scan.json`; `PATH#SPLIT` is `PATH/SPLIT`.
        copies: where remote shards are kept.

    Raises:
        UserError: there is no such folder, or no shard in it with a sample.
    """
    path, split = place_of(ref)
    folder = Path(path) / split
    if not folder.is_dir():
        raise UserError(
            f"There is no folder {folder}; data.stream=true reads folders of shards, or those that `vlkd prep scan "
            "URL --out FOLDER` wrote."
        )
    if not (folder / SCAN_FILE).is_file():
        if not any(folder.glob("*.tar")):
            raise UserError(
                f"{folder} holds neither shards nor {SCAN_FILE}; run `vlkd prep scan` or name another folder."
            )
        print(f"{folder}: no {SCAN_FILE} yet, the shards are scanned once", flush=True)
        scan_shards([str(folder)], None, workers=os.cpu_count() or 1)
    scan = read_scan(folder)
    return ShardTable(indexed_shards(scan), copies, problems=scan_problems(scan))


def scan_problems(scan: Scan) -> list[str]:
    """What training does without, in words; raises `UserError` for shards that came after the scan."""
    places = [entry.place for entry in scan.shards] + [row.place for row in scan.left_out]
    known = {os.path.basename(place) for place in places}
    new = sorted(path.name for path in scan.folder.glob("*.tar") if path.name not in known)
    if new:
        raise UserError(
            f"{scan.folder} holds {len(new)} shards that are not in its {SCAN_FILE} (first {new[0]}); run "
            f"`vlkd prep scan {scan.folder}` again, or move them away."
        )
    kinds = [f"{count} of kind {kind!r}" for kind, count in scan.problem_counts().items()]
    return [f"{row.place}: {row.reason}" for row in scan.left_out] + kinds


def indexed_shards(scan: Scan) -> list[IndexedShard]:
    """The shards of a scan that hold a sample."""
    return [
        IndexedShard(
            place=entry_place(scan, entry),
            index=scan.folder / entry.index,
            entry=entry,
            prefix="" if scan.unique_keys else entry.index.removesuffix(SUFFIX) + "/",
        )
        for entry in scan.shards
        if entry.samples
    ]


def _check_files(shard: IndexedShard) -> None:
    if not shard.index.is_file():
        raise UserError(f"The index {shard.index} is missing; run `vlkd prep scan` again.")
    if is_remote(shard.place):
        return
    try:
        size = os.stat(shard.place).st_size
    except OSError as error:
        raise UserError(
            f"The shard {shard.place} cannot be read ({error.strerror}); restore it, or run `vlkd prep scan` again."
        ) from None
    if size != shard.entry.bytes:
        raise UserError(
            f"The shard {shard.place} has {size} bytes, expected {shard.entry.bytes} as it was scanned; run `vlkd prep "
            "scan` again."
        )
