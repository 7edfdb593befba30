from __future__ import annotations

from xml.etree import ElementTree

import pytest

from vlkd.report import Bar, grouped_bar_plot


def test_bars_are_as_long_as_their_values_and_coloured_by_name():
    groups = {"pets": [Bar(label="", value=50), Bar(label="", value=25)], "cars": [Bar(label="", value=100), None]}
    drawing = ElementTree.fromstring(grouped_bar_plot(groups, ["teacher", "student"], title="t", x_label="acc1"))
    bars = list(drawing.iter("rect"))
    width = [float(bar.attrib["width"]) for bar in bars]
    assert width[0] == pytest.approx(2 * width[1], abs=0.03)
    assert width[2] == pytest.approx(2 * width[0], abs=0.03)
    colours = [bar.attrib["style"] for bar in bars]
    assert colours[0] == colours[2] != colours[1]
    words = [element.text for element in drawing.iter("text")]
    assert {"pets", "cars", "teacher", "student", "no value", "acc1"} <= set(words)
    assert [title.text for title in drawing.iter("title")][1] == "pets, student: 25"


def test_intervals_are_drawn_and_nan_is_no_value():
    groups = {"a": [Bar(label="", value=5, low=4, high=7)], "b": [Bar(label="", value=float("nan"))]}
    plot = grouped_bar_plot(groups, ["m"], title="t", x_label="x")
    assert plot.count('class="interval"') == 1
    assert "a, m: 5 (4 to 7)" in plot
    assert plot.count("no value<") == 1


def test_a_group_without_a_bar_per_name_is_refused():
    with pytest.raises(ValueError, match="'a' has 1 bars; expected 2"):
        grouped_bar_plot({"a": [None]}, ["m", "n"], title="t", x_label="x")
    assert "no values yet" in grouped_bar_plot({}, ["m"], title="t", x_label="x")
