"""Writing image-text shards: ordinary WebDataset tars with fixed bytes and a manifest, whole or not at all."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

from vlkd.errors import UserError

IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp")
MAX_KEY_CHARACTERS = 80


@dataclass(frozen=True, kw_only=True)
class RawSample:
    """One picture as it is stored: its encoded bytes, its captions, and anything else for the JSON member."""

    key: str
    image: bytes
    extension: str
    captions: tuple[str, ...] = ()
    extra: Mapping[str, object] = field(default_factory=dict)


def is_safe_key(key: str) -> bool:
    """Whether a key survives every reader: no dot, slash or control character, not `__x`, at most 80 characters."""
    return re.fullmatch(rf"(?!__)[^./\\\x00-\x1f\x7f]{{1,{MAX_KEY_CHARACTERS}}}", key) is not None


@contextlib.contextmanager
def new_folder(out: Path) -> Iterator[Path]:
    """Yield a folder to fill, which takes the name `out` in one step when the block ends, and vanishes when it fails.

    A killed run leaves `.NAME.partial` beside `out`, which the next run with the same `out` removes.

    Raises:
        UserError: when `out` exists and is not an empty folder.
    """
    out = out.absolute()
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out} already holds files; give a new or empty folder, or remove it first.")
    partial = out.parent / f".{out.name}.partial"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        yield partial
        if out.exists():
            out.rmdir()
        os.replace(partial, out)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def write_shards(
    samples: Iterable[RawSample], out: Path, *, samples_per_shard: int = 1000, name: str = ""
) -> dict[str, Any]:
    """Write `out/000000.tar`, ... (`NAME-000000.tar` with a name) and `out/manifest.json`; return the manifest.

    Equal samples give equal bytes. The folder appears whole or not at all (see `new_folder`).

    Raises:
        UserError: for an `out` that holds files, no samples, an unsafe or repeated key, an unknown extension.
    """
    shards: list[dict[str, Any]] = []
    seen: set[str] = set()
    remaining = iter(samples)
    with new_folder(out) as partial:
        while batch := list(islice(remaining, samples_per_shard)):
            for sample in batch:
                _check_writable(sample, seen)
            file = f"{name}-{len(shards):06d}.tar" if name else f"{len(shards):06d}.tar"
            shards.append(_write_shard(batch, partial / file))
        if not shards:
            raise UserError(f"No sample is left to write into {out.name}; check the input and its limits.")
        totals = {count: sum(shard[count] for shard in shards) for count in ("samples", "labelled", "captions")}
        manifest = {"format": 1, **totals, "shards": shards}
        (partial / "manifest.json").write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")
    return manifest


def _check_writable(sample: RawSample, seen: set[str]) -> None:
    if not is_safe_key(sample.key):
        raise UserError(
            f"The key {sample.key!r} is not safe in a tar; expected 1 to {MAX_KEY_CHARACTERS} characters without dots, "
            "slashes or control characters."
        )
    if sample.key in seen:
        raise UserError(f"The key {sample.key!r} occurs twice; every picture needs a key of its own.")
    if sample.extension not in IMAGE_EXTENSIONS:
        raise UserError(f"{sample.key}: extension {sample.extension!r}; expected one of {', '.join(IMAGE_EXTENSIONS)}.")
    if {"captions", "caption"} & set(sample.extra):
        raise UserError(f"{sample.key}: captions belong in `captions`, not in `extra`.")
    seen.add(sample.key)


def _write_shard(batch: list[RawSample], path: Path) -> dict[str, Any]:
    # webdataset imports torch, which the rest of this module does without.
    from webdataset import TarWriter

    with path.open("wb") as stream, TarWriter(stream, encoder=False, mtime=0) as tar:
        for sample in batch:
            members: dict[str, Any] = {"__key__": sample.key, sample.extension: sample.image}
            if sample.captions or sample.extra:
                payload = {"captions": list(sample.captions), **sample.extra}
                members["json"] = json.dumps(payload, ensure_ascii=False, allow_nan=False).encode()
            tar.write(members)
    with path.open("rb") as written:
        digest = hashlib.file_digest(written, "sha256").hexdigest()
    return {
        "file": path.name,
        "samples": len(batch),
        "labelled": sum(bool(sample.captions) for sample in batch),
        "captions": sum(len(sample.captions) for sample in batch),
        "bytes": path.stat().st_size,
        "sha256": digest,
    }
