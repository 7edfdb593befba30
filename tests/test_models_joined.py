"""Two models joined: each side's embeddings are exactly its model's own."""

from __future__ import annotations

import pytest
import torch
from helpers.tiny_models import CAPTIONS, tiny_composite, tiny_images, write_open_clip

from vlkd.errors import UserError
from vlkd.models.fingerprint import model_fingerprint
from vlkd.models.load import load, load_image_encoder


@pytest.fixture(scope="module")
def refs(tmp_path_factory):
    place = tmp_path_factory.mktemp("models")
    tiny_composite().save(place / "a")
    tiny_composite(seed=1).save(place / "b + c")
    write_open_clip(place / "clip")
    tiny_composite(width=16).save(place / "wide")
    return {name: str(place / name) for name in ("a", "b + c", "clip", "wide")}


@pytest.mark.parametrize(("images", "texts"), [("a", "clip"), ("clip", "a")])
@pytest.mark.parametrize("loader", [load, load_image_encoder])
def test_each_side_encodes_as_its_own_model(refs, images, texts, loader):
    joined = loader(f"{refs[images]} + {refs[texts]}")
    pictures = tiny_images()
    assert torch.equal(joined.encode_image(pictures), load(refs[images]).encode_image(pictures))
    assert torch.equal(joined.encode_text(CAPTIONS), load(refs[texts]).encode_text(CAPTIONS))
    scale = load(refs[texts]).encode({}, ("logit_scale",))["logit_scale"]
    assert torch.equal(joined.encode({}, ("logit_scale",))["logit_scale"], scale)
    assert joined.name == f"{refs[images]} + {refs[texts]}"


def test_the_fingerprint_knows_both_sides(refs):
    names = (refs["a"], refs["clip"], f"{refs['a']} + {refs['clip']}", f"{refs['clip']} + {refs['a']}")
    prints = [model_fingerprint(load(name)) for name in names]
    assert len(set(prints)) == 4


def test_an_existing_folder_wins(refs):
    assert type(load(refs["b + c"])) is type(load(refs["a"]))


def test_other_widths_and_towers_are_refused(refs):
    with pytest.raises(UserError, match=r"a has width 24 but the text model \S+wide has 16; asymmetric search needs"):
        load(f"{refs['a']} + {refs['wide']}")
    with pytest.raises(UserError, match=r"'timm:resnet10t' is an image tower without a text tower"):
        load_image_encoder(f"timm:resnet10t + {refs['a']}")
    with pytest.raises(UserError, match="Found no model 'nothing'; expected"):
        load(f"{refs['a']} + nothing")
