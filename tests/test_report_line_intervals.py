"""Line plots with intervals, a logarithmic x axis and marks of one's own."""

from __future__ import annotations

import itertools
import math
import re
from xml.etree import ElementTree

import pytest

from vlkd.report import line_plot

WORDS = {"title": "T", "x_label": "x", "y_label": "y"}


def whiskers(root):
    """x, low end and high end of each, in pixels."""
    paths = [path.attrib["d"] for path in root.iter("path") if path.attrib.get("class") == "interval"]
    found = [re.match(r"M([\d.]+) ([\d.]+)h4m-2 0V([\d.]+)m", path).groups() for path in paths]
    return [(float(x) + 2, float(low), float(high)) for x, low, high in found]


def points(root):
    return [
        [tuple(map(float, pair.split(","))) for pair in line.attrib["points"].split()] for line in root.iter("polyline")
    ]


def svg(*args, **kwargs):
    return ElementTree.fromstring(line_plot(*args, **WORDS, **kwargs))


def test_a_logarithmic_x_axis_with_marks_of_ones_own():
    xs = [1, 2, 4, 8, 16]
    root = svg({"a": (xs, [110, 120, 130, 140, 150])}, log_x=True, x_marks=xs)
    (line,) = points(root)
    steps = [b[0] - a[0] for a, b in itertools.pairwise(line)]
    assert steps == pytest.approx([steps[0]] * 4, abs=0.02)
    marks = {text.text: float(text.attrib["x"]) for text in root.iter("text")}
    assert [marks[str(x)] for x in xs] == pytest.approx([x for x, _ in line], abs=0.01)


def test_what_is_not_positive_is_left_out_on_a_logarithmic_x_axis():
    root = svg({"a": ([0, 1, 2], [1, 2, 3])}, log_x=True)
    assert len(points(root)[0]) == 2
    assert any("not finite and positive: a (1)" in (text.text or "") for text in root.iter("text"))


def test_whiskers_are_drawn_to_scale_around_their_points():
    root = svg({"a": ([0, 1], [2, 6])}, intervals={"a": [(0, 4), (5, 10)]})
    (line,) = points(root)
    found = whiskers(root)
    assert [x for x, _, _ in found] == pytest.approx([x for x, _ in line], abs=0.01)
    # The axis spans 0 to 10 in 190 pixels.
    assert [low - high for _, low, high in found] == pytest.approx([76, 95], abs=0.02)
    assert [low - y for (_, low, _), (_, y) in zip(found, line, strict=True)] == pytest.approx([38, 19], abs=0.02)
    assert len(list(root.iter("circle"))) == 2


def test_series_with_intervals_stand_beside_each_other_and_without_do_not():
    series = {name: ([0, 1], [1, 2]) for name in "abc"}
    ends = {name: [(0, 2), (1, 3)] for name in "abc"}
    xs = [line[0][0] for line in points(svg(series, intervals=ends))]
    assert [xs[1] - xs[0], xs[2] - xs[1]] == pytest.approx([3, 3])
    assert len({line[0][0] for line in points(svg(series))}) == 1


def test_an_interval_that_is_not_finite_is_not_drawn_and_its_point_is():
    root = svg({"a": ([0, 1], [2, 6])}, intervals={"a": [(math.nan, math.nan), (5, 7)]})
    assert len(whiskers(root)) == 1
    assert len(points(root)[0]) == 2
    assert not re.search(r"\b(nan|inf)\b", ElementTree.tostring(root, encoding="unicode"))


def test_intervals_widen_the_axis_and_have_to_be_as_many_as_points():
    root = svg({"a": ([0, 1], [40, 60])}, intervals={"a": [(1, 70), (30, 99)]})
    assert {"0", "100"} <= {text.text for text in root.iter("text")}
    with pytest.raises(ValueError, match="2 y values and 1 intervals"):
        svg({"a": ([0, 1], [1, 2])}, intervals={"a": [(0, 1)]})


def test_the_height_is_as_asked():
    boxes = [svg({"a": ([0, 1], [0, 1])}, height=height).attrib["viewBox"].split()[3] for height in (190, 320)]
    assert int(boxes[1]) - int(boxes[0]) == 130
