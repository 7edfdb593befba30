"""Views are functions of (seed, key, number), mean the same at every resolution, and have the drawn distribution."""

from __future__ import annotations

import numpy as np
import pytest
from helpers.pairs import noise
from PIL import Image, ImageEnhance

from vlkd.data.views import WHOLE, View, ViewSettings, colors, draws, geometry, view_of

MANY = 4000


def many(settings: ViewSettings) -> list[View]:
    return [view_of(settings, 3, f"key{number % 50}", number // 50) for number in range(MANY)]


def test_a_view_depends_on_seed_key_and_number_alone():
    settings = ViewSettings(color=0.3)
    first = view_of(settings, 1, "a", 2)
    assert view_of(settings, 1, "a", 2) == first
    assert len({first, view_of(settings, 2, "a", 2), view_of(settings, 1, "b", 2), view_of(settings, 1, "a", 3)}) == 4
    # No two of seed, key and number may run into each other.
    assert draws(1, "1", 1, "x") != draws(11, "", 1, "x")


@pytest.mark.parametrize("scale", [(0.5, 1.0), (0.9, 1.0), (0.05, 0.2)])
def test_areas_and_ratios_lie_in_their_ranges(scale):
    boxes = np.array([view.box for view in many(ViewSettings(crop_scale=scale))])
    width, height = boxes[:, 2] - boxes[:, 0], boxes[:, 3] - boxes[:, 1]
    area, ratio = width * height, width / height
    assert boxes.min() >= 0
    assert boxes.max() <= 1
    assert area.min() >= scale[0] - 1e-9
    assert area.max() <= scale[1] + 1e-9
    # Uniform areas: mean and spread of the whole range.
    assert area.mean() == pytest.approx(sum(scale) / 2, abs=0.02 * (scale[1] - scale[0]) + 0.005)
    assert area.std() == pytest.approx((scale[1] - scale[0]) / 12**0.5, rel=0.05)
    assert ratio.min() >= 0.75 - 1e-9
    assert ratio.max() <= 1.3333 + 1e-9
    assert np.log(ratio).mean() == pytest.approx(0, abs=0.02)


def test_full_scale_keeps_the_whole_picture():
    settings = ViewSettings(crop_scale=(1, 1), flip=0)
    image = noise(0)
    for view in many(settings)[:200]:
        assert view.box == pytest.approx((0, 0, 1, 1), abs=1e-12)
        assert geometry(image, view) is image


@pytest.mark.parametrize("probability", [0.0, 0.3, 1.0])
def test_flips_have_their_probability(probability):
    share = sum(view.flip for view in many(ViewSettings(flip=probability))) / MANY
    assert share == pytest.approx(probability, abs=4 * (probability * (1 - probability) / MANY) ** 0.5)


def test_colour_factors_are_uniform_around_one():
    factors = np.array([view.color for view in many(ViewSettings(color=0.4))])
    assert factors.min() >= 0.6
    assert factors.max() <= 1.4
    np.testing.assert_allclose(factors.mean(axis=0), 1, atol=0.02)
    np.testing.assert_allclose(factors.std(axis=0), 0.8 / 12**0.5, rtol=0.05)
    assert all(view.color == (1.0, 1.0, 1.0) for view in many(ViewSettings())[:100])


def test_geometry_crops_then_mirrors():
    array = np.arange(8 * 4 * 3, dtype=np.uint8).reshape(4, 8, 3)
    view = View((0.25, 0.5, 0.75, 1.0), True, (0.2, 0.2, 0.2))
    found = np.asarray(geometry(Image.fromarray(array), view))
    np.testing.assert_array_equal(found, array[2:4, 2:6][:, ::-1])


def test_geometry_never_leaves_an_empty_picture():
    assert geometry(Image.new("RGB", (2, 1)), View((0.4, 0.4, 0.45, 0.45), False, (1, 1, 1))).size == (1, 1)


def test_one_view_shows_the_same_part_at_two_resolutions():
    y, x = np.mgrid[0:240, 0:320]
    ramp = np.stack([x * 255 / 319, y * 255 / 239, np.full(x.shape, 128)], axis=-1).astype(np.uint8)
    large, small = Image.fromarray(ramp), Image.fromarray(ramp).resize((80, 60), Image.Resampling.BOX)
    for number in range(20):
        view = view_of(ViewSettings(), 0, "k", number)
        pair = [
            np.asarray(geometry(image, view).resize((16, 16), Image.Resampling.BOX), np.float64)
            for image in (large, small)
        ]
        # One pixel of the small picture is 255 / 60 grey levels of the ramp.
        assert np.abs(pair[0] - pair[1]).max() < 255 / 60
        other = view_of(ViewSettings(), 0, "k", number + 1)
        wrong = np.asarray(geometry(small, other).resize((16, 16), Image.Resampling.BOX), np.float64)
        assert np.abs(pair[0] - wrong).max() > 255 / 60


def test_colours_are_pillows_enhancers_in_their_order():
    image = noise(1)
    view = View((0, 0, 1, 1), False, (0.8, 1.2, 0.5))
    expected = ImageEnhance.Brightness(image).enhance(0.8)
    expected = ImageEnhance.Contrast(expected).enhance(1.2)
    expected = ImageEnhance.Color(expected).enhance(0.5)
    np.testing.assert_array_equal(np.asarray(colors(image, view)), np.asarray(expected))
    assert colors(image, WHOLE) is image
