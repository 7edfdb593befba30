"""The composite's Pillow transforms against timm's and torchvision's."""

from __future__ import annotations

import numpy as np
import pytest
import timm
import torch
from helpers.tiny_models import tiny_images, tiny_tokenizer
from PIL import Image
from timm.data import create_transform, resolve_model_data_config
from torchvision.transforms import InterpolationMode, Resize

from vlkd.errors import UserError
from vlkd.models.preprocessing import CompositePreprocessing, PixelSettings, timm_settings

MEAN, STD = (0.5, 0.4, 0.3), (0.5, 0.25, 0.2)


def settings(**changes):
    values = {"size": 32, "mean": MEAN, "std": STD, "interpolation": "bicubic", "crop_fraction": 0.875}
    return PixelSettings(**(values | changes))


def odd_images():
    """Shapes whose halves and ratios round differently."""
    sizes = [(61, 40), (40, 61), (33, 33), (200, 31), (31, 200), (97, 64)]
    generator = np.random.default_rng(0)
    return tiny_images() + [Image.fromarray(generator.integers(0, 256, (h, w, 3), dtype=np.uint8)) for w, h in sizes]


@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
@pytest.mark.parametrize(("crop_fraction", "crop_mode"), [(0.875, "center"), (1.0, "center"), (0.9, "squash")])
@pytest.mark.parametrize("size", [32, 33])
def test_image_transform_equals_timms(interpolation, crop_fraction, crop_mode, size):
    own = settings(size=size, interpolation=interpolation, crop_fraction=crop_fraction, crop_mode=crop_mode)
    transform = create_transform(
        (3, size, size), interpolation=interpolation, mean=MEAN, std=STD, crop_pct=crop_fraction, crop_mode=crop_mode
    )
    preprocessing = CompositePreprocessing(own, tiny_tokenizer(), 16)
    for image in odd_images():
        pixels = preprocessing.image_transform(image)
        assert pixels.dtype == torch.uint8
        found = (pixels / 255 - torch.tensor(MEAN)[:, None, None]) / torch.tensor(STD)[:, None, None]
        torch.testing.assert_close(found, transform(image), rtol=0, atol=1e-5)


def test_view_transform_equals_torchvisions_squash():
    preprocessing = CompositePreprocessing(settings(), tiny_tokenizer(), 16)
    squash = Resize((32, 32), interpolation=InterpolationMode.BICUBIC)
    for image in odd_images():
        wanted = torch.from_numpy(np.array(squash(image))).permute(2, 0, 1)
        assert torch.equal(preprocessing.view_transform(image), wanted)


@pytest.mark.parametrize("name", ["tf_efficientnet_lite0", "resnet10t", "vit_tiny_patch16_224"])
def test_timms_own_values_are_kept(name):
    tower = timm.create_model(name, num_classes=0)
    found, wanted = timm_settings(tower, size=0, crop_fraction=0.0), resolve_model_data_config(tower)
    assert (found.size, found.mean, found.std) == (wanted["input_size"][1], wanted["mean"], wanted["std"])
    assert (found.interpolation, found.crop_fraction) == (wanted["interpolation"], wanted["crop_pct"])


def test_efficientnet_lite_is_not_given_imagenets_mean():
    assert timm_settings(timm.create_model("tf_efficientnet_lite0"), size=0, crop_fraction=0.0).mean == (0.5, 0.5, 0.5)


@pytest.mark.parametrize(
    "changes",
    [{"size": 0}, {"std": (1.0, 0.0, 1.0)}, {"interpolation": "cubic"}, {"crop_fraction": 1.5}, {"mean": (0.5,)}],
)
def test_values_outside_their_range(changes):
    with pytest.raises(UserError, match="Found preprocessing"):
        settings(**changes)
