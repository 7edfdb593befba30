"""One picture's name in one string, for an index: a file's path, or a shard's path with the sample's key."""

from __future__ import annotations

import functools
import os
from pathlib import Path

from PIL.Image import Image

from vlkd.data.images import open_image
from vlkd.data.shards import index_shard, read_member
from vlkd.data.sources import Pairs
from vlkd.data.tar_members import Member
from vlkd.errors import UserError


def item_paths(pairs: Pairs) -> list[str]:
    """The absolute path of each image's file, followed by `/KEY` for an image inside a shard."""
    places = [os.path.abspath(file.path) for file in pairs.files]
    return [
        place if file.size < 0 else f"{place}/{key}"
        for place, key, file in zip(places, pairs.keys, pairs.files, strict=True)
    ]


def open_item(item: str) -> Image:
    """Decode the picture that `item_paths` named.

    Raises:
        UserError: the file or the sample is gone, or cannot be read.
    """
    place, tar, key = item.rpartition(".tar/")
    if not tar or Path(item).is_file():
        return open_image(Path(item))
    shard = Path(f"{place}.tar")
    try:
        status = shard.stat()
    except OSError as error:
        raise UserError(f"{shard} cannot be read ({error.strerror}); restore it or build the index again.") from None
    member = _members(shard, status.st_mtime_ns).get(key)
    if member is None:
        raise UserError(f"{shard} holds no sample {key!r}; restore it or build the index again.")
    return open_image(read_member(shard, member.offset, member.size))


@functools.lru_cache(maxsize=64)
def _members(shard: Path, _modified: int) -> dict[str, Member]:
    return {sample.key: sample.image for sample in index_shard(shard).samples}
