"""Stored features joined to streamed shards by the shards' hashes: the rows that the table in memory gets by key."""

from __future__ import annotations

import shutil

import pytest
import torch
from helpers.distilling import TEXTS, VIEWS, tiny_teachers
from helpers.pairs import noise, picture_pairs

from vlkd.data.prepare import encode_picture
from vlkd.data.shard_table import ShardTable, open_shards
from vlkd.data.shard_writer import RawSample, write_shards
from vlkd.data.sources import open_pairs
from vlkd.distill.cache import CacheSpec, ensure_cache, open_cache, verify_cache
from vlkd.distill.cache import build as cache_build
from vlkd.distill.teachers import CachedTeacher
from vlkd.errors import UserError

SPEC = CacheSpec(features=("image.embed", "text.embed"), views=2, view_settings=VIEWS, dtype="float32")
EVERY = torch.arange(8)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Shards of four rows, one of which holds a broken picture, and the cache of their table in memory."""
    root = tmp_path_factory.mktemp("join")
    pairs = picture_pairs(root / "pictures", TEXTS)
    samples = [
        RawSample(key=f"k{row}", image=encode_picture(file.path, None)[0], extension="png", captions=tuple(texts))
        for row, (file, texts) in enumerate(zip(pairs.files, TEXTS, strict=True))
    ]
    samples[6] = RawSample(key="k6", image=b"\x89PNG no", extension="png", captions=tuple(TEXTS[6]))
    write_shards(samples, root / "train", samples_per_shard=4)
    cache_build.SHARD_ROWS, before = 3, cache_build.SHARD_ROWS
    model = tiny_teachers()["one"]
    reader = ensure_cache(root / "cache", "one", model, open_pairs(str(root / "train")), SPEC)
    yield root, model, reader
    cache_build.SHARD_ROWS = before


def test_a_cache_made_in_memory_serves_the_stream(made):
    root, model, reader = made
    table = open_shards(str(root / "train"))
    streamed = open_cache(root / "cache", "one", model, table, SPEC)
    assert (len(streamed), streamed.captions) == (len(reader), reader.captions) == (8, 7)
    for number in range(2):
        views = torch.full((8,), number)
        assert torch.equal(streamed.image("image.embed", EVERY, views), reader.image("image.embed", EVERY, views))
    texts = torch.arange(7)
    assert torch.equal(streamed.text("text.embed", texts.flip(0)), reader.text("text.embed", texts.flip(0)))
    assert [streamed.view(row, 1) for row in range(8)] == [reader.view(row, 1) for row in range(8)]
    assert streamed.unreadable_rows() == reader.unreadable_rows() == [6]
    assert min(verify_cache(streamed, model, table).values()) > 0.9999


def test_a_cache_made_from_the_stream_is_the_same_to_the_byte(made, tmp_path):
    root, model, _ = made
    ensure_cache(tmp_path / "cache", "one", model, open_shards(str(root / "train")), SPEC)
    names = sorted(path.name for path in (root / "cache").glob("*.safetensors"))
    assert names == [f"00000{shard}.00{part}.safetensors" for shard in range(2) for part in range(2)]
    for name in names:
        assert (tmp_path / "cache" / name).read_bytes() == (root / "cache" / name).read_bytes()


def test_another_order_and_a_part_of_the_shards_serve(made):
    root, model, reader = made
    first, second = open_shards(str(root / "train")).shards
    turned = open_cache(root / "cache", "one", model, ShardTable([second, first]), SPEC)
    views = torch.ones(8, dtype=torch.int64)
    expected = reader.image("image.embed", EVERY, views)
    assert torch.equal(turned.image("image.embed", EVERY, views), torch.cat([expected[4:], expected[:4]]))
    captions = [len(texts) for texts in TEXTS]
    own = reader.text("text.embed", torch.arange(7))
    assert torch.equal(
        turned.text("text.embed", torch.arange(7)), torch.cat([own[sum(captions[:4]) :], own[: sum(captions[:4])]])
    )
    assert turned.unreadable_rows() == [2]
    half = open_cache(root / "cache", "one", model, ShardTable([second]), SPEC)
    assert torch.equal(half.image("image.embed", EVERY[:4], views[:4]), expected[4:])


def test_several_sources_are_joined_one_after_the_other(made):
    root, model, reader = made
    first, second = (
        open_cache(root / "cache", "one", model, ShardTable([shard]), SPEC)
        for shard in open_shards(str(root / "train")).shards
    )
    teacher = CachedTeacher("one", model.width, [second, first])
    assert teacher.unreadable_rows() == [2]
    assert teacher.view(5, 1) == reader.view(1, 1)


def test_a_tar_that_is_there_twice_is_joined_twice(made, tmp_path):
    root, model, _ = made
    shutil.copytree(root / "train", tmp_path / "train")
    for index in (tmp_path / "train").glob("*[!r]"):
        index.unlink()
    shutil.copy(tmp_path / "train" / "000000.tar", tmp_path / "train" / "000002.tar")
    table = open_shards(str(tmp_path / "train"))
    twice = ensure_cache(tmp_path / "cache", "one", model, table, SPEC)
    views = torch.ones(12, dtype=torch.int64)
    found = twice.image("image.embed", torch.arange(12), views)
    assert torch.equal(found[8:], found[:4])
    assert found[:6].norm(dim=1).min() > 0
    assert [twice.view(row, 1) for row in range(8, 12)] == [twice.view(row, 1) for row in range(4)]
    again = open_cache(tmp_path / "cache", "one", model, table, SPEC)
    assert again.captions == 7 + sum(len(texts) for texts in TEXTS[:4])


def test_a_shard_that_cannot_be_read_now_is_not_stored_as_unreadable(made, tmp_path):
    root, model, _ = made
    shutil.copytree(root / "train", tmp_path / "train")
    table = open_shards(str(tmp_path / "train"))
    (tmp_path / "train" / "000001.tar").unlink()
    with pytest.raises(UserError, match=r"000001.tar cannot be (opened|read)"):
        ensure_cache(tmp_path / "cache", "one", model, table, SPEC)
    assert not list((tmp_path / "cache").glob("000001*"))


def test_a_shard_that_was_written_anew_is_refused(made, tmp_path):
    root, model, _ = made
    shutil.copytree(root / "train", tmp_path / "train")
    shutil.rmtree(tmp_path / "train")
    noise(99).save(tmp_path / "new.png")
    samples = [RawSample(key=f"k{row}", image=(tmp_path / "new.png").read_bytes(), extension="png") for row in range(4)]
    write_shards(samples, tmp_path / "train", name="other")
    mixed = ShardTable([*open_shards(str(root / "train")).shards, *open_shards(str(tmp_path / "train")).shards])
    with pytest.raises(UserError, match=r"found 2 of 3 shards as they are now, expected all; not 'other-000000'"):
        open_cache(root / "cache", "one", model, mixed, SPEC)
