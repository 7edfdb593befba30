"""Where targets come from: a teacher that runs beside the student, or its features held in memory. One protocol."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Collection, Mapping
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
from vlkd.models.base import DualEncoderModule, evaluating


class Teacher(Protocol):
    """Gives detached targets for a batch: image features (B, ...), text features (T, ...), scalars ()."""

    name: str
    width: int
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
        self.preprocessing: Preprocessing | None = model.preprocessing
        self.model: DualEncoder = model.eval().requires_grad_(False)

    @torch.no_grad()
    def targets(self, batch: Batch, want: Collection[str]) -> dict[str, Tensor]:
        """The model's features of the batch; no text feature where no sample has a caption."""
        known = [name for name in want if len(batch.texts) or not name.startswith("text.")]
        return {name: value.float() for name, value in self.model.encode(batch.inputs[self.name], known).items()}


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


def model_fingerprint(model: DualEncoderModule) -> str:
    """A hash of all weights and of the preprocessing."""
    state = hashlib.sha256(repr((model.preprocessing.image_size, model.preprocessing.context_length)).encode())
    settings = getattr(model, "settings", None)
    state.update(repr(settings).encode())
    for name, value in sorted(model.state_dict().items()):
        state.update(name.encode())
        state.update(value.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes() if value.dim() else b"")
    return state.hexdigest()[:16]


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

    The file's name holds a hash of the model's weights, the data, the views and the precision, so that a stale or foreign
    one is never found. Text features come from the un-augmented captions; a picture that cannot be decoded leaves
    zeros, and no batch will hold it.
    """
    fingerprint = hashlib.sha256(
        repr((model_fingerprint(model), pairs.fingerprint(), settings, view_seed, views, sorted(want), precision)).encode()
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
        UserError: a feature is not finite or an image's features have no length.
    """
    image_names = [feature for feature in want if feature.startswith("image.")]
    text_names = [feature for feature in want if feature.startswith("text.")]
    tables: dict[str, Tensor] = {}
    device = model.device
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16")
    with torch.no_grad(), evaluating(model), autocast:
        scalars = [feature for feature in want if feature.startswith("logit_")]
        tables |= {key: value.float().cpu().clone() for key, value in model.encode({}, scalars).items()}
        if image_names:
            loader = DataLoader(
                _Views(pairs, model.preprocessing, views, settings, view_seed), batch_size=batch_size, num_workers=workers
            )
            bar = tqdm(total=views * len(pairs), desc=f"{name}: images x {views} views", unit="view")
            for rows, pixels in loader:
                for key, value in model.encode({"pixels": pixels.to(device)}, image_names).items():
                    table = tables.setdefault(key, torch.zeros(views * len(pairs), *value.shape[1:]))
                    table[rows[rows >= 0]] = value.float().cpu()[rows >= 0]
                bar.update(len(rows))
            bar.close()
        texts = pairs.texts()
        if text_names and texts:
            unique = list(dict.fromkeys(texts))
            number = {text: i for i, text in enumerate(unique)}
            parts: dict[str, list[Tensor]] = {key: [] for key in text_names}
            for start in tqdm(range(0, len(unique), 256), desc=f"{name}: captions", unit="batch"):
                tokens = model.preprocessing.tokenize(unique[start : start + 256])
                found = model.encode({key: value.to(device) for key, value in tokens.items()}, text_names)
                for key, value in found.items():
                    parts[key].append(value.float().cpu())
            order = [number[text] for text in texts]
            tables |= {key: torch.cat(value)[order].contiguous() for key, value in parts.items()}
    for key in image_names:
        tables[key] = tables[key].unflatten(0, (views, len(pairs)))
    for key, value in tables.items():
        if not value.isfinite().all():
            raise UserError(f"Teacher {name}: found {key} that is not finite; check its weights with `vlkd doctor`.")
    return tables
