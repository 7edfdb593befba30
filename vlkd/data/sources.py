"""One table of images and captions from shards, a captions file, a Karpathy JSON or a folder of images."""

from __future__ import annotations

import functools
import hashlib
import itertools
import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from glob import glob
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL.Image import Image

from vlkd.data.images import open_image
from vlkd.data.records import Record, read_captions_file, read_karpathy, record_keys
from vlkd.data.shards import index_shard, read_captions, read_member
from vlkd.data.table import Part
from vlkd.errors import UserError

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")
LIST_SUFFIXES = (".jsonl", ".ndjson", ".csv", ".tsv")
DATA_SUFFIXES = (".tar", ".json", *LIST_SUFFIXES)
MAX_BAD_SHARE = 0.05
"""Above this share of pictures that are missing or cannot be decoded, the data are refused."""


@dataclass(frozen=True)
class ImageFile:
    """Where an image's bytes are: a whole file (size -1), or a part of a tar."""

    path: Path
    offset: int = 0
    size: int = -1

    @property
    def shard(self) -> Path | None:
        """The tar it is in."""
        return self.path if self.size >= 0 else None

    def read(self) -> bytes:
        """The bytes; raises `UserError` when the file is gone or shorter than it was."""
        try:
            return self.path.read_bytes() if self.size < 0 else read_member(self.path, self.offset, self.size)
        except OSError as error:
            raise UserError(f"{self.path} cannot be read ({error.strerror}); restore it or leave it out.") from None

    def middle(self) -> bytes:
        """At most 256 bytes of its middle, which tell it from another picture of the same length."""
        size = self.length()
        begin = max(0, size // 2 - 128)
        try:
            return read_member(self.path, self.offset + begin, min(256, size - begin))
        except OSError as error:
            raise UserError(f"{self.path} cannot be read ({error.strerror}); restore it or leave it out.") from None

    def length(self) -> int:
        """The number of bytes; raises `UserError` when the file is gone."""
        try:
            return self.path.stat().st_size if self.size < 0 else self.size
        except OSError as error:
            raise UserError(f"{self.path} cannot be read ({error.strerror}); restore it or leave it out.") from None


@dataclass(frozen=True)
class Pairs:
    """Images and their captions, row by row; an image without captions is unlabelled.

    Attributes:
        keys: one per image, without repeats.
        captions: those of each image, () for none.
        files: where each image is.
        problems: what was left out, in words.
    """

    keys: list[str]
    captions: list[tuple[str, ...]]
    files: list[ImageFile]
    problems: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.keys)

    @property
    def captioned(self) -> int:
        """Rows with a caption."""
        return sum(1 for captions in self.captions if captions)

    @property
    def caption_total(self) -> int:
        """Captions of all rows."""
        return int(self._text_ends[-1]) if len(self) else 0

    @property
    def most_captions(self) -> int:
        """Of any row."""
        return max(map(len, self.captions), default=0)

    def key(self, row: int) -> str:
        """The name of a row."""
        return self.keys[row]

    def captions_of(self, row: int) -> tuple[str, ...]:
        """The captions of a row."""
        return self.captions[row]

    def first_text(self, row: int) -> int:
        """The number of a row's first caption among all."""
        return int(self._text_ends[row]) - len(self.captions[row])

    def image(self, row: int, size_hint: int | None = None) -> Image:
        """Decode an image; raises `BadImage` for one that cannot be used."""
        return open_image(self.files[row].read(), size_hint=size_hint)

    def texts(self) -> list[str]:
        """All captions, row by row."""
        return [caption for captions in self.captions for caption in captions]

    def parts(self) -> list[Part]:
        """Rows of one tar together, and pictures in files of their own; each tar is read for its hash."""
        groups = itertools.groupby(range(len(self)), key=lambda row: self.files[row].shard)
        found = []
        for shard, group in groups:
            rows = list(group)
            captions = sum(len(self.captions[row]) for row in rows)
            found.append(Part(shard.stem if shard else "", len(rows), captions, file_sha256(shard) if shard else ""))
        return found

    def row_state(self, row: int) -> str:
        """A hash of a row's key, captions and place, and of 256 bytes of its picture."""
        return row_state(self.keys[row], self.captions[row], self.files[row])

    def sizes(self) -> list[int]:
        """One for all: a table in memory is shuffled as a whole."""
        return [len(self)]

    def spread_rows(self, count: int) -> list[int]:
        """Rows to look at, spread over the table."""
        return spread(len(self), count)

    def prefetch(self, numbers: Iterable[int]) -> None:
        """Nothing: all files are on this machine."""

    @functools.cached_property
    def _text_ends(self) -> NDArray[np.int64]:
        return np.cumsum([len(captions) for captions in self.captions], dtype=np.int64)

    def fingerprint(self) -> str:
        """A hash of keys, captions and the images' places and sizes."""
        state = hashlib.sha256()
        for key, captions, file in zip(self.keys, self.captions, self.files, strict=True):
            state.update(_place_state(key, captions, file))
        return state.hexdigest()[:16]


def spread(rows: int, count: int) -> list[int]:
    """Up to `count` of so many rows, evenly spread."""
    return [i * rows // min(rows, count) for i in range(min(rows, count))]


def file_sha256(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def row_state(key: str, captions: tuple[str, ...], file: ImageFile, name: str = "") -> str:
    """By which a row is known again in another order or among others: all but its picture, and 256 bytes of that.

    `name` is that of the file where it lies, if `file` is a copy under another one.
    """
    return hashlib.blake2b(_place_state(key, captions, file, name) + file.middle(), digest_size=8).hexdigest()


def _place_state(key: str, captions: tuple[str, ...], file: ImageFile, name: str = "") -> bytes:
    return repr((key, captions, name or file.path.name, file.offset, file.length())).encode()


def open_pairs(ref: str) -> Pairs:
    """Open one source: a folder, glob or file of shards, a captions JSONL or CSV, a Karpathy JSON, an image folder.

    Args:
        ref: a path; `PATH#SPLIT` takes one split of a captions file or a Karpathy JSON, or the folder `PATH/SPLIT`.

    Raises:
        UserError: nothing is there, it is empty, or it has another form.
    """
    path, split = place_of(ref)
    pairs = _open(path, split, ref)
    if not len(pairs):
        raise UserError(f"{ref} holds no usable image ({'; '.join(pairs.problems[:3]) or 'it is empty'}); check it.")
    return pairs


def open_union(refs: Sequence[str]) -> Pairs:
    """Several sources one after the other, as `union` joins them."""
    return union(open_sources(refs))


def open_sources(refs: Sequence[str]) -> list[Pairs]:
    """Each source alone; raises `UserError` where none is named."""
    if not refs:
        raise UserError("No data are named; set data.train=PATH.")
    return [open_pairs(ref) for ref in refs]


def union(sources: Sequence[Pairs]) -> Pairs:
    """Sources one after the other; keys get the source's number in front where they would repeat."""
    keys = [key for source in sources for key in source.keys]
    if len(set(keys)) < len(keys):
        keys = [f"{number}:{key}" for number, source in enumerate(sources) for key in source.keys]
    return Pairs(
        keys,
        [captions for source in sources for captions in source.captions],
        [file for source in sources for file in source.files],
        tuple(problem for source in sources for problem in source.problems),
    )


def source_name(ref: str) -> str:
    """A short name for a source's folder: the last two parts of its path and its split.

    `data/coco/train` is `coco-train`, `emoji/captions.jsonl#train` is `emoji-captions-train`, and of a glob only the
    parts before and between the wildcards count: `data/coco/train/*.tar` is `coco-train`, too.
    """
    path, split = place_of(ref)
    place = Path(os.path.abspath(path))
    parts = [*place.parts[:-1], place.stem if place.suffix in DATA_SUFFIXES else place.name]
    words = [re.sub(r"[^\w]+", "-", re.sub(r"[*?]|\[[^]]*\]", " ", part)).strip("-") for part in parts]
    return "-".join([*[word for word in words if word][-2:], *([split] if split else [])]) or "data"


def place_of(ref: str) -> tuple[str, str]:
    """The path of a reference and its split, "" for none; a path that exists may hold a `#`."""
    if Path(ref).exists() or "#" not in ref:
        return ref, ""
    path, _, split = ref.rpartition("#")
    return path, split


def _open(place: str, split: str, ref: str) -> Pairs:
    path = Path(place)
    if path.is_dir():
        path = path / split
        if not path.is_dir():
            raise UserError(f"{place} has no folder {split!r}; check the split or run `vlkd prep`.")
        shards = sorted(path.glob("*.tar"))
        return _from_shards(shards) if shards else _from_image_folder(path)
    if not path.exists():
        shards = sorted(Path(found) for found in glob(place))
        if shards and not split:
            return _from_shards(shards)
        raise UserError(f"There is nothing at {ref}; give shards, a captions file, a Karpathy JSON or an image folder.")
    if path.suffix == ".tar" and not split:
        return _from_shards([path])
    if path.suffix == ".json":
        return _from_records(read_karpathy(path), split, path)
    if path.suffix in LIST_SUFFIXES:
        return _from_records(read_captions_file(path), split, path)
    raise UserError(
        f"{ref} is no known data file; expected .tar (without #SPLIT), .jsonl, .csv, a Karpathy .json or a folder."
    )


def _from_shards(shards: Sequence[Path]) -> Pairs:
    keys: list[str] = []
    captions: list[tuple[str, ...]] = []
    files: list[ImageFile] = []
    problems: list[str] = []
    for shard in shards:
        index = index_shard(shard)
        problems += [f"{shard.name}: {problem}" for problem in index.problems]
        for sample in index.samples:
            keys.append(sample.key)
            captions.append(read_captions(shard, sample))
            files.append(ImageFile(shard, sample.image.offset, sample.image.size))
    _check_keys(keys)
    return Pairs(keys, captions, files, tuple(problems))


def _from_image_folder(folder: Path) -> Pairs:
    paths = sorted(path for path in folder.rglob("*") if path.suffix.lower() in IMAGE_SUFFIXES)
    splits = sorted({shard.parent.name for shard in folder.glob("*/*.tar")})
    if splits and not paths:
        likely = "train" if "train" in splits else splits[0]
        raise UserError(f"{folder} holds the splits {', '.join(splits)}; name one, for instance {folder}#{likely}.")
    keys = [path.relative_to(folder).as_posix() for path in paths]
    return Pairs(keys, [()] * len(paths), [ImageFile(path) for path in paths])


def _from_records(records: Sequence[Record], split: str, source: Path) -> Pairs:
    """Those of one split; keys are numbered over all splits, so that a split read alone has the same ones."""
    keyed = zip(record_keys([record.image for record in records]), records, strict=True)
    chosen = [(key, record) for key, record in keyed if not split or record.split == split]
    if split and not chosen:
        known = ", ".join(sorted({record.split for record in records}))
        raise UserError(f"{source} has no record of the split {split!r}; it has {known or 'none'}.")
    present = [(key, record) for key, record in chosen if record.image.is_file()]
    missing = [str(record.image) for _, record in chosen if not record.image.is_file()]
    if len(missing) > max(1, MAX_BAD_SHARE * len(chosen)):
        raise UserError(
            f"{len(missing)} of {len(chosen)} pictures of {source} are missing, first {missing[0]}; paths are relative "
            "to that file: put it beside them, or use `vlkd prep` with --image-root."
        )
    return Pairs(
        [key for key, _ in present],
        [record.captions for _, record in present],
        [ImageFile(record.image) for _, record in present],
        tuple(f"missing: {path}" for path in missing),
    )


def _check_keys(keys: Sequence[str]) -> None:
    if len(set(keys)) < len(keys):
        seen: set[str] = set()
        twice = next(key for key in keys if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise UserError(f"The key {twice!r} stands for two images; rename one or run `vlkd prep`.")
