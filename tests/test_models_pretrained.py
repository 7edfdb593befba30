"""Real pretrained towers, where they are at hand."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from helpers.tiny_models import CAPTIONS, tiny_images
from safetensors.torch import load_file

from vlkd.models.load import load
from vlkd.models.self_check import check_preprocessing
from vlkd.models.spec import CompositeSpec, build_composite

MODELS = Path(__file__).parents[2] / "shared" / "models"
pytestmark = pytest.mark.skipif(not MODELS.is_dir(), reason="the pretrained towers are not beside this checkout")


def teacher():
    spec = CompositeSpec(
        image="tf_efficientnet_lite0",
        image_weights=str(MODELS / "tf_efficientnet_lite0.safetensors"),
        text=str(MODELS / "minilm-l6-v2"),
        context_length=64,
        width=128,
    )
    return build_composite(spec, name="teacher").eval()


def test_towers_equal_their_libraries_and_survive_a_save(tmp_path):
    import timm
    from timm.data import create_transform, resolve_model_data_config
    from transformers import AutoModel, AutoTokenizer

    model = teacher()
    check_preprocessing(model)
    tower = timm.create_model("tf_efficientnet_lite0").eval()
    weights = load_file(MODELS / "tf_efficientnet_lite0.safetensors")
    tower.load_state_dict({key: value.float() for key, value in weights.items()})
    transform = create_transform(**resolve_model_data_config(tower))
    images = tiny_images(2)
    pixels = torch.stack([model.preprocessing.image_transform(image) for image in images])
    text = AutoTokenizer.from_pretrained(MODELS / "minilm-l6-v2")(list(CAPTIONS), padding=True, return_tensors="pt")
    mask = text["attention_mask"][..., None]
    encoder = AutoModel.from_pretrained(MODELS / "minilm-l6-v2", dtype=torch.float32).eval()
    with torch.no_grad():
        image = tower.forward_head(
            tower.forward_features(torch.stack([transform(image) for image in images])), pre_logits=True
        )
        tokens = encoder(**text).last_hidden_state
        found = model.encode(
            {"pixels": pixels, **model.preprocessing.tokenize(CAPTIONS)}, ("image.pooled", "text.pooled")
        )
    torch.testing.assert_close(found["image.pooled"], image, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found["text.pooled"], (tokens * mask).sum(1) / mask.sum(1), rtol=1e-5, atol=1e-5)
    model.save(tmp_path / "model", dtype="float16", golden=True)
    # the towers were float16 on disk, so that only the projections are rounded
    again = load(str(tmp_path / "model"))
    torch.testing.assert_close(again.encode_text(CAPTIONS), model.encode_text(CAPTIONS), rtol=0, atol=2e-3)
