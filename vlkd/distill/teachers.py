"""Where targets come from: a teacher that runs beside the student, or its features held in memory. One protocol."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Protocol

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from vlkd.data.images import BadImage
from vlkd.data.loader import Batch
from vlkd.data.sources import Pairs
from vlkd.data.views import ViewSettings, geometry, view_of
from vlkd.errors import UserError
from vlkd.features import DualEncoder, Preprocessing
from vlkd.models.base import DualEncoderModule, evaluating, model_fingerprint


class Teacher(Protocol):
    """Gives detached targets for a batch: image features (B, ...), text features (T, ...), scalars ()."""

    name: str
    width: int
    provides: frozenset[str]
    """The features it can give."""
    preprocessing: Preprocessing | None
    """What must be prepared for it in the loader; None where nothing is."""

    def targets(self, batch: Batch, want: Collection[str]) -> dict[str, Tensor]: ...


class OnlineTeacher:
    """A frozen model that sees every view as it comes.

    Args:
        name: its short name in terms and tables.
        model: the teacher.
    """

    def __init__(self, name: str, model: DualEncoderModule) -> None:
        self.name = name
        self.width = model.width
        self.provides = model.provides
        self.preprocessing: Preprocessing | None = model.preprocessing
        self.model: DualEncoder = model.eval().requires_grad_(False)

    @torch.no_grad()
    def targets(self, batch: Batch, want: Collection[str]) -> dict[str, Tensor]:
        """The model's features of the batch."""
        return trim_texts(self.model.encode(batch.inputs[self.name], want), batch)


class StoredTeacher:
    """Features of K views of every image, and of every caption, in memory.

    Args:
        name: its short name in terms and tables.
        width: D.
        tables: image features (K, N, ...), text features (T, ...) of all captions, scalars ().
    """

    preprocessing: Preprocessing | None = None

    def __init__(self, name: str, width: int, tables: Mapping[str, Tensor]) -> None:
        self.name = name
        self.width = width
        self.tables = dict(tables)
        self.provides = frozenset(tables)

    def targets(self, batch: Batch, want: Collection[str]) -> dict[str, Tensor]:
        """Rows of the tables, on the batch's device."""
        device = batch.captioned.device
        found: dict[str, Tensor] = {}
        for name in want:
            table = self.tables[name]
            if name.startswith("image."):
                table = table[batch.views, batch.rows]
            elif name.startswith("text."):
                table = table[batch.texts]
            found[name] = table.float().to(device)
        return found

    def unreadable_rows(self) -> list[int]:
        """Rows of images that could not be decoded: their image features are zeros."""
        images = [table[0] for name, table in self.tables.items() if name.startswith("image.")]
        if not images:
            return []
        empty = torch.stack([image.eq(0).flatten(1).all(dim=1) for image in images]).all(dim=0)
        return [int(row) for row in empty.nonzero()]


def trim_texts(features: Mapping[str, Tensor], batch: Batch) -> dict[str, Tensor]:
    """Features in float32, text features without the row of the blank text that stands in for no caption at all."""
    return {
        name: value.float()[: len(batch.texts)] if name.startswith("text.") else value.float()
        for name, value in features.items()
    }


def stored_teacher(
    name: str,
    model: DualEncoderModule,
    pairs: Pairs,
    want: Collection[str],
    *,
    views: int,
    settings: ViewSettings,
    view_seed: int,
    folder: Path,
    workers: int = 0,
    batch_size: int = 64,
    precision: str = "fp32",
) -> StoredTeacher:
    """Run a model once over K views of every image and over every caption, or read what an earlier call stored.

    The file's name holds a hash of the model's weights, the data, the views and the precision, so that a stale or
    foreign one is never found; drawn views are part of it, so that features of views drawn in another way are stale,
    too. Text features come from the un-augmented captions; a picture that cannot be decoded leaves zeros, and no batch
    will hold it.
    """
    fingerprint = hashlib.sha256(
        repr(
            (
                model_fingerprint(model),
                pairs.fingerprint(),
                settings,
                [view_of(settings, view_seed, "", number) for number in range(16)],
                view_seed,
                views,
                sorted(want),
                precision,
            )
        ).encode()
    ).hexdigest()[:20]
    path = folder / f"{name}-{fingerprint}.safetensors"
    if not path.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        tables = compute_tables(
            name,
            model,
            pairs,
            want,
            views=views,
            settings=settings,
            view_seed=view_seed,
            workers=workers,
            batch_size=batch_size,
            precision=precision,
        )
        temporary = path.with_name(f".{path.name}.{os.getpid()}")
        save_file(tables, str(temporary))
        temporary.replace(path)
    with safe_open(str(path), "pt") as file:
        return StoredTeacher(name, model.width, {key: file.get_tensor(key) for key in file.keys()})  # noqa: SIM118


class _Views(Dataset[tuple[int, Tensor]]):
    """Every view of every image once, view by view."""

    def __init__(self, pairs: Pairs, transform: Preprocessing, views: int, settings: ViewSettings, seed: int) -> None:
        self.pairs, self.transform, self.views, self.settings, self.seed = pairs, transform, views, settings, seed

    def __len__(self) -> int:
        return self.views * len(self.pairs)

    def __getitem__(self, i: int) -> tuple[int, Tensor]:
        number, row = divmod(i, len(self.pairs))
        try:
            image = self.pairs.image(row, size_hint=2 * max(self.transform.image_size))
        except BadImage:
            return -1, torch.zeros(3, *self.transform.image_size, dtype=torch.uint8)
        view = view_of(self.settings, self.seed, self.pairs.keys[row], number)
        return i, self.transform.view_transform(geometry(image, view))


def compute_tables(
    name: str,
    model: DualEncoderModule,
    pairs: Pairs,
    want: Collection[str],
    *,
    views: int,
    settings: ViewSettings,
    view_seed: int,
    workers: int,
    batch_size: int,
    precision: str,
) -> dict[str, Tensor]:
    """The tables of `StoredTeacher`, float32.

    Raises:
        UserError: a feature is not finite.
    """
    tables: dict[str, Tensor] = {}
    autocast = torch.autocast(model.device.type, torch.bfloat16, enabled=precision == "bf16")
    with torch.no_grad(), evaluating(model), autocast:
        scalars = [feature for feature in want if feature.startswith("logit_")]
        tables |= {key: value.float().cpu().clone() for key, value in model.encode({}, scalars).items()}
        if image_names := [feature for feature in want if feature.startswith("image.")]:
            dataset = _Views(pairs, model.preprocessing, views, settings, view_seed)
            loader = DataLoader(dataset, batch_size=batch_size, num_workers=workers)
            tables |= _image_tables(name, model, loader, image_names, views, len(pairs))
        if text_names := [feature for feature in want if feature.startswith("text.")]:
            tables |= _text_tables(name, model, pairs.texts(), text_names)
    for key, value in tables.items():
        if not value.isfinite().all():
            raise UserError(f"Teacher {name}: found {key} that is not finite; check its weights with `vlkd doctor`.")
    return tables


def _image_tables(
    name: str,
    model: DualEncoderModule,
    loader: DataLoader[tuple[int, Tensor]],
    features: Collection[str],
    views: int,
    images: int,
) -> dict[str, Tensor]:
    """Image features (K, N, ...) of all views."""
    tables: dict[str, Tensor] = {}
    with tqdm(total=views * images, desc=f"{name}: images x {views} views", unit="view") as bar:
        for rows, pixels in loader:
            for key, value in model.encode({"pixels": pixels.to(model.device)}, features).items():
                table = tables.setdefault(key, torch.zeros(views * images, *value.shape[1:]))
                table[rows[rows >= 0]] = value.float().cpu()[rows >= 0]
            bar.update(len(rows))
    return {key: table.view(views, images, *table.shape[1:]) for key, table in tables.items()}


def _text_tables(
    name: str, model: DualEncoderModule, texts: Sequence[str], features: Collection[str]
) -> dict[str, Tensor]:
    """Text features (T, ...) of all captions, each different one encoded once."""
    # Without any caption a blank text still tells the width, and no row is kept of it.
    unique = list(dict.fromkeys(texts)) or [""]
    number = {text: i for i, text in enumerate(unique)}
    parts: dict[str, list[Tensor]] = {key: [] for key in features}
    for start in tqdm(range(0, len(unique), 256), desc=f"{name}: captions", unit="batch"):
        tokens = model.preprocessing.tokenize(unique[start : start + 256])
        found = model.encode({key: value.to(model.device) for key, value in tokens.items()}, features)
        for key, value in found.items():
            parts[key].append(value.float().cpu())
    order = torch.tensor([number[text] for text in texts], dtype=torch.int64)
    return {key: torch.cat(value)[order].contiguous() for key, value in parts.items()}
