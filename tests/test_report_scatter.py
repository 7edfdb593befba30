from __future__ import annotations

import itertools
from xml.etree import ElementTree

import pytest

from vlkd.report import Dot, scatter_plot

CHARACTER, LINE = 7.2, 14


def texts(drawing: ElementTree.Element) -> dict[str, ElementTree.Element]:
    return {element.text or "": element for element in drawing.iter("text")}


def test_dots_lie_at_the_logarithm_of_x():
    dots = [
        Dot(label=name, x=x, y=50 + place) for place, (name, x) in enumerate({"a": 1e6, "b": 1e7, "c": 1e8}.items())
    ]
    drawing = ElementTree.fromstring(scatter_plot(dots, title="t", x_label="parameters", y_label="y", log_x=True))
    x = [float(circle.attrib["cx"]) for circle in drawing.iter("circle")]
    y = [float(circle.attrib["cy"]) for circle in drawing.iter("circle")]
    assert x[1] == pytest.approx((x[0] + x[2]) / 2, abs=0.02)
    assert y[0] > y[1] > y[2]


def test_every_name_is_drawn_and_none_overlaps_another():
    dots = [Dot(label=f"model number {n}", x=1e6 * (1 + n / 50), y=50 + n / 20) for n in range(8)]
    drawing = ElementTree.fromstring(scatter_plot(dots, title="t", x_label="x", y_label="y", log_x=True))
    labels = texts(drawing)
    boxes = []
    for dot in dots:
        x, y = (float(labels[dot.label].attrib[name]) for name in "xy")
        assert x >= 0
        assert x + CHARACTER * len(dot.label) <= 480
        boxes.append((x, y - LINE + 3, x + CHARACTER * len(dot.label), y + 3))
    for one, other in itertools.combinations(boxes, 2):
        assert (
            one[2] <= other[0] + 0.1 or other[2] <= one[0] + 0.1 or one[3] <= other[1] + 0.1 or other[3] <= one[1] + 0.1
        )


def test_what_cannot_be_drawn_is_named():
    dots = [Dot(label="free", x=0, y=1), Dot(label="broken", x=1, y=float("nan")), Dot(label="<b>", x=2, y=1)]
    drawing = ElementTree.fromstring(scatter_plot(dots, title="t", x_label="x", y_label="y", log_x=True))
    assert len(list(drawing.iter("circle"))) == 1
    assert "not drawn: free, broken" in texts(drawing)
    assert "<b>" in texts(drawing)


def test_interval_of_a_dot_is_drawn_and_told():
    plot = scatter_plot([Dot(label="a", x=1, y=5, low=4, high=6)], title="t", x_label="x", y_label="y")
    assert "a: 1, 5 (4 to 6)" in plot
    assert "interval" in plot
    assert "no values yet" in scatter_plot([], title="t", x_label="x", y_label="y")
