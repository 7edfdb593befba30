"""Reads a teacher cache through memory maps, its rows joined to a table's by key."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from torch import Tensor

from vlkd.data.sources import Pairs
from vlkd.data.views import View
from vlkd.distill.cache.columns import SCALE, check_embeddings, unpack
from vlkd.distill.cache.format import MANIFEST, METADATA, manifest_identity
from vlkd.errors import UserError

CHECKED_ROWS = 4096


@dataclass(frozen=True)
class Join:
    """Where the rows and captions of a table are stored.

    Attributes:
        row_shard: (N,) int64, the shard of each row.
        row_place: (N,) its place among the shard's rows.
        text_shard: (T,) the shard of each caption.
        text_place: (T,) its place among the shard's captions.
        wrong: keys of rows that are not stored, or with another picture or other captions; then nothing can be read.
    """

    row_shard: Tensor
    row_place: Tensor
    text_shard: Tensor
    text_place: Tensor
    wrong: tuple[str, ...]


def join_rows(folder: Path, name: str, manifest: Mapping[str, Any], pairs: Pairs) -> Join:
    """Find every row of a table by its key; the table may have another order, or fewer rows, than what was stored.

    Raises:
        UserError: a shard is missing, of another size than the manifest says, damaged, or of another build.
    """
    check_files(folder, name, manifest)
    stored: dict[str, tuple[int, int, int, str]] = {}
    for number, entry in enumerate(manifest["shards"]):
        head, counts = _read_head(folder / entry["file"], name, manifest)
        first_captions = (np.cumsum(counts) - counts).tolist()
        rows = zip(head["keys"], first_captions, head["rows"], strict=True)
        stored |= {key: (number, place, first, state) for place, (key, first, state) in enumerate(rows)}
    unknown = (0, 0, 0, "")
    found = [stored.get(key, unknown) for key in pairs.keys]
    states = pairs.row_fingerprints()
    wrong = tuple(key for key, row, state in zip(pairs.keys, found, states, strict=True) if row[3] != state)
    places = np.array([row[:3] for row in found], dtype=np.int64).reshape(-1, 3)
    own = np.array([len(captions) for captions in pairs.captions], dtype=np.int64)
    text_places = np.repeat(places[:, 2] - (np.cumsum(own) - own), own) + np.arange(own.sum())
    columns = (places[:, 0], places[:, 1], np.repeat(places[:, 0], own), text_places)
    row_shard, row_place, text_shard, text_place = (
        torch.from_numpy(np.ascontiguousarray(column)) for column in columns
    )
    return Join(row_shard, row_place, text_shard, text_place, wrong)


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


class CacheReader:
    """Stored features by row and caption numbers of a table. It travels to workers, where files are opened anew.

    Args:
        folder: of the shards.
        name: the teacher's short name.
        manifest: what is stored.
        join: where the table's rows are.
    """

    def __init__(self, folder: Path, name: str, manifest: Mapping[str, Any], join: Join) -> None:
        self.folder = folder
        self.name = name
        self.manifest = dict(manifest)
        self.join = join
        self.width = int(manifest["teacher"]["width"])
        self.views = int(manifest["views"]["count"])
        self.features = frozenset(manifest["features"])
        self.scalars = {
            key: float(value) for key, value in manifest["teacher"].items() if key in ("logit_scale", "logit_bias")
        }
        self.captions = len(join.text_shard)
        self._opened: dict[int, dict[str, Tensor]] = {}

    def __len__(self) -> int:
        return len(self.join.row_shard)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_opened": {}}

    def image(self, name: str, rows: Tensor, views: Tensor) -> Tensor:
        """An image feature (B, ...) of rows and view numbers (B,), float32; masks as they are."""
        if len(views) and not 0 <= int(views.min()) <= int(views.max()) < self.views:
            raise ValueError(f"views {views.tolist()} of a cache of {self.views}")
        return self._read(name, self.join.row_shard[rows], self.join.row_place[rows] * self.views + views)

    def text(self, name: str, texts: Tensor) -> Tensor:
        """A text feature (T, ...) of caption numbers (T,) among all captions of the table, float32."""
        return self._read(name, self.join.text_shard[texts], self.join.text_place[texts])

    def scalar(self, name: str) -> Tensor:
        """`logit_scale` or `logit_bias`, ()."""
        return torch.tensor(self.scalars[name])

    def view(self, row: int, number: int) -> View:
        """The stored view of a row: its box and whether it is mirrored, without colours."""
        table = self._shard(int(self.join.row_shard[row]))["views"]
        left, top, right, bottom, flip = table[int(self.join.row_place[row]), number].tolist()
        return View((left, top, right, bottom), bool(flip), (1.0, 1.0, 1.0))

    def unreadable_rows(self) -> list[int]:
        """Rows of images that could not be decoded: their image features are zeros."""
        return [int(row) for row in self._readable().eq(0).nonzero()]

    def check_embeddings(self, texts: Sequence[str]) -> None:
        """Refuse embeddings that are not finite, zero or constant, on up to 4,096 images and as many captions.

        Args:
            texts: all captions of the table.
        """
        rows = self._readable().nonzero()[:, 0]
        rows = rows[:: len(rows) // CHECKED_ROWS + 1]
        numbers = range(0, len(texts), len(texts) // CHECKED_ROWS + 1)
        captions = torch.tensor(list({texts[i]: i for i in numbers}.values()), dtype=torch.int64)
        views = torch.zeros_like(rows)
        for name in sorted(self.features):
            if name.endswith(".embed"):
                image = name.startswith("image.")
                stored = self.image(name, rows, views) if image else self.text(name, captions)
                try:
                    check_embeddings(self.name, {name: stored})
                except UserError as error:
                    raise UserError(
                        f"{self.folder}: {error} If it is sound, the cache is damaged: see `vlkd cache embeddings` "
                        "with --verify."
                    ) from None

    def _readable(self) -> Tensor:
        return self._gather("readable", self.join.row_shard, self.join.row_place)

    def _read(self, name: str, shards: Tensor, places: Tensor) -> Tensor:
        scaled = name + SCALE in self._shard(0)
        scale = self._gather(name + SCALE, shards, places) if scaled else None
        return unpack(self._gather(name, shards, places), scale)

    def _gather(self, column: str, shards: Tensor, places: Tensor) -> Tensor:
        """Rows of a column, one `index_select` per shard that is touched."""
        if len(self.manifest["shards"]) == 1 or not len(shards):
            return self._shard(0)[column].index_select(0, places)
        order = shards.argsort()
        touched, counts = torch.unique_consecutive(shards[order], return_counts=True)
        parts = torch.split(places[order], counts.tolist())
        # The step around it may be under autocast, which knows no joining of halves.
        with torch.autocast("cpu", enabled=False):
            found = torch.cat(
                [self._shard(s)[column].index_select(0, part) for s, part in zip(touched.tolist(), parts, strict=True)]
            )
        back = torch.empty_like(order)
        back[order] = torch.arange(len(order))
        return found.index_select(0, back)

    def _shard(self, number: int) -> dict[str, Tensor]:
        """A shard's columns, mapped and not read; image features as (n * K, ...)."""
        if number not in self._opened:
            self._opened[number] = self._open_shard(self.manifest["shards"][number])
        return self._opened[number]

    def _open_shard(self, entry: Mapping[str, Any]) -> dict[str, Tensor]:
        path = self.folder / entry["file"]
        with safe_open(str(path), "pt") as file:
            columns: dict[str, Tensor] = {column: file.get_tensor(column) for column in file.keys()}  # noqa: SIM118
        for column, value in columns.items():
            if column.startswith("image."):
                # A wrong shape would be read as the views of other images.
                if value.shape[:2] != (entry["rows"], self.views):
                    raise UserError(f"{path} has another shape than {MANIFEST} says; remove the folder.")
                columns[column] = value.flatten(0, 1)
        return columns
