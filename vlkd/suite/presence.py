"""Which data sets of a suite are there, which are missing, and how large they are; nothing is opened but text files."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vlkd.data.eval_wds import COUNT_FILE, MAX_SHARDS, is_wds
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
    """

    entry: DataEntry
    path: Path | None
    bytes: int
    images: int | None
    problem: str


def presence(suite: Suite, root: Path) -> list[Present]:
    """Look for every data set of a suite below `root`, in the suite's order."""
    return [_present(entry, root) for entry in suite.entries]


def presence_table(suite: Suite, found: Sequence[Present], root: Path) -> str:
    """The list that `--dry-run` prints: a line per data set, what is wrong below, and totals.

    Data sets that share a folder show its whole size each; the total counts it once.
    """
    rows = [("data set", "state", "size", "images", "where")]
    for one in found:
        state = "missing" if one.path is None else "incomplete" if one.problem else "present"
        expected = f"({size_text(one.entry.bytes)})" if one.entry.bytes else "-"
        images = "-" if one.images is None else f"{one.images:,}"
        where = (
            "no " + " or ".join(one.entry.paths) if one.path is None else one.problem or os.path.relpath(one.path, root)
        )
        rows.append((one.entry.name, state, size_text(one.bytes) if one.path else expected, images, where))
    widths = [max(len(row[column]) for row in rows) for column in range(4)]
    lines = [f"{suite.name}: {suite.title}; data root {root}"]
    for name, state, size, images, where in rows:
        lines.append(
            f"{name:<{widths[0]}}  {state:<{widths[1]}}  {size:>{widths[2]}}  {images:>{widths[3]}}  {where}".rstrip()
        )
    there = [one for one in found if one.path is not None]
    total = sum({one.path: one.bytes for one in there}.values())
    declared = sum(one.images or 0 for one in there)
    lines.append(
        f"{len(there)} of {len(found)} data sets are there: {size_text(total)}, {declared:,} images as declared; "
        f"{len(found) - len(there)} missing, {sum(bool(one.problem) for one in there)} incomplete"
    )
    return "\n".join(lines)


def as_json(found: Sequence[Present]) -> list[dict[str, Any]]:
    """The same for strict JSON."""
    return [
        {
            "dataset": one.entry.name,
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
