"""A teacher's embeddings of validation, test and labelled images, made once and kept beside its stored features."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from vlkd.data.files import write_whole
from vlkd.data.images import BadImage
from vlkd.data.labelled import Labelled
from vlkd.errors import UserError
from vlkd.models.base import DualEncoderModule
from vlkd.models.fingerprint import model_fingerprint
from vlkd.retrieval.encode import encode_images

PREFIX = "evaluated-"


def embedded(model: DualEncoderModule, images: Labelled, folder: Path | None = None) -> tuple[Tensor, Tensor]:
    """Embeddings (I, D) and class ids (I,) of the readable images, prepared as in evaluation, on the CPU.

    Args:
        model: the dual encoder.
        images: of any split.
        folder: keeps the embeddings under a hash of the model and of all bytes; unreadable images are never kept, so
            that they are looked at again. None keeps nothing.
    """
    path = folder / f"{PREFIX}{_identity(model, images)}.safetensors" if folder is not None else None
    labels = torch.from_numpy(np.asarray(images.labels))
    if path is not None and (kept := _read(path, len(images), model.width)) is not None:
        return kept, labels
    found = encode_images(model, images)
    if path is not None and not found.bad:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, save({"image.embed": found.embed.contiguous()}))
    return found.embed, labels[torch.from_numpy(found.index)]


def _identity(model: DualEncoderModule, images: Labelled) -> str:
    digest = hashlib.blake2b(model_fingerprint(model).encode(), digest_size=16)
    for part in _bytes(images):
        digest.update(hashlib.blake2b(part, digest_size=16).digest())
    return digest.hexdigest()


def _bytes(images: Labelled) -> Iterator[bytes]:
    """Each file's content; of one that cannot be read nothing, as it will be left out."""
    for file in images.files:
        try:
            yield file.read()
        except (UserError, BadImage):
            yield b""


def _read(path: Path, rows: int, width: int) -> Tensor | None:
    """The kept embeddings, None where there are none or the file is damaged."""
    try:
        with safe_open(str(path), "pt") as file:
            found: Tensor = file.get_tensor("image.embed")
    except (OSError, SafetensorError):
        return None
    return found if tuple(found.shape) == (rows, width) else None
