"""What a teacher cache that is not built yet will take: bytes, and the time of its parts."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from itertools import islice

import torch
from accelerate import Accelerator
from safetensors.torch import save
from torch import Tensor

from vlkd.data.table import Table
from vlkd.distill.cache import CacheSpec
from vlkd.distill.cache.build import TEXT_BATCH, PlannedShard, plan_shards, text_batches, view_batches
from vlkd.distill.cache.columns import pack
from vlkd.distill.cache.format import METADATA, identity
from vlkd.engine.cost import Host, images_per_second
from vlkd.engine.footprint import tensor_bytes
from vlkd.engine.probe import one_of_each, repeated_seconds
from vlkd.models.base import DualEncoderModule, evaluating

SAMPLED_ROWS = 64
ROW_SECONDS = 2.0


@dataclass(frozen=True, kw_only=True)
class BuildTimes:
    """Seconds of building a cache.

    Attributes:
        row: one process decodes an image and makes all of its views.
        view: the forward pass of one view.
        text: the forward pass of one caption.
        views: K.
    """

    row: float
    view: float
    text: float
    views: int

    def seconds(self, rows: int, captions: int, host: Host) -> float:
        """Of a table; captions that occur twice are counted twice, which the build does not."""
        seen = self.row + self.view > 0
        images = rows * self.views / images_per_second(self.view, self.row / self.views, host) if seen else 0.0
        return images + captions * self.text


def cache_bytes(model: DualEncoderModule, table: Table, spec: CacheSpec, accelerator: Accelerator) -> int:
    """Bytes of the shards of a cache: columns, keys and headers, the manifest aside.

    Args:
        model: whose features are stored.
        table: a source, as it is opened alone.
        spec: of the cache.
        accelerator: precision of the pass.
    """
    one = one_of_each(model, spec.features, accelerator)
    packed = {
        name: column for feature, value in one.items() for name, column in pack(feature, value, spec.dtype).items()
    }
    columns = {name: _empty(value, spec.views if name.startswith("image.") else 0) for name, value in packed.items()}
    columns |= {
        "views": torch.empty(0, spec.views, 5, dtype=torch.float64),
        "readable": torch.empty(0, dtype=torch.uint8),
        "captions": torch.empty(0, dtype=torch.int32),
    }
    # As long as those that a build finds.
    errors = {feature: [0.00012345678901234567] * 2 for feature in spec.features}
    head = {"identity": identity(model, spec), "keys": [], "rows": [], "error": errors, "columns": "0" * 64}
    per_file = len(save(columns, metadata={METADATA: json.dumps(head)}))
    per_text = sum(tensor_bytes(value) for name, value in packed.items() if name.startswith("text."))
    per_row = sum(_row_bytes(value) for name, value in columns.items() if not name.startswith("text."))
    rows = range(0, len(table), max(1, len(table) // SAMPLED_ROWS))
    strings = [text for row in rows for text in (table.key(row), table.row_state(row))]
    # Quotes, which are escaped in the header, a comma and a space.
    per_row_of_head = 2 * sum(len(json.dumps(text)) + 4 for text in strings) / len(strings)
    return round(
        len(plan_shards(table)) * per_file + len(table) * (per_row + per_row_of_head) + table.caption_total * per_text
    )


def _empty(value: Tensor, views: int) -> Tensor:
    """No row of a column whose rows are like that of (1, ...), one for each view where there are views."""
    return value.new_empty(0, *([views] if views else []), *value.shape[1:])


def _row_bytes(column: Tensor) -> int:
    return tensor_bytes(column.new_empty(1, *column.shape[1:]))


def build_times(
    model: DualEncoderModule, table: Table, spec: CacheSpec, accelerator: Accelerator, *, batch_size: int, threads: int
) -> BuildTimes:
    """Measure the parts of a build on a few rows; nothing is written.

    Args:
        model: whose features are to be stored.
        table: the data.
        spec: of the cache.
        accelerator: device and precision.
        batch_size: views of a forward pass.
        threads: of torch in the process that decodes.
    """
    images = [name for name in spec.features if name.startswith("image.")]
    texts = [name for name in spec.features if name.startswith("text.")]
    row = view = text = 0.0
    rows = range(0, len(table), max(1, len(table) // SAMPLED_ROWS))[:SAMPLED_ROWS]
    with torch.no_grad(), evaluating(model), accelerator.autocast():
        if images:
            row, pixels = _row_seconds(model, table, spec, rows, threads)
            batch = pixels.repeat(-(-batch_size // len(pixels)), 1, 1, 1)[:batch_size].to(model.device)
            view = repeated_seconds(lambda: model.encode({"pixels": batch}, images), model.device) / len(batch)
        captions = [caption for row_number in rows for caption in table.captions_of(row_number)][:TEXT_BATCH]
        if texts and captions:
            work = repeated_seconds(lambda: list(text_batches(model, captions, texts)), model.device)
            text = work / len(captions)
    return BuildTimes(row=row, view=view, text=text, views=spec.views)


def _row_seconds(
    model: DualEncoderModule, table: Table, spec: CacheSpec, rows: range, threads: int
) -> tuple[float, Tensor]:
    """Seconds to prepare all views of a row, and the pixels (n * K, 3, H, W) of the first few rows."""
    shard = PlannedShard("", rows, table.parts()[0])
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        batches = view_batches(model, table, spec, [shard], workers=0, batch_size=4 * spec.views)
        first = next(batches)[0]
        started, done = time.perf_counter(), 0
        for pixels, _, _ in islice(batches, SAMPLED_ROWS):
            done += len(pixels)
            if time.perf_counter() - started > ROW_SECONDS:
                break
        # A table of one batch has that one alone.
        if not done:
            next(view_batches(model, table, spec, [shard], workers=0, batch_size=4 * spec.views))
            done = len(first)
        return (time.perf_counter() - started) / done, first.flatten(0, 1)
    finally:
        torch.set_num_threads(before)
