"""Opening a cache, building what is missing of it, and comparing it with its teacher."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from vlkd.data.images import BadImage
from vlkd.data.shard_table import ShardTable
from vlkd.data.sources import file_sha256
from vlkd.data.table import Table
from vlkd.data.views import geometry
from vlkd.distill.cache.build import build_shards, text_batches
from vlkd.distill.cache.format import (
    MANIFEST,
    CacheSpec,
    differences,
    identity,
    manifest_identity,
    read_manifest,
    refuse,
    write_manifest,
)
from vlkd.distill.cache.join import Join, join
from vlkd.distill.cache.reader import CacheReader
from vlkd.errors import UserError
from vlkd.models.base import DualEncoderModule, evaluating


def ensure_cache(
    folder: Path,
    name: str,
    model: DualEncoderModule,
    pairs: Table,
    spec: CacheSpec,
    *,
    workers: int = 0,
    batch_size: int = 64,
) -> CacheReader:
    """Open the cache in a folder, or build it, or continue building it.

    Args:
        folder: of one teacher and one source.
        name: the teacher's short name, for errors.
        model: the teacher; it is only read.
        pairs: the source, as it is opened alone.
        spec: what the cache must be; one that holds more views or features serves, too.
        workers: processes that decode.
        batch_size: views per forward pass.

    Raises:
        UserError: what is there was made from something else (every difference is named), or the teacher's embeddings
            are not finite, zero or constant.
    """
    if (folder / MANIFEST).is_file():
        return open_cache(folder, name, model, pairs, spec)
    manifest = build_shards(folder, name, model, pairs, spec, workers=workers, batch_size=batch_size)
    joined = join(folder, name, manifest, pairs)
    if phrases := data_difference(joined, pairs):
        refuse(name, folder, phrases)
    reader = CacheReader(folder, name, manifest, joined)
    reader.check_embeddings(pairs)
    write_manifest(folder, manifest)
    return reader


def open_cache(folder: Path, name: str, model: DualEncoderModule, pairs: Table, spec: CacheSpec) -> CacheReader:
    """Open a whole cache and check it; shards by their size alone, their content is for `verify_cache`.

    Raises:
        UserError: there is none, or not the one that is expected.
    """
    if not (folder / MANIFEST).is_file():
        half = any(folder.glob("*.safetensors"))
        raise UserError(
            f"{folder} holds {'half a cache' if half else 'no cache'} of teacher {name}; "
            f"{'continue' if half else 'build'} it with `vlkd cache embeddings --teacher {model.name} --data DATA "
            f"--out {folder.absolute().parents[1]}`."
        )
    manifest = read_manifest(name, folder)
    joined = join(folder, name, manifest, pairs)
    phrases = differences(manifest_identity(manifest), identity(model, spec)) + data_difference(joined, pairs)
    if phrases:
        refuse(name, folder, phrases)
    reader = CacheReader(folder, name, manifest, joined)
    reader.check_embeddings(pairs)
    return reader


def data_difference(joined: Join, pairs: Table) -> list[str]:
    """Why stored features cannot serve a table, in words."""
    if not joined.wrong:
        return []
    unit, total = ("shards", len(pairs.parts())) if isinstance(pairs, ShardTable) else ("images", len(pairs))
    found = f"found {total - len(joined.wrong)} of {total} {unit} as they are now, expected all"
    return [f"from other data ({found}; not {joined.wrong[0]!r})"]


def verify_cache(
    reader: CacheReader, model: DualEncoderModule, pairs: Table, *, sample: int = 64, seed: int = 0
) -> dict[str, float]:
    """Compare every shard with the hash in the manifest, and a sample of features with those computed anew.

    Args:
        reader: of the cache.
        model: the teacher.
        pairs: the reader's table.
        sample: so many stored views and so many captions, drawn from `seed`.
        seed: of the draw.

    Returns:
        Per feature the lowest cosine between what is stored and what is computed.

    Raises:
        UserError: a shard's content has changed, or a picture can no longer be decoded.
    """
    for entry in reader.manifest["shards"]:
        path = reader.folder / entry["file"]
        found = file_sha256(path)
        if found != entry["sha256"]:
            raise UserError(
                f"{path} of teacher {reader.name} has changed since it was written (sha256 {found[:12]}, expected "
                f"{entry['sha256'][:12]}); remove it and {MANIFEST}: the same command without --verify makes it again."
            )
    draw = np.random.default_rng(seed)
    readable = np.setdiff1d(np.arange(len(reader)), reader.unreadable_rows())
    rows = torch.from_numpy(draw.choice(readable, min(sample, len(readable)), replace=False))
    views = torch.from_numpy(draw.integers(reader.views, size=len(rows)))
    texts = drawn_captions(pairs, sample, draw)
    autocast = torch.autocast(model.device.type, torch.bfloat16, enabled=reader.manifest["precision"] == "bf16")
    lowest: dict[str, float] = {}
    with torch.no_grad(), evaluating(model), autocast:
        names = sorted(name for name in reader.features if name.startswith("image."))
        if names and len(rows):
            pixels = _stored_pixels(reader, model, pairs, rows, views)
            for name, value in model.encode({"pixels": pixels.to(model.device)}, names).items():
                lowest[name] = _lowest_cosine(reader.image(name, rows, views), value)
        names = sorted(name for name in reader.features if name.startswith("text."))
        if names and texts:
            parts = list(text_batches(model, list(texts.values()), names))
            for name in names:
                stored = reader.text(name, torch.tensor(list(texts)))
                lowest[name] = _lowest_cosine(stored, torch.cat([part[name] for part in parts]))
    return lowest


def drawn_captions(pairs: Table, count: int, draw: np.random.Generator) -> dict[int, str]:
    """Up to `count` captions of different rows by their numbers, looked for in sixteen times as many rows."""
    found: dict[int, str] = {}
    for row in draw.permutation(len(pairs))[: 16 * count].tolist():
        captions = pairs.captions_of(row)
        if captions and len(found) < count:
            i = int(draw.integers(len(captions)))
            found[pairs.first_text(row) + i] = captions[i]
    return found


def _stored_pixels(reader: CacheReader, model: DualEncoderModule, pairs: Table, rows: Tensor, views: Tensor) -> Tensor:
    hint = 2 * max(model.preprocessing.image_size)
    pixels = []
    for row, number in zip(rows.tolist(), views.tolist(), strict=True):
        try:
            image = pairs.image(row, size_hint=hint)
        except BadImage as error:
            raise UserError(f"{pairs.key(row)} was readable when {reader.folder} was built; now {error}") from None
        pixels.append(model.preprocessing.view_transform(geometry(image, reader.view(row, number))))
    return torch.stack(pixels)


def _lowest_cosine(stored: Tensor, computed: Tensor) -> float:
    """Over rows, all further dimensions as one vector; two zeros are equal."""
    left, right = (value.cpu().double().flatten(1) for value in (stored, computed))
    lengths = left.norm(dim=1) * right.norm(dim=1)
    cosine = (left * right).sum(dim=1) / torch.where(lengths > 0, lengths, 1.0)
    both_zero = left.eq(0).all(dim=1) & right.eq(0).all(dim=1)
    return float(torch.where(both_zero, 1.0, cosine).amin())
