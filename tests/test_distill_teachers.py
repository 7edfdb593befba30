"""An online and a cached teacher are one protocol: on the same stored views they see the same pixels."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from helpers.distilling import TEXTS, VIEWS, batch_of, sequence_of, tiny_teachers
from helpers.pairs import noise, picture_pairs
from helpers.tiny_models import CAPTIONS, tiny_composite
from PIL import Image

from vlkd.data.samples import Consumer, SampleSequence
from vlkd.data.sources import ImageFile, Pairs, union
from vlkd.data.views import ViewSettings
from vlkd.distill.cache import CacheSpec, ensure_cache
from vlkd.distill.teachers import CachedTeacher, OnlineTeacher, text_features
from vlkd.errors import UserError
from vlkd.models.fingerprint import model_fingerprint

WANT = frozenset({"image.embed", "text.embed", "image.pooled", "text.pooled", "logit_scale"})
HELD = tuple(name for name in WANT if "." in name)
NEAR = {"float32": 1e-5, "float16": 1e-3, "bfloat16": 8e-3, "int8": 2e-2}
"""Relative to the vector."""


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    return picture_pairs(tmp_path_factory.mktemp("pictures"), TEXTS)


def cached(model, sources, folder, *, name="one", views=3, dtype="float32", settings=VIEWS):
    spec = CacheSpec(features=HELD, views=views, view_settings=settings, dtype=dtype)
    parts = [ensure_cache(folder / name / str(i), name, model, source, spec) for i, source in enumerate(sources)]
    return CachedTeacher(name, model.width, parts)


def three_teachers():
    return tiny_teachers() | {"three": tiny_composite(seed=5, width=31, image_size=32)}


def batches(sequence, count=8, size=5):
    for start in range(0, count * size, size):
        yield sequence.collate([sequence[position] for position in range(start, start + size)])


@pytest.mark.parametrize("dtype", NEAR)
def test_three_cached_teachers_equal_online_ones_on_every_view(dtype, pairs, tmp_path):
    models = three_teachers()
    online = {name: OnlineTeacher(name, model) for name, model in models.items()}
    stored = {name: cached(model, [pairs], tmp_path, name=name, dtype=dtype) for name, model in models.items()}
    images = set()
    for batch in batches(sequence_of(pairs, models, view_cycle=3)):
        for name in models:
            expected, found = online[name].targets(batch, WANT), stored[name].targets(batch, WANT)
            assert found.keys() == expected.keys() == WANT
            assert stored[name].width == found["image.embed"].shape[1] == {"one": 20, "two": 9, "three": 31}[name]
            for key in HELD:
                error = (found[key] - expected[key]).norm(dim=1) / expected[key].norm(dim=1)
                assert error.max() < NEAR[dtype], key
                assert not found[key].requires_grad
            assert torch.equal(found["logit_scale"], expected["logit_scale"])
        images |= {(int(row), int(view)) for row, view in zip(batch.rows, batch.views, strict=True)}
    assert len(images) == 24
    assert stored["one"].provides == WANT
    assert stored["one"].preprocessing is None


def test_a_union_with_clashing_keys_is_joined_source_by_source(tmp_path):
    sources = [
        picture_pairs(tmp_path / "a", [CAPTIONS[:2], (), CAPTIONS[2:3]], broken=(1,)),
        picture_pairs(tmp_path / "b", [CAPTIONS[3:4], CAPTIONS[:1], ()], broken=(2,)),
    ]
    for number, file in enumerate(sources[1].files[:2]):
        noise(40 + number).save(file.path)
    both = union(sources)
    assert both.keys == ["0:p0", "0:p1", "0:p2", "1:p0", "1:p1", "1:p2"]
    model = tiny_teachers()["one"]
    online, stored = OnlineTeacher("one", model), cached(model, sources, tmp_path / "c")
    assert stored.unreadable_rows() == [1, 5]
    consumers = {"one": Consumer(preprocessing=model.preprocessing, image=True, text=True)}
    # The union's keys are not those from which the sources' views were drawn: only stored views are right.
    sequence = SampleSequence(both, consumers, VIEWS, seed=4, view_cycle=3, stored_view=stored.view)
    drawn = SampleSequence(both, consumers, VIEWS, seed=4, view_cycle=3)
    seen, differing = set(), 0
    for batch, other in zip(batches(sequence), batches(drawn), strict=True):
        expected, found = online.targets(batch, WANT), stored.targets(batch, WANT)
        for key in WANT:
            torch.testing.assert_close(found[key], expected[key], rtol=1e-5, atol=1e-5)
        differing += not torch.allclose(online.targets(other, WANT)["image.embed"], found["image.embed"], atol=1e-3)
        seen |= set(batch.rows.tolist())
    assert seen == {0, 2, 3, 4}
    assert differing == 8
    nothing = replace(batch, rows=batch.rows[:0], views=batch.views[:0], texts=batch.texts[:0])
    assert {key: tuple(value.shape) for key, value in stored.targets(nothing, HELD).items()} == {
        "image.embed": (0, 20), "text.embed": (0, 20), "image.pooled": (0, 16), "text.pooled": (0, 32),
    }  # fmt: skip


class PixelTeacher:
    """Its embedding is the very pixels that it is given."""

    def __new__(cls):
        model = tiny_composite(image_size=24)
        model.image_features = lambda pixels, **_: {"image.embed": pixels.flatten(1)}
        model.normalised = lambda pixels: pixels.float()
        model.width = 3 * 24 * 24
        return model


def test_cached_and_online_see_identical_pixels_of_large_jpegs(tmp_path):
    files = []
    for number in range(3):
        array = np.random.default_rng(number).integers(0, 256, (90, 120, 3), dtype=np.uint8)
        path = tmp_path / f"{number}.jpg"
        Image.fromarray(array).resize((960, 720), Image.Resampling.BICUBIC).save(path, quality=95)
        files.append(ImageFile(path))
    pairs = Pairs(["a", "b", "c"], [()] * 3, files)
    model = PixelTeacher()
    # At this hint the decoder gives 120 x 90 pixels, at none 960 x 720, and the view's pixels tell.
    assert pairs.image(0, size_hint=48).size == (120, 90)
    spec = CacheSpec(features=("image.embed",), views=2, view_settings=VIEWS, dtype="float32")
    stored = CachedTeacher("t", model.width, [ensure_cache(tmp_path / "c", "t", model, pairs, spec)])
    online = OnlineTeacher("t", model)
    student = Consumer(preprocessing=tiny_composite(image_size=224).preprocessing, image=True, text=False, student=True)
    teacher = Consumer(preprocessing=model.preprocessing, image=True, text=False)
    for consumers in ({"t": teacher}, {"student": student, "t": teacher}):
        sequence = SampleSequence(pairs, consumers, VIEWS, seed=0, view_cycle=2, stored_view=stored.view)
        for batch in batches(sequence, count=2, size=3):
            found = stored.targets(batch, {"image.embed"})["image.embed"]
            assert torch.equal(found, online.targets(batch, {"image.embed"})["image.embed"])
    whole = model.preprocessing.view_transform(pairs.image(0))
    assert not torch.equal(whole, model.preprocessing.view_transform(pairs.image(0, size_hint=48)))


def test_an_online_teacher_looks_captions_up(pairs):
    model = tiny_teachers()["two"]
    calls = []
    whole = model.text_features
    model.text_features = lambda ids, mask, **options: (calls.append(len(ids)), whole(ids, mask, **options))[1]
    texts = text_features("two", model, pairs.texts(), {"text.embed", "text.pooled"})
    assert calls == [len(set(pairs.texts()))]
    assert texts["text.embed"].shape == (7, 9)
    looked, direct = OnlineTeacher("two", model, texts), OnlineTeacher("two", model)
    for batch in batches(sequence_of(pairs, {"two": model}), count=4):
        calls.clear()
        found = looked.targets(batch, WANT)
        assert not calls
        expected = direct.targets(batch, WANT)
        assert calls
        assert found.keys() == expected.keys()
        for key in WANT:
            torch.testing.assert_close(found[key], expected[key], rtol=1e-5, atol=1e-5)
    half = OnlineTeacher("two", model, {"text.embed": texts["text.embed"]})
    calls.clear()
    assert half.targets(batch, {"text.embed", "text.pooled"})["text.pooled"].shape == (len(batch.texts), 24)
    assert len(calls) == 1


def test_text_features_are_checked():
    model = tiny_teachers()["one"]
    assert text_features("one", model, [], {"text.embed"})["text.embed"].shape == (0, 20)
    with torch.no_grad():
        model.text_projection[0].weight.zero_()
    with pytest.raises(UserError, match=r"Teacher one: found text.embed of length zero in 2 of 2 rows"):
        text_features("one", model, ["a", "b", "a"], {"text.embed"})


def test_the_fingerprint_follows_every_weight_and_not_the_layout():
    model = tiny_teachers()["one"]
    before = model_fingerprint(model)
    assert model_fingerprint(tiny_teachers()["one"]) == before
    model.to(memory_format=torch.channels_last)
    assert model_fingerprint(model) == before
    seen = {before}
    with torch.no_grad():
        for value in (model.log_logit_scale, next(model.image_tower.parameters()), next(model.image_tower.buffers())):
            value.add_(1e-3)
            seen.add(model_fingerprint(model))
    assert len(seen) == 4


def test_the_model_keeps_its_mode_and_an_online_teacher_is_frozen(pairs, tmp_path):
    model = tiny_teachers()["one"].train()
    cached(model, [pairs], tmp_path, settings=ViewSettings())
    assert model.training
    online = OnlineTeacher("one", model)
    assert not model.training
    assert not any(value.requires_grad for value in model.parameters())
    batch = batch_of(sequence_of(pairs, {"one": model}), (2, 5))
    targets = online.targets(batch, {"image.embed", "text.embed"})
    assert targets["image.embed"].shape == (2, 20)
    assert targets["text.embed"].shape == (0, 20)
