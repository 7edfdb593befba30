"""Which data sets of a suite are there, which are missing, and how large they are; nothing is opened but text files."""

from __future__ import annotations

import os
import tarfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from vlkd.data.eval_wds import COUNT_FILE, MAX_SHARDS, is_wds
from vlkd.data.tar_members import read_members
from vlkd.suite.declaration import DataEntry, Suite


@dataclass(frozen=True, kw_only=True)
class Present:
    """What was found of one data set.

    Attributes:
        entry: its declaration.
        path: the first of its paths that exists; None when it is missing.
        bytes: of all files there; of a single file, of that alone.
        images: as declared.
        problem: why it cannot be measured, in a sentence; "" when nothing is seen to be wrong.
        broken: the problem is a tar that is cut or damaged.
    """

    entry: DataEntry
    path: Path | None
    bytes: int
    images: int | None
    problem: str
    broken: bool = False

    @property
    def state(self) -> str:
        """In a word."""
        if self.path is None:
            return "missing"
        return "broken" if self.broken else "incomplete" if self.problem else "present"


def presence(suite: Suite, root: Path) -> list[Present]:
    """Look for every data set of a suite below `root`, in the suite's order."""
    return [_present(entry, root) for entry in suite.entries]


def with_broken_tars(found: Sequence[Present]) -> list[Present]:
    """Follow the headers of every tar to its end, without reading what lies between them.

    A picture that is damaged inside a whole tar is seen by decoding only.
    """
    ends: dict[Path, str] = {}
    return [one if one.path is None or one.problem else _with_broken_tars(one, one.path, ends) for one in found]


def _with_broken_tars(one: Present, path: Path, ends: dict[Path, str]) -> Present:
    broken = []
    for tar in _tars(one.entry, path):
        if tar not in ends:
            ends[tar] = _end(tar)
        if ends[tar]:
            broken.append(tar)
    if not broken:
        return one
    first = f"{broken[0]} ({ends[broken[0]]})"
    tars = "One tar is" if len(broken) == 1 else f"{len(broken)} tars are"
    return replace(one, broken=True, problem=f"{tars} cut or damaged: {first}; fetch again.")


def _tars(entry: DataEntry, path: Path) -> Iterator[Path]:
    """Those of the declared parts, or all of a folder that has no such parts."""
    if path.is_file():
        yield from [path] if path.suffix == ".tar" else []
        return
    parts = [path / split for split in dict.fromkeys((entry.split, entry.train)) if split and (path / split).is_dir()]
    for part in parts or [path]:
        yield from sorted(part.rglob("*.tar"))


def _end(tar: Path) -> str:
    """What is wrong with the end of a tar, or ""."""
    try:
        problems = read_members(tar).problems
    except (OSError, tarfile.TarError) as error:
        return f"it is no tar that can be read: {error}"
    return next((str(one) for one in problems if one.kind in ("truncated", "damaged", "no-end")), "")


def presence_table(suite: Suite, found: Sequence[Present], root: Path) -> str:
    """The list that `--dry-run` prints: a line per data set, what is wrong below, and totals.

    Data sets that share a folder show its whole size each; the total counts it once.
    """
    rows = [("data set", "state", "size", "images", "where")]
    for one in found:
        expected = f"({size_text(one.entry.bytes)})" if one.entry.bytes else "-"
        images = "-" if one.images is None else f"{one.images:,}"
        where = (
            "no " + " or ".join(one.entry.paths) if one.path is None else one.problem or os.path.relpath(one.path, root)
        )
        rows.append((one.entry.name, one.state, size_text(one.bytes) if one.path else expected, images, where))
    widths = [max(len(row[column]) for row in rows) for column in range(4)]
    lines = [f"{suite.name}: {suite.title}; data root {root}"]
    for name, state, size, images, where in rows:
        lines.append(
            f"{name:<{widths[0]}}  {state:<{widths[1]}}  {size:>{widths[2]}}  {images:>{widths[3]}}  {where}".rstrip()
        )
    there = [one for one in found if one.path is not None]
    total = sum({one.path: one.bytes for one in there}.values())
    declared = sum(one.images or 0 for one in there)
    images = f", {declared:,} images as declared" if declared else ""
    lines.append(
        f"{len(there)} of {len(found)} data sets are there: {size_text(total)}{images}; "
        f"{len(found) - len(there)} missing, {sum(one.state == 'incomplete' for one in there)} incomplete"
        f"{f', {broken} broken' if (broken := sum(one.broken for one in there)) else ''}"
    )
    return "\n".join(lines)


def as_json(found: Sequence[Present]) -> list[dict[str, Any]]:
    """The same for strict JSON."""
    return [
        {
            "dataset": one.entry.name,
            "state": one.state,
            "path": None if one.path is None else str(one.path),
            "bytes": one.bytes,
            "images": one.images,
            "problem": one.problem or None,
        }
        for one in found
    ]


def size_text(count: int) -> str:
    """Bytes in words, in steps of 1,000: "999 B", "1.2 kB", "3.4 GB"."""
    value, unit = float(count), "B"
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if value < 999.95 or unit == "TB":
            break
        value /= 1000
    return f"{count} B" if unit == "B" else f"{value:.1f} {unit}"


def _present(entry: DataEntry, root: Path) -> Present:
    path = next((root / place for place in entry.paths if (root / place).exists()), None)
    if path is None:
        problem = f"Nothing at {' or '.join(entry.paths)} below {root}; fetch it as the suite's file says."
        return Present(entry=entry, path=None, bytes=0, images=entry.images, problem=problem)
    return Present(entry=entry, path=path, bytes=_bytes(path), images=entry.images, problem=_problem(entry, path))


def _bytes(path: Path) -> int:
    if path.is_file():
        return path.stat().st_size
    # Linked folders are data that lie elsewhere; they count, and a loop of links must not.
    total, seen = 0, set()
    for folder, folders, files in os.walk(path, followlinks=True):
        real = os.path.realpath(folder)
        if real in seen:
            folders.clear()
            continue
        seen.add(real)
        total += sum(place.stat().st_size for name in files if (place := Path(folder) / name).is_file())
    return total


def _problem(entry: DataEntry, path: Path) -> str:
    """What can be seen without opening a tar: an empty folder, or fewer shards than `nshards.txt` counts."""
    if not path.is_dir():
        return ""
    if not any(path.iterdir()):
        return f"{path} is empty; fetch the data again."
    if not is_wds(path):
        return ""
    problems = [_split_problem(path / split) for split in dict.fromkeys((entry.split, entry.train)) if split]
    return " ".join(problem for problem in problems if problem)


def _split_problem(folder: Path) -> str:
    # A folder of shards without a count, such as `vlkd prep` writes, is as complete as it looks.
    if not (folder / COUNT_FILE).is_file():
        return "" if any(folder.glob("*.tar")) else f"{folder} has no {COUNT_FILE}; fetch the data again."
    told = (folder / COUNT_FILE).read_bytes()[:80].strip().decode("ascii", errors="replace")
    if not told.isascii() or not told.isdigit() or not 1 <= int(told) <= MAX_SHARDS:
        return f"{folder / COUNT_FILE} says {told!r}; expected the number of tars."
    missing = [name for number in range(int(told)) if not (folder / (name := f"{number}.tar")).is_file()]
    if not missing:
        return ""
    return f"{folder} lacks {len(missing)} of {told} tars, first {missing[0]}; fetch them."
