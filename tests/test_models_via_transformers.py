"""transformers adapters against the library's own features, processor and tokenizer."""

from __future__ import annotations

import json
import pickle

import pytest
import torch
from helpers.tiny_models import CAPTIONS, tiny_images, word_tokenizer, write_bert, write_clip, write_siglip
from transformers import AutoImageProcessor, AutoModel, AutoTokenizer

from vlkd.errors import UserError
from vlkd.models.load import load


@pytest.fixture(params=["clip", "siglip"])
def folder(request, tmp_path):
    write = write_clip if request.param == "clip" else write_siglip
    return write(tmp_path / "model")


def own_features(folder):
    """The library's features by its documented calls."""
    model = AutoModel.from_pretrained(folder).eval()
    siglip = model.config.model_type == "siglip"
    pixels = AutoImageProcessor.from_pretrained(folder)(images=tiny_images(), return_tensors="pt")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    text = tokenizer(list(CAPTIONS), padding="max_length" if siglip else True, truncation=True, return_tensors="pt")
    with torch.no_grad():
        image = model.get_image_features(pixel_values=pixels["pixel_values"])
        # SigLIP's published tokenizers give no mask; CLIP's do
        mask = {} if siglip else {"attention_mask": text["attention_mask"]}
        texts = model.get_text_features(input_ids=text["input_ids"], **mask)
    return image.pooler_output, texts.pooler_output


@pytest.mark.parametrize("prefix", ["", "hf:"])
def test_equals_the_librarys_features(folder, prefix):
    image, text = own_features(folder)
    loaded = load(f"{prefix}{folder}")
    torch.testing.assert_close(loaded.encode_image(tiny_images(), batch_size=3), image, rtol=0, atol=1e-5)
    torch.testing.assert_close(loaded.encode_text(CAPTIONS, batch_size=2), text, rtol=0, atol=1e-5)
    assert loaded.width == image.shape[1]


def test_logits_equal_the_librarys(folder):
    model = AutoModel.from_pretrained(folder).eval()
    loaded = load(str(folder))
    pixels = torch.stack([loaded.preprocessing.image_transform(image) for image in tiny_images()])
    ids = loaded.preprocessing.tokenize(CAPTIONS)
    with torch.no_grad():
        wanted = model(pixel_values=pixels, input_ids=ids["ids"]).logits_per_image
    scalars = loaded.encode({}, loaded.provides & {"logit_scale", "logit_bias"})
    cosines = loaded.encode_image(tiny_images(), normalize=True) @ loaded.encode_text(CAPTIONS, normalize=True).T
    logits = scalars["logit_scale"] * cosines + scalars.get("logit_bias", 0.0)
    torch.testing.assert_close(logits, wanted, rtol=1e-4, atol=1e-4)


def test_pooled_is_before_the_projection(tmp_path):
    loaded = load(str(write_clip(tmp_path / "model")))
    model = AutoModel.from_pretrained(tmp_path / "model").eval()
    inputs = loaded.preprocessing.tokenize(CAPTIONS)
    with torch.no_grad():
        found = loaded.encode(inputs, ("text.pooled", "text.embed"))
        wanted = model.text_model(input_ids=inputs["ids"], attention_mask=inputs["mask"].long()).pooler_output
    torch.testing.assert_close(found["text.pooled"], wanted)
    torch.testing.assert_close(found["text.embed"], wanted @ model.text_projection.weight.T)


def test_view_keeps_everything(folder):
    """SigLIP's own transform squashes, so view and image agree there; CLIP's crops, so an edge is lost only there."""
    preprocessing = load(str(folder)).preprocessing
    image = tiny_images()[1]
    whole, view = preprocessing.image_transform(image), preprocessing.view_transform(image)
    assert view.shape == whole.shape == (3, 32, 32)
    assert torch.equal(whole, view) == (folder.joinpath("preprocessor_config.json").read_text().find("crop_size") < 0)
    wanted = torch.tensor(list(image.resize((32, 32), resample=3).tobytes())).view(32, 32, 3).permute(2, 0, 1) / 255
    processor = preprocessing.processor
    mean, std = torch.tensor(processor.image_mean)[:, None, None], torch.tensor(processor.image_std)[:, None, None]
    # one grey level: the library resizes tensors, Pillow resizes images
    torch.testing.assert_close(view * std + mean, wanted, rtol=0, atol=1.01 / 255)


def test_siglip_is_padded_to_its_context(tmp_path):
    found = load(str(write_siglip(tmp_path / "model"))).preprocessing.tokenize(["a red dog", "A RED DOG"])
    assert found["ids"].shape == (2, 16)
    assert found["mask"].sum(dim=1).tolist() == [4, 4]
    assert torch.equal(found["ids"][0], found["ids"][1])


def test_long_texts_are_truncated_and_keep_their_end(folder):
    preprocessing = load(str(folder)).preprocessing
    found = preprocessing.tokenize(["a red dog " * 40])
    assert found["ids"].shape == (1, preprocessing.context_length)
    assert (
        found["ids"][0, -1] == preprocessing.tokenize(["a"])["ids"][0, 2 if preprocessing.context_length == 40 else 1]
    )


def test_preprocessing_travels_without_weights(folder):
    preprocessing = load(str(folder)).preprocessing
    copy = pickle.loads(pickle.dumps(preprocessing))
    image = tiny_images()[0]
    assert torch.equal(copy.image_transform(image), preprocessing.image_transform(image))
    assert torch.equal(copy.tokenize(CAPTIONS)["ids"], preprocessing.tokenize(CAPTIONS)["ids"])


def test_siglip_2_in_cased_folders_is_lower_cased(tmp_path):
    """Fixed-resolution SigLIP 2 says model_type siglip and ships Gemma's cased tokenizer."""
    from vlkd.models.via_transformers import TransformersModel

    loaded = load(str(write_siglip(tmp_path / "model")))
    cased = type("GemmaTokenizer", (), {"__call__": lambda self, texts, **rest: word_tokenizer()(texts, **rest)})()
    wrapped = TransformersModel(name="x", model=loaded.model, processor=loaded.processor, tokenizer=cased)
    assert wrapped.preprocessing.tokenizer.lower_case
    assert not loaded.preprocessing.tokenizer.lower_case


def test_variable_resolution_and_other_families_are_refused(tmp_path):
    folder = write_siglip(tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"model_type": "siglip2"}))
    with pytest.raises(UserError, match="NaFlex"):
        load(str(folder))
    with pytest.raises(UserError, match="'bert', expected a dual encoder"):
        load(str(write_bert(tmp_path / "bert")))


def test_pickled_or_incomplete_weights_are_refused(tmp_path):
    from safetensors.torch import load_file, save_file

    folder = write_clip(tmp_path / "model")
    weights = load_file(folder / "model.safetensors")
    del weights["visual_projection.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"lack visual_projection\.weight"):
        load(str(folder))
    (folder / "model.safetensors").unlink()
    torch.save(weights, folder / "pytorch_model.bin")
    with pytest.raises(UserError, match="transformers cannot load"):
        load(str(folder))


def test_hub_without_network_says_what_to_do(monkeypatch):
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match="check the spelling and the network"):
        load("hf:nobody/no-such-model-here")
