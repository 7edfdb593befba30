"""timm towers as image encoders: equal to timm's own features and transform, and honest about texts."""

from __future__ import annotations

import pickle
from pathlib import Path

import pytest
import timm
import torch
from helpers.tiny_models import CAPTIONS, tiny_composite, tiny_images
from safetensors.torch import load_file, save_file
from timm.data import create_transform, resolve_model_data_config

from vlkd.errors import UserError
from vlkd.models.fingerprint import model_fingerprint
from vlkd.models.load import load, load_image_encoder

NAME = "resnet10t"
LITE = "tf_efficientnet_lite0"
SHARED = Path(__file__).parents[2] / "shared"


def whole_model(name=NAME, *, seed=0):
    """A random timm model with its classifier, its running statistics random, too."""
    torch.manual_seed(seed)
    model = timm.create_model(name, pretrained=False)
    for key, value in model.named_buffers():
        if key.endswith("running_mean"):
            value.normal_(std=0.1)
        if key.endswith("running_var"):
            value.uniform_(0.5, 1.5)
    return model.eval()


def written(path, model, dtype=torch.float32):
    save_file({key: value.to(dtype).contiguous() for key, value in model.state_dict().items()}, str(path))
    return str(path)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("name", [NAME, "vit_tiny_patch16_224"])
def test_it_gives_the_pooled_features_of_timm(tmp_path, name, dtype):
    whole = whole_model(name).to(dtype).float()
    encoder = load_image_encoder(f"timm:{name}@{written(tmp_path / 'w.safetensors', whole, dtype)}")
    images = tiny_images(3)
    transform = create_transform(**resolve_model_data_config(whole), is_training=False)
    with torch.no_grad():
        features = whole.forward_features(torch.stack([transform(image) for image in images]))
        expected = whole.forward_head(features, pre_logits=True)
    found = encoder.encode_image(images, batch_size=2)
    assert found.dtype == torch.float32
    assert torch.allclose(found, expected, rtol=1e-5, atol=1e-5)
    assert encoder.width == expected.shape[1]
    assert torch.allclose(encoder.encode_image(images, normalize=True).norm(dim=1), torch.ones(3))
    assert {value.dtype for value in encoder.parameters()} == {torch.float32}
    assert not encoder.training
    assert encoder.parameter_counts() == {
        "image": sum(value.numel() for value in whole.parameters()) - whole.get_classifier().weight.numel() - 1000,
        "text": 0,
    }


def test_the_transform_is_that_of_the_name(tmp_path):
    encoder = load_image_encoder(f"timm:{LITE}@{written(tmp_path / 'w.safetensors', whole_model(LITE))}")
    image = tiny_images(1)[0]
    pixels = encoder.preprocessing.image_transform(image)
    assert encoder.preprocessing.image_size == tuple(pixels.shape[1:]) == (224, 224)
    # Mean and std 0.5 put the range of bytes on -1 to 1; the values are multiples of 2/255.
    grey = (pixels + 1) * 255 / 2
    assert torch.allclose(grey, grey.round(), atol=1e-3)
    assert encoder.library_configuration().mean == (0.5, 0.5, 0.5)
    # A view is not cropped: its corners are the image's own.
    corner = torch.tensor(image.resize((224, 224), 3).getpixel((0, 0))) / 127.5 - 1
    assert torch.allclose(encoder.preprocessing.view_transform(image)[:, 0, 0], corner, atol=1e-6)


def test_the_fingerprint_follows_the_weights_and_the_preprocessing(tmp_path):
    one, other = (written(tmp_path / f"{i}.safetensors", whole_model(seed=i)) for i in (0, 1))
    prints = [model_fingerprint(load_image_encoder(f"timm:{name}@{path}"))
              for name, path in ((NAME, one), (NAME, one), (NAME, other))]  # fmt: skip
    assert prints[0] == prints[1] != prints[2]
    encoder = load_image_encoder(f"timm:{NAME}@{one}")
    squashed = type(encoder.preprocessing)((176, 176), encoder.preprocessing.squash, encoder.preprocessing.squash)
    encoder.preprocessing = squashed
    assert model_fingerprint(encoder) != prints[0]


def test_texts_are_refused(tmp_path):
    ref = f"timm:{NAME}@{written(tmp_path / 'w.safetensors', whole_model())}"
    encoder = load_image_encoder(ref)
    assert encoder.provides == {"image.embed"}
    with pytest.raises(UserError, match="without a text tower"):
        encoder.encode_text(CAPTIONS)
    with pytest.raises(UserError, match=r"cannot produce 'text.embed'; it has image\.embed"):
        encoder.encode({}, ("text.embed",))
    with pytest.raises(UserError, match=rf"model\.image={NAME}\).*linear probe, k-NN, speed"):
        load(ref)


def test_a_dual_encoder_is_an_image_encoder(tmp_path):
    tiny_composite().save(tmp_path / "m")
    images = tiny_images(2)
    expected = load(str(tmp_path / "m")).encode_image(images)
    assert torch.equal(load_image_encoder(str(tmp_path / "m")).encode_image(images), expected)


def test_what_cannot_be_loaded(tmp_path):
    with pytest.raises(UserError, match="timm cannot build 'no_such_net'"):
        load_image_encoder("timm:no_such_net@x.safetensors")
    with pytest.raises(UserError, match=r"Found no file .*gone\.safetensors"):
        load_image_encoder(f"timm:{NAME}@{tmp_path}/gone.safetensors")
    (tmp_path / "w.bin").write_bytes(pickle.dumps({}))
    with pytest.raises(UserError, match="never unpickles"):
        load_image_encoder(f"timm:{NAME}@{tmp_path}/w.bin")
    other = written(tmp_path / "other.safetensors", whole_model("resnet18"))
    with pytest.raises(UserError, match="does not fit its model"):
        load_image_encoder(f"timm:{NAME}@{other}")
    with pytest.raises(UserError, match="image tower without a text tower"):
        load_image_encoder("timm:")


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A hub of one file; what was asked of it is listed."""
    import huggingface_hub

    asked = []

    def download(repository, file):
        asked.append((repository, file))
        if not (tmp_path / "hub.safetensors").exists():
            raise OSError("no network")
        return str(tmp_path / "hub.safetensors")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    return asked


def test_a_name_alone_is_fetched_from_the_hub(tmp_path, hub):
    whole = whole_model()
    written(tmp_path / "hub.safetensors", whole)
    assert torch.equal(
        load_image_encoder(f"timm:{NAME}").encode_image(tiny_images(2)),
        load_image_encoder(f"timm:{NAME}@{tmp_path / 'hub.safetensors'}").encode_image(tiny_images(2)),
    )
    assert hub == [(f"timm/{NAME}.c3_in1k", "model.safetensors")]


def test_a_hub_without_network_or_with_missing_keys_is_refused(tmp_path, hub):
    with pytest.raises(UserError, match=rf"no network.*pass timm:{NAME}@FILE\.safetensors"):
        load_image_encoder(f"timm:{NAME}")
    weights = whole_model().state_dict()
    del weights["conv1.0.weight"]
    save_file(weights, str(tmp_path / "hub.safetensors"))
    with pytest.raises(UserError, match="timm cannot load"):
        load_image_encoder(f"timm:{NAME}")


def test_a_name_without_published_weights_is_refused(hub):
    name = "coatnet_nano_cc_224"
    assert not timm.models.get_pretrained_cfg(name).hf_hub_id
    with pytest.raises(UserError, match=f"publishes no safetensors for 'timm:{name}'"):
        load_image_encoder(f"timm:{name}")
    assert not hub


@pytest.mark.skipif(not (SHARED / "models").is_dir(), reason="the pretrained towers are not there")
def test_a_pretrained_tower_loads():
    path = SHARED / "models" / f"{LITE}.safetensors"
    encoder = load_image_encoder(f"timm:{LITE}@{path}")
    assert encoder.width == 1280
    assert "classifier.weight" in load_file(str(path))
    assert encoder.encode_image(tiny_images(1)).isfinite().all()
