"""What every vlkd model folder has: a `model.json` of a known format and version, and weights; written whole or never.

A folder holds one of `KINDS`; code that expects one kind and finds another says which it found.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vlkd.errors import UserError
from vlkd.models.tokenizer import first_line

MODEL_JSON, WEIGHTS = "model.json", "model.safetensors"
DTYPES = {"float32": torch.float32, "float16": torch.float16}
KINDS = {
    "vlkd-model": ("a dual encoder", "vlkd.load"),
    "vlkd-classifier": ("a classifier", "vlkd.models.classifier.load_classifier"),
    "vlkd-vlm": ("a generative model", "vlkd.models.load_generative.load_generative"),
}
"""The formats of `model.json`, each in words and with the function that reads it."""
IMAGE_TOWERS = {
    "vlkd-model": ("image", "image_tower."),
    "vlkd-classifier": ("image", "trunk.tower."),
    "vlkd-vlm": ("vision", "tower."),
}
"""Of the timm image tower in each format: where `model.json` names it, and what its keys begin with."""


def read_format(folder: Path) -> str:
    """The format that a folder's `model.json` names; "" where there is none to read."""
    try:
        found = json.loads((folder / MODEL_JSON).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return ""
    return str(found.get("format", "")) if isinstance(found, dict) else ""


def read_image_tower(folder: Path) -> tuple[str, str]:
    """timm's name of a folder's image tower, and what its keys begin with.

    Raises:
        UserError: there is no vlkd model in the folder, or its `model.json` names no tower.
    """
    form = read_format(folder)
    if form not in IMAGE_TOWERS:
        raise UserError(f"Found no vlkd model in {folder}, expected one or a safetensors file; check the path.")
    place, prefix = IMAGE_TOWERS[form]
    tower = json.loads((folder / MODEL_JSON).read_text(encoding="utf-8")).get(place)
    name = tower.get("timm") if isinstance(tower, dict) else None
    if not isinstance(name, str):
        raise UserError(f"{folder / MODEL_JSON} names no image tower under {place!r}; write the model again.")
    return name, prefix


def read_layout(folder: Path, form: str, version: int) -> dict[str, Any]:
    """The content of `model.json`.

    Args:
        folder: a model folder.
        form: the format that is expected, a key of `KINDS`.
        version: of that format.

    Raises:
        UserError: it is missing, no JSON, or of another kind, program or version.
    """
    if not (folder / MODEL_JSON).is_file():
        raise UserError(f"Found no {MODEL_JSON} in {folder}, expected a vlkd model folder; check the path.")
    try:
        layout = json.loads((folder / MODEL_JSON).read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{folder / MODEL_JSON} is no JSON ({first_line(error)}); write the model again.") from error
    found = (layout.get("format"), layout.get("version")) if isinstance(layout, dict) else (None, None)
    if found[0] != form and found[0] in list(KINDS):
        kind, reader = KINDS[found[0]]
        raise UserError(
            f"{folder} holds {kind}, expected {KINDS[form][0]}; choose another folder, or read this one with {reader}."
        )
    if found != (form, version):
        raise UserError(
            f"{folder / MODEL_JSON} has format {found[0]!r}, version {found[1]!r}; "
            f"expected {form!r}, version {version}: it is another program's model, or was written by a newer vlkd."
        )
    return dict(layout)


def storage_dtype(name: str) -> torch.dtype:
    """The type of weights on disk by its name; raises `UserError` for one that is not in `DTYPES`."""
    if name not in DTYPES:
        raise UserError(f"Found dtype {name!r}, expected one of {', '.join(DTYPES)}.")
    return DTYPES[name]


def stored_state(state: Mapping[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """The tensors as they are written: on the CPU, matrices and kernels in `dtype`, anything else as it is."""

    def stored(value: Tensor) -> Tensor:
        # Running variances overflow float16, and vectors weigh nothing.
        halve = value.is_floating_point() and value.ndim >= 2
        return value.detach().to("cpu", dtype if halve else value.dtype).clone().contiguous()

    return {key: stored(value) for key, value in state.items()}


@contextmanager
def replacing(folder: str | Path, form: str) -> Iterator[Path]:
    """An empty folder to fill, which takes the name `folder` when the block ends; after an error nothing has changed.

    Args:
        folder: the new folder, or one with a model of the same format, which is replaced.
        form: the format that is written, a key of `KINDS`.

    Raises:
        UserError: the folder exists and is neither empty nor a model of that format.
    """
    target = Path(folder).absolute()
    if target.exists() and read_format(target) != form and (target.is_file() or any(target.iterdir())):
        raise UserError(
            f"{folder} exists and is no vlkd model of this kind ({KINDS[form][0]}); choose a new folder, or remove it "
            "yourself."
        )
    with written_whole(target) as temporary:
        yield temporary


@contextmanager
def written_whole(target: Path) -> Iterator[Path]:
    """An empty folder to fill, which takes the place of `target` when the block ends, whatever is there.

    After an error nothing has changed. Whether what is there may go is the caller's to check.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    try:
        temporary.chmod(0o755)
        yield temporary
        put_in_place(temporary, target)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def put_in_place(temporary: Path, target: Path) -> None:
    """Rename a complete folder to its name; an older model there is removed after the new one stands."""
    if not target.exists():
        os.rename(temporary, target)
        return
    old = Path(tempfile.mkdtemp(prefix=f".{target.name}.old.", dir=target.parent))
    os.rename(target, old / target.name)
    os.rename(temporary, target)
    shutil.rmtree(old)
