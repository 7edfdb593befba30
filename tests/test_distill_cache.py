"""A cache holds what the teacher gives, joins it by key, resumes byte for byte, and refuses everything else by name."""

from __future__ import annotations

import json
import multiprocessing
import pickle
from dataclasses import replace

import numpy as np
import pytest
import torch
from helpers.distilling import TEXTS, VIEWS, tiny_teachers
from helpers.pairs import noise, picture_pairs
from helpers.tiny_models import CAPTIONS
from safetensors import safe_open
from safetensors.torch import load_file

from vlkd.data.prepare import encode_picture
from vlkd.data.shard_writer import RawSample, write_shards
from vlkd.data.sources import ImageFile, Pairs, open_pairs, union
from vlkd.data.views import geometry, view_of
from vlkd.distill.cache import CacheSpec, check_embeddings, ensure_cache, open_cache, verify_cache
from vlkd.distill.cache import build as cache_build
from vlkd.distill.cache.columns import pack, storage_error, unpack
from vlkd.distill.cache.format import MANIFEST
from vlkd.distill.teachers import CachedTeacher
from vlkd.errors import UserError

EMBED = ("image.embed", "text.embed")
SPEC = CacheSpec(features=EMBED, views=3, view_settings=VIEWS, dtype="float32")
ROWS = torch.arange(8).repeat_interleave(3)
NUMBERS = torch.arange(3).repeat(8)


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    return picture_pairs(tmp_path_factory.mktemp("pictures"), TEXTS)


@pytest.fixture
def model():
    return tiny_teachers()["one"]


@pytest.fixture
def small(monkeypatch):
    """Shards of three rows."""
    monkeypatch.setattr(cache_build, "SHARD_ROWS", 3)


def build(model, pairs, folder, *, name="one", **changes):
    options = {"batch_size": changes.pop("batch_size", 64), "workers": changes.pop("workers", 0)}
    return ensure_cache(folder, name, model, pairs, replace(SPEC, **changes), **options)


def direct(model, pairs, feature="image.embed"):
    """Every view of every row by the model alone, (N * K, ...), from views drawn here."""
    pixels = [
        model.preprocessing.view_transform(geometry(pairs.image(row), view_of(VIEWS, 0, pairs.keys[row], number)))
        for row, number in zip(ROWS.tolist(), NUMBERS.tolist(), strict=True)
    ]
    with torch.no_grad():
        return model.encode({"pixels": torch.stack(pixels)}, {feature})[feature]


def direct_texts(model, pairs, feature="text.embed"):
    with torch.no_grad():
        return model.encode(model.preprocessing.tokenize(pairs.texts()), {feature})[feature]


@pytest.mark.parametrize("workers", [0, 1])
def test_every_view_and_caption_is_what_the_model_gives(pairs, model, tmp_path, small, workers):
    reader = build(model, pairs, tmp_path / "c", batch_size=7, workers=workers)
    expected = direct(model, pairs)
    torch.testing.assert_close(reader.image("image.embed", ROWS, NUMBERS), expected, rtol=1e-5, atol=1e-5)
    mixed = torch.randperm(24, generator=torch.Generator().manual_seed(0))[:10]
    torch.testing.assert_close(
        reader.image("image.embed", ROWS[mixed], NUMBERS[mixed]), expected[mixed], rtol=1e-5, atol=1e-5
    )
    texts = torch.tensor([6, 0, 3, 3, 2])
    torch.testing.assert_close(
        reader.text("text.embed", texts), direct_texts(model, pairs)[texts], rtol=1e-5, atol=1e-5
    )
    assert float(reader.scalar("logit_scale")) == float(model.log_logit_scale.detach().exp())
    assert (len(reader), reader.captions, reader.views, reader.width) == (8, 7, 3, model.width)
    assert reader.image("image.embed", ROWS[:0], NUMBERS[:0]).shape == (0, 20)
    assert reader.text("text.embed", ROWS[:0]).shape == (0, 20)
    # Views differ by far more than the tolerance, so that the comparison above could fail.
    assert (expected[0] - expected[1]).abs().max() > 1e-3
    with pytest.raises(ValueError, match="of a cache of 3"):
        reader.image("image.embed", ROWS[:1], torch.tensor([3]))


def test_stored_views_are_the_drawn_ones_and_mirrored_ones_have_features_of_their_own(pairs, model, tmp_path, small):
    reader = build(model, pairs, tmp_path / "c")
    mirrored = []
    for row, number in zip(ROWS.tolist(), NUMBERS.tolist(), strict=True):
        drawn = view_of(VIEWS, 0, pairs.keys[row], number)
        stored = reader.view(row, number)
        assert (stored.box, stored.flip, stored.color) == (drawn.box, drawn.flip, (1.0, 1.0, 1.0))
        if stored.flip:
            mirrored.append((row, number))
    assert 0 < len(mirrored) < 24
    row, number = mirrored[0]
    found = reader.image("image.embed", torch.tensor([row]), torch.tensor([number]))
    for flip, equal in ((True, True), (False, False)):
        picture = geometry(pairs.image(row), replace(reader.view(row, number), flip=flip))
        pixels = model.preprocessing.view_transform(picture)[None]
        value = model.encode({"pixels": pixels}, {"image.embed"})["image.embed"]
        assert torch.allclose(found, value, atol=1e-5) == equal


def test_tokens_and_masks_are_held(pairs, model, tmp_path):
    features = ("image.tokens", "text.mask", "text.tokens")
    tokens, texts = direct(model, pairs, "image.tokens"), direct_texts(model, pairs, "text.tokens")
    mask = model.preprocessing.tokenize(pairs.texts())["mask"]
    assert tokens.dim() == texts.dim() == 3
    for dtype, tolerance in (("float32", 1e-5), ("int8", 0.05)):
        reader = build(model, pairs, tmp_path / dtype, features=features, dtype=dtype)
        found = reader.image("image.tokens", ROWS, NUMBERS)
        torch.testing.assert_close(found, tokens, rtol=tolerance, atol=tolerance)
        found = reader.text("text.tokens", torch.arange(7))
        real = torch.nn.functional.pad(mask, (0, texts.shape[1] - mask.shape[1]))
        torch.testing.assert_close(found[real], texts[real], rtol=tolerance, atol=tolerance)
        assert found[~real].eq(0).all()
        held = reader.text("text.mask", torch.arange(7))
        assert held.dtype == torch.bool
        assert torch.equal(held[:, : mask.shape[1]], mask)
        assert not held[:, mask.shape[1] :].any()
        assert min(verify_cache(reader, model, pairs).values()) > 0.999


def test_a_shard_per_tar_and_tars_of_one_name(model, tmp_path, small):
    pictures = picture_pairs(tmp_path / "p", [CAPTIONS[i % 4 : i % 4 + 1] for i in range(7)])
    samples = [
        RawSample(key=key, image=encode_picture(file.path)[0], extension="png", captions=captions)
        for key, file, captions in zip(pictures.keys, pictures.files, pictures.captions, strict=True)
    ]
    write_shards(samples[:4], tmp_path / "a", samples_per_shard=4)
    write_shards(samples[4:], tmp_path / "b", samples_per_shard=4)
    tars = open_pairs(str(tmp_path / "[ab]" / "*.tar"))
    reader = build(model, tars, tmp_path / "c")
    entries = [(entry["file"], entry["rows"], entry["captions"]) for entry in reader.manifest["shards"]]
    assert entries == [
        ("000000.000.safetensors", 3, 3),
        ("000000.001.safetensors", 1, 1),
        ("000000-2.000.safetensors", 3, 3),
    ]
    alone = build(model, pictures, tmp_path / "d")
    rows, views = torch.tensor([6, 0, 3]), torch.tensor([2, 1, 0])
    torch.testing.assert_close(reader.image("image.embed", rows, views), alone.image("image.embed", rows, views))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "int8"])
def test_the_measured_error_is_that_of_numpy(pairs, model, tmp_path, small, dtype):
    exact = build(model, pairs, tmp_path / "exact")
    reader = build(model, pairs, tmp_path / dtype, dtype=dtype)
    for feature, found, value in (
        ("image.embed", reader.image("image.embed", ROWS, NUMBERS), exact.image("image.embed", ROWS, NUMBERS)),
        ("text.embed", reader.text("text.embed", torch.arange(7)), exact.text("text.embed", torch.arange(7))),
    ):
        a, b = value.numpy().astype(np.float64), found.numpy().astype(np.float64)
        lengths = np.sqrt((a * a).sum(1)), np.sqrt((b * b).sum(1))
        cosine = 1 - (a * b).sum(1) / (lengths[0] * lengths[1])
        relative = np.sqrt(((a - b) ** 2).sum(1)) / lengths[0]
        told = reader.manifest["error"][feature]
        assert told["max_cosine_distance"] == pytest.approx(cosine.max(), rel=1e-6, abs=1e-12)
        assert told["max_relative_l2"] == pytest.approx(relative.max(), rel=1e-6)
        assert 1e-5 < relative.max() < {"float16": 1e-3, "bfloat16": 5e-3, "int8": 2e-2}[dtype]
    assert exact.manifest["error"]["image.embed"] == {
        "max_cosine_distance": pytest.approx(0, abs=1e-12),
        "max_relative_l2": 0.0,
    }


def test_int8_is_symmetric_per_vector():
    value = np.random.default_rng(0).normal(size=(3, 4, 6)).astype(np.float32)
    value[1, 2] = 0
    packed = pack("x", torch.from_numpy(value), "int8")
    scale = np.abs(value).max(axis=-1) / np.float32(127)
    codes = np.rint(value / np.where(scale > 0, scale, 1)[..., None]).astype(np.int8)
    np.testing.assert_array_equal(packed["x"].numpy(), codes)
    np.testing.assert_array_equal(packed["x.scale"].numpy(), scale)
    np.testing.assert_array_equal(unpack(*packed.values()).numpy(), codes.astype(np.float32) * scale[..., None])
    assert packed["x"].abs().amax() == 127
    assert storage_error(torch.zeros(2, 3), torch.zeros(2, 3)).tolist() == [0, 0]


def shard_bytes(folder):
    return {path.name: path.read_bytes() for path in folder.glob("*.safetensors")}


def test_a_killed_build_goes_on_where_it_was_and_gives_the_same_bytes(pairs, model, tmp_path, small, monkeypatch):
    whole = build(model, pairs, tmp_path / "whole", batch_size=4)
    written = []
    real = cache_build.write_shard

    def killed(path, *rest):
        if len(written) == 2:
            raise KeyboardInterrupt
        written.append(path.name)
        real(path, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(cache_build, "write_shard", killed)
        with pytest.raises(KeyboardInterrupt):
            build(model, pairs, tmp_path / "half", batch_size=4)
    assert written == ["rows.000.safetensors", "rows.001.safetensors"]
    assert not (tmp_path / "half" / MANIFEST).exists()
    with pytest.raises(UserError, match="holds half a cache of teacher one; continue it with `vlkd cache embeddings"):
        open_cache(tmp_path / "half", "one", model, pairs, SPEC)
    # Half a shard, as a machine leaves it that loses power.
    (tmp_path / "half" / written[1]).write_bytes((tmp_path / "half" / written[1]).read_bytes()[:500])
    seen = []
    encode = model.encode
    monkeypatch.setattr(
        model, "encode", lambda inputs, want: (seen.append(len(inputs.get("pixels", ()))), encode(inputs, want))[1]
    )
    again = build(model, pairs, tmp_path / "half", batch_size=4)
    assert sum(seen) == 3 * (8 - 3)
    assert shard_bytes(tmp_path / "half") == shard_bytes(tmp_path / "whole")
    assert again.manifest["shards"] == whole.manifest["shards"]
    assert again.manifest["error"] == whole.manifest["error"]
    assert (whole.manifest["computed"], again.manifest["computed"]) == (8, 5)
    seen.clear()
    build(model, pairs, tmp_path / "half", batch_size=4)
    assert not seen


def test_building_leaves_the_global_generator_alone(pairs, model, tmp_path):
    torch.manual_seed(3)
    build(model, pairs, tmp_path / "c")
    found = torch.rand(2)
    torch.manual_seed(3)
    assert torch.equal(found, torch.rand(2))


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"views": 4}, r"of fewer views \(found 3, expected 4\)"),
        ({"view_seed": 1}, r"of other views \(found .*'seed': 0.*, expected .*'seed': 1"),
        (
            {"view_settings": replace(VIEWS, flip=0.0)},
            r"of other views \(found .*'flip': 0.5.*, expected .*'flip': 0.0",
        ),
        ({"features": (*EMBED, "image.pooled")}, r"without image.pooled \(found image.embed, text.embed\)"),
        (
            {"views": 5, "features": (*EMBED, "image.pooled")},
            r"of fewer views \(.*\), which teachers.views=3 takes, without image.pooled \(.*\); remove ",
        ),
    ],
)
def test_another_specification_is_refused_by_name(pairs, model, tmp_path, changes, sentence):
    build(model, pairs, tmp_path / "c")
    with pytest.raises(UserError, match=r"The features of teacher one in .*c were made " + sentence):
        build(model, pairs, tmp_path / "c", **changes)


@pytest.mark.parametrize(
    ("stored", "asked", "sentence"),
    [
        ({"dtype": "float32"}, {"dtype": "int8"}, None),
        ({"dtype": "float16"}, {"dtype": "bfloat16"}, None),
        ({"dtype": "int8"}, {"dtype": "float16"}, r"in a coarser dtype \(found int8, expected float16\)"),
        ({"precision": "fp32"}, {"precision": "bf16"}, None),
        ({"precision": "bf16"}, {"precision": "fp32"}, r"in a coarser precision \(found bf16, expected fp32\)"),
    ],
)
def test_more_faithful_features_serve_and_coarser_ones_do_not(pairs, model, tmp_path, stored, asked, sentence):
    build(model, pairs, tmp_path / "c", **stored)
    if sentence is None:
        assert build(model, pairs, tmp_path / "c", **asked).manifest["dtype"] == stored.get("dtype", "float32")
        return
    with pytest.raises(UserError, match=sentence):
        build(model, pairs, tmp_path / "c", **asked)


def test_other_weights_are_refused_by_name(pairs, model, tmp_path):
    found = build(model, pairs, tmp_path / "c").manifest["teacher"]["fingerprint"]
    with torch.no_grad():
        model.log_logit_scale.add_(1e-3)
    with pytest.raises(UserError, match=rf"with other weights \(found {found}, expected \w+\); remove the folder"):
        build(model, pairs, tmp_path / "c")


def test_views_drawn_in_another_way_are_refused(pairs, model, tmp_path, monkeypatch):
    from vlkd.distill.cache import format as cache_format

    build(model, pairs, tmp_path / "c")
    monkeypatch.setattr(cache_format, "view_of", lambda settings, seed, key, n: view_of(settings, seed, key, n + 1))
    with pytest.raises(UserError, match="of views drawn in another way"):
        build(model, pairs, tmp_path / "c")


def test_other_data_are_refused_and_a_foreign_key_too(pairs, model, tmp_path):
    build(model, pairs, tmp_path / "c")
    relabelled = replace(pairs, captions=[*pairs.captions[:-1], ("a dog",)])
    renamed = replace(pairs, keys=["stranger", *pairs.keys[1:]])
    for other, key in ((relabelled, "p7"), (renamed, "stranger")):
        sentence = rf"from other data \(found 7 of 8 images as they are now, expected all; not '{key}'\)"
        with pytest.raises(UserError, match=sentence):
            build(model, other, tmp_path / "c")


def test_more_views_features_and_rows_than_needed_serve(pairs, model, tmp_path, small):
    build(model, pairs, tmp_path / "c", features=(*EMBED, "image.pooled"))
    expected = direct(model, pairs).view(8, 3, -1)
    order = [6, 1, 4, 3]
    some = Pairs([pairs.keys[i] for i in order], [pairs.captions[i] for i in order], [pairs.files[i] for i in order])
    spec = replace(SPEC, views=2, features=("image.embed", "text.embed"), view_settings=replace(VIEWS, color=0.9))
    reader = open_cache(tmp_path / "c", "one", model, some, spec)
    torch.testing.assert_close(
        reader.image("image.embed", torch.arange(4), torch.ones(4, dtype=torch.int64)), expected[order, 1]
    )
    torch.testing.assert_close(
        reader.text("text.embed", torch.arange(len(some.texts()))), direct_texts(model, some), rtol=1e-5, atol=1e-5
    )
    assert reader.view(0, 1) == replace(view_of(VIEWS, 0, "p6", 1), color=(1.0, 1.0, 1.0))


def test_broken_folders_are_refused(pairs, model, tmp_path, small):
    with pytest.raises(
        UserError, match=r"no cache of teacher one; build it with `vlkd cache embeddings --teacher tiny"
    ):
        open_cache(tmp_path / "c" / "one" / "p", "one", model, pairs, SPEC)
    build(model, pairs, tmp_path / "c")
    manifest, shard = tmp_path / "c" / MANIFEST, tmp_path / "c" / "rows.001.safetensors"
    text, content = manifest.read_text(), shard.read_bytes()

    def refused(sentence):
        with pytest.raises(UserError, match=sentence):
            build(model, pairs, tmp_path / "c")

    for changed, sentence in (
        ("{", "is no manifest of a teacher cache"),
        (text.replace('"version": 2', '"version": 1'), r"in another format version \(found 1, expected 2\)"),
        (text.replace("rows.001", "../c/rows.001"), "is no manifest|another format"),
    ):
        manifest.write_text(changed)
        refused(sentence)
    manifest.write_text(text)
    shard.write_bytes(content + b"x")
    refused(rf"rows.001.safetensors of teacher one has {len(content) + 1} bytes, expected {len(content)} bytes")
    shard.unlink()
    refused("rows.001.safetensors of teacher one is missing")
    manifest.unlink()
    build(model, pairs, tmp_path / "c")
    assert shard.read_bytes() == content


def test_half_a_cache_of_another_build_is_refused(pairs, model, tmp_path, small):
    build(model, pairs, tmp_path / "c")
    (tmp_path / "c" / MANIFEST).unlink()
    (tmp_path / "c" / "rows.002.safetensors").unlink()
    for changes, sentence in (
        ({"view_seed": 1}, "of other views"),
        ({"dtype": "int8"}, r"with another dtype \(found float32, expected int8\)"),
        ({"views": 2}, r"with another number of views \(found 3, expected 2\)"),
    ):
        with pytest.raises(UserError, match=sentence):
            build(model, pairs, tmp_path / "c", **changes)
    other = replace(pairs, captions=[("a dog",), *pairs.captions[1:]])
    with pytest.raises(UserError, match=r"from other data \(the images of rows.000.safetensors have changed\)"):
        build(model, other, tmp_path / "c")
    (tmp_path / "c" / "strange.safetensors").write_bytes(b"")
    with pytest.raises(UserError, match=r"from other data \(found strange.safetensors, expected rows.000.safetensors"):
        build(model, pairs, tmp_path / "c")


def test_unreadable_pictures_are_known_and_leave_zeros(model, tmp_path, small):
    broken = picture_pairs(tmp_path / "p", TEXTS, broken=(3, 6))
    reader = build(model, broken, tmp_path / "c", dtype="int8", batch_size=6)
    assert reader.unreadable_rows() == [3, 6]
    lengths = reader.image("image.embed", ROWS, NUMBERS).norm(dim=1).view(8, 3)
    assert lengths.eq(0).all(dim=1).nonzero()[:, 0].tolist() == [3, 6]
    assert lengths[[0, 1, 2, 4, 5, 7]].min() > 0
    assert [entry["unreadable"] for entry in reader.manifest["shards"]] == [0, 1, 1]
    assert min(verify_cache(reader, model, broken).values()) > 0.999


def test_data_without_captions_and_caches_of_texts_alone(pairs, model, tmp_path):
    silent = build(model, replace(pairs, captions=[()] * 8), tmp_path / "silent")
    assert silent.text("text.embed", torch.tensor([], dtype=torch.int64)).shape == (0, 20)
    broken = picture_pairs(tmp_path / "p", TEXTS, broken=(0, 1, 2))
    texts = build(model, broken, tmp_path / "texts", features=("text.embed",))
    torch.testing.assert_close(
        texts.text("text.embed", torch.arange(7)), direct_texts(model, broken), rtol=1e-5, atol=1e-5
    )
    assert verify_cache(texts, model, broken).keys() == {"text.embed"}


def test_equal_captions_have_equal_features(pairs, model, tmp_path):
    table = build(model, pairs, tmp_path / "c").text("text.embed", torch.arange(7))
    texts = pairs.texts()
    for i, left in enumerate(texts):
        for j, right in enumerate(texts):
            assert torch.equal(table[i], table[j]) == (left == right)


def test_bfloat16_passes_are_close_but_not_equal(pairs, model, tmp_path):
    full, half = (
        build(model, pairs, tmp_path / kind, precision=kind).image("image.embed", ROWS, NUMBERS)
        for kind in ("fp32", "bf16")
    )
    assert not torch.equal(full, half)
    assert torch.nn.functional.cosine_similarity(full, half, dim=-1).min() > 0.99


@pytest.mark.parametrize("side", ["image", "text"])
def test_teachers_that_cannot_teach_are_refused(pairs, tmp_path, side):
    def spoilt(change):
        model = tiny_teachers()["one"]
        with torch.no_grad():
            change(getattr(model, f"{side}_projection")[0])
        return model

    class Constant(torch.nn.Module):
        def forward(self, rows):
            return torch.arange(1.0, 21.0).expand(len(rows), 20) * (2 + rows[:, :1].abs())

    unfit = {
        "is not finite": spoilt(lambda head: head.weight[0, 0].fill_(float("nan"))),
        "of length zero in": spoilt(lambda head: head.weight.zero_()),
        "is too large for float16; store it as bfloat16": spoilt(lambda head: head.weight.mul_(1e9)),
    }
    for words, model in unfit.items():
        with pytest.raises(
            UserError, match=rf"Teacher one: .*{side}.embed .*{words}|Teacher one: {side}.embed {words}"
        ):
            build(model, pairs, tmp_path / "c", dtype="float16")
        assert list((tmp_path / "c").iterdir()) == []
    model = tiny_teachers()["one"]
    setattr(model, f"{side}_projection", Constant())
    sentence = rf"Teacher one: found one and the same direction of {side}.embed for all"
    with pytest.raises(UserError, match=sentence):
        build(model, pairs, tmp_path / "c")
    assert not (tmp_path / "c" / MANIFEST).exists()


def test_embeddings_are_checked_row_by_row():
    rows = torch.randn(5, 4, generator=torch.Generator().manual_seed(0))
    check_embeddings("t", {"image.embed": rows, "text.embed": rows[:1], "text.mask": rows > 0})
    check_embeddings("t", {"image.embed": rows[:0], "image.pooled": torch.ones(3, 4)})
    with pytest.raises(UserError, match=r"Teacher t: found image.pooled that is not finite in 1 of 5 rows"):
        check_embeddings("t", {"image.pooled": rows.index_fill(0, torch.tensor([2]), float("inf"))})
    with pytest.raises(UserError, match=r"text.embed of length zero in 2 of 5 rows"):
        check_embeddings("t", {"text.embed": rows.index_fill(0, torch.tensor([0, 4]), 0)})
    with pytest.raises(UserError, match=r"one and the same direction of text.embed for all 3 inputs"):
        check_embeddings("t", {"text.embed": rows[:1] * torch.tensor([[1.0], [2.0], [3.0]])})
    check_embeddings("t", {"text.embed": rows[:1] * torch.tensor([[1.0], [-1.0]])})


def test_verify_sees_flipped_bytes_and_other_weights(pairs, model, tmp_path, small, monkeypatch):
    reader = build(model, pairs, tmp_path / "c", dtype="float16")
    found = verify_cache(reader, model, pairs, sample=5)
    assert found.keys() == set(EMBED)
    assert min(found.values()) > 0.99999
    with torch.no_grad():
        model.image_projection[0].weight.copy_(torch.randn(model.image_projection[0].weight.shape))
    found = verify_cache(reader, model, pairs)
    assert found["text.embed"] > 0.99999 > 0.9 > found["image.embed"]
    path = tmp_path / "c" / "rows.002.safetensors"
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.write_bytes(content)
    with pytest.raises(
        UserError, match=r"rows.002.safetensors of teacher one has changed since it was written \(sha256"
    ):
        verify_cache(reader, model, pairs)


def test_shards_tell_their_rows(pairs, model, tmp_path, small):
    reader = build(model, pairs, tmp_path / "c")
    columns = load_file(str(tmp_path / "c" / "rows.001.safetensors"))
    assert {name: tuple(value.shape) for name, value in columns.items()} == {
        "image.embed": (3, 3, 20),
        "text.embed": (3, 20),
        "views": (3, 3, 5),
        "readable": (3,),
        "captions": (3,),
    }
    assert columns["captions"].tolist() == [2, 1, 0]
    assert (columns["views"].dtype, columns["captions"].dtype) == (torch.float64, torch.int32)
    with safe_open(str(tmp_path / "c" / "rows.001.safetensors"), "pt") as file:
        assert json.loads(file.metadata()["vlkd"])["keys"] == ["p3", "p4", "p5"]
    assert json.loads((tmp_path / "c" / MANIFEST).read_text()) == reader.manifest


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_a_reader_travels_to_workers(pairs, model, tmp_path, small, method):
    reader = build(model, pairs, tmp_path / "c")
    teacher = CachedTeacher("one", 20, [reader, reader])
    wanted = [(row, number) for row in range(16) for number in range(3)]
    expected = [teacher.view(*one) for one in wanted]
    assert expected[:24] == expected[24:]
    # The columns stay behind: only paths and the join travel.
    assert len(reader._opened) == 3
    assert not pickle.loads(pickle.dumps(reader))._opened
    with multiprocessing.get_context(method).Pool(1) as pool:
        assert pool.starmap(teacher.view, wanted) == expected


def test_union_of_sources_with_clashing_keys_joins_right(model, tmp_path):
    first = picture_pairs(tmp_path / "a", [CAPTIONS[:2], (), CAPTIONS[2:3]])
    second = picture_pairs(tmp_path / "b", [CAPTIONS[3:4], CAPTIONS[:1]])
    for number, file in enumerate(second.files):
        noise(40 + number).save(file.path)
    assert first.keys[:2] == second.keys
    both = union([first, second])
    parts = [build(model, source, tmp_path / name) for name, source in (("c", first), ("d", second))]
    teacher = CachedTeacher("one", 20, parts)
    for row, (part, own) in enumerate([(0, 0), (0, 1), (0, 2), (1, 0), (1, 1)]):
        view = teacher.view(row, 1)
        assert view == parts[part].view(own, 1)
        picture = geometry(both.image(row), view)
        value = model.encode({"pixels": model.preprocessing.view_transform(picture)[None]}, {"image.embed"})[
            "image.embed"
        ]
        torch.testing.assert_close(parts[part].image("image.embed", torch.tensor([own]), torch.tensor([1])), value)


def test_a_pass_in_bf16_builds_and_is_read_under_autocast(pairs, model, tmp_path, small):
    """Several shards of halves, joined inside a step that runs under autocast."""
    reader = build(model, pairs, tmp_path / "c", precision="bf16", dtype="float16")
    with torch.autocast("cpu", torch.bfloat16):
        found = reader.image("image.embed", ROWS, NUMBERS)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, reader.image("image.embed", ROWS, NUMBERS), rtol=0, atol=0)
    cosine = torch.cosine_similarity(found, direct(model, pairs))
    assert 0.999 < float(cosine.min()) < 1


def test_another_picture_of_the_same_name_and_length_is_refused(model, tmp_path):
    """Two uncompressed pictures change places: names and lengths stay."""
    folder = tmp_path / "p"
    folder.mkdir()
    paths = [folder / f"{number}.bmp" for number in range(2)]
    for number, path in enumerate(paths):
        noise(number).save(path)
    pairs = Pairs(["a", "b"], [("a dog",), ("a red square",)], [ImageFile(path) for path in paths])
    build(model, pairs, tmp_path / "c")
    first, second = (path.read_bytes() for path in paths)
    assert len(first) == len(second)
    paths[0].write_bytes(second)
    paths[1].write_bytes(first)
    with pytest.raises(UserError, match="from other data"):
        build(model, pairs, tmp_path / "c")


def test_a_build_that_is_continued_makes_a_damaged_shard_again(pairs, model, tmp_path, small):
    build(model, pairs, tmp_path / "c")
    shard = tmp_path / "c" / "rows.001.safetensors"
    content = shard.read_bytes()
    shard.write_bytes(content[:-5] + bytes([content[-5] ^ 255]) + content[-4:])
    (tmp_path / "c" / MANIFEST).unlink()
    assert build(model, pairs, tmp_path / "c").manifest["computed"] == 3
    assert shard.read_bytes() == content
