"""Which shards are meant: tars, folders of them, patterns with `*` and `{000..099}`, and URLs."""

from __future__ import annotations

import hashlib
import os
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from glob import glob
from itertools import islice
from pathlib import Path, PurePosixPath

from braceexpand import braceexpand

from vlkd.data.remote import expand_remote, is_remote, redacted
from vlkd.data.shard_rows import SUFFIX
from vlkd.errors import UserError

MAX_SHARDS = 1_000_000


def expand_shards(refs: Sequence[str]) -> list[str]:
    """Absolute paths and URLs of shards, each once, numbers in their names in numerical order.

    Raises:
        UserError: a folder or a pattern holds no tar, nothing is there, or braces are not balanced.
    """
    found: dict[str, None] = {}
    for ref in refs:
        if is_remote(ref):
            if re.search(r"://[^/]*:[^/]*@", ref):
                raise UserError(f"{redacted(ref)} carries a password, which a scan would write down; use ~/.netrc.")
            found |= dict.fromkeys(expand_remote(ref))
        else:
            # Links to one folder lead to the same shards, while a link to a shard keeps its own name.
            for path in _local(ref.removeprefix("file://")):
                found[os.path.join(os.path.realpath(os.path.dirname(path)), os.path.basename(path))] = None
    if not found:
        raise UserError("No shards are named; give tars, a folder of tars, a pattern or a URL.")
    for place in found:
        if not place.isprintable():
            raise UserError(f"The shard {place!a} has a name that is no UTF-8 text; rename it.")
    return sorted(found, key=natural)


def _local(ref: str) -> list[str]:
    if os.path.isdir(ref):
        paths = [str(path) for path in Path(ref).glob("*.tar")]
        if not paths:
            raise UserError(f"The folder {ref} holds no .tar; give one with shards, or run `vlkd prep` to make some.")
        return paths
    if os.path.exists(ref):
        return [ref]
    paths = []
    for pattern in _braces(ref):
        # What braces spell out is expected to be there; a missing one is told with the others.
        named = glob(pattern) if re.search(r"[*?[]", pattern) else [pattern]
        paths += [path for path in named if path.endswith(".tar")]
    if not any(os.path.exists(path) for path in paths):
        raise UserError(f"There is no .tar at {ref}; check the path or the pattern.")
    return paths


def _braces(ref: str) -> list[str]:
    ranges = re.findall(r"\{(-?[0-9]{1,18})\.\.(-?[0-9]{1,18})", ref)
    if any(abs(int(end) - int(start)) >= MAX_SHARDS for start, end in ranges):
        raise UserError(f"{ref} spells out more than {MAX_SHARDS} names; check its braces.")
    try:
        return list(islice(braceexpand(ref), MAX_SHARDS))
    except ValueError as error:
        raise UserError(f"{ref} has no balanced braces ({error}); expected, for instance, {{000..099}}.tar.") from None


def shown(place: str) -> str:
    """A place fit for messages: of a URL without what may be secret in it."""
    return redacted(place) if "://" in place else place


def natural(text: str) -> tuple[object, ...]:
    """A key that sorts the numbers in texts by value: `2.tar` before `10.tar`."""
    parts = re.split(r"([0-9]+)", text)
    numbers = [number.lstrip("0") for number in parts[1::2]]
    pairs = zip(parts[::2], [*numbers, ""], strict=True)
    return (*(item for words, number in pairs for item in (words, len(number), number)), text)


def common_folder(places: Iterable[str]) -> Path:
    """The folder in which local shards lie; raises `UserError` where there is not just one."""
    folders = {os.path.dirname(place) for place in places if "://" not in place}
    if len(folders) != 1 or any("://" in place for place in places):
        raise UserError("The shards do not lie in one local folder; name a folder for their indexes with --out.")
    return Path(folders.pop())


def relative_place(place: str, folder: Path) -> str:
    """A path as seen from a folder, with `/`; URLs stay as they are."""
    if "://" in place:
        return place
    return Path(os.path.relpath(place, os.path.realpath(folder))).as_posix()


def index_names(places: Sequence[str]) -> list[str]:
    """File names for the indexes of shards: after the shard, with a hash of its place where two have one name."""
    stems = [_stem(place) for place in places]
    taken = Counter(stem.casefold() for stem in stems)
    return [
        stem + (f"-{_digest(place)}" if taken[stem.casefold()] > 1 else "") + SUFFIX
        for stem, place in zip(stems, places, strict=True)
    ]


def _stem(place: str) -> str:
    name = PurePosixPath(re.split(r"[?#]", place)[0] if "://" in place else place).name.removesuffix(".tar")
    stem = re.sub(r"[^\w.-]", "_", name)
    return stem if stem == name and len(stem.encode()) <= 100 else f"{stem[:20]}-{_digest(place)}"


def _digest(place: str) -> str:
    return hashlib.blake2b(place.encode(errors="surrogateescape"), digest_size=4).hexdigest()
