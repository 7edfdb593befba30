"""open_clip adapters against open_clip's own forward, transform and tokenizer."""

from __future__ import annotations

import json
import pickle

import open_clip
import pytest
import torch
from helpers.tiny_models import CAPTIONS, tiny_images, write_open_clip

from vlkd.errors import UserError
from vlkd.models.load import load


@pytest.fixture(params=["clip", "siglip"])
def folder(request, tmp_path):
    return write_open_clip(tmp_path / "model", siglip=request.param == "siglip")


def own(folder):
    """The library's model, evaluation transform and tokenizer."""
    name = f"local-dir:{folder}"
    model, _, transform = open_clip.create_model_and_transforms(name)
    return model.eval(), transform, open_clip.get_tokenizer(name)


def test_equals_the_librarys_forward(folder):
    model, transform, tokenizer = own(folder)
    images = tiny_images()
    with torch.no_grad():
        image_embed = model.encode_image(torch.stack([transform(image) for image in images]))
        text_embed = model.encode_text(tokenizer(list(CAPTIONS)))
    loaded = load(str(folder))
    torch.testing.assert_close(loaded.encode_image(images, batch_size=3), image_embed, rtol=0, atol=1e-5)
    torch.testing.assert_close(loaded.encode_text(CAPTIONS, batch_size=2), text_embed, rtol=0, atol=1e-5)
    assert loaded.width == image_embed.shape[1]


def test_scale_and_bias_equal_the_librarys_logits(folder):
    model, transform, tokenizer = own(folder)
    images = tiny_images()
    with torch.no_grad():
        wanted, _ = model.get_logits(torch.stack([transform(i) for i in images]), tokenizer(list(CAPTIONS)))
    loaded = load(str(folder))
    scalars = loaded.encode({}, loaded.provides & {"logit_scale", "logit_bias"})
    cosines = loaded.encode_image(images, normalize=True) @ loaded.encode_text(CAPTIONS, normalize=True).T
    logits = scalars["logit_scale"] * cosines + scalars.get("logit_bias", torch.zeros(()))
    torch.testing.assert_close(logits, wanted, rtol=1e-5, atol=1e-5)


def test_view_is_squashed_and_never_cropped(tmp_path):
    loaded = load(str(write_open_clip(tmp_path / "model")))
    image = tiny_images()[1]
    squashed = image.resize((32, 32), resample=3)
    mean, std = torch.tensor([0.4, 0.5, 0.6]), torch.tensor([0.2, 0.3, 0.25])
    pixels = torch.tensor(list(squashed.tobytes())).view(32, 32, 3).permute(2, 0, 1) / 255
    wanted = (pixels - mean[:, None, None]) / std[:, None, None]
    torch.testing.assert_close(loaded.preprocessing.view_transform(image), wanted, rtol=0, atol=1e-5)
    assert not torch.allclose(loaded.preprocessing.image_transform(image), wanted, atol=1e-2)


def test_mask_counts_real_tokens(tmp_path):
    loaded = load(str(write_open_clip(tmp_path / "model")))
    found = loaded.preprocessing.tokenize(["a!!! ", "a " * 50, ""])
    # start, a, !!!, end; then a text longer than the context; then start and end alone
    assert found["mask"].sum(dim=1).tolist() == [4, 20, 2]
    siglip = load(str(write_open_clip(tmp_path / "siglip", siglip=True)))
    assert siglip.preprocessing.tokenize(["a red dog", ""])["mask"].sum(dim=1).tolist() == [4, 1]


def test_preprocessing_travels_without_weights(folder):
    preprocessing = load(str(folder)).preprocessing
    copy = pickle.loads(pickle.dumps(preprocessing))
    image = tiny_images()[0]
    assert torch.equal(copy.image_transform(image), preprocessing.image_transform(image))
    assert torch.equal(copy.tokenize(CAPTIONS)["ids"], preprocessing.tokenize(CAPTIONS)["ids"])


def test_name_with_a_weights_file(tmp_path, monkeypatch):
    folder = write_open_clip(tmp_path / "model")
    config = json.loads((folder / "open_clip_config.json").read_text())["model_cfg"]
    monkeypatch.setitem(open_clip.factory._MODEL_CONFIGS, "Tiny", config)
    odd = tmp_path / "a @b:c#.safetensors"
    odd.write_bytes((folder / "open_clip_model.safetensors").read_bytes())
    images = tiny_images()
    loaded = load(f"open_clip:Tiny@{odd}")
    # open_clip's defaults for a bare weights file are OpenAI's mean and std
    assert loaded.library_configuration().mean == pytest.approx(open_clip.OPENAI_DATASET_MEAN)
    torch.testing.assert_close(loaded.encode_text(CAPTIONS), load(str(folder)).encode_text(CAPTIONS))
    assert loaded.encode_image(images).shape == (4, 24)


def test_hub_tag_goes_through_the_librarys_download(tmp_path, monkeypatch):
    """The tag's own settings reach the preprocessing; only the transfer itself is replaced."""
    folder = write_open_clip(tmp_path / "model")
    config = json.loads((folder / "open_clip_config.json").read_text())["model_cfg"]
    monkeypatch.setitem(open_clip.factory._MODEL_CONFIGS, "Tiny", config)
    tag = {"hf_hub": "nobody/tiny/", "mean": (0.1, 0.2, 0.3), "std": (0.5, 0.5, 0.5)}
    monkeypatch.setitem(open_clip.pretrained._PRETRAINED, "Tiny", {"webli": tag})
    asked = []

    def transfer(repo_id, filename, **_):
        asked.append(repo_id)
        return str(folder / "open_clip_model.safetensors")

    monkeypatch.setattr(open_clip.pretrained, "hf_hub_download", transfer)
    loaded = load("open_clip:Tiny@webli")
    assert set(asked) == {"nobody/tiny"}
    assert loaded.library_configuration().mean == (0.1, 0.2, 0.3)
    torch.testing.assert_close(loaded.encode_text(CAPTIONS), load(str(folder)).encode_text(CAPTIONS))


@pytest.mark.parametrize(
    ("ref", "sentence"),
    [
        ("open_clip:ViT-B-32", "open_clip:NAME@TAG"),
        ("open_clip:NoSuchNet@openai", "names no open_clip model"),
        ("open_clip:ViT-B-32@nosuchtag", "its tags are"),
    ],
)
def test_unknown_names(ref, sentence):
    with pytest.raises(UserError, match=sentence):
        load(ref)


def test_pickled_weights_are_refused(tmp_path):
    folder = write_open_clip(tmp_path / "model")
    (folder / "open_clip_model.safetensors").rename(folder / "open_clip_pytorch_model.bin")
    with pytest.raises(UserError, match="never unpickles"):
        load(str(folder))
    (tmp_path / "weights.pt").write_bytes(b"not read")
    with pytest.raises(UserError, match="never unpickles"):
        load(f"open_clip:ViT-B-32@{tmp_path / 'weights.pt'}")


def test_remote_code_is_refused(tmp_path):
    folder = write_open_clip(tmp_path / "model", siglip=True)
    config = json.loads((folder / "open_clip_config.json").read_text())
    config["model_cfg"]["text_cfg"]["tokenizer_kwargs"]["trust_remote_code"] = True
    (folder / "open_clip_config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="remote code"):
        load(str(folder))


def test_weights_of_another_model(tmp_path):
    folder = write_open_clip(tmp_path / "model")
    config = json.loads((folder / "open_clip_config.json").read_text())
    config["model_cfg"]["vision_cfg"]["layers"] = 3
    (folder / "open_clip_config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="cannot load"):
        load(str(folder))
