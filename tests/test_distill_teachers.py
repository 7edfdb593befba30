"""A stored teacher is the online teacher on the same views and captions, kept under a name that no change survives."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from helpers.distilling import TEXTS, VIEWS, batch_of, sequence_of, tiny_teachers
from helpers.pairs import picture_pairs

from vlkd.data.views import ViewSettings
from vlkd.distill import teachers as module
from vlkd.distill.teachers import OnlineTeacher, StoredTeacher, stored_teacher
from vlkd.errors import UserError
from vlkd.models.base import model_fingerprint

WANT = frozenset({"image.embed", "text.embed", "image.pooled", "text.pooled", "logit_scale"})


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    return picture_pairs(tmp_path_factory.mktemp("pictures"), TEXTS)


def store(model, pairs, folder, *, name="one", **changes):
    options = {"views": 3, "settings": VIEWS, "view_seed": 0, "folder": folder}
    return stored_teacher(name, model, pairs, changes.pop("want", WANT), **(options | changes))


@pytest.mark.parametrize("name", ["one", "two"])
@pytest.mark.parametrize("workers", [0, 1])
def test_stored_equals_online_on_every_view(name, workers, pairs, tmp_path):
    model = tiny_teachers()[name]
    online = OnlineTeacher(name, model)
    stored = store(model, pairs, tmp_path, name=name, batch_size=3, workers=workers)
    sequence = sequence_of(pairs, {name: model}, view_cycle=3)
    images = set()
    for start in range(0, 40, 5):
        batch = sequence.collate([sequence[position] for position in range(start, start + 5)])
        expected, found = online.targets(batch, WANT), stored.targets(batch, WANT)
        assert found.keys() == expected.keys() == WANT
        for key in WANT:
            torch.testing.assert_close(found[key], expected[key], rtol=1e-5, atol=1e-5)
            assert not found[key].requires_grad
        images |= {(int(row), int(view)) for row, view in zip(batch.rows, batch.views, strict=True)}
    assert len(images) == 24
    # The views differ by more than the tolerance, so the comparison above could fail.
    table = stored.tables["image.embed"]
    assert (table[0] - table[1]).abs().max() > 1e-3
    assert table.shape == (3, 8, model.width)
    assert stored.tables["text.embed"].shape == (len(pairs.texts()), model.width)


def test_equal_captions_have_equal_rows(pairs, tmp_path):
    table = store(tiny_teachers()["one"], pairs, tmp_path).tables["text.embed"]
    texts = pairs.texts()
    for i, left in enumerate(texts):
        for j, right in enumerate(texts):
            assert torch.equal(table[i], table[j]) == (left == right)


def test_a_second_call_reads_what_the_first_stored(pairs, tmp_path, monkeypatch):
    first = store(tiny_teachers()["one"], pairs, tmp_path)
    assert [path.suffix for path in tmp_path.iterdir()] == [".safetensors"]
    monkeypatch.setattr(module, "compute_tables", lambda *_, **__: pytest.fail("computed again"))
    second = store(tiny_teachers()["one"], pairs, tmp_path)
    assert first.tables.keys() == second.tables.keys()
    assert all(torch.equal(value, second.tables[key]) for key, value in first.tables.items())
    assert second.provides == WANT


@pytest.mark.parametrize(
    "changes",
    [
        {"views": 2},
        {"view_seed": 1},
        {"settings": replace(VIEWS, flip=0.0)},
        {"want": WANT - {"image.pooled"}},
        {"precision": "bf16"},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_other_features_have_another_name(changes, pairs, tmp_path):
    model = tiny_teachers()["one"]
    store(model, pairs, tmp_path)
    store(model, pairs, tmp_path, **changes)
    assert len(list(tmp_path.iterdir())) == 2


def test_features_of_views_drawn_in_another_way_are_stale(pairs, tmp_path, monkeypatch):
    model = tiny_teachers()["one"]
    store(model, pairs, tmp_path)
    drawn = module.view_of
    monkeypatch.setattr(module, "view_of", lambda settings, seed, key, number: drawn(settings, seed, key, number + 1))
    store(model, pairs, tmp_path)
    assert len(list(tmp_path.iterdir())) == 2


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


def test_other_data_have_another_name(pairs, tmp_path):
    model = tiny_teachers()["one"]
    store(model, pairs, tmp_path)
    store(model, replace(pairs, captions=[*pairs.captions[:-1], ("a dog",)]), tmp_path)
    assert len(list(tmp_path.iterdir())) == 2


def test_bfloat16_is_close_but_not_equal(pairs, tmp_path):
    model = tiny_teachers()["one"]
    full, half = (store(model, pairs, tmp_path, precision=kind).tables["image.embed"] for kind in ("fp32", "bf16"))
    assert half.dtype == torch.float32
    assert not torch.equal(full, half)
    assert torch.nn.functional.cosine_similarity(full, half, dim=-1).min() > 0.99


def test_broken_pictures_leave_zeros_and_are_known(tmp_path):
    broken = picture_pairs(tmp_path / "p", TEXTS, broken=(3, 6))
    found = store(tiny_teachers()["one"], broken, tmp_path / "f")
    assert found.unreadable_rows() == [3, 6]
    table = found.tables["image.embed"]
    assert table[:, [3, 6]].abs().max() == 0
    assert table[:, [0, 1, 2, 4, 5, 7]].abs().amax(dim=-1).min() > 0
    assert StoredTeacher("t", 4, {"text.embed": torch.zeros(3, 4)}).unreadable_rows() == []


def test_data_without_captions_still_give_the_width(pairs, tmp_path):
    found = store(tiny_teachers()["two"], replace(pairs, captions=[()] * 8), tmp_path)
    assert found.tables["text.embed"].shape == (0, 9)
    assert found.tables["image.embed"].shape == (3, 8, 9)


@pytest.mark.parametrize("side", ["image", "text"])
def test_a_nan_teacher_is_refused_and_leaves_no_file(side, pairs, tmp_path):
    model = tiny_teachers()["one"]
    with torch.no_grad():
        getattr(model, f"{side}_projection")[0].weight[0, 0] = float("nan")
    with pytest.raises(UserError, match=f"Teacher one: found {side}.embed that is not finite"):
        store(model, pairs, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_the_model_keeps_its_mode_and_an_online_teacher_is_frozen(pairs, tmp_path):
    model = tiny_teachers()["one"].train()
    store(model, pairs, tmp_path, settings=ViewSettings())
    assert model.training
    online = OnlineTeacher("one", model)
    assert not model.training
    assert not any(value.requires_grad for value in model.parameters())
    batch = batch_of(sequence_of(pairs, {"one": model}), (2, 5))
    targets = online.targets(batch, {"image.embed", "text.embed"})
    assert targets["image.embed"].shape == (2, 20)
    assert targets["text.embed"].shape == (0, 20)
