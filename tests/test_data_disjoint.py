"""Sets of images compared by key and by content."""

from __future__ import annotations

import pytest

from vlkd.data.disjoint import ImageSet, copies, disjoint
from vlkd.data.sources import ImageFile
from vlkd.errors import UserError


def test_disjoint_by_key_and_by_content(tmp_path):
    contents = {"a": b"one", "b": b"two", "c": b"three", "d": b"two", "e": b"other"}
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
    tar = tmp_path / "tar"
    tar.write_bytes(b"....two....")

    def images(name: str, keys: str) -> ImageSet:
        return ImageSet(name, list(keys), [ImageFile(tmp_path / key) for key in keys], f"move {name}")

    disjoint((images("left", "abc"), images("right", "e")))
    disjoint()
    with pytest.raises(UserError, match=r"1 of 3 left have a key that right have, too, first 'c'; .*: move left"):
        disjoint((images("left", "abc"), images("right", "ec")))
    with pytest.raises(UserError, match=r"1 of 3 left are .*among the right, too, first 'b', which is 'd' there"):
        disjoint((images("left", "abc"), images("other", "e")), (images("left", "abc"), images("right", "ed")))
    inside = ImageSet("inside", ["x"], [ImageFile(tar, 4, 3)], "")
    with pytest.raises(UserError, match=r"1 of 1 inside are .*'x', which is 'b' there"):
        disjoint((inside, images("left", "abc")))
    assert copies(images("", "abdce").files, images("", "db").files) == {1: 0, 2: 0}
