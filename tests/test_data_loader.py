"""Order, captions, views, ranks, workers and resumption of the batch stream."""

from __future__ import annotations

import hashlib
import json
import pickle
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.pairs import noise, picture_pairs
from helpers.tiny_models import CAPTIONS, tiny_tokenizer
from PIL import Image

from vlkd.data.decoded import Decoded, shrink
from vlkd.data.images import BadImage
from vlkd.data.loader import BatchStream
from vlkd.data.samples import Batch, Consumer, SampleSequence
from vlkd.data.sources import ImageFile, Pairs
from vlkd.data.views import View, ViewSettings, colors, geometry, view_of
from vlkd.errors import UserError
from vlkd.models.preprocessing import CompositePreprocessing, PixelSettings

TEXTS = [CAPTIONS[:3], CAPTIONS[1:2], (), CAPTIONS[2:], CAPTIONS[:2], (), CAPTIONS[3:]]
VIEWS = ViewSettings(color=0.4)


def preprocessing(size: int = 24) -> CompositePreprocessing:
    third = (0.5, 0.5, 0.5)
    settings = PixelSettings(size=size, mean=third, std=third, interpolation="bilinear", crop_fraction=1.0)
    return CompositePreprocessing(settings, tiny_tokenizer(), 16)


def consumers(**sizes: int) -> dict[str, Consumer]:
    return {
        name: Consumer(preprocessing=preprocessing(size), image=True, text=True, student=name == "student")
        for name, size in ({"student": 24} | sizes).items()
    }


def sequence(pairs: Pairs, *, seed: int = 5, wanted: dict[str, Consumer] | None = None, **options) -> SampleSequence:
    return SampleSequence(pairs, {} if wanted is None else wanted, VIEWS, seed=seed, **options)


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Pairs:
    return picture_pairs(tmp_path_factory.mktemp("pictures"), TEXTS)


def assert_same(left: Batch, right: Batch) -> None:
    assert (left.keys, left.bad) == (right.keys, right.bad)
    for name in ("rows", "views", "captioned", "texts", "caption_ids", "own_ids"):
        assert torch.equal(getattr(left, name), getattr(right, name)), name
    assert left.inputs.keys() == right.inputs.keys()
    for model, part in left.inputs.items():
        assert part.keys() == right.inputs[model].keys()
        for name, value in part.items():
            assert torch.equal(value, right.inputs[model][name]), (model, name)


def keys(stream: BatchStream) -> list[str]:
    return [key for batch in stream for key in batch.keys]


def test_every_epoch_is_one_permutation_across_batch_borders(pairs):
    order = keys(BatchStream(sequence(pairs), batch_size=3, samples=21))
    assert len(order) == 21
    epochs = [order[start : start + 7] for start in (0, 7, 14)]
    assert all(sorted(epoch) == sorted(pairs.keys) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 3
    assert keys(BatchStream(sequence(pairs), batch_size=3, samples=21)) == order
    assert keys(BatchStream(sequence(pairs, seed=6), batch_size=3, samples=21)) != order


@pytest.mark.parametrize("stop", [1, 2, 5])
def test_a_state_continues_without_repeat_or_gap(pairs, stop):
    whole = list(BatchStream(sequence(pairs, wanted=consumers()), batch_size=3, samples=21))
    first = BatchStream(sequence(pairs, wanted=consumers()), batch_size=3, samples=21)
    steps = iter(first)
    taken = [next(steps) for _ in range(stop)]
    second = BatchStream(sequence(pairs, wanted=consumers()), batch_size=3, samples=21)
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    for found, expected in zip(taken + list(second), whole, strict=True):
        assert_same(found, expected)


def test_the_state_counts_what_was_handed_out(pairs):
    stream = BatchStream(sequence(pairs), batch_size=2, samples=20, workers=0)
    steps = iter(stream)
    for step in range(1, 4):
        next(steps)
        assert stream.state_dict()["samples"] == 2 * step


def test_prefetching_workers_do_not_run_ahead_of_the_state(pairs):
    stream = BatchStream(sequence(pairs), batch_size=2, samples=20, workers=1)
    steps = iter(stream)
    next(steps)
    assert stream.state_dict()["samples"] == 2


@pytest.mark.parametrize("changed", [{"seed": 6}, {"data": "other"}, {"plan": "other"}])
def test_a_foreign_state_is_refused(pairs, changed):
    stream = BatchStream(sequence(pairs), batch_size=2, samples=20)
    with pytest.raises(UserError, match=f"made with {next(iter(changed))}"):
        stream.load_state_dict(stream.state_dict() | changed)


@pytest.mark.parametrize("world_size", [2, 4])
def test_ranks_share_the_batches_of_one(pairs, world_size):
    whole = list(BatchStream(sequence(pairs, wanted=consumers()), batch_size=4, samples=20))
    ranks = [
        list(
            BatchStream(sequence(pairs, wanted=consumers()), batch_size=4, samples=20, rank=rank, world_size=world_size)
        )
        for rank in range(world_size)
    ]
    assert {len(rank) for rank in ranks} == {len(whole)} == {5}
    for step, expected in enumerate(whole):
        parts = [rank[step] for rank in ranks]
        assert [key for part in parts for key in part.keys] == expected.keys
        for name in ("rows", "views", "captioned", "texts", "caption_ids", "own_ids"):
            assert torch.equal(torch.cat([getattr(part, name) for part in parts]), getattr(expected, name))
        pixels = torch.cat([part.inputs["student"]["pixels"] for part in parts])
        assert torch.equal(pixels, expected.inputs["student"]["pixels"])


def test_small_tensors_travel_as_arrays_and_come_back(pairs, monkeypatch):
    batch = next(iter(BatchStream(sequence(pairs, wanted=consumers()), batch_size=3, samples=12)))
    monkeypatch.setattr("vlkd.data.samples.SMALL_BYTES", batch.inputs["student"]["pixels"].nbytes - 1)
    state = batch.__getstate__()
    travelling = [*state.values(), *state["inputs"]["student"].values()]
    assert [part.shape[1:] for part in travelling if isinstance(part, torch.Tensor)] == [(3, 24, 24)]
    found = pickle.loads(pickle.dumps(batch))
    assert_same(found, batch)
    assert found.captioned.dtype == torch.bool
    found.rows.add_(1)


def test_workers_change_nothing(pairs):
    alone, helped = (
        list(BatchStream(sequence(pairs, wanted=consumers()), batch_size=3, samples=12, workers=workers))
        for workers in (0, 2)
    )
    for left, right in zip(alone, helped, strict=True):
        assert_same(left, right)


def test_a_sequence_travels_to_a_spawned_worker(pairs):
    own = sequence(pairs, wanted=consumers(), view_cycle=2, stored_view=stored_view)
    own[9]
    copy = pickle.loads(pickle.dumps(own))
    assert_same(copy.collate([copy[8], copy[1]]), own.collate([own[8], own[1]]))


def test_captions_belong_to_their_images_and_vary_by_epoch(pairs):
    texts = pairs.texts()
    chosen: dict[str, Counter[str]] = {key: Counter() for key in pairs.keys}
    for batch in BatchStream(sequence(pairs, wanted=consumers()), batch_size=7, samples=7 * 60):
        captioned = [key for key, flag in zip(batch.keys, batch.captioned, strict=True) if flag]
        assert [bool(pairs.captions[row]) for row in batch.rows] == batch.captioned.tolist()
        for key, number in zip(captioned, batch.texts.tolist(), strict=True):
            chosen[key][texts[number]] += 1
        drawn = [texts[number] for number in batch.texts]
        expected = preprocessing().tokenize(drawn)
        assert torch.equal(batch.inputs["student"]["ids"], expected["ids"])
        assert torch.equal(batch.inputs["student"]["mask"], expected["mask"])
    for key, own in zip(pairs.keys, pairs.captions, strict=True):
        assert set(chosen[key]) == set(own)
        # 60 even draws among n captions: five standard deviations.
        for count in chosen[key].values():
            assert abs(count - 60 / len(own)) <= 5 * (60 / len(own)) ** 0.5


def test_caption_ids_are_equal_exactly_for_equal_strings(pairs):
    own = sequence(pairs)
    found: dict[int, set[str]] = {}
    texts = pairs.texts()
    for start in range(0, 70, 7):
        batch = own.collate([own[position] for position in range(start, start + 7)])
        for number, identity in zip(batch.texts.tolist(), batch.caption_ids.tolist(), strict=True):
            found.setdefault(identity, set()).add(texts[number])
    assert all(len(strings) == 1 for strings in found.values())
    assert len(found) == len(set(texts))


def test_own_ids_are_those_of_all_captions_of_the_image(pairs):
    own = sequence(pairs)
    batch = own.collate([own[position] for position in range(7)])
    strings = {
        int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little") // 2: text
        for text in pairs.texts()
    }
    assert batch.own_ids.shape == (5, 3)
    captioned = batch.rows[batch.captioned].tolist()
    for row, drawn, numbers in zip(captioned, batch.caption_ids.tolist(), batch.own_ids.tolist(), strict=True):
        assert tuple(strings[number] for number in numbers if number >= 0) == pairs.captions[row]
        assert drawn in numbers
        assert numbers == sorted(numbers, key=lambda number: number < 0)
    moved = batch.to(torch.device("meta"))
    assert moved.own_ids.device.type == moved.caption_ids.device.type == "meta"
    unlabelled = sequence(replace(pairs, captions=[()] * 7))
    assert unlabelled.collate([unlabelled[0]]).own_ids.shape == (0, 0)


def stored_view(row: int, number: int) -> View:
    """Left to a function of the module, because it must travel to workers."""
    return View((row / 20, 0.1, row / 20 + 0.5, 0.9), number % 2 == 1, (1.0, 1.0, 1.0))


def test_stored_views_are_applied_again_and_colours_drawn(pairs):
    own = sequence(pairs, wanted=consumers(near=24), view_cycle=4, stored_view=stored_view)
    for position in (0, 9, 16):
        sample = own[position]
        seen = geometry(pairs.image(sample.row), stored_view(sample.row, sample.view))
        drawn = view_of(VIEWS, 0, sample.key, sample.view)
        plain, coloured = (
            np.asarray(image.resize((24, 24), Image.Resampling.BILINEAR)).transpose(2, 0, 1)
            for image in (seen, colors(seen, drawn))
        )
        np.testing.assert_array_equal(sample.pixels["near"].numpy(), plain)
        np.testing.assert_array_equal(sample.pixels["student"].numpy(), coloured)
        assert (plain != coloured).any()


def large_jpegs(folder: Path, count: int = 3) -> Pairs:
    """960 x 720, which decoders reduce where little is needed."""
    folder.mkdir()
    for number in range(count):
        fine = np.random.default_rng(number).integers(0, 256, (90, 120, 3), dtype=np.uint8)
        Image.fromarray(fine).resize((960, 720), Image.Resampling.BICUBIC).save(folder / f"{number}.jpg", quality=95)
    files = [ImageFile(folder / f"{number}.jpg") for number in range(count)]
    return Pairs([str(number) for number in range(count)], [()] * count, files)


def test_a_models_pixels_do_not_depend_on_who_else_runs(tmp_path):
    jpegs = large_jpegs(tmp_path / "j")
    alone = sequence(jpegs, wanted=consumers())
    beside = sequence(jpegs, wanted=consumers(large=200, equal=24))
    for position in range(6):
        sample, other = alone[position], beside[position]
        assert torch.equal(sample.pixels["student"], other.pixels["student"])
        view = view_of(VIEWS, 0, sample.key, sample.view)
        for name, size in (("large", 200), ("equal", 24)):
            seen = geometry(jpegs.image(sample.row, size_hint=2 * size), view)
            expected = np.asarray(seen.resize((size, size), Image.Resampling.BILINEAR)).transpose(2, 0, 1)
            np.testing.assert_array_equal(other.pixels[name].numpy(), expected)
            # Otherwise the decoder was not asked for less, and the comparison says nothing.
            full = np.asarray(geometry(jpegs.image(sample.row), view).resize((size, size), Image.Resampling.BILINEAR))
            assert (full.transpose(2, 0, 1) != expected).any() == (size == 24)


def test_equal_sizes_share_a_decode_and_pictures_in_memory_are_the_students(tmp_path, monkeypatch):
    jpegs = large_jpegs(tmp_path / "j")
    held = Decoded(jpegs, 30)
    asked = []
    whole = Pairs.image

    def counting(self, i, size_hint=None):
        asked.append(size_hint)
        return whole(self, i, size_hint)

    monkeypatch.setattr(Pairs, "image", counting)
    _ = sequence(jpegs, wanted=consumers(one=24, two=24, three=50))[0]
    assert asked == [48, 100]
    asked.clear()
    sample = sequence(jpegs, wanted=consumers(one=24), decoded=held)[0]
    assert asked == [48]
    view = view_of(VIEWS, 0, sample.key, sample.view)
    seen = colors(geometry(held.image(sample.row), view), view).resize((24, 24), Image.Resampling.BILINEAR)
    np.testing.assert_array_equal(sample.pixels["student"].numpy(), np.asarray(seen).transpose(2, 0, 1))
    asked.clear()
    assert sequence(jpegs, wanted=consumers(), decoded=held)[0].pixels.keys() == {"student"}
    assert not asked


def test_teachers_see_the_students_crop_without_its_colours(pairs):
    wanted = consumers(near=24, far=12)
    own = sequence(pairs, wanted=wanted, view_seed=9)
    sample = own[3]
    view = view_of(VIEWS, 9, sample.key, sample.view)
    seen = geometry(pairs.image(sample.row), view)
    assert view.box != (0, 0, 1, 1)
    for name, size in (("near", 24), ("far", 12)):
        expected = np.asarray(seen.resize((size, size), Image.Resampling.BILINEAR)).transpose(2, 0, 1)
        np.testing.assert_array_equal(sample.pixels[name].numpy(), expected)
    coloured = np.asarray(colors(seen, view).resize((24, 24), Image.Resampling.BILINEAR)).transpose(2, 0, 1)
    np.testing.assert_array_equal(sample.pixels["student"].numpy(), coloured)
    assert not torch.equal(sample.pixels["student"], sample.pixels["near"])


@pytest.mark.parametrize(("cycle", "expected"), [(0, [0, 1, 2, 3, 4]), (2, [0, 1, 0, 1, 0])])
def test_views_come_round_after_a_cycle(pairs, cycle, expected):
    own = sequence(pairs, view_cycle=cycle)
    assert [own.row_and_view(7 * epoch)[1] for epoch in range(5)] == expected


def test_a_broken_picture_is_left_out_and_counted(tmp_path):
    broken = picture_pairs(tmp_path, [("a blue circle",)] * 20, broken=(4,))
    stream = BatchStream(sequence(broken, wanted=consumers()), batch_size=10, samples=40)
    batches = list(stream)
    assert sorted(key for batch in batches[:2] for key in batch.keys) == sorted(set(broken.keys) - {"p4"})
    assert [list(batch.bad) for batch in batches if batch.bad] == [["p4"], ["p4"]]
    assert "is damaged" in batches[0].bad.get("p4", "") + batches[1].bad.get("p4", "")
    assert all(len(batch.inputs["student"]["pixels"]) == len(batch.keys) == len(batch.texts) for batch in batches)
    assert list(stream.state_dict()["bad"]) == ["p4"]
    again = BatchStream(sequence(broken, wanted=consumers()), batch_size=10, samples=40)
    again.load_state_dict(stream.state_dict())
    assert again.bad == stream.bad


def test_more_than_a_twentieth_broken_is_refused(tmp_path):
    broken = picture_pairs(tmp_path, [()] * 20, broken=(4, 9))
    with pytest.raises(UserError, match=r"2 samples cannot be used, more than 5% .*p[49]: "):
        list(BatchStream(sequence(broken, wanted=consumers()), batch_size=10, samples=20))


def test_rows_known_to_be_unusable_are_left_out_without_any_decoding(pairs):
    own = sequence(pairs, unusable=[2])
    batch = own.collate([own[position] for position in range(7)])
    assert list(batch.bad) == ["p2"]
    assert sorted(batch.rows.tolist()) == [0, 1, 3, 4, 5, 6]


def test_decoded_pictures_are_those_of_the_files(tmp_path):
    broken = picture_pairs(tmp_path, [()] * 3, broken=(1,))
    held = Decoded(broken, 18)
    expected = noise(0).resize((24, 18), Image.Resampling.BICUBIC)
    np.testing.assert_array_equal(np.asarray(held.image(0)), np.asarray(expected))
    with pytest.raises(BadImage):
        held.image(1)
    assert shrink(noise(0), 36).size == (48, 36)
    batch = sequence(broken, wanted=consumers(), decoded=held).collate(
        [sequence(broken, wanted=consumers(), decoded=held)[position] for position in range(3)]
    )
    assert list(batch.bad) == ["p1"]


def test_a_batch_without_captions_has_no_text_row_but_a_blank_input(pairs):
    unlabelled = replace(pairs, captions=[()] * 7)
    own = sequence(unlabelled, wanted=consumers())
    batch = own.collate([own[0], own[1]])
    assert (len(batch.texts), len(batch.caption_ids), batch.captioned.tolist()) == (0, 0, [False, False])
    assert torch.equal(batch.inputs["student"]["ids"], preprocessing().tokenize([""])["ids"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 5, "world_size": 2}, "does not divide among 2 ranks"),
        ({"batch_size": 8}, "larger than the 7 training images"),
    ],
)
def test_batches_that_cannot_be_are_refused(pairs, options, message):
    with pytest.raises(UserError, match=message):
        BatchStream(sequence(pairs), samples=20, **options)


def test_real_shards_stream(tmp_path):
    shards = Path(__file__).parents[2] / "shared" / "data" / "coco" / "dataset_coco.json"
    if not shards.is_file():
        pytest.skip("the shared COCO photos are absent")
    from vlkd.data.sources import open_pairs

    found = open_pairs(f"{shards}#test")
    batch = next(iter(BatchStream(sequence(found, wanted=consumers()), batch_size=8, samples=8)))
    assert (len(batch.keys), batch.bad) == (8, {})
