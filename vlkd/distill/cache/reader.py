"""Reads a teacher cache through memory maps, its rows joined to a table's by key."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from vlkd.data.images import BadImage
from vlkd.data.table import Table
from vlkd.data.views import View
from vlkd.distill.cache.columns import SCALE, check_embeddings, unpack
from vlkd.distill.cache.format import MANIFEST
from vlkd.distill.cache.join import Join
from vlkd.errors import UserError

CHECKED_ROWS = 4096


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
        self.captions = join.captions
        self._opened: dict[int, dict[str, Tensor]] = {}

    def __len__(self) -> int:
        return self.join.images

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_opened": {}}

    def image(self, name: str, rows: Tensor, views: Tensor) -> Tensor:
        """An image feature (B, ...) of rows and view numbers (B,), float32; masks as they are."""
        if len(views) and not 0 <= int(views.min()) <= int(views.max()) < self.views:
            raise ValueError(f"views {views.tolist()} of a cache of {self.views}")
        shards, places = self.join.rows(rows)
        return self._read(name, shards, places * self.views + views)

    def text(self, name: str, texts: Tensor) -> Tensor:
        """A text feature (T, ...) of caption numbers (T,) among all captions of the table, float32."""
        return self._read(name, *self.join.texts(texts))

    def scalar(self, name: str) -> Tensor:
        """`logit_scale` or `logit_bias`, ()."""
        return torch.tensor(self.scalars[name])

    def view(self, row: int, number: int) -> View:
        """The stored view of a row: its box and whether it is mirrored, without colours."""
        shard, place = self.join.row(row)
        left, top, right, bottom, flip = self._shard(shard)["views"][place, number].tolist()
        return View((left, top, right, bottom), bool(flip), (1.0, 1.0, 1.0))

    def unreadable_rows(self) -> list[int]:
        """Rows of images that could not be decoded: their image features are zeros."""
        found: list[int] = []
        for number, entry in enumerate(self.manifest["shards"]):
            if entry["unreadable"]:
                rows, places = self.join.rows_of(number)
                found += rows[self._shard(number)["readable"][places].eq(0)].tolist()
        return sorted(found)

    def check_embeddings(self, table: Table) -> None:
        """Refuse embeddings that are not finite, zero or constant, on up to 4,096 rows and one caption of each."""
        rows = torch.tensor(table.spread_rows(CHECKED_ROWS), dtype=torch.int64)
        rows = rows[self._gather("readable", *self.join.rows(rows)).bool()]
        first_texts = {}
        for row in rows.tolist():
            # The data's own limit on samples that cannot be read is kept elsewhere.
            with contextlib.suppress(BadImage):
                if captions := table.captions_of(row):
                    first_texts[captions[0]] = table.first_text(row)
        texts = torch.tensor(list(first_texts.values()), dtype=torch.int64)
        views = torch.zeros_like(rows)
        for name in sorted(self.features):
            if name.endswith(".embed"):
                stored = self.image(name, rows, views) if name.startswith("image.") else self.text(name, texts)
                try:
                    check_embeddings(self.name, {name: stored})
                except UserError as error:
                    raise UserError(
                        f"{self.folder}: {error} If it is sound, the cache is damaged: see `vlkd cache embeddings` "
                        "with --verify."
                    ) from None

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
