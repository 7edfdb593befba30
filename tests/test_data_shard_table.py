"""The streamed table: the rows of the table in memory, changed bytes noticed, nothing held that is not being read."""

from __future__ import annotations

import hashlib
import json
import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.pairs import picture_pairs
from helpers.tiny_models import CAPTIONS, tiny_tokenizer

from vlkd.data.images import BadImage
from vlkd.data.loader import BatchStream
from vlkd.data.local_copies import LocalCopies
from vlkd.data.plan import Plan
from vlkd.data.prepare import encode_picture
from vlkd.data.samples import Consumer, SampleSequence
from vlkd.data.scan import scan_shards
from vlkd.data.shard_table import ShardTable, open_shards
from vlkd.data.shard_writer import RawSample, write_shards
from vlkd.data.sources import open_pairs
from vlkd.data.views import ViewSettings
from vlkd.errors import UserError
from vlkd.models.preprocessing import CompositePreprocessing, PixelSettings

ROWS = 40


def write(folder: Path, *, rows: int = ROWS, per_shard: int = 7, start: int = 0, prefix: str = "k") -> Path:
    texts = [tuple(CAPTIONS[row % 4 : row % 4 + row % 3]) for row in range(rows)]
    pairs = picture_pairs(folder.with_name(folder.name + "-pictures"), texts)
    samples = [
        RawSample(
            key=f"{prefix}{start + row:03d}",
            image=encode_picture(pairs.files[row].path, None)[0],
            extension="png",
            captions=texts[row],
        )
        for row in range(rows)
    ]
    write_shards(samples, folder, samples_per_shard=per_shard)
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = write(tmp_path_factory.mktemp("shards") / "train")
    scan_shards([str(folder)], None, workers=1)
    return folder


@pytest.fixture
def own(folder, tmp_path):
    """A copy that a test may damage."""
    return Path(shutil.copytree(folder, tmp_path / "train", copy_function=shutil.copy2))


def consumers(size: int = 16) -> dict[str, Consumer]:
    third = (0.5, 0.5, 0.5)
    settings = PixelSettings(size=size, mean=third, std=third, interpolation="bilinear", crop_fraction=1.0)
    preprocessing = CompositePreprocessing(settings, tiny_tokenizer(), 16)
    return {"student": Consumer(preprocessing=preprocessing, image=True, text=True, student=True)}


def stream(table, *, seed=3, weights=(), together=2, batch_size=8, samples=160, plan=None, **options) -> BatchStream:
    plan = plan or Plan([table.sizes()], seed=seed, weights=weights, together=together)
    sequence = SampleSequence(table, consumers(), ViewSettings(), seed=seed, plan=plan)
    return BatchStream(sequence, batch_size=batch_size, samples=samples, **options)


def keys_of(batches) -> list[str]:
    return [key for batch in batches for key in (*batch.keys, *batch.bad)]


def test_rows_are_those_of_the_table_in_memory(folder):
    pairs, table = open_pairs(str(folder)), open_shards(str(folder))
    assert len(table) == len(pairs) == ROWS
    counts = ("captioned", "caption_total", "most_captions")
    assert [getattr(table, name) for name in counts] == [getattr(pairs, name) for name in counts]
    assert table.sizes() == [7, 7, 7, 7, 7, 5]
    for row in range(ROWS):
        assert table.key(row) == pairs.keys[row]
        assert table.captions_of(row) == pairs.captions[row]
        assert table.first_text(row) == pairs.first_text(row)
        assert table.row_state(row) == pairs.row_state(row)
        np.testing.assert_array_equal(np.asarray(table.image(row)), np.asarray(pairs.image(row)))
    assert table.parts() == pairs.parts()


def test_the_same_batches_as_from_memory(folder):
    pairs, table = open_pairs(str(folder)), open_shards(str(folder))
    plan = Plan([[ROWS]], seed=3)
    for left, right in zip(stream(table, plan=plan), stream(pairs, plan=plan), strict=True):
        assert left.keys == right.keys
        assert torch.equal(left.inputs["student"]["pixels"], right.inputs["student"]["pixels"])
        assert torch.equal(left.inputs["student"]["ids"], right.inputs["student"]["ids"])
        assert torch.equal(left.caption_ids, right.caption_ids)
        assert torch.equal(left.own_ids, right.own_ids)


@pytest.mark.parametrize(("workers", "world_size"), [(0, 2), (1, 1), (2, 1), (2, 4)])
def test_keys_do_not_depend_on_workers_or_ranks(folder, workers, world_size):
    expected = keys_of(stream(open_shards(str(folder))))
    assert sorted(expected[:ROWS]) == sorted(open_pairs(str(folder)).keys)
    ranks = [
        list(stream(open_shards(str(folder)), workers=workers, rank=rank, world_size=world_size))
        for rank in range(world_size)
    ]
    assert {len(rank) for rank in ranks} == {20}
    assert keys_of(part for step in zip(*ranks, strict=True) for part in step) == expected


@pytest.mark.parametrize("stop", [1, 4, 9])
def test_it_continues_in_the_middle_of_an_epoch_on_other_workers_and_ranks(folder, stop):
    expected = keys_of(stream(open_shards(str(folder))))
    first = stream(open_shards(str(folder)), workers=2)
    taken = keys_of(batch for batch, _ in zip(first, range(stop), strict=False))
    # The zip has drawn one batch more than it handed out.
    state = json.loads(json.dumps(first.state_dict())) | {"samples": 8 * stop}
    halves = [stream(open_shards(str(folder)), rank=rank, world_size=2) for rank in range(2)]
    for half in halves:
        half.load_state_dict(state)
    rest = keys_of(part for step in zip(*halves, strict=True) for part in step)
    assert taken + rest == expected
    assert halves[0].state_dict() == first.state_dict() | {"samples": 160, "epoch": 4}


def test_an_epoch_can_be_set(folder):
    expected = keys_of(stream(open_shards(str(folder))))
    later = stream(open_shards(str(folder)))
    later.set_epoch(2)
    assert keys_of(later) == expected[2 * ROWS :]


def test_a_flipped_bit_is_a_sample_left_out_and_named(own):
    tar = next(iter(sorted(own.glob("*.tar"))))
    table = open_shards(str(own))
    damaged = bytearray(tar.read_bytes())
    place = damaged.find(b"IDAT") + 9
    damaged[place] ^= 4
    tar.write_bytes(damaged)
    batches = list(stream(open_shards(str(own)), samples=40))
    bad = {key: reason for batch in batches for key, reason in batch.bad.items()}
    assert list(bad) == ["k000"]
    assert "changed since it was scanned" in bad["k000"]
    assert len(keys_of(batches)) == ROWS
    with pytest.raises(BadImage):
        table.image(0)


def test_a_flipped_bit_in_a_caption_is_noticed(own):
    tar = sorted(own.glob("*.tar"))[0]
    damaged = tar.read_bytes().replace(CAPTIONS[1].encode(), CAPTIONS[1][::-1].encode(), 1)
    tar.write_bytes(damaged)
    batches = list(stream(open_shards(str(own)), samples=40))
    assert [list(batch.bad) for batch in batches if batch.bad] == [["k001"]]


def test_a_shard_that_shrinks_or_vanishes_while_it_is_read(own):
    table = open_shards(str(own))
    first, second = sorted(own.glob("*.tar"))[:2]
    second.unlink()
    with first.open("r+b") as file:
        file.truncate(3 * 512)
    # Seven of forty rows are more than a twentieth: the run ends in a sentence, and its state is sound.
    batches = stream(table, samples=400)
    with pytest.raises(UserError, match=r"cannot be used, more than 5% .*(changed since|cannot be opened)"):
        list(batches)
    for row in range(14):
        with pytest.raises(BadImage):
            table.image(row)
    assert table.image(14).size


def test_much_of_the_latest_samples_bad_ends_the_run(tmp_path, monkeypatch):
    """A small source of a mixture that is gone is under a twentieth of the rows, and most of what is drawn."""
    folders = [write(tmp_path / "large", rows=150, per_shard=50), write(tmp_path / "small", rows=6, per_shard=6)]
    tables = [open_shards(str(folder)) for folder in folders]
    joined = ShardTable([shard for table in tables for shard in table.shards])
    (tmp_path / "small" / "000000.tar").unlink()
    plan = Plan([table.sizes() for table in tables], seed=0, weights=(1, 4))
    batches = stream(joined, plan=plan, samples=4000)
    with pytest.raises(UserError, match=r"1\d\d of the latest 1\d\d samples cannot be used"):
        list(batches)
    # Before that, a rate of four fifths does not end it: too few samples are known.
    assert 112 <= batches.position <= 200


def test_a_shard_that_comes_back_is_read_again(own, monkeypatch):
    table = open_shards(str(own))
    first = sorted(own.glob("*.tar"))[0]
    now = [1000.0]
    monkeypatch.setattr("vlkd.data.shard_table.time.monotonic", lambda: now[0])
    away = first.rename(own / "away")
    with pytest.raises(BadImage, match="cannot be opened"):
        table.image(0)
    away.rename(first)
    now[0] += 1
    with pytest.raises(BadImage, match="cannot be opened"):
        table.image(0)
    now[0] += 600
    assert table.image(0).size


def test_what_the_scan_left_out_is_told_and_new_shards_are_not_passed_over(own, tmp_path):
    (own / "999999.tar").write_bytes(b"no tar")
    with pytest.raises(UserError, match=r"holds 1 shards that are not in its scan.json \(first 999999.tar\)"):
        open_shards(str(own))
    scan_shards([str(own)], None, workers=1)
    table = open_shards(str(own))
    assert len(table) == ROWS
    assert len(table.problems) == 1
    assert table.problems[0].startswith("999999.tar: ")
    sorted(own.glob("*.index.safetensors"))[2].unlink()
    with pytest.raises(UserError, match="is missing; run `vlkd prep scan` again"):
        open_shards(str(own))


def test_missing_and_changed_shards_are_refused_when_opened(own):
    tar = sorted(own.glob("*.tar"))[1]
    tar.write_bytes(tar.read_bytes() + bytes(512))
    with pytest.raises(UserError, match=rf"{tar.name} has .* expected .* run `vlkd prep scan` again"):
        open_shards(str(own))
    tar.unlink()
    with pytest.raises(UserError, match=r"cannot be read .*restore it"):
        open_shards(str(own))


def test_shards_without_an_index_are_scanned_once(tmp_path, capsys):
    folder = write(tmp_path / "fresh")
    assert len(open_shards(str(folder))) == len(open_shards(f"{tmp_path}#fresh")) == ROWS
    assert capsys.readouterr().out.count("scanned once") == 1


@pytest.mark.parametrize("ref", ["nowhere", "empty"])
def test_what_is_no_folder_of_shards_is_refused(tmp_path, ref):
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"no folder|neither shards nor"):
        open_shards(str(tmp_path / ref))


def test_keys_that_repeat_among_shards_carry_the_shards_name(tmp_path):
    folder = write(tmp_path / "one", rows=6, per_shard=6)
    second = write(tmp_path / "two", rows=6, per_shard=6)
    shutil.copy(second / "000000.tar", folder / "000001.tar")
    table = open_shards(str(folder))
    assert [table.key(row) for row in (0, 6)] == ["000000/k000", "000001/k000"]


def test_weighted_sources_from_one_table(folder, tmp_path):
    other = write(tmp_path / "other", rows=10, per_shard=4, start=500)
    tables = [open_shards(str(folder)), open_shards(str(other))]
    joined = ShardTable([shard for table in tables for shard in table.shards])
    plan = Plan([table.sizes() for table in tables], seed=1, weights=(1, 3))
    taken = keys_of(stream(joined, plan=plan, samples=4096))
    assert sum(key >= "k500" for key in taken) == 3072
    parts = stream(joined, plan=plan).sequence.plan.coverage(4096)
    assert [(part.drawn, part.distinct) for part in parts] == [(1024, 40), (3072, 10)]


def test_it_travels_to_a_spawned_worker_and_holds_no_more_than_what_is_read(folder):
    table = open_shards(str(folder))
    table.image(3)
    copy = pickle.loads(pickle.dumps(table))
    assert copy._files == {}
    assert copy._rows == {}
    np.testing.assert_array_equal(np.asarray(copy.image(9)), np.asarray(table.image(9)))
    assert set(copy._rows) == {1}


def test_remote_shards_are_copied_and_read(folder, tmp_path):
    import fsspec

    memory = fsspec.filesystem("memory")
    for tar in folder.glob("*.tar"):
        memory.pipe_file(f"/streamed/{tar.name}", tar.read_bytes())
    index = tmp_path / "index"
    scan_shards(["memory://streamed/*.tar"], index, workers=0)
    copies = LocalCopies(tmp_path / "copies", 10**6)
    table = open_shards(str(index), copies)
    local = open_shards(str(folder))
    assert table.fingerprint() == local.fingerprint()
    assert keys_of(stream(table)) == keys_of(stream(local))
    np.testing.assert_array_equal(np.asarray(table.image(11)), np.asarray(local.image(11)))
    assert [table.row_state(row) for row in range(9)] == [local.row_state(row) for row in range(9)]
    kept = {hashlib.sha256(path.read_bytes()).hexdigest() for path in (tmp_path / "copies").glob("*.tar")}
    assert kept == {hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.glob("*.tar")}
