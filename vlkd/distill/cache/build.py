"""Builds a teacher cache: one pass over views and captions, shard by shard, continued where it was stopped."""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from vlkd.data.images import BadImage, Unavailable
from vlkd.data.sources import file_sha256
from vlkd.data.table import Part, Table
from vlkd.data.views import geometry, view_of
from vlkd.distill.cache.columns import Columns, check_lengths
from vlkd.distill.cache.format import (
    METADATA,
    CacheSpec,
    differences,
    identity,
    new_manifest,
    refuse,
)
from vlkd.features import Preprocessing, check_features
from vlkd.models.base import DualEncoderModule, evaluating

SHARD_ROWS = 1024
TEXT_BATCH = 256

ViewBatch = tuple[Tensor, Tensor, Tensor]
"""Pixels (R, K, 3, H, W), views (R, K, 5) and readable (R,) of R rows."""


@dataclass(frozen=True)
class PlannedShard:
    """A shard's file name, the rows of the table that it holds, and the part of the table that they belong to."""

    file: str
    rows: range
    part: Part


def plan_shards(pairs: Table) -> list[PlannedShard]:
    """At most `SHARD_ROWS` rows of one tar together, named after it; pictures in files of their own as `rows`."""
    taken: Counter[str] = Counter()
    plan, first = [], 0
    for part in pairs.parts():
        stem = part.name or "rows"
        taken[stem] += 1
        if taken[stem] > 1:
            stem = f"{stem}-{taken[stem]}"
        for number, start in enumerate(range(0, part.rows, SHARD_ROWS)):
            rows = range(first + start, first + min(start + SHARD_ROWS, part.rows))
            plan.append(PlannedShard(f"{stem}.{number:03d}.safetensors", rows, part))
        first += part.rows
    return plan


def build_shards(
    folder: Path,
    name: str,
    model: DualEncoderModule,
    pairs: Table,
    spec: CacheSpec,
    *,
    workers: int,
    batch_size: int,
) -> dict[str, Any]:
    """Write the shards that are missing; returns the manifest, which the caller writes.

    Raises:
        UserError: the folder holds shards of another build, a feature is unknown, not finite, zero, or does not fit the
            dtype.
    """
    check_features(spec.features, model.provides, f"Teacher {name}")
    folder.mkdir(parents=True, exist_ok=True)
    plan, own = plan_shards(pairs), identity(model, spec)
    foreign = {path.name for path in folder.glob("*.safetensors")} - {shard.file for shard in plan}
    if foreign:
        refuse(name, folder, [f"from other data (found {min(foreign)}, expected {plan[0].file} and the like)"])
    entries: dict[str, dict[str, Any]] = {}
    missing = []
    for shard in plan:
        path = folder / shard.file
        entry = found_shard(path, name, _head(own, pairs, shard)) if path.is_file() else None
        if entry is None:
            missing.append(shard)
        else:
            entries[shard.file] = entry | {"source": shard.part.sha256}
    computed = sum(len(shard.rows) for shard in missing)
    started = time.perf_counter()
    autocast = torch.autocast(model.device.type, torch.bfloat16, enabled=spec.precision == "bf16")
    total, label = len(pairs) * spec.views, f"{name}: {len(pairs)} images x {spec.views} views"
    with (
        torch.no_grad(),
        evaluating(model),
        autocast,
        tqdm(total=total, initial=total - computed * spec.views, desc=label, unit="view") as bar,
    ):
        batches = view_batches(model, pairs, spec, missing, workers=workers, batch_size=batch_size)
        for shard in missing:
            own_batches = islice(batches, len(_row_batches(shard, spec, batch_size)))
            columns, error = shard_columns(name, model, pairs, spec, shard, own_batches, batch_size, bar)
            head = _head(own, pairs, shard)
            write_shard(folder / shard.file, columns, head | {"error": error})
            entry = found_shard(folder / shard.file, name, head)
            assert entry is not None
            entries[shard.file] = entry | {"source": shard.part.sha256}
        scalars = model.encode({}, sorted(feature for feature in model.provides if feature.startswith("logit_")))
    made = {"computed": computed, "seconds": round(time.perf_counter() - started, 3)}
    found = {shard.file: entries[shard.file] for shard in plan}
    return new_manifest(name, model, pairs, own, found, {key: float(value) for key, value in scalars.items()}) | made


def _head(own: Mapping[str, Any], pairs: Table, shard: PlannedShard) -> dict[str, Any]:
    """What a stored shard tells of itself."""
    return {
        "identity": own,
        "keys": [pairs.key(row) for row in shard.rows],
        "rows": [pairs.row_state(row) for row in shard.rows],
    }


def found_shard(path: Path, name: str, head: Mapping[str, Any]) -> dict[str, Any] | None:
    """The manifest's entry of a whole shard of this build, with `error`; None where none or a damaged one is there."""
    if not path.is_file():
        return None
    try:
        with safe_open(str(path), "pt") as file:
            found = json.loads((file.metadata() or {})[METADATA])
            if found["columns"] != columns_hash({key: file.get_tensor(key) for key in file.keys()}):  # noqa: SIM118
                return None
            captions, unreadable = int(file.get_tensor("captions").sum()), int(file.get_tensor("readable").eq(0).sum())
    except (SafetensorError, KeyError, ValueError):
        return None
    if any(found[part] != head[part] for part in head):
        phrases = differences(found["identity"], head["identity"], exact=True)
        if found["identity"] == head["identity"]:
            phrases = [f"from other data (the images of {path.name} have changed)"]
        refuse(name, path.parent, phrases)
    entry = {"file": path.name, "rows": len(found["keys"]), "captions": captions, "unreadable": unreadable}
    return entry | {"bytes": path.stat().st_size, "sha256": file_sha256(path), "error": found["error"]}


def columns_hash(columns: Mapping[str, Tensor]) -> str:
    """SHA-256 of the columns' content, so that a build that is continued does not adopt a damaged shard."""
    state = hashlib.sha256()
    for name in sorted(columns):
        state.update(name.encode())
        state.update(columns[name].contiguous().flatten().view(torch.uint8).numpy().data)
    return state.hexdigest()


def write_shard(path: Path, columns: Mapping[str, Tensor], head: Mapping[str, Any]) -> None:
    """Write a shard whole or not at all."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    head = {**head, "columns": columns_hash(columns)}
    try:
        save_file(dict(columns), str(temporary), metadata={METADATA: json.dumps(head, allow_nan=False)})
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


class _Views(Dataset[ViewBatch]):
    """All views of a row, from one decode; without a transform only their parameters."""

    def __init__(self, pairs: Table, transform: Preprocessing | None, spec: CacheSpec) -> None:
        self.pairs, self.transform, self.spec = pairs, transform, spec

    def __getitem__(self, row: int) -> ViewBatch:
        key, spec = self.pairs.key(row), self.spec
        views = [view_of(spec.view_settings, spec.view_seed, key, number) for number in range(spec.views)]
        parameters = torch.tensor([(*view.box, float(view.flip)) for view in views], dtype=torch.float64)
        if self.transform is None:
            return torch.empty(spec.views, 0), parameters, torch.tensor(1, dtype=torch.uint8)
        try:
            image = self.pairs.image(row, size_hint=2 * max(self.transform.image_size))
            readable = 1
        except Unavailable:
            # It would be written down as unreadable for ever.
            raise
        except BadImage:
            # A picture in its place, because only the transform knows the dtype of its pixels.
            image, readable = Image.new("RGB", (8, 8)), 0
        pixels = torch.stack([self.transform.view_transform(geometry(image, view)) for view in views])
        return pixels, parameters, torch.tensor(readable, dtype=torch.uint8)


def view_batches(
    model: DualEncoderModule,
    pairs: Table,
    spec: CacheSpec,
    shards: Sequence[PlannedShard],
    *,
    workers: int,
    batch_size: int,
) -> Iterator[ViewBatch]:
    """Batches of whole rows, none across a shard's border, so that a shard does not depend on where a build began."""
    seeing = any(feature.startswith("image.") for feature in spec.features)
    loader: DataLoader[ViewBatch] = DataLoader(
        _Views(pairs, model.preprocessing if seeing else None, spec),
        batch_sampler=[rows for shard in shards for rows in _row_batches(shard, spec, batch_size)],
        num_workers=workers,
        prefetch_factor=4 if workers else None,
        pin_memory=model.device.type == "cuda",
        # The global generator stays as it was: a run draws the same numbers whether or not it built its cache.
        generator=torch.Generator(),
    )
    return iter(loader)


def _row_batches(shard: PlannedShard, spec: CacheSpec, batch_size: int) -> list[list[int]]:
    size = max(1, batch_size // spec.views)
    return [list(shard.rows[start : start + size]) for start in range(0, len(shard.rows), size)]


def shard_columns(
    name: str,
    model: DualEncoderModule,
    pairs: Table,
    spec: CacheSpec,
    shard: PlannedShard,
    batches: Iterator[ViewBatch],
    batch_size: int,
    bar: tqdm[Any],
) -> tuple[dict[str, Tensor], dict[str, list[float]]]:
    """All columns of one shard, and the error of each feature."""
    image_names = [feature for feature in spec.features if feature.startswith("image.")]
    images, views, readable = Columns(spec.dtype), [], []
    for pixels, parameters, sound in batches:
        views.append(parameters)
        readable.append(sound)
        if image_names:
            _add_images(images, model, image_names, pixels, sound, batch_size)
        bar.update(pixels.shape[0] * pixels.shape[1])
    columns = images.joined(name)
    columns = {key: value.view(len(shard.rows), spec.views, *value.shape[1:]) for key, value in columns.items()}
    columns |= {"views": torch.cat(views), "readable": torch.cat(readable)}
    captions = [pairs.captions_of(row) for row in shard.rows]
    texts = [caption for own in captions for caption in own]
    text_columns, text_error = _text_columns(name, model, texts, spec)
    columns |= text_columns
    columns["captions"] = torch.tensor([len(own) for own in captions], dtype=torch.int32)
    check_lengths(name, columns)
    return {key: value.contiguous() for key, value in columns.items()}, images.error() | text_error


def _add_images(
    columns: Columns, model: DualEncoderModule, features: Sequence[str], pixels: Tensor, sound: Tensor, batch_size: int
) -> None:
    flat = pixels.flatten(0, 1)
    blank = None if sound.all() else sound.eq(0).repeat_interleave(pixels.shape[1]).to(model.device)
    for start in range(0, len(flat), batch_size):
        part = flat[start : start + batch_size].to(model.device, non_blocking=True)
        for feature, value in model.encode({"pixels": part}, features).items():
            if blank is not None:
                value = value.masked_fill(blank[start : start + batch_size].view(-1, *[1] * (value.dim() - 1)), 0)
            columns.add(feature, value)


def text_batches(
    model: DualEncoderModule, texts: Sequence[str], features: Sequence[str]
) -> Iterator[dict[str, Tensor]]:
    """Text features of `TEXT_BATCH` texts at a time, as the model gives them; per-token ones with zeros at padding."""
    for start in range(0, len(texts), TEXT_BATCH):
        tokens = model.preprocessing.tokenize(texts[start : start + TEXT_BATCH])
        tokens = {key: value.to(model.device) for key, value in tokens.items()}
        found = model.encode(tokens, features)
        yield {key: _without_padding(value, tokens["mask"]) for key, value in found.items()}


def _without_padding(value: Tensor, mask: Tensor) -> Tensor:
    """(B, N, C) with zeros where no token is: what a tower leaves there depends on the other texts of the batch."""
    if value.dim() < 3:
        return value
    real = torch.nn.functional.pad(mask, (0, value.shape[1] - mask.shape[1]))
    return value.masked_fill(~real[..., None], 0)


def distinct(texts: Sequence[str]) -> tuple[list[str], Tensor]:
    """The distinct texts, and for each text its number among them; without any, a blank one that nothing refers to."""
    number = {text: i for i, text in enumerate(dict.fromkeys(texts))}
    # Without any caption a blank text still tells the features' shapes.
    return list(number) or [""], torch.tensor([number[text] for text in texts], dtype=torch.int64)


def _text_columns(
    name: str, model: DualEncoderModule, texts: Sequence[str], spec: CacheSpec
) -> tuple[dict[str, Tensor], dict[str, list[float]]]:
    columns = Columns(spec.dtype)
    features = [feature for feature in spec.features if feature.startswith("text.")]
    if not features:
        return {}, {}
    unique, order = distinct(texts)
    for found in text_batches(model, unique, features):
        for feature, value in found.items():
            columns.add(feature, value)
    return {key: value.index_select(0, order) for key, value in columns.joined(name).items()}, columns.error()
