"""The reference grammar."""

from __future__ import annotations

import pytest
import torch
from helpers.tiny_models import CAPTIONS, tiny_composite, write_clip, write_open_clip

import vlkd
from vlkd.errors import UserError
from vlkd.models.load import load

ODD = "a b@c:d#e;f'g"


@pytest.mark.parametrize("family", ["vlkd", "open_clip", "transformers"])
def test_folders_with_odd_names(tmp_path, family):
    folder = tmp_path / ODD
    if family == "vlkd":
        tiny_composite().save(folder)
    else:
        (write_open_clip if family == "open_clip" else write_clip)(folder)
    model = load(str(folder))
    assert model.name == str(folder)
    assert not model.training
    assert model.encode_text(CAPTIONS).shape == (5, 24)


def test_a_folder_wins_over_a_prefix(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model = tiny_composite()
    model.save("open_clip:ViT-B-32@openai")
    assert torch.equal(vlkd.load("open_clip:ViT-B-32@openai").encode_text(CAPTIONS), model.encode_text(CAPTIONS))


@pytest.mark.parametrize(
    ("ref", "sentence"),
    [
        ("timm:resnet18", "image tower without a text tower"),
        ("no/such/folder", "Found no model 'no/such/folder'; expected a folder"),
        ("", "Found no model"),
        ("hf:", "Found no model"),
        ("clip:ViT-B-32", "Found no model"),
    ],
)
def test_what_is_no_model(ref, sentence):
    with pytest.raises(UserError, match=sentence):
        load(ref)


def test_folders_that_are_no_model(tmp_path):
    with pytest.raises(UserError, match="holds none of"):
        load(str(tmp_path))
    with pytest.raises(UserError, match=r"Found no config\.json"):
        load(f"hf:{tmp_path}")
    with pytest.raises(UserError, match=r"Found no open_clip_config\.json"):
        load(f"open_clip:{tmp_path}")
