"""The self-check: what it lets pass and what it refuses."""

from __future__ import annotations

import itertools
import json

import pytest
import torch
from helpers.tiny_models import CAPTIONS, tiny_composite, tiny_images, write_clip, write_open_clip, write_siglip
from PIL import Image
from safetensors.torch import save_file

from vlkd.errors import UserError
from vlkd.models.load import load
from vlkd.models.self_check import check_preprocessing, measured_normalisation, pairing_statistic, self_check

COLOURS = [(r, g, b) for r in (0, 85, 170, 255) for g in (0, 85, 170, 255) for b in (0, 85, 170, 255)]


def colour_pairs():
    """64 plain images and a caption for each."""
    names = [f"red {r} green {g} blue {b}" for r, g, b in COLOURS]
    return [Image.new("RGB", (40, 40), colour) for colour in COLOURS], names


class Matching:
    """Lends a model embeddings that pair each of the given images with its caption, and others by their position."""

    def __init__(self, model, names):
        self.model, self.names = model, names

    def encode_image(self, images):
        if len(images) != len(self.names):
            return self.model.encode_image(images)
        return torch.eye(len(images), 80) + 0.1

    def encode_text(self, texts):
        if len(texts) != len(self.names):
            return self.model.encode_text(texts)
        return torch.stack([torch.eye(1, 80).roll(self.names.index(text), 1)[0] for text in texts])

    def __getattr__(self, name):
        return getattr(self.model, name)


def test_statistic_equals_all_permutations():
    similarity = torch.randn(5, 5, dtype=torch.float64)
    sums = torch.stack([similarity[range(5), list(p)].sum() for p in itertools.permutations(range(5))])
    matched, mismatched, z = pairing_statistic(similarity)
    wanted = (similarity.trace() - sums.mean()) / sums.std(correction=0)
    assert z == pytest.approx(float(wanted))
    assert matched == pytest.approx(float(similarity.trace() / 5))
    assert mismatched == pytest.approx(float((similarity.sum() - similarity.trace()) / 20))


def test_right_pairs_pass_and_shuffled_pairs_are_refused_from_64_up():
    images, names = colour_pairs()
    model = Matching(tiny_composite(), names)
    report = self_check(model, images, names)
    assert report.z > 10
    assert report.pairs == 64
    assert not report.warnings
    with pytest.raises(UserError, match="captions may belong to other images"):
        self_check(model, images, names[1:] + names[:1])


def test_an_untrained_model_is_warned_about_below_64_pairs():
    report = self_check(tiny_composite(), tiny_images(5), CAPTIONS)
    assert len(report.warnings) == 1
    assert "With 64 pairs this would be refused" in report.warnings[0]
    assert self_check(tiny_composite(), tiny_images(1), CAPTIONS[:1]).z == 0.0


def test_counts_must_agree():
    with pytest.raises(UserError, match="4 images and 5 captions"):
        self_check(tiny_composite(), tiny_images(4), CAPTIONS)
    with pytest.raises(UserError, match="at least one pair"):
        self_check(tiny_composite(), [], [])


@pytest.mark.parametrize("write", [write_open_clip, write_clip, write_siglip])
def test_libraries_own_preprocessing_passes(tmp_path, write):
    model = load(str(write(tmp_path / "model")))
    check_preprocessing(model)
    mean, std = measured_normalisation(model)
    expected = model.library_configuration()
    assert mean.tolist() == pytest.approx(expected.mean, abs=1e-4)
    assert std.tolist() == pytest.approx(expected.std, abs=1e-4)


def pretrained_composite(tmp_path, key, value):
    """A composite with a published image tower whose model.json was edited."""
    source = tiny_composite()
    save_file(source.image_tower.state_dict(), tmp_path / "tower.safetensors")
    model = tiny_composite(image_weights=str(tmp_path / "tower.safetensors"))
    model.save(tmp_path / "model")
    layout = json.loads((tmp_path / "model" / "model.json").read_text())
    layout["preprocessing"][key] = value
    (tmp_path / "model" / "model.json").write_text(json.dumps(layout))
    return load(str(tmp_path / "model"))


@pytest.mark.parametrize(
    ("key", "value"), [("mean", [0.5, 0.5, 0.5]), ("std", [0.5, 0.5, 0.5]), ("interpolation", "bilinear")]
)
def test_wrong_preprocessing_of_a_pretrained_tower_is_refused(tmp_path, key, value):
    with pytest.raises(UserError, match=f"its preprocessing has {key} .* was trained with"):
        self_check(pretrained_composite(tmp_path, key, value), tiny_images(5), CAPTIONS)


def test_right_preprocessing_of_a_pretrained_tower_passes(tmp_path):
    check_preprocessing(pretrained_composite(tmp_path, "interpolation", "bicubic"))


def test_a_swapped_library_transform_is_refused(tmp_path):
    model = load(str(write_open_clip(tmp_path / "a")))
    model.preprocessing = load(str(write_open_clip(tmp_path / "b", siglip=True))).preprocessing
    with pytest.raises(UserError, match="its preprocessing has mean"):
        check_preprocessing(model)


@pytest.mark.parametrize(
    ("break_it", "sentence"),
    [
        (lambda m: m.image_projection[0].weight.fill_(float("nan")), r"image\.embed has 3 of 3 rows with NaN"),
        (lambda m: m.text_projection[0].weight.fill_(float("inf")), r"text\.embed has 3 of 3 rows with NaN"),
        (lambda m: m.image_projection[0].weight.zero_(), r"image\.embed has a vector of length zero"),
        (lambda m: m.image_tower.conv1[0].weight.zero_(), r"image\.embed is the same for differing inputs"),
        (
            lambda m: (m.text_tower.token_embedding.weight.zero_(), m.text_tower.position_embedding.zero_(),
                       m.text_tower.final_norm.bias.fill_(1.0)),
            r"text\.embed is the same for differing inputs",
        ),
    ],
)  # fmt: skip
def test_damaged_models_are_refused(break_it, sentence):
    model = tiny_composite()
    with torch.no_grad():
        break_it(model)
    with pytest.raises(UserError, match=sentence):
        self_check(model, tiny_images(5), CAPTIONS)
