"""The fingerprint follows everything on which features depend, and nothing else."""

from __future__ import annotations

import json

import pytest
import torch
from helpers.distilling import tiny_teachers

from vlkd.models.composite import load_composite
from vlkd.models.fingerprint import model_fingerprint


@pytest.fixture
def folder(tmp_path):
    tiny_teachers()["one"].save(tmp_path / "one")
    return tmp_path / "one"


def rewritten(folder, name, change):
    content = json.loads((folder / name).read_text())
    change(content)
    (folder / name).write_text(json.dumps(content))
    return load_composite(folder)


def test_equal_for_equal_models(folder):
    assert model_fingerprint(load_composite(folder)) == model_fingerprint(load_composite(folder))


def test_it_follows_the_tokenizer(folder):
    before = model_fingerprint(load_composite(folder))

    def swap(content):
        vocabulary = content["model"]["vocab"]
        first, second = [word for word in vocabulary if word.isalpha() and len(word) == 1][:2]
        vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]

    assert model_fingerprint(rewritten(folder, "tokenizer.json", swap)) != before


def test_it_follows_the_preprocessing_and_the_layout(folder):
    seen = {model_fingerprint(load_composite(folder))}
    mean = lambda content: content["preprocessing"].update(mean=[0.4, 0.4, 0.4])  # noqa: E731
    dropout = lambda content: content["image"].update(projection_dropout=0.7)  # noqa: E731
    for change in (mean, dropout):
        seen.add(model_fingerprint(rewritten(folder, "model.json", change)))
    assert len(seen) == 3


def test_that_of_the_towers_ignores_projections_alone(folder):
    model = load_composite(folder)
    before, whole = model_fingerprint(model, towers=True), model_fingerprint(model)
    with torch.no_grad():
        model.image_projection[0].weight.add_(1)
    assert model_fingerprint(model, towers=True) == before
    assert model_fingerprint(model) != whole
    with torch.no_grad():
        next(model.image_tower.parameters()).add_(1)
    assert model_fingerprint(model, towers=True) != before
