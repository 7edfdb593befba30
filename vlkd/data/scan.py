"""Scanning shards: an index beside each, and `scan.json`, from which a stream of any length opens at once.

Shards are read in parallel and indexed once: a scan that was stopped, or is run again, reads what is new. `scan.json`
is written last, so that it never names an index that is not there.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock
from numpy.typing import NDArray

from vlkd.data.files import check_counts, strict_json, write_whole
from vlkd.data.scan_shard import BadShard, scan_shard
from vlkd.data.scan_work import Done, Progress, Task, run
from vlkd.data.shard_refs import common_folder, expand_shards, index_names, relative_place
from vlkd.data.shard_rows import SUFFIX, read_rows
from vlkd.errors import UserError

__all__ = [
    "SCAN_FILE",
    "BadShard",
    "LeftOut",
    "Scan",
    "ShardEntry",
    "entry_place",
    "expand_shards",
    "read_scan",
    "scan_shard",
    "scan_shards",
]

FORMAT, VERSION, SCAN_FILE = "vlkd-scan", 1, "scan.json"
LOCK = ".scan.lock"
MAX_LEFT_OUT = 0.05
"""Above this share of shards that cannot be used (one is always allowed), the scan is refused."""
_TOTALS = ("bytes", "samples", "labelled", "captions")
_CHECKED_REPEATS = 100


@dataclass(frozen=True, kw_only=True)
class ShardEntry:
    """One shard of a scan.

    Attributes:
        place: path relative to the scan's folder, with `/`, or URL; `entry_place` makes it absolute.
        bytes, sha256: of the file.
        samples, labelled, captions, most_captions: rows, those with captions, all captions, the most of one row.
        index: name of its index in the scan's folder.
        problems: how many of each kind of `Problem`.
    """

    place: str
    bytes: int
    sha256: str
    samples: int
    labelled: int
    captions: int
    most_captions: int
    index: str
    problems: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class LeftOut:
    """A shard that cannot be used, and why."""

    place: str
    reason: str


@dataclass(frozen=True)
class Scan:
    """What a scan found.

    Attributes:
        folder: of `scan.json` and the indexes.
        shards: usable ones, in natural order of their places.
        unique_keys: whether no key occurs in two shards.
        left_out: shards that cannot be used.
        repeated: where keys repeat, an example in words.
    """

    folder: Path
    shards: tuple[ShardEntry, ...]
    unique_keys: bool
    left_out: tuple[LeftOut, ...] = ()
    repeated: str = ""

    def total(self, count: str) -> int:
        """Sum of `bytes`, `samples`, `labelled` or `captions` over all shards."""
        return sum(getattr(entry, count) for entry in self.shards)

    def problem_counts(self) -> dict[str, int]:
        """Problems per kind, of all shards."""
        return dict(sum((Counter(entry.problems) for entry in self.shards), Counter[str]()))


def entry_place(scan: Scan, entry: ShardEntry) -> str:
    """Where a shard is: an absolute path, or a URL."""
    if "://" in entry.place:
        return entry.place
    return os.path.normpath(os.path.join(os.path.realpath(scan.folder), entry.place))


def read_scan(folder: Path) -> Scan:
    """Read and check `scan.json` of a folder; indexes are not opened.

    Raises:
        UserError: it is missing, or not what `scan_shards` writes.
    """
    path = folder / SCAN_FILE
    try:
        found = strict_json(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{folder} has no {SCAN_FILE}; run `vlkd prep scan` on its shards.") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}); run `vlkd prep scan` again.") from None
    except ValueError as error:
        raise UserError(f"{path} is no JSON ({error}); run `vlkd prep scan` again.") from None
    try:
        if not isinstance(found, dict) or (found["format"], found["version"]) != (FORMAT, VERSION):
            raise ValueError(f"not of format {FORMAT} {VERSION}")
        entries = tuple(_entry(entry) for entry in _list(found["shards"]))
        left_out = tuple(LeftOut(**_exactly(row, LeftOut)) for row in _list(found["left_out"]))
        scan = Scan(folder, entries, found["unique_keys"], left_out, found["repeated"])
        _check_scan(scan, found)
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path} is no scan of shards ({error}); run `vlkd prep scan` again.") from None
    return scan


def _check_scan(scan: Scan, found: Mapping[str, Any]) -> None:
    if not scan.shards:
        raise ValueError("no shard")
    if not isinstance(scan.unique_keys, bool) or not isinstance(scan.repeated, str):
        raise ValueError("unique_keys and repeated are no flag and no text")
    if not all(isinstance(text, str) for row in scan.left_out for text in (row.place, row.reason)):
        raise ValueError("left_out is no list of places and reasons")
    if len({entry.index.casefold() for entry in scan.shards}) < len(scan.shards):
        raise ValueError("two shards of one index")
    if len({entry.place for entry in scan.shards}) < len(scan.shards):
        raise ValueError("a shard that is named twice")
    for name in _TOTALS:
        if type(found[name]) is not int or found[name] != scan.total(name) or found[name] >= 2**63:
            raise ValueError(f"{name} is not the sum over its shards")


def _entry(row: object) -> ShardEntry:
    values = _exactly(row, ShardEntry)
    check_counts(values)
    index, place = values["index"], values["place"]
    # Indexes lie in the folder itself, whatever a foreign file says.
    if not isinstance(index, str) or not index.endswith(SUFFIX) or re.search(r"[/\\\x00]", index):
        raise ValueError(f"{index!r:.80} names no index")
    if not isinstance(place, str) or not place or "\0" in place or place.startswith("/"):
        raise ValueError(f"{place!r:.80} names no shard")
    place.encode()
    index.encode()
    if not values["samples"] or values["bytes"] < 512 * values["samples"]:
        raise ValueError(f"{place!r:.80} holds {values['samples']} samples in {values['bytes']} bytes")
    return ShardEntry(**values)


def _exactly(row: object, kind: type[Any]) -> dict[str, Any]:
    names = {part.name for part in fields(kind)}
    if not isinstance(row, dict) or set(row) != names:
        raise ValueError(f"a row that is not made of {', '.join(sorted(names))}")
    return row


def _list(value: object) -> list[Any]:
    if not isinstance(value, list):
        raise ValueError(f"a {type(value).__name__} in place of a list")
    return value


def scan_shards(refs: Sequence[str], folder: Path | None, *, workers: int, again: bool = False) -> Scan:
    """Index shards and write `scan.json`; shows a progress bar.

    A shard whose index is whole and has its size and time of change is not read again. Shards that cannot be used
    are listed, not indexed; up to a twentieth of them, and at least one, is accepted. Of URLs, a passing copy is
    scanned; whether one changed since its index was made is not asked.

    Args:
        refs: tars, folders of tars, patterns with `*` or `{000..099}`, URLs.
        folder: of the indexes and `scan.json`; that of the shards where they are local and lie in one folder.
        workers: processes that read.
        again: read shards that have an index, too.

    Raises:
        UserError: there are no shards, too many cannot be used, no folder is given where it is needed, or nothing can
            be written there.
    """
    places = expand_shards(refs)
    folder = folder or common_folder(places)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{folder} cannot be made ({error.strerror}); give another --out.") from None
    names = [relative_place(place, folder) for place in places]
    tasks = [
        Task(place=place, name=name, index=folder / index, again=again)
        for place, name, index in zip(places, names, index_names(names), strict=True)
    ]
    # Two scans of one folder, as of runs that begin together, would take each other's unfinished files for leftovers.
    with FileLock(folder / LOCK):
        return _scan(folder, tasks, workers)


def _scan(folder: Path, tasks: Sequence[Task], workers: int) -> Scan:
    done = _run_all(tasks, workers)
    entries, hashes, left_out = [], [], []
    for task, found in zip(tasks, done, strict=True):
        header = found.header
        if header is None:
            left_out.append(LeftOut(place=task.name, reason=found.reason))
            continue
        shared = {name: getattr(header, name) for name in (*_TOTALS, "sha256", "most_captions", "problems")}
        entries.append(ShardEntry(place=task.name, index=task.index.name, **shared))
        hashes.append(found.hashes)
    repeated = _repeated(folder, entries, hashes)
    scan = Scan(folder, tuple(entries), not repeated, tuple(left_out), repeated)
    _write_scan(scan)
    _remove_leftovers(folder, {task.index.name for task in tasks} | {SCAN_FILE})
    return scan


def _run_all(tasks: Sequence[Task], workers: int) -> list[Done]:
    allowed = max(1, int(MAX_LEFT_OUT * len(tasks)))
    found: dict[int, Done] = {}
    bad: list[str] = []
    with closing(Progress(tasks)) as progress, closing(run(tasks, workers)) as results:
        for number, done in results:
            found[number] = done
            progress.update(number, done)
            if done.header is None:
                bad.append(done.reason)
            if len(bad) == len(tasks):
                raise UserError(f"No shard can be used, first: {bad[0]}")
            if len(bad) > allowed:
                raise UserError(
                    f"{len(bad)} of {len(tasks)} shards cannot be used, {allowed} may be left out; first: {bad[0]} "
                    "Mend or remove them and scan again: what is indexed is not read again."
                )
    return [found[number] for number in range(len(tasks))]


def _repeated(folder: Path, entries: Sequence[ShardEntry], hashes: Sequence[NDArray[np.uint64]]) -> str:
    """An example of a key that occurs in two shards, in words; "" where there is none.

    Keys are compared by hashes of 64 bits; those that agree, by themselves.
    """
    together = np.sort(np.concatenate(hashes))
    several = np.unique(together[1:][together[1:] == together[:-1]])
    for value in several[:_CHECKED_REPEATS]:
        seen: dict[str, str] = {}
        for entry, own in zip(entries, hashes, strict=True):
            for row in np.flatnonzero(own == value).tolist():
                key = read_rows(folder / entry.index).key(row)
                if key in seen:
                    return f"the key {key!r} is in {seen[key]} and in {entry.place}"
                seen[key] = entry.place
    return ""


def _write_scan(scan: Scan) -> None:
    content = {
        "format": FORMAT,
        "version": VERSION,
        **{name: scan.total(name) for name in _TOTALS},
        "unique_keys": scan.unique_keys,
        "repeated": scan.repeated,
        "left_out": [asdict(row) for row in scan.left_out],
        "shards": [asdict(entry) for entry in scan.shards],
    }
    write_whole(scan.folder / SCAN_FILE, (json.dumps(content, indent=1, allow_nan=False) + "\n").encode())


def _remove_leftovers(folder: Path, names: set[str]) -> None:
    """What killed scans of the same shards left under temporary names."""
    for path in folder.iterdir():
        match = re.fullmatch(r"\.(.+?)(\.tar)?\.[0-9]+\.partial", path.name)
        if match and match[1] in names and path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        elif match and match[1] in names:
            path.unlink(missing_ok=True)
