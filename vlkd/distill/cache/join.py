"""Where the rows of a table are stored in a teacher cache: found by key, or by the hashes of whole shards."""

from __future__ import annotations

import bisect
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from torch import Tensor

from vlkd.data.shard_table import ShardTable
from vlkd.data.sources import Pairs
from vlkd.data.table import Table
from vlkd.distill.cache.format import MANIFEST, METADATA, manifest_identity
from vlkd.errors import UserError


class Join(Protocol):
    """Where the rows and captions of a table are stored.

    Attributes:
        images: rows of the table.
        captions: of all its rows.
        wrong: what is not stored, or stored of other pictures or captions; then nothing can be read.
    """

    images: int
    captions: int
    wrong: tuple[str, ...]

    def rows(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """The stored shards of rows (B,), and their places among each shard's rows."""
        ...

    def row(self, row: int) -> tuple[int, int]:
        """The same of one row, some ten times as fast."""
        ...

    def texts(self, texts: Tensor) -> tuple[Tensor, Tensor]:
        """The same of caption numbers (T,)."""
        ...

    def rows_of(self, shard: int) -> tuple[Tensor, Tensor]:
        """The table's rows that lie in a stored shard, and their places there."""
        ...


class KeyedJoin:
    """Every row was found by its key; the table may have another order, or fewer rows, than what was stored.

    Args:
        row_shard: (N,) int64.
        row_place: (N,).
        text_shard: (T,).
        text_place: (T,).
        wrong: keys of rows that cannot be served.
    """

    def __init__(
        self, row_shard: Tensor, row_place: Tensor, text_shard: Tensor, text_place: Tensor, wrong: tuple[str, ...]
    ) -> None:
        self.row_shard, self.row_place = row_shard, row_place
        self.text_shard, self.text_place = text_shard, text_place
        self.images, self.captions = len(row_shard), len(text_shard)
        self.wrong = wrong

    def rows(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """See `Join`."""
        return self.row_shard[rows], self.row_place[rows]

    def row(self, row: int) -> tuple[int, int]:
        """See `Join`."""
        return int(self.row_shard[row]), int(self.row_place[row])

    def texts(self, texts: Tensor) -> tuple[Tensor, Tensor]:
        """See `Join`."""
        return self.text_shard[texts], self.text_place[texts]

    def rows_of(self, shard: int) -> tuple[Tensor, Tensor]:
        """See `Join`."""
        rows = self.row_shard.eq(shard).nonzero()[:, 0]
        return rows, self.row_place[rows]


class ShardJoin:
    """Whole shards of the data were found by their hashes: nothing is held per row.

    Args:
        shards: of the manifest, in the order in which the table has their rows.
        entries: their entries.
        wrong: names of data shards that cannot be served.
    """

    def __init__(self, shards: list[int], entries: list[Mapping[str, Any]], wrong: tuple[str, ...]) -> None:
        self.shards = torch.tensor(shards, dtype=torch.int64)
        self.row_ends = torch.tensor([entry["rows"] for entry in entries], dtype=torch.int64).cumsum(0)
        self.text_ends = torch.tensor([entry["captions"] for entry in entries], dtype=torch.int64).cumsum(0)
        self.row_starts, self.text_starts = (
            torch.cat([ends.new_zeros(1), ends]) for ends in (self.row_ends, self.text_ends)
        )
        self._numbers, self._ends = list(shards), self.row_ends.tolist()
        self.images = int(self.row_ends[-1]) if entries else 0
        self.captions = int(self.text_ends[-1]) if entries else 0
        self.wrong = wrong

    def rows(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """See `Join`."""
        return self._place(self.row_ends, self.row_starts, rows)

    def row(self, row: int) -> tuple[int, int]:
        """See `Join`."""
        found = bisect.bisect_right(self._ends, row)
        return self._numbers[found], row - (self._ends[found - 1] if found else 0)

    def texts(self, texts: Tensor) -> tuple[Tensor, Tensor]:
        """See `Join`."""
        return self._place(self.text_ends, self.text_starts, texts)

    def rows_of(self, shard: int) -> tuple[Tensor, Tensor]:
        """See `Join`."""
        ends = [0, *self.row_ends.tolist()]
        found = [torch.arange(ends[i], ends[i + 1]) for i in self.shards.eq(shard).nonzero()[:, 0].tolist()]
        none = torch.zeros(0, dtype=torch.int64)
        return torch.cat([none, *found]), torch.cat([none, *(rows - rows[0] for rows in found)])

    def _place(self, ends: Tensor, starts: Tensor, numbers: Tensor) -> tuple[Tensor, Tensor]:
        found = torch.searchsorted(ends, numbers, right=True)
        return self.shards[found], numbers - starts[found]


def join(folder: Path, name: str, manifest: Mapping[str, Any], table: Table) -> Join:
    """Find the rows of a table: by the shards' hashes where they are known, else by key.

    Raises:
        UserError: a stored shard is missing, of another size than the manifest says, damaged, or of another build.
    """
    check_files(folder, name, manifest)
    if isinstance(table, ShardTable):
        return join_shards(manifest, table)
    assert isinstance(table, Pairs)
    return join_rows(folder, name, manifest, table)


def join_shards(manifest: Mapping[str, Any], table: ShardTable) -> ShardJoin:
    """Each shard of the table stands for the stored shards that were made from a tar of the same SHA-256."""
    stored: dict[str, list[int]] = {}
    for number, entry in enumerate(manifest["shards"]):
        stored.setdefault(entry["source"], []).append(number)
    chosen: list[int] = []
    wrong = []
    for part in table.parts():
        # Of a tar that is there twice, the stored shards of one copy.
        numbers: list[int] = []
        for number in stored.get(part.sha256, []):
            if sum(manifest["shards"][i]["rows"] for i in numbers) < part.rows:
                numbers.append(number)
        entries = [manifest["shards"][number] for number in numbers]
        totals = [sum(entry[count] for entry in entries) for count in ("rows", "captions")]
        if totals != [part.rows, part.captions]:
            wrong.append(part.name)
        chosen += numbers
    return ShardJoin(chosen, [manifest["shards"][number] for number in chosen], tuple(wrong))


def join_rows(folder: Path, name: str, manifest: Mapping[str, Any], pairs: Pairs) -> KeyedJoin:
    """Find every row of a table by its key, and compare its state with the one that was stored."""
    stored: dict[str, tuple[int, int, int, str]] = {}
    for number, entry in enumerate(manifest["shards"]):
        head, counts = _read_head(folder / entry["file"], name, manifest)
        first_captions = (np.cumsum(counts) - counts).tolist()
        rows = zip(head["keys"], first_captions, head["rows"], strict=True)
        stored |= {key: (number, place, first, state) for place, (key, first, state) in enumerate(rows)}
    unknown = (0, 0, 0, "")
    found = [stored.get(key, unknown) for key in pairs.keys]
    numbered = enumerate(zip(pairs.keys, found, strict=True))
    wrong = tuple(key for row, (key, place) in numbered if place[3] != pairs.row_state(row))
    places = np.array([row[:3] for row in found], dtype=np.int64).reshape(-1, 3)
    own = np.array([len(captions) for captions in pairs.captions], dtype=np.int64)
    text_places = np.repeat(places[:, 2] - (np.cumsum(own) - own), own) + np.arange(own.sum())
    columns = (places[:, 0], places[:, 1], np.repeat(places[:, 0], own), text_places)
    row_shard, row_place, text_shard, text_place = (
        torch.from_numpy(np.ascontiguousarray(column)) for column in columns
    )
    return KeyedJoin(row_shard, row_place, text_shard, text_place, wrong)


def check_files(folder: Path, name: str, manifest: Mapping[str, Any]) -> None:
    """Raise `UserError` unless every shard is there with the size that the manifest says."""
    for entry in manifest["shards"]:
        path = folder / entry["file"]
        found = path.stat().st_size if path.is_file() else None
        if found != entry["bytes"]:
            what = "is missing" if found is None else f"has {found} bytes"
            raise UserError(
                f"{path} of teacher {name} {what}, expected {entry['bytes']} bytes; remove {MANIFEST} beside it, and "
                "the same command makes that shard again."
            )


def _read_head(path: Path, name: str, manifest: Mapping[str, Any]) -> tuple[dict[str, Any], NDArray[np.int32]]:
    """What a shard says of its rows, and their numbers of captions."""
    try:
        with safe_open(str(path), "pt") as file:
            head = json.loads((file.metadata() or {})[METADATA])
            counts: NDArray[np.int32] = file.get_tensor("captions").numpy()
        if head["identity"] == manifest_identity(manifest) and len(head["keys"]) == len(head["rows"]) == len(counts):
            return head, counts
    except (SafetensorError, KeyError, ValueError):
        pass
    raise UserError(
        f"{path} of teacher {name} is damaged or of another build than its manifest; remove it and {MANIFEST} beside "
        "it, and the same command makes it again."
    )
