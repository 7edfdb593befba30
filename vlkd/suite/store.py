"""Embeddings on disk, under hashes of all that they depend on: weights, preprocessing, precision, bytes encoded.

`STORE/FINGERPRINT-PRECISION/images-HASH.safetensors` and `.../texts-HASH.safetensors`. Another model, another
precision, another picture or another order of them has another name, so nothing stale is ever found; a file whose
contents do not fit its name is refused.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from vlkd.data.files import strict_json, write_whole
from vlkd.errors import UserError
from vlkd.retrieval.encode import EncodedImages

FORMAT_VERSION = "1"


class Files(Protocol):
    """Pictures by their place, as an evaluation set lists them."""

    @property
    def keys(self) -> list[str]:
        """(I,) names."""
        ...

    @property
    def files(self) -> Sequence[Any]:
        """(I,) where each image is: `path`, `offset`, `size`, and `read()`."""
        ...


def images_hash(data: Files, memory: Path) -> str:
    """A hash of the names and the bytes of all pictures, in order; a picture that cannot be read counts as such.

    Reading everything takes a fraction of decoding it, and happens once: the hash is remembered under the paths, sizes
    and times of change (in nanoseconds) of the files.

    Args:
        data: the pictures.
        memory: a folder for what is remembered.
    """
    place = memory / f"{_signature(data)}.json"
    try:
        known = strict_json(place.read_text(encoding="utf-8"))
        return str(known["images"])
    except (OSError, ValueError, KeyError, TypeError):
        pass
    state = hashlib.sha256()
    whole = True
    for key, file in zip(data.keys, data.files, strict=True):
        try:
            content = hashlib.sha256(file.read()).hexdigest()
        except UserError:
            content, whole = "unreadable", False
        state.update(f"{key}\0{content}\n".encode("utf-8", "surrogateescape"))
    found = state.hexdigest()[:16]
    if not whole:
        return found  # It may be readable again without any sign of it.
    memory.mkdir(parents=True, exist_ok=True)
    write_whole(place, json.dumps({"images": found}).encode())
    return found


def _signature(data: Files) -> str:
    state = hashlib.sha256()
    seen: dict[Path, str] = {}
    for key, file in zip(data.keys, data.files, strict=True):
        if file.path not in seen:
            try:
                about = file.path.stat()
                seen[file.path] = f"{about.st_size} {about.st_mtime_ns}"
            except OSError:
                seen[file.path] = "missing"
        state.update(
            f"{key}\0{file.path.absolute()}\0{file.offset}\0{file.size}\0{seen[file.path]}\n".encode(
                "utf-8", "surrogateescape"
            )
        )
    return state.hexdigest()[:16]


def texts_hash(texts: Sequence[str], kind: str) -> str:
    """A hash of texts in order, and of what is made of them."""
    return hashlib.sha256(json.dumps([kind, list(texts)]).encode()).hexdigest()[:16]


class Store:
    """The embeddings of one model at one precision.

    Args:
        folder: of all models.
        fingerprint: the model's (`vlkd.models.fingerprint`).
        precision: of the encoders, `fp32` or `bf16`; what is stored is float32.
    """

    def __init__(self, folder: Path, fingerprint: str, precision: str) -> None:
        self.folder = folder / f"{fingerprint}-{precision}"
        self._about = {"format": FORMAT_VERSION, "fingerprint": fingerprint, "precision": precision}

    def has_images(self, data_hash: str) -> bool:
        """Whether the pictures of this hash were encoded."""
        return self._place("images", data_hash).is_file()

    def images(
        self,
        data_hash: str,
        encode: Callable[[], EncodedImages],
        retry: Callable[[EncodedImages], EncodedImages] | None = None,
    ) -> EncodedImages:
        """The stored embeddings of pictures, or those that `encode` gives, stored.

        Args:
            data_hash: of the pictures.
            encode: the pass over all of them.
            retry: given what is stored where a picture could not be read, tries these again; returns the same where
                none can be read by now.
        """
        place = self._place("images", data_hash)
        if not place.is_file():
            made = encode()
            self._write_images(place, data_hash, made)
            return made
        tensors, about = self._read(place, data_hash)
        bad = tuple((str(key), str(reason)) for key, reason in json.loads(about["bad"]))
        found = EncodedImages(embed=tensors["embed"], index=tensors["index"].numpy().astype(np.int64), bad=bad)
        if not bad or retry is None:
            return found
        tried = retry(found)
        if tried is not found:
            self._write_images(place, data_hash, tried)
        return tried

    def texts(self, data_hash: str, encode: Callable[[], Tensor]) -> Tensor:
        """The stored embeddings of texts, or those that `encode` gives, stored."""
        place = self._place("texts", data_hash)
        if not place.is_file():
            made = encode()
            self._write(place, data_hash, {"embed": made}, {})
            return made
        return self._read(place, data_hash)[0]["embed"]

    def _place(self, kind: str, data_hash: str) -> Path:
        return self.folder / f"{kind}-{data_hash}.safetensors"

    def _write_images(self, place: Path, data_hash: str, made: EncodedImages) -> None:
        tensors = {"embed": made.embed, "index": torch.from_numpy(made.index)}
        self._write(place, data_hash, tensors, {"bad": json.dumps(made.bad)})

    def _write(self, place: Path, data_hash: str, tensors: Mapping[str, Tensor], more: Mapping[str, str]) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        about = {**self._about, "data": data_hash, **more}
        write_whole(place, save({name: value.contiguous() for name, value in tensors.items()}, metadata=about))

    def _read(self, place: Path, data_hash: str) -> tuple[dict[str, Tensor], dict[str, str]]:
        try:
            with safe_open(str(place), framework="pt") as stored:
                about = dict(stored.metadata() or {})
                tensors = {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118
        except (SafetensorError, OSError) as error:
            raise UserError(f"{place} cannot be read ({error}); remove it, it will be made again.") from None
        wanted = {**self._about, "data": data_hash}
        if {name: about.get(name) for name in wanted} != wanted or "embed" not in tensors:
            raise UserError(
                f"{place} holds embeddings of another model, precision or data than its name says; remove it, it will "
                "be made again."
            )
        return tensors, about
