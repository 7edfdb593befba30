"""The vlkd model folder against compositions by hand, and its round trip."""

from __future__ import annotations

import json
import pickle
import shutil

import pytest
import timm
import torch
from helpers.tiny_models import CAPTIONS, tiny_composite, tiny_images, tiny_spec, tiny_tokenizer, write_bert, write_clip
from timm.data import create_transform
from transformers import AutoModel, AutoTokenizer

from vlkd.errors import UserError
from vlkd.features import DualEncoder, Preprocessing
from vlkd.models.composite import load_composite, tower_names
from vlkd.models.heads import LinearHead
from vlkd.models.load import load
from vlkd.models.spec import build_composite, with_text_of


def every_embedding(model):
    return torch.cat([model.encode_image(tiny_images()), model.encode_text(CAPTIONS)])


def test_image_side_equals_timm_by_hand():
    model = tiny_composite()
    tower = timm.create_model("resnet10t", channels=(8, 8, 16, 16), stem_width=8, num_classes=0).eval()
    tower.load_state_dict(model.image_tower.state_dict())
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    transform = create_transform(32, interpolation="bicubic", mean=mean, std=std, crop_pct=1.0)
    with torch.no_grad():
        pooled = tower(torch.stack([transform(image) for image in tiny_images()]))
    wanted = pooled @ model.image_projection[0].weight.T
    torch.testing.assert_close(model.encode_image(tiny_images(), batch_size=3), wanted, rtol=0, atol=1e-5)


def test_text_side_equals_transformers_by_hand(tmp_path):
    folder = write_bert(tmp_path / "bert")
    model = build_composite(tiny_spec(text=str(folder)))
    text = AutoTokenizer.from_pretrained(folder)(list(CAPTIONS), padding=True, return_tensors="pt")
    mask = text["attention_mask"][..., None]
    with torch.no_grad():
        tokens = AutoModel.from_pretrained(folder).eval()(**text).last_hidden_state
    wanted = (tokens * mask).sum(1) / mask.sum(1) @ model.text_projection[0].weight.T
    torch.testing.assert_close(model.encode_text(CAPTIONS, batch_size=2), wanted, rtol=0, atol=1e-5)


@pytest.mark.parametrize("text", ["compact", "bert"])
@pytest.mark.parametrize("projection", ["linear", "mlp"])
def test_round_trip_is_bit_equal(tmp_path, text, projection):
    changes = {"image_projection": projection, "text_projection": projection, "logit_bias": -10.0}
    if text == "bert":
        changes["text"] = str(write_bert(tmp_path / "bert"))
    model = tiny_composite(**changes)
    model.save(tmp_path / "a folder:with @odd# name", golden=True)
    shutil.rmtree(tmp_path / "bert", ignore_errors=True)
    loaded = load(str(tmp_path / "a folder:with @odd# name"))
    assert torch.equal(every_embedding(loaded), every_embedding(model))
    assert all(torch.equal(value, loaded.state_dict()[key]) for key, value in model.state_dict().items())
    scalars = loaded.encode({}, ("logit_scale", "logit_bias"))
    assert scalars["logit_scale"].item() == pytest.approx(1 / 0.07)
    assert scalars["logit_bias"].item() == -10.0
    loaded.save(tmp_path / "again")
    for name in ("model.json", "model.safetensors"):
        assert (tmp_path / "again" / name).read_bytes() == (
            tmp_path / "a folder:with @odd# name" / name
        ).read_bytes(), name
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_float16_on_disk_is_float32_in_memory(tmp_path):
    model = tiny_composite()
    # beyond float16's range, and beyond its precision
    model.image_tower.bn1.running_var.fill_(1e5)
    with torch.no_grad():
        model.log_logit_scale.fill_(2.6593)
    model.save(tmp_path / "full")
    model.save(tmp_path / "half", dtype="float16", golden=True)
    loaded = load(str(tmp_path / "half"))
    assert {value.dtype for value in loaded.parameters()} == {torch.float32}
    for name in ("image_tower.bn1.running_var", "log_logit_scale"):
        assert torch.equal(loaded.state_dict()[name], model.state_dict()[name])
    torch.testing.assert_close(every_embedding(loaded), every_embedding(model), rtol=0, atol=5e-3)
    sizes = [(tmp_path / name / "model.safetensors").stat().st_size for name in ("half", "full")]
    assert sizes[0] < 0.75 * sizes[1]
    with pytest.raises(UserError, match="expected one of float32, float16"):
        model.save(tmp_path / "other", dtype="int8")


def test_float_pixels_are_taken_as_they_are():
    model = tiny_composite()
    pixels = model.preprocessing.image_transform(tiny_images()[0])[None]
    by_hand = (pixels / 255 - torch.tensor([0.485, 0.456, 0.406])[:, None, None]) / torch.tensor([0.229, 0.224, 0.225])[
        :, None, None
    ]
    with torch.no_grad():
        found = [model.encode({"pixels": given}, ("image.embed",))["image.embed"] for given in (pixels, by_hand)]
    torch.testing.assert_close(found[0], found[1], rtol=0, atol=1e-5)


def test_protocols_and_the_wanted_features():
    model = tiny_composite()
    assert isinstance(model, DualEncoder)
    assert isinstance(model.preprocessing, Preprocessing)
    inputs = model.preprocessing.tokenize(CAPTIONS)
    found = model.encode(inputs, ("text.pooled", "logit_scale"))
    assert {key: tuple(value.shape) for key, value in found.items()} == {"text.pooled": (5, 32), "logit_scale": ()}
    with pytest.raises(UserError, match="cannot produce 'logit_bias'"):
        model.encode(inputs, ("logit_bias",))
    with pytest.raises(UserError, match="no feature is called"):
        model.encode(inputs, ("text.embeds",))


def test_empty_lists_are_refused():
    model = tiny_composite()
    for encode in (model.encode_image, model.encode_text):
        with pytest.raises(UserError, match="at least one item"):
            encode([])


def test_encoding_leaves_modes_and_gradients_alone():
    model = tiny_composite()
    model.train()
    model.image_tower.eval()
    assert not model.encode_image(tiny_images()).requires_grad
    assert model.training
    assert not model.image_tower.training
    assert model.text_tower.training


def test_parameter_counts_split_the_model():
    model = tiny_composite()
    counts = model.parameter_counts()
    total = sum(value.numel() for value in model.parameters())
    assert counts["image"] + counts["text"] + 1 == total
    towers = (model.text_tower, model.text_projection)
    assert counts["text"] == sum(value.numel() for module in towers for value in module.parameters())


def test_normalized_rows_have_length_one():
    found = tiny_composite().encode_text(CAPTIONS, normalize=True)
    torch.testing.assert_close(found.norm(dim=1), torch.ones(5))


def test_preprocessing_travels_without_weights():
    preprocessing = tiny_composite().preprocessing
    data = pickle.dumps(preprocessing)
    assert len(data) < 20_000
    assert torch.equal(pickle.loads(data).tokenize(CAPTIONS)["ids"], preprocessing.tokenize(CAPTIONS)["ids"])


def test_borrowed_text_side(tmp_path):
    """A student's image side, through a linear map, beside a CLIP teacher's text side."""
    write_clip(tmp_path / "teacher")
    student, head = tiny_composite(width=12), LinearHead(12, 24)
    pair = with_text_of(student, str(tmp_path / "teacher"), heads=[head])
    pair.save(tmp_path / "pair", golden=True)
    loaded, teacher = load(str(tmp_path / "pair")), load(str(tmp_path / "teacher"))
    assert torch.equal(loaded.encode_text(CAPTIONS), teacher.encode_text(CAPTIONS))
    wanted = student.encode_image(tiny_images()) @ head.weight.T
    torch.testing.assert_close(loaded.encode_image(tiny_images()), wanted, rtol=0, atol=1e-5)
    assert loaded.width == 24
    assert loaded.parameter_counts()["text"] == teacher.parameter_counts()["text"]
    stored = (tmp_path / "pair" / "model.safetensors").stat().st_size
    assert stored < 4 * student.parameter_counts()["image"] * 1.5
    assert not [name for name, value in loaded.named_parameters() if value.requires_grad and "reference" in name]
    loaded.train()
    assert not loaded.reference.training
    with pytest.raises(UserError, match="joint width 24, expected 12"):
        with_text_of(student, str(tmp_path / "teacher"))


def test_saving_replaces_models_alone(tmp_path):
    tiny_composite(seed=0).save(tmp_path / "model", golden=True)
    second = tiny_composite(seed=1)
    second.save(tmp_path / "model")
    assert torch.equal(every_embedding(load_composite(tmp_path / "model")), every_embedding(second))
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("keep")
    with pytest.raises(UserError, match="is no vlkd model"):
        second.save(tmp_path / "mine")
    assert (tmp_path / "mine" / "notes.txt").read_text() == "keep"


def test_a_failed_save_leaves_nothing(tmp_path, monkeypatch):
    model = tiny_composite()
    model.save(tmp_path / "model")
    before = (tmp_path / "model" / "model.safetensors").read_bytes()
    monkeypatch.setattr("vlkd.models.composite.save_file", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        model.save(tmp_path / "model")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    assert (tmp_path / "model" / "model.safetensors").read_bytes() == before


def change(folder, edit):
    layout = json.loads((folder / "model.json").read_text())
    edit(layout)
    (folder / "model.json").write_text(json.dumps(layout))


@pytest.mark.parametrize(
    ("edit", "sentence"),
    [
        (lambda x: x.update(width=25), "ends at width 24, expected the joint width 25"),
        (lambda x: x["text"].update(layers=3), "does not fit its model"),
        (lambda x: x["text"].update(width=36), "has shape"),
        (lambda x: x.update(version=2), "written by a newer vlkd"),
        (lambda x: x.update(format="other"), "another program's model"),
        (lambda x: x.pop("image"), "lacks or misspells 'image'"),
        (lambda x: x["image"].update(timm="resnet11"), "timm cannot build"),
        (lambda x: x["preprocessing"].update(std=[0, 1, 1]), "three positive deviations"),
        (lambda x: x["text"].update(kind="poem"), "expected compact, transformers or reference"),
    ],
)
def test_bad_model_json(tmp_path, edit, sentence):
    tiny_composite().save(tmp_path / "model")
    change(tmp_path / "model", edit)
    with pytest.raises(UserError, match=sentence):
        load(str(tmp_path / "model"))


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json"])
def test_missing_and_cut_files(tmp_path, name):
    tiny_composite().save(tmp_path / "model")
    path = tmp_path / "model" / name
    path.write_bytes(path.read_bytes()[:-50])
    with pytest.raises(UserError, match=r"damaged|is not a tokenizer\.json"):
        load(str(tmp_path / "model"))
    path.unlink()
    with pytest.raises(UserError, match="Found no"):
        load(str(tmp_path / "model"))


def test_bad_specs(tmp_path):
    for changes, sentence in (
        ({"width": 0}, "at least 1"),
        ({"tokenizer": str(tmp_path / "none.json")}, "Found no tokenizer"),
        ({"text": str(tmp_path)}, r"Found no config\.json"),
        ({"text": str(write_bert(tmp_path / "bert")), "context_length": 99}, "at most 24 positions"),
        ({"image_weights": "x.bin"}, "Found no file"),
    ):
        with pytest.raises(UserError, match=sentence):
            build_composite(tiny_spec(**changes), tokenizer=None if "tokenizer" in changes else tiny_tokenizer())


TOKENS = ("image.tokens", "image.token_embeds", "text.tokens", "text.token_embeds", "text.mask")
POOLED = ("image.pooled", "image.embed", "text.pooled", "text.embed")


def some_inputs(model, captions=CAPTIONS):
    pixels = torch.stack([model.preprocessing.image_transform(image) for image in tiny_images()])
    return {"pixels": pixels} | model.preprocessing.tokenize(captions)


@pytest.mark.parametrize("text", ["compact", "bert"])
@pytest.mark.parametrize("projection", ["linear", "mlp"])
def test_tokens_beside_the_pooled_output(tmp_path, text, projection):
    changes = {"image_size": 64, "image_projection": projection, "text_projection": projection}
    if text == "bert":
        changes["text"] = str(write_bert(tmp_path / "bert"))
    model = tiny_composite(**changes)
    inputs = some_inputs(model)
    with torch.no_grad():
        alone, together = model.encode(inputs, POOLED), model.encode(inputs, POOLED + TOKENS)
        for side, tower in (("image", model.image_projection), ("text", model.text_projection)):
            tokens = together[f"{side}.tokens"]
            one_by_one = torch.stack([tower(tokens[:, i]) for i in range(tokens.shape[1])], dim=1)
            torch.testing.assert_close(together[f"{side}.token_embeds"], one_by_one, rtol=0, atol=1e-5)
    assert all(torch.equal(alone[name], together[name]) for name in POOLED)
    shapes = {name: tuple(together[name].shape) for name in TOKENS}
    assert shapes == {
        "image.tokens": (4, 4, 16),
        "image.token_embeds": (4, 4, 24),
        "text.tokens": (5, 16, 32),
        "text.token_embeds": (5, 16, 24),
        "text.mask": (5, 16),
    }
    lengths = inputs["mask"].sum(dim=1)
    assert together["text.mask"].dtype == torch.bool
    assert torch.equal(together["text.mask"], torch.arange(16) < lengths[:, None])
    mean = torch.stack([row[:n].mean(dim=0) for row, n in zip(together["text.tokens"], lengths, strict=True)])
    torch.testing.assert_close(mean, together["text.pooled"], rtol=0, atol=1e-5)


def test_tokens_of_a_caption_do_not_depend_on_its_batch():
    """Every batch is padded to the context length, and real tokens do not see padding."""
    model = tiny_composite()
    with torch.no_grad():
        together = model.encode(some_inputs(model), TOKENS)
        for i, caption in enumerate(CAPTIONS):
            alone = model.encode(some_inputs(model, [caption]), TOKENS)
            kept = alone["text.mask"][0]
            assert torch.equal(kept, together["text.mask"][i])
            torch.testing.assert_close(
                alone["text.tokens"][0][kept], together["text.tokens"][i][kept], rtol=0, atol=1e-5
            )


def test_tokens_run_only_where_they_are_wanted(monkeypatch):
    """Neither tower does more for a pooled output than before, and each runs once for both."""
    model = tiny_composite()
    inputs = some_inputs(model)
    calls = []
    original = model.image_tower.forward_features
    monkeypatch.setattr(model.image_tower, "forward_features", lambda x: calls.append("image") or original(x))
    monkeypatch.setattr("vlkd.models.composite.image_tokens", lambda *_: calls.append("cells") or torch.zeros(4, 1, 16))
    model.text_tower.blocks[0].register_forward_hook(lambda *_: calls.append("text"))
    dimensions = []
    for projection in (model.image_projection, model.text_projection):
        projection.register_forward_hook(lambda _, given, __: dimensions.append(given[0].ndim))
    for want, towers, projected in (
        (("image.embed", "logit_scale"), ["image"], [2]),
        (("text.embed",), ["text"], [2]),
        (("image.pooled", "text.token_embeds"), ["image", "text"], [2, 2, 3]),
        (("image.embed", "image.tokens", "text.pooled"), ["image", "cells", "text"], [2, 3, 2]),
    ):
        calls.clear()
        dimensions.clear()
        assert set(model.encode(inputs, want)) == set(want)
        assert (calls, dimensions) == (towers, projected), want


def test_projecting_held_tower_features():
    model = tiny_composite(image_projection="mlp", text_projection="mlp", projection_dropout=0.5)
    want = ("image.embed", "text.embed", "image.token_embeds", "text.token_embeds")
    inputs = some_inputs(model)
    with torch.no_grad():
        held = model.encode(inputs, tower_names(want) | {"text.mask"})
        found, wanted = model.project(held), model.encode(inputs, want)
    assert found.keys() == set(want)
    assert all(torch.equal(found[name], wanted[name]) for name in want)


def test_the_tower_features_behind_a_wish():
    assert tower_names(("image.embed", "logit_scale", "logit_bias")) == {"image.pooled"}
    assert tower_names(("image.token_embeds", "text.token_embeds", "text.mask", "text.embed")) == {
        "image.tokens",
        "text.tokens",
        "text.mask",
        "text.pooled",
    }
    assert tower_names(("image.pooled", "text.tokens")) == {"image.pooled", "text.tokens"}
    assert tower_names(()) == frozenset()


def test_a_borrowed_text_side_gives_no_text_tokens(tmp_path):
    tiny_composite(seed=1).save(tmp_path / "lender")
    pair = with_text_of(tiny_composite(), str(tmp_path / "lender"))
    inputs = some_inputs(pair)
    with torch.no_grad():
        found = pair.encode(inputs, ("image.tokens", "text.embed"))
    assert found["image.tokens"].shape == (4, 1, 16)
    assert torch.equal(found["text.embed"], pair.encode_text(CAPTIONS))
    for name in ("text.tokens", "text.token_embeds", "text.mask"):
        with pytest.raises(UserError, match=f"cannot produce '{name}'"):
            pair.encode(inputs, (name,))
