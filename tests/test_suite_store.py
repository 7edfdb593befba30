"""Stored embeddings: found again only under the same bytes, weights and precision, and refused when they do not fit."""

from __future__ import annotations

import io
import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from vlkd.data.sources import ImageFile
from vlkd.errors import UserError
from vlkd.retrieval.encode import EncodedImages
from vlkd.suite.store import Store, images_hash, texts_hash


@dataclass
class Pictures:
    keys: list[str]
    files: list[ImageFile]


def picture(path: Path, level: int) -> ImageFile:
    buffer = io.BytesIO()
    Image.new("L", (4, 4), level).save(buffer, "PNG")
    path.write_bytes(buffer.getvalue())
    return ImageFile(path)


@pytest.fixture
def pictures(tmp_path):
    return Pictures(["a", "b"], [picture(tmp_path / "a.png", 10), picture(tmp_path / "b.png", 20)])


def test_the_hash_of_pictures_depends_on_bytes_names_and_order_alone(pictures, tmp_path):
    memory = tmp_path / "memory"
    first = images_hash(pictures, memory)
    assert images_hash(pictures, memory) == first
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    moved = Pictures(pictures.keys, [picture(elsewhere / "x.png", 10), picture(elsewhere / "y.png", 20)])
    assert images_hash(moved, memory) == first
    assert images_hash(Pictures(["a", "c"], pictures.files), memory) != first
    assert images_hash(Pictures(pictures.keys, pictures.files[::-1]), memory) != first


def test_a_changed_picture_of_the_same_size_changes_the_hash(pictures, tmp_path):
    first = images_hash(pictures, tmp_path / "memory")
    before = pictures.files[0].path.stat()
    picture(pictures.files[0].path, 11)
    assert pictures.files[0].path.stat().st_size == before.st_size
    os.utime(pictures.files[0].path, ns=(before.st_atime_ns, before.st_mtime_ns + 1))
    assert images_hash(pictures, tmp_path / "memory") != first


def test_a_missing_picture_and_a_damaged_memory_are_no_crash(pictures, tmp_path):
    memory = tmp_path / "memory"
    first = images_hash(pictures, memory)
    for file in memory.iterdir():
        file.write_text("{")
    assert images_hash(pictures, memory) == first
    pictures.files[1].path.unlink()
    assert images_hash(pictures, memory) != first


def encoded() -> EncodedImages:
    return EncodedImages(
        embed=torch.randn(3, 5, generator=torch.Generator().manual_seed(0)),
        index=np.array([0, 2, 3]),
        bad=(("k1", "it is cut short"),),
    )


def never():
    raise AssertionError("encoded again")


def test_embeddings_are_encoded_once_and_come_back_bit_for_bit(tmp_path):
    made = encoded()
    store = Store(tmp_path, "f" * 16, "fp32")
    assert not store.has_images("d" * 16)
    assert store.images("d" * 16, lambda: made) is made
    found = Store(tmp_path, "f" * 16, "fp32").images("d" * 16, never)
    assert torch.equal(found.embed, made.embed)
    assert found.index.tolist() == [0, 2, 3]
    assert found.bad == made.bad
    texts = torch.eye(3)
    store.texts("t" * 16, lambda: texts)
    assert torch.equal(store.texts("t" * 16, never), texts)


def test_another_model_precision_or_data_is_encoded_anew(tmp_path):
    Store(tmp_path, "f" * 16, "fp32").images("d" * 16, encoded)
    for store, data in (
        (Store(tmp_path, "e" * 16, "fp32"), "d" * 16),
        (Store(tmp_path, "f" * 16, "bf16"), "d" * 16),
        (Store(tmp_path, "f" * 16, "fp32"), "c" * 16),
    ):
        with pytest.raises(AssertionError, match="encoded again"):
            store.images(data, never)


def test_a_file_that_does_not_fit_its_name_is_refused(tmp_path):
    store = Store(tmp_path, "f" * 16, "fp32")
    store.images("d" * 16, encoded)
    place = store.folder / f"images-{'d' * 16}.safetensors"
    place.rename(store.folder / f"images-{'c' * 16}.safetensors")
    with pytest.raises(UserError, match=r"another model, precision or data than its name says; remove it"):
        store.images("c" * 16, never)
    save_file({"embed": torch.ones(1, 1)}, str(place))
    with pytest.raises(UserError, match="remove it"):
        store.images("d" * 16, never)
    place.write_bytes(b"half a fi")
    with pytest.raises(UserError, match=r"cannot be read .* remove it"):
        store.images("d" * 16, never)


def test_texts_that_join_alike_have_other_hashes():
    assert len({texts_hash(texts, "x") for texts in (["ab", "c"], ["a", "bc"], ["abc"], ["c", "ab"])}) == 4
    assert texts_hash(["a"], "x") != texts_hash(["a"], "y")


def test_a_pass_with_unreadable_pictures_is_tried_again_until_it_is_whole(tmp_path):
    store = Store(tmp_path, "f" * 16, "fp32")
    store.images("d" * 16, encoded)
    assert store.images("d" * 16, never, lambda found: found).bad == encoded().bad
    whole = EncodedImages(embed=torch.eye(4), index=np.arange(4), bad=())
    assert store.images("d" * 16, never, lambda _: whole) is whole
    again = store.images("d" * 16, never, lambda _: never())
    assert torch.equal(again.embed, whole.embed)
    assert (again.index.tolist(), again.bad) == ([0, 1, 2, 3], ())
