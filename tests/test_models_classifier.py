"""The classifier folder: two heads and their mix against closed forms, its round trip, and what it refuses."""

from __future__ import annotations

import json
import pickle

import numpy as np
import pytest
import timm
import torch
from helpers.tiny_models import CAPTIONS, TINY_IMAGE, tiny_composite, tiny_images
from safetensors.torch import load_file, save_file

from vlkd.errors import UserError
from vlkd.features import Preprocessing
from vlkd.models.classifier import Classifier, is_classifier, load_classifier, mixed_probabilities
from vlkd.models.classifier_spec import ClassifierSpec, build_classifier
from vlkd.models.composite import load_composite
from vlkd.models.load import load

CLASSES = ("a red fox", "ein Bär", "a crane", "a crane", "λ")
WIDTH = 16
"""Of the tiny ResNet's pooled features."""


def spec(**changes):
    return ClassifierSpec(**({**TINY_IMAGE, "image_size": 32} | changes))


def tiny_classifier(*, seed=0, **changes):
    """Random, in evaluation mode, its running statistics random, too, and its heads far from uniform."""
    torch.manual_seed(seed)
    model = build_classifier(spec(**changes), CLASSES)
    for key, value in model.named_buffers():
        if key.endswith("running_mean"):
            value.normal_(std=0.1)
        if key.endswith("running_var"):
            value.uniform_(0.5, 1.5)
    for head in (model.label_head, model.teacher_head):
        if head is not None:
            torch.nn.init.normal_(head.weight)
    return model.eval()


def pixels_for(model):
    return torch.stack([model.preprocessing.image_transform(image) for image in tiny_images()])


def softmax(values):
    raised = np.exp(values - values.max(axis=1, keepdims=True))
    return raised / raised.sum(axis=1, keepdims=True)


@pytest.fixture
def started(tmp_path):
    """A dual encoder on disk, the spec of a classifier on its image side, and text vectors for its classes."""
    start = tiny_composite(image_projection="mlp", projection_dropout=0.3)
    start.save(tmp_path / "start")
    return start, {"start": str(tmp_path / "start")}, start.encode_text(CAPTIONS)


def from_start(started, **changes):
    _, settings, vectors = started
    built = ClassifierSpec(**settings, language_init=True, **changes)
    return build_classifier(built, CLASSES, class_vectors=vectors, zeta=0.05).eval()


def test_features_equal_timm_by_hand():
    model = tiny_classifier()
    whole = timm.create_model("resnet10t", channels=(8, 8, 16, 16), stem_width=8, num_classes=0).eval()
    whole.load_state_dict({key.removeprefix("0."): value for key, value in model.trunk[0].state_dict().items()})
    pixels = pixels_for(model)
    assert pixels.dtype == torch.uint8
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    by_hand = (pixels.float() / 255 - mean[:, None, None]) / std[:, None, None]
    with torch.no_grad():
        torch.testing.assert_close(model.features(pixels), whole(by_hand), rtol=0, atol=1e-5)
        assert torch.equal(model.features(by_hand), whole(by_hand))
    assert model.preprocessing.image_size == (32, 32)
    assert isinstance(model.preprocessing, Preprocessing)
    assert pickle.loads(pickle.dumps(model.preprocessing)) == model.preprocessing
    assert model.device == torch.device("cpu")


@pytest.mark.parametrize(("alpha", "beta"), [(0.3, 0.5), (1.0, 0.5), (0.0, 2.0)])
def test_one_call_gives_the_mix(alpha, beta):
    model = tiny_classifier()
    model.alpha, model.beta = alpha, beta
    pixels = pixels_for(model)
    with torch.no_grad():
        z = model.features(pixels).double().numpy()
        found, mix = model.probabilities(pixels), model(pixels)
    rows = {}
    for key, head in (("label", model.label_head), ("teacher", model.teacher_head)):
        rows[key] = z @ head.weight.detach().double().numpy().T + head.bias.detach().double().numpy()
    label, teacher = softmax(rows["label"]), softmax(rows["teacher"] / beta)
    np.testing.assert_allclose(mix.numpy(), alpha * label + (1 - alpha) * teacher, rtol=0, atol=1e-5)
    np.testing.assert_allclose(found["label"].numpy(), label, rtol=0, atol=1e-5)
    np.testing.assert_allclose(found["teacher"].numpy(), teacher, rtol=0, atol=1e-5)
    assert np.abs(label - teacher).max() > 0.1
    assert torch.equal(found["mix"], mix)
    if alpha in (0, 1):
        assert torch.equal(mix, found["label" if alpha else "teacher"])


def test_the_mix_of_known_logits():
    label, teacher = torch.log(torch.tensor([[1.0, 3.0]])), torch.log(torch.tensor([[4.0, 1.0]]))
    found = mixed_probabilities(label, teacher, alpha=0.25, beta=0.5)
    # softmax(log(4, 1) / 0.5) is 16 : 1.
    torch.testing.assert_close(found, torch.tensor([[0.25 * 0.25 + 0.75 * 16 / 17, 0.25 * 0.75 + 0.75 / 17]]))
    with pytest.raises(UserError, match="expected one shape"):
        mixed_probabilities(label, teacher[:, :1], alpha=0.5, beta=1.0)
    half = mixed_probabilities(label.bfloat16(), teacher.bfloat16(), alpha=0.5, beta=1.0)
    assert half.dtype == torch.float32


@pytest.mark.parametrize("heads", ["two", "one"])
@pytest.mark.parametrize("origin", ["timm", "start"])
def test_round_trip_is_bit_equal(tmp_path, started, heads, origin):
    model = tiny_classifier(heads=heads, dropout=0.2) if origin == "timm" else from_start(started, heads=heads)
    if heads == "two":
        model.alpha, model.beta = 0.4, 0.5
    model.notes = {"teacher": "zero-shot", "validation": {"acc1": 0.5}}
    model.save(tmp_path / "a folder:with @odd# name")
    (tmp_path / "start").rename(tmp_path / "gone")
    loaded = load_classifier(str(tmp_path / "a folder:with @odd# name"))
    pixels = pixels_for(model)
    with torch.no_grad():
        assert torch.equal(loaded(pixels), model(pixels))
    assert all(torch.equal(value, loaded.state_dict()[key]) for key, value in model.state_dict().items())
    kept = ("classes", "alpha", "beta", "notes", "preprocessing", "width")
    assert [getattr(loaded, key) for key in kept] == [getattr(model, key) for key in kept]
    assert loaded.dropout.p == model.dropout.p
    assert not loaded.training
    loaded.save(tmp_path / "again")
    for name in ("model.json", "model.safetensors"):
        first = (tmp_path / "a folder:with @odd# name" / name).read_bytes()
        assert (tmp_path / "again" / name).read_bytes() == first, name
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_float16_on_disk_is_float32_in_memory(tmp_path):
    model = tiny_classifier()
    model.trunk[0].bn1.running_var.fill_(1e5)  # beyond float16's range
    model.save(tmp_path / "full")
    model.save(tmp_path / "half", dtype="float16")
    loaded = load_classifier(tmp_path / "half")
    assert {value.dtype for value in loaded.parameters()} == {torch.float32}
    with torch.no_grad():
        torch.testing.assert_close(loaded(pixels_for(model)), model(pixels_for(model)), rtol=0, atol=5e-3)
    sizes = [(tmp_path / name / "model.safetensors").stat().st_size for name in ("half", "full")]
    assert sizes[0] < 0.75 * sizes[1]
    with pytest.raises(UserError, match="expected one of float32, float16"):
        model.save(tmp_path / "other", dtype="int8")


def test_a_single_head_serves_as_both():
    model = tiny_classifier(heads="one")
    assert model.teacher_head is None
    found = model.logits(model.features(pixels_for(model)))
    assert found["teacher"] is found["label"]
    with torch.no_grad():
        given = model.probabilities(pixels_for(model))
    assert torch.equal(given["mix"], given["label"])
    assert torch.equal(given["teacher"], given["label"])
    assert list(map(id, model.head_parameters("teacher"))) == list(map(id, model.head_parameters("label")))
    assert (model.alpha, model.beta) == (1.0, 1.0)
    for key in ("alpha", "beta"):
        with pytest.raises(UserError, match=f"single head.*found {key} 0.5, expected 1"):
            setattr(model, key, 0.5)


def test_the_trunk_of_a_dual_encoder_gives_its_embeddings(started):
    start, settings, _ = started
    model = build_classifier(ClassifierSpec(**settings), CLASSES).eval()
    with torch.no_grad():
        found = model.features(pixels_for(model))
    torch.testing.assert_close(found, start.encode_image(tiny_images()), rtol=0, atol=1e-6)
    assert model.preprocessing.settings == start.settings
    larger = build_classifier(ClassifierSpec(**settings, image_size=48, crop_fraction=0.5), CLASSES)
    assert larger.preprocessing.image_size == (48, 48)
    assert larger.preprocessing.settings.crop_fraction == 0.5


def test_language_init_starts_as_the_zero_shot_classifier(started):
    start, _, vectors = started
    model = from_start(started)
    with torch.no_grad():
        found = model.logits(model.features(pixels_for(model)))
    z, w = start.encode_image(tiny_images()).numpy(), vectors.numpy()
    for key in ("label", "teacher"):
        np.testing.assert_allclose(found[key].numpy(), z @ w.T, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("autocast", [False, True])
def test_an_aligned_head_gives_cosines_over_zeta(tmp_path, started, autocast):
    model = from_start(started, align=True)
    model.save(tmp_path / "aligned")
    model = load_classifier(tmp_path / "aligned")
    with torch.no_grad():
        model.teacher_head.weight[2] *= 7.0
        z = model.features(pixels_for(model))
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            found = model.logits(z)["teacher"]
    w = started[2].double().numpy()
    w, rows = w / np.linalg.norm(w, axis=1, keepdims=True), z.double().numpy()
    expected = rows / np.linalg.norm(rows, axis=1, keepdims=True) @ w.T / 0.05
    assert found.dtype == torch.float32
    np.testing.assert_allclose(found.numpy(), expected, rtol=0, atol=1e-4)
    assert model.teacher_head.bias is None
    assert model.teacher_head.weight.requires_grad


@pytest.mark.parametrize("align", [False, True])
def test_each_head_has_its_own_gradient_and_the_trunk_both(started, align):
    model = from_start(started, align=align).train()
    trunk = list(model.trunk_parameters())
    for own, other in (("label", "teacher"), ("teacher", "label")):
        model.zero_grad(set_to_none=True)
        model.logits(model.features(pixels_for(model)))[own].square().sum().backward()
        assert all(value.grad.abs().sum() > 0 for value in model.head_parameters(own))
        assert all(value.grad is None for value in model.head_parameters(other))
        # A weight in front of a BatchNorm may have none; none may be cut off.
        assert all(value.grad is not None for value in trunk)
        assert trunk[0].grad.abs().sum() > 0
    parts = [*trunk, *model.head_parameters("label"), *model.head_parameters("teacher")]
    assert sorted(map(id, parts)) == sorted(map(id, model.parameters()))
    assert model.parameter_counts() == {"image": sum(value.numel() for value in parts)}


def test_weights_from_a_file_with_a_classifier(tmp_path):
    whole = timm.create_model("resnet10t", **json.loads(TINY_IMAGE["image_kwargs"]), num_classes=7)
    save_file(whole.state_dict(), str(tmp_path / "w.safetensors"))
    model = build_classifier(spec(image_weights=str(tmp_path / "w.safetensors")), CLASSES)
    assert all(torch.equal(value, whole.state_dict()[key]) for key, value in model.trunk[0].state_dict().items())
    assert model.preprocessing.settings.crop_fraction == whole.pretrained_cfg["crop_pct"]
    assert tiny_classifier().preprocessing.settings.crop_fraction == 1.0
    assert model.training


def test_a_widening_head_counts_in_the_width():
    """MobileNets widen their features after the pool."""
    model = build_classifier(ClassifierSpec(image_size=32), CLASSES).eval()
    with torch.no_grad():
        assert model.features(pixels_for(model)).shape == (4, model.width) == (4, 1024)


def test_dropout_acts_before_both_heads_in_training_alone():
    model = tiny_classifier(dropout=0.9)
    z = torch.ones(1, WIDTH)
    assert torch.equal(model.logits(z)["label"], model.label_head(z))
    model.train()
    found = model.logits(z)
    assert not torch.equal(found["label"], model.label_head(z))
    assert not torch.equal(found["teacher"], model.teacher_head(z))


@pytest.mark.parametrize(
    ("key", "value"), [("alpha", 1.01), ("alpha", -0.1), ("alpha", float("nan")), ("beta", 0.0), ("beta", -1.0)]
)
def test_mixes_outside_their_range(tmp_path, key, value):
    model = tiny_classifier()
    with pytest.raises(UserError, match=f"Found {key} {value}"):
        setattr(model, key, value)
    assert (model.alpha, model.beta) == (0.5, 1.0)
    with pytest.raises(UserError, match=f"Found {key} {value}"):
        mixed_probabilities(torch.zeros(1, 2), torch.zeros(1, 2), **({"alpha": 0.5, "beta": 1.0} | {key: value}))


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"heads": "three"}, "expected one of two, one"),
        ({"dropout": 1.0}, "less than 1"),
        ({"language_init": True}, "language_init without start"),
        ({"align": True}, "align without language_init"),
        ({"start": "somewhere"}, "beside image, image_kwargs; expected one trunk"),
        ({"image": "resnet11"}, "timm cannot build"),
        ({"image_weights": "x.bin"}, "Found no file"),
    ],
)
def test_bad_specs(changes, sentence):
    with pytest.raises(UserError, match=sentence):
        build_classifier(spec(**changes), CLASSES)


def test_bad_arguments(started):
    _, settings, vectors = started
    started_spec = ClassifierSpec(**settings, language_init=True)
    for arguments, sentence in (
        ({"class_vectors": vectors[:4]}, r"\(4, 24\), expected \(5, 24\)"),
        ({"class_vectors": vectors[:, :20]}, r"\(5, 20\), expected \(5, 24\)"),
        ({"class_vectors": vectors * 0}, "length 0"),
        ({"class_vectors": vectors * float("nan")}, "not finite"),
        ({}, "set without class vectors"),
        ({"class_vectors": vectors, "zeta": 0.0}, "Found zeta 0.0"),
    ):
        with pytest.raises(UserError, match=sentence):
            build_classifier(started_spec, CLASSES, **arguments)
    with pytest.raises(UserError, match="not set, but found class vectors"):
        build_classifier(spec(), CLASSES, class_vectors=vectors)
    with pytest.raises(UserError, match="align with heads 'one'"):
        from_start(started, align=True, heads="one")
    for classes in ((), ("one",), "names", ("a", 3)):
        with pytest.raises(UserError, match="at least two names"):
            build_classifier(spec(), classes)


def test_kinds_of_folders_are_told_apart(tmp_path, started):
    tiny_classifier().save(tmp_path / "classifier")
    assert is_classifier(str(tmp_path / "classifier"))
    assert not is_classifier(str(tmp_path / "start"))
    assert not is_classifier(str(tmp_path / "nothing"))
    for read in (load, load_composite):
        with pytest.raises(UserError, match=r"holds a classifier, expected a dual encoder"):
            read(str(tmp_path / "classifier"))
    with pytest.raises(UserError, match="holds a dual encoder, expected a classifier"):
        load_classifier(str(tmp_path / "start"))
    with pytest.raises(UserError, match=r"Found no model\.json"):
        load_classifier(str(tmp_path))
    with pytest.raises(UserError, match="device"):
        load_classifier(str(tmp_path / "classifier"), "nowhere")
    with pytest.raises(UserError, match="is no vlkd model of this kind"):
        tiny_classifier().save(tmp_path / "start")
    with pytest.raises(UserError, match="is no vlkd model of this kind"):
        started[0].save(tmp_path / "classifier")


def change(folder, edit):
    layout = json.loads((folder / "model.json").read_text())
    edit(layout)
    (folder / "model.json").write_text(json.dumps(layout))


@pytest.mark.parametrize(
    ("edit", "sentence"),
    [
        (lambda x: x["classes"].pop(), "does not fit its model: label_head.bias has shape"),
        (lambda x: x.update(heads="one", alpha=1.0), "teacher_head.bias is unexpected"),
        (lambda x: x.update(alpha=1.5), "Found alpha 1.5"),
        (lambda x: x.update(beta=0), "Found beta 0"),
        (lambda x: x.update(alpha="much"), "lacks or misspells"),
        (lambda x: x.update(version=2), "written by a newer vlkd"),
        (lambda x: x.update(format="other"), "another program's model"),
        (lambda x: x.update(format=["other"]), "another program's model"),
        (lambda x: x.pop("image"), "lacks or misspells 'image'"),
        (lambda x: x["image"].update(timm="resnet11"), "timm cannot build"),
        (lambda x: x["preprocessing"].update(std=[0, 1, 1]), "three positive deviations"),
        (lambda x: x["preprocessing"].update(hue=1), "lacks or misspells"),
    ],
)
def test_bad_model_json(tmp_path, edit, sentence):
    tiny_classifier().save(tmp_path / "model")
    change(tmp_path / "model", edit)
    with pytest.raises(UserError, match=sentence):
        load_classifier(tmp_path / "model")


def test_damaged_and_missing_weights(tmp_path):
    tiny_classifier().save(tmp_path / "model")
    path = tmp_path / "model" / "model.safetensors"
    tensors = load_file(str(path))
    save_file({key: value for key, value in tensors.items() if not key.startswith("teacher_head")}, str(path))
    with pytest.raises(UserError, match=r"teacher_head\.bias is missing"):
        load_classifier(tmp_path / "model")
    path.write_bytes(path.read_bytes()[:-50])
    with pytest.raises(UserError, match="is damaged"):
        load_classifier(tmp_path / "model")
    path.unlink()
    with pytest.raises(UserError, match="Found no file"):
        load_classifier(tmp_path / "model")


def test_saving_replaces_classifiers_alone_and_leaves_nothing_on_failure(tmp_path):
    tiny_classifier(seed=0).save(tmp_path / "model")
    second = tiny_classifier(seed=1)
    second.save(tmp_path / "model")
    loaded = load_classifier(tmp_path / "model")
    assert torch.equal(loaded.label_head.weight, second.label_head.weight)
    before = (tmp_path / "model" / "model.safetensors").read_bytes()
    third: Classifier = tiny_classifier(seed=2)
    third.notes = {"acc1": float("nan")}
    with pytest.raises(ValueError, match="JSON compliant"):
        third.save(tmp_path / "model")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    assert (tmp_path / "model" / "model.safetensors").read_bytes() == before
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("keep")
    with pytest.raises(UserError, match="is no vlkd model"):
        second.save(tmp_path / "mine")
    assert (tmp_path / "mine" / "notes.txt").read_text() == "keep"
