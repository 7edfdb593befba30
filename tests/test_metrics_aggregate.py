"""The mean over named data sets: a published row of 38, the rows that do not count, the rows that are missing."""

from __future__ import annotations

import math

import numpy as np
import pytest

from vlkd.errors import UserError
from vlkd.metrics import aggregate

# open_clip, docs/openclip_results.csv (MIT): ViT-B-32, openai. Figures are rounded to four digits, their mean is not.
AVERAGE = 0.5245075360607366
ROW = {
    "ImageNet 1k": 0.6332, "Caltech-101": 0.8758, "CIFAR-10": 0.8983, "CIFAR-100": 0.6423, "CLEVR Counts": 0.2320,
    "CLEVR Distance": 0.2335, "Country211": 0.1720, "Describable Textures": 0.4436, "EuroSAT": 0.5044,
    "FGVC Aircraft": 0.1953, "Food-101": 0.8400, "GTSRB": 0.3258, "ImageNet Sketch": 0.4229, "ImageNet v2": 0.5592,
    "ImageNet-A": 0.3155, "ImageNet-O": 0.4775, "ImageNet-R": 0.6933, "KITTI Vehicle Distance": 0.2743, "MNIST": 0.4839,
    "ObjectNet": 0.4431, "Oxford Flowers-102": 0.6670, "Oxford-IIIT Pet": 0.8700, "Pascal VOC 2007": 0.7640,
    "PatchCamelyon": 0.6224, "Rendered SST2": 0.5865, "RESISC45": 0.5362, "Stanford Cars": 0.5963, "STL-10": 0.9713,
    "SUN397": 0.6248, "SVHN": 0.3159, "Flickr": 0.6884, "MSCOCO": 0.4028, "WinoGAViL": 0.4125, "iWildCam": 0.0732,
    "Camelyon17": 0.6061, "FMoW": 0.1676, "Dollar Street": 0.5386, "GeoDE": 0.8217,
}  # fmt: skip
NAMES = list(ROW)
EXTRA = {f"SugarCrepe {i}": 0.8 + i / 100 for i in range(10)}


def test_the_published_average_of_38():
    assert len(ROW) == 38
    assert aggregate(ROW, NAMES, what="Average") == pytest.approx(AVERAGE, abs=5e-5)


def test_48_scored_rows_of_which_38_count():
    scores = EXTRA | ROW
    assert len(scores) == 48
    assert aggregate(scores, NAMES, what="Average") == aggregate(ROW, NAMES, what="Average")
    assert np.mean(list(scores.values())) - AVERAGE > 0.05, "the trap: the naive mean is another figure"


def test_named_data_sets_weigh_alike():
    assert aggregate({"a": 0.25, "b": 0.75, "c": 9.0}, ("b", "a"), what="two") == 0.5
    assert aggregate({str(i): 0.1 for i in range(10)}, [str(i) for i in range(10)], what="ten") == 0.1


@pytest.mark.parametrize("value", [None, math.nan, math.inf])
def test_a_missing_or_undefined_score_is_refused(value):
    scores = dict(ROW)
    del scores["FMoW"]
    if value is not None:
        scores["FMoW"] = value
    with pytest.raises(UserError, match=r"Average over 38: 1 of 38 data sets have no score \(FMoW\)"):
        aggregate(scores | EXTRA, NAMES, what="Average over 38")


@pytest.mark.parametrize("names", [[], ["GeoDE", "GeoDE"]])
def test_names_stand_once(names):
    with pytest.raises(UserError, match="expected each once"):
        aggregate(ROW, names, what="VTAB")
