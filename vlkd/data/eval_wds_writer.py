"""Writing evaluation sets in CLIP_benchmark's layout (see `eval_wds`): fixed bytes, whole or not at all."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from vlkd.data.eval_types import EvalSet
from vlkd.data.eval_wds import COUNT_FILE, LABEL, METADATA, TYPE_FILE
from vlkd.data.images import image_format, open_image
from vlkd.data.labelled import CLASSES_FILE, PROMPTS_FILE, TEMPLATES_FILE
from vlkd.data.shard_writer import new_folder
from vlkd.errors import UserError

_VERBATIM = {"JPEG": "jpg", "PNG": "png", "WEBP": "webp"}

Members = list[tuple[str, bytes]]
"""Name and bytes of what one sample puts into a tar."""


def write_wds(
    data: EvalSet,
    out: Path,
    *,
    split: str = "test",
    samples_per_shard: int = 10_000,
    bytes_per_shard: int = 1_000_000_000,
    progress: bool = False,
) -> dict[str, Any]:
    """Write `out/SPLIT/0.tar` ... with keys `s0000000`, `s0000001`, ... and the text files; return counts.

    JPEG, PNG and WebP bytes are kept, other formats become PNG. Line breaks inside of captions become spaces. Group ids
    go into `.npy` beside `.cls`, or into `.metadata.npy` beside other labels. Equal sets give equal bytes. A second
    split may join a folder of the same names and templates.

    Raises:
        UserError: a selection, a picture that cannot be decoded, a split or a folder that holds other things.
    """
    if data.kind not in LABEL:
        raise UserError(f"A set for {data.kind} has no place in this layout; give one for {', '.join(LABEL)}.")
    if samples_per_shard < 1 or not split or Path(split).name != split or split.startswith("."):
        raise UserError(
            f"Found split {split!r} and {samples_per_shard} samples per shard; expected a name and 1 or more."
        )
    texts = _texts(data)
    samples = _samples(data, progress)
    if out.is_dir() and any(out.iterdir()):
        _check_same(out, texts)
        with new_folder(out / split) as folder:
            shards = _write_tars(samples, folder, samples_per_shard, bytes_per_shard)
    else:
        with new_folder(out) as root:
            (root / split).mkdir()
            shards = _write_tars(samples, root / split, samples_per_shard, bytes_per_shard)
            for name, text in texts.items():
                (root / name).write_bytes(text.encode())
    captions = sum(map(len, data.captions))
    return {
        "out": str(out), "split": split, "kind": data.kind, "samples": len(data), "shards": shards,
        "classes": len(data.classes), "captions": captions,
    }  # fmt: skip


def _texts(data: EvalSet) -> dict[str, str]:
    """The files of the root; templates take CLIP_benchmark's `{c}`."""
    texts = {}
    if data.kind != "classification":
        texts[TYPE_FILE] = f"{data.kind}\n"
    if data.classes:
        texts[CLASSES_FILE] = "".join(f"{_one_line(name)}\n" for name in data.classes)
    if data.templates:
        texts[TEMPLATES_FILE] = "".join(f"{_one_line(text).replace('{}', '{c}')}\n" for text in data.templates)
    if data.prompts is not None:
        texts[PROMPTS_FILE] = json.dumps(dict(data.prompts), ensure_ascii=False, indent=1) + "\n"
    return texts


def _check_same(out: Path, texts: dict[str, str]) -> None:
    for name in (TYPE_FILE, CLASSES_FILE, TEMPLATES_FILE, PROMPTS_FILE):
        there = (out / name).read_bytes() if (out / name).is_file() else None
        if there != (texts[name].encode() if name in texts else None):
            raise UserError(f"{out} has another {name} than this set, or only one has it; write it into a new folder.")


def _one_line(text: str) -> str:
    return " ".join(text.splitlines())


def _samples(data: EvalSet, progress: bool) -> Iterator[Members]:
    from tqdm import tqdm

    groups = np.stack(list(data.groups.values()), axis=1).astype(np.int64) if data.groups else None
    for row in tqdm(range(len(data)), unit="picture", disable=not progress):
        key = f"s{row:07d}"
        image, extension = _stored(data, row)
        label = _label(data, row)
        members = [(f"{key}.{extension}", image), (f"{key}.{LABEL[data.kind]}", label)]
        if groups is not None:
            name = "npy" if data.kind == "classification" else METADATA
            members.append((f"{key}.{name}", _npy(groups[row])))
        yield members


def _stored(data: EvalSet, row: int) -> tuple[bytes, str]:
    try:
        encoded = data.files[row].read()
        image = open_image(encoded)
    except UserError as error:
        raise UserError(f"The picture {data.keys[row]!r} cannot be used, so nothing was written: {error}") from None
    kind = image_format(encoded)
    return (encoded, _VERBATIM[kind]) if kind in _VERBATIM else (_png(image), "png")


def _png(image: Image.Image) -> bytes:
    with io.BytesIO() as stream:
        image.save(stream, format="PNG")
        return stream.getvalue()


def _label(data: EvalSet, row: int) -> bytes:
    if data.kind == "retrieval":
        captions = [_one_line(caption) for caption in data.captions[row]]
        if not captions or not all(caption.strip() for caption in captions):
            raise UserError(f"The picture {data.keys[row]!r} has no or an empty caption; retrieval needs one for each.")
        return "\n".join(captions).encode()
    if data.labels is None:
        raise UserError(f"A set for {data.kind} without labels cannot be written; give its labels.")
    return _npy(data.labels[row].astype(np.int64)) if data.kind == "multilabel" else str(data.labels[row]).encode()


def _npy(vector: NDArray[np.int64]) -> bytes:
    with io.BytesIO() as stream:
        np.save(stream, vector, allow_pickle=False)
        return stream.getvalue()


def _write_tars(samples: Iterable[Members], folder: Path, most_samples: int, most_bytes: int) -> int:
    """Fill `0.tar`, `1.tar`, ... up to either limit, and write their number; returns it."""
    shards, count, size = 0, 0, 0
    tar: tarfile.TarFile | None = None
    try:
        for members in samples:
            own = sum(len(content) for _, content in members)
            if tar is None or count == most_samples or size + own > most_bytes:
                if tar is not None:
                    tar.close()
                tar = tarfile.open(folder / f"{shards}.tar", "w", format=tarfile.USTAR_FORMAT)  # noqa: SIM115
                shards, count, size = shards + 1, 0, 0
            for name, content in members:
                info = tarfile.TarInfo(name)  # owner, mode and time are constants
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
            count, size = count + 1, size + own
    finally:
        if tar is not None:
            tar.close()
    (folder / COUNT_FILE).write_text(f"{shards}\n", encoding="utf-8")
    return shards
