"""Images as a user names them: files, folders, globs, splits of class folders, shards and lists, in one table.

Keys are those under which training knows the images: of a picture below the root of a run's data, the path from there
on, as `train/CLASS/FILE.jpg`.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from glob import glob, has_magic
from pathlib import Path

from vlkd.data.sources import DATA_SUFFIXES, IMAGE_SUFFIXES, ImageFile, Pairs, open_pairs, place_of
from vlkd.errors import UserError

SPLIT_NAMES = ("train", "val", "valid", "validation", "test")
"""A folder of class folders with one of these names is a split, which stands in front of its keys."""


def open_given(refs: Sequence[str], root: str = "") -> Pairs:
    """Open everything that is named, in order; a file that is named twice by itself counts once.

    Args:
        refs: image files, globs of them, folders of images at any depth, and whatever else `open_pairs` opens.
        root: the folder of the data that a model was trained on, "" for none.

    Returns:
        Keys without repeats. Of a picture below `root`: its path from there on. Of `ROOT#SPLIT`, and of a folder that
        is called as one of `SPLIT_NAMES` and has its images in class folders: `SPLIT/CLASS/FILE`. Of another folder:
        the path inside it. Of shards and lists: as `open_pairs` has them. Of a file: the path as given. Where the
        keys of a later source repeat earlier ones, its number stands in front, `1:` for the second, as in the pool of
        a run with further sources.

    Raises:
        UserError: nothing is named, or a name leads to nothing, to no image or to no data that can be opened.
    """
    if not refs:
        raise UserError("No images are named; give files, folders or shards.")
    keys: list[str] = []
    files: list[ImageFile] = []
    problems: list[str] = []
    known: set[str] = set()
    for number, source in enumerate(_sources(refs)):
        own = _from_root(source, root).keys if root else source.keys
        while not known.isdisjoint(own):
            own = [f"{number}:{key}" for key in own]
        known.update(own)
        keys += own
        files += source.files
        problems += source.problems
    return Pairs(keys, [()] * len(keys), files, tuple(problems))


def _sources(refs: Sequence[str]) -> list[Pairs]:
    """Each reference alone, but neighbouring files together."""
    sources: list[Pairs] = []
    single: dict[str, None] = {}
    for ref in refs:
        matches = _matches(ref)
        if matches is not None:
            single |= dict.fromkeys(matches)
            continue
        sources += _take_files(single)
        sources.append(_opened(ref))
    return sources + _take_files(single)


def _matches(ref: str) -> list[str] | None:
    """The image files that a file's name or a glob means; None for data that `open_pairs` opens, or refuses."""
    if Path(ref).exists() or not has_magic(ref):
        return [ref] if Path(ref).is_file() and Path(ref).suffix.lower() not in DATA_SUFFIXES else None
    found = sorted(path for path in glob(ref, recursive=True) if Path(path).suffix.lower() in IMAGE_SUFFIXES)
    found = [path for path in found if not Path(path).is_dir()]
    return found or None


def _take_files(single: dict[str, None]) -> list[Pairs]:
    """The files so far as one source, and none from here on."""
    paths = list(single)
    single.clear()
    keys = [Path(path).as_posix() for path in paths]
    return [Pairs(keys, [()] * len(paths), [ImageFile(Path(path)) for path in paths])] if paths else []


def _opened(ref: str) -> Pairs:
    """As `open_pairs`, with the split in front of the keys of class folders."""
    found = open_pairs(ref)
    place, split = place_of(ref)
    if not Path(place).is_dir() or any(file.shard is not None for file in found.files):
        return found
    name = os.path.basename(os.path.abspath(place))
    if not split and name in SPLIT_NAMES and all(key.count("/") == 1 for key in found.keys):
        split = name
    return replace(found, keys=[f"{Path(split).as_posix()}/{key}" for key in found.keys]) if split else found


def _from_root(source: Pairs, root: str) -> Pairs:
    """The source with the path from the root on as the key of each picture file below it."""
    top = os.path.join(os.path.abspath(root), "")
    keys = []
    for key, file in zip(source.keys, source.files, strict=True):
        path = os.path.abspath(file.path)
        below = file.shard is None and path.startswith(top)
        keys.append(Path(path[len(top) :]).as_posix() if below else key)
    # A list may name one file twice under two keys.
    return replace(source, keys=keys) if len(set(keys)) == len(keys) else source
