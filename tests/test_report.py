from __future__ import annotations

import base64
import io
import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
from PIL import Image

from vlkd.errors import UserError
from vlkd.report import (
    Bar,
    Estimate,
    Figure,
    Gallery,
    ImageQuery,
    RankedImage,
    RankedText,
    Report,
    Table,
    TextQuery,
    bar_plot,
    line_plot,
    read_metrics,
    write_run_report,
)
from vlkd.report.axes import fit_axis
from vlkd.report.plots import POINTS, thin_out
from vlkd.report.run import curves

HOSTILE = '"><script>alert(1)</script><img src="https://evil.example/x.png" onerror=\'go()\'> & \x00\ud800 </q>'
VOID = {"meta", "img", "br", "hr", "input", "link"}


class Page(HTMLParser):
    """Checks that tags nest and collects elements, attributes and text."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == [], f"left open: {self.open}"

    def handle_starttag(self, tag, attrs):
        assert len(dict(attrs)) == len(attrs), f"repeated attribute in {tag}: {attrs}"
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open, f"</{tag}> closes nothing"
        assert self.open[-1] == tag, f"</{tag}> inside {self.open}"
        self.open.pop()

    def handle_data(self, data):
        if self.open and self.open[-1] not in ("style",):
            self.words.append(data)

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.elements if name == tag]

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())


def picture(width: int = 40, height: int = 30, colour: str = "red") -> Image.Image:
    return Image.new("RGB", (width, height), colour)


def text_query(text: str = "a dog", rank: int = 2, **more) -> TextQuery:
    found = [RankedImage(image=picture(), score=0.5 - 0.1 * place, right=place == rank - 1) for place in range(5)]
    return TextQuery(text=text, found=found, rank=rank, gallery_size=1200, **more)


def svg(markup: str) -> ElementTree.Element:
    return ElementTree.fromstring(markup)


def points_of(element: ElementTree.Element) -> list[tuple[float, float]]:
    pairs = [pair.split(",") for pair in element.attrib["points"].split()]
    return [(float(x), float(y)) for x, y in pairs]


# Axes


def test_axis_maps_linearly_and_by_logarithm():
    axis = fit_axis([0, 10], 100, 300)
    assert (axis.pixel(0), axis.pixel(2.5), axis.pixel(10)) == (100, 150, 300)
    # Pixels may run downwards; on the logarithmic axis the geometric mean of the ends lies in the middle.
    axis = fit_axis([0.01, 100], 200, 0, log=True)
    assert [axis.pixel(value) for value in (0.01, 1, 10, 100)] == pytest.approx([200, 100, 50, 0])


@pytest.mark.parametrize(
    ("values", "labels"),
    [
        ((0, 1), ("0", "0.2", "0.4", "0.6", "0.8", "1.0")),
        ((3, 47), ("0", "10", "20", "30", "40", "50")),
        ((-0.3, 0.9), ("-0.5", "0", "0.5", "1.0")),
        ((0, 5e-4), ("0", "1e-4", "2e-4", "3e-4", "4e-4", "5e-4")),
        ((0, 0.001), ("0", "0.0002", "0.0004", "0.0006", "0.0008", "0.0010")),
        ((0, 20_000), ("0", "5k", "10k", "15k", "20k")),
        ((0, 1.9e6), ("0", "0.5M", "1.0M", "1.5M", "2.0M")),
        ((1.0001, 1.0003), ("1.00010", "1.00015", "1.00020", "1.00025", "1.00030")),
    ],
)
def test_ticks_are_round(values, labels):
    assert fit_axis(values, 0, 1).labels() == labels


@pytest.mark.parametrize(
    ("values", "labels"),
    [
        ((0.01, 100), ("0.01", "0.1", "1", "10", "100")),
        ((2.1, 30), ("2", "5", "10", "20", "50")),
        ((1e-5, 1e3), ("1e-5", "0.001", "0.1", "10", "1000")),
        ((0.07, 9), ("0.1", "1", "10")),
    ],
)
def test_logarithmic_ticks(values, labels):
    assert fit_axis(values, 0, 1, log=True).labels() == labels


@pytest.mark.parametrize("log", [False, True])
@pytest.mark.parametrize("scale", [1e-30, 1e-3, 1.0, 1e5, 1e30])
def test_every_value_lies_on_its_axis(scale, log):
    for values in ([scale], [scale, scale * (1 + 1e-15)], [scale, 3.7 * scale], [scale, 1e4 * scale]):
        axis = fit_axis(values, 0, 100, log=log)
        assert all(-1e-6 <= axis.pixel(value) <= 100 + 1e-6 for value in values)
        assert 1 <= len(axis.ticks) <= 9
        assert len(set(axis.labels())) == len(axis.ticks)


# Plots


def test_line_plot_puts_values_at_their_pixels():
    # x fills its axis; y runs from 0 to 10 in ticks of 2, so the values divide the height in known parts.
    root = svg(line_plot({"a": ([0, 50, 100], [0, 5, 10])}, title="T", x_label="x", y_label="y"))
    (line,) = root.iter("polyline")
    (x0, y0), (x1, y1), (x2, y2) = points_of(line)
    assert x1 - x0 == pytest.approx(x2 - x1, abs=0.02)
    assert (y0 - y1, y1 - y2) == (pytest.approx(95), pytest.approx(95))
    assert y2 == 40
    marks = {mark.text: mark for mark in root.iter("text")}
    assert float(marks["100"].attrib["x"]) == pytest.approx(x2)
    assert float(marks["10"].attrib["y"]) - 4 == pytest.approx(y2)


def test_line_plot_on_a_logarithmic_axis():
    root = svg(line_plot({"a": ([0, 1, 2], [0.01, 1, 100])}, title="", x_label="", y_label="", log_y=True))
    (line,) = root.iter("polyline")
    assert [y for _, y in points_of(line)] == pytest.approx([230, 135, 40])


def test_line_plot_has_one_line_and_one_legend_entry_per_series():
    series = {f"teacher {index}": ([0, 1], [index, index + 1]) for index in range(11)}
    root = svg(line_plot(series, title="T", x_label="x", y_label="y"))
    lines = list(root.iter("polyline"))
    assert len(lines) == 11
    assert len({line.attrib["style"] for line in lines}) == 11, "two series look alike"
    words = [text.text for text in root.iter("text")]
    assert [words.count(name) for name in series] == [1] * 11


def test_values_that_cannot_be_drawn_interrupt_the_line_and_are_counted():
    ys = [1.0, 2.0, math.nan, 3.0, math.inf, 4.0, 5.0, 6.0]
    root = svg(line_plot({"loss": (range(8), ys)}, title="T", x_label="x", y_label="y"))
    assert [len(points_of(line)) for line in root.iter("polyline")] == [2, 3]
    assert len(list(root.iter("circle"))) == 1
    assert any("not finite: loss (2)" in (text.text or "") for text in root.iter("text"))
    assert not re.search(r"\b(nan|inf)\b", ElementTree.tostring(root, encoding="unicode"))


def test_what_is_not_positive_is_left_out_on_a_logarithmic_axis():
    root = svg(line_plot({"a": ([0, 1, 2], [0.0, -1.0, 4.0])}, title="", x_label="", y_label="", log_y=True))
    assert len(list(root.iter("circle"))) == 1
    assert any("not finite and positive: a (2)" in (text.text or "") for text in root.iter("text"))


@pytest.mark.parametrize("series", [{}, {"a": ([], [])}, {"a": ([1.0], [math.nan])}])
@pytest.mark.parametrize("log_y", [False, True])
def test_an_empty_plot_says_so(series, log_y):
    root = svg(line_plot(series, title="T", x_label="x", y_label="y", log_y=log_y))
    assert "no values yet" in [text.text for text in root.iter("text")]


def test_thinning_keeps_ends_and_spikes():
    ys = np.random.default_rng(0).normal(size=10_000)
    ys[[0, -1]] = 0.0  # the ends are no extremes of their stretch
    ys[1234], ys[7777] = 9.0, -9.0
    points = list(zip(range(10_000), ys.tolist(), strict=True))
    kept = thin_out(points)
    assert len(kept) <= POINTS + 2
    assert (kept[0], kept[-1]) == (points[0], points[-1])
    assert {points[1234], points[7777]} <= set(kept)
    assert kept == sorted(kept)
    assert thin_out(points[:POINTS]) == points[:POINTS]


def test_line_plot_refuses_uneven_series():
    with pytest.raises(ValueError, match="2 x values and 1 y values"):
        line_plot({"a": ([1, 2], [1])}, title="", x_label="", y_label="")


def test_bar_plot_draws_to_scale_from_zero():
    bars = [Bar(label="a", value=10, low=8, high=12), Bar(label="b", value=5), Bar(label="c", value=-5)]
    root = svg(bar_plot(bars, title="T", x_label="percent"))
    boxes = [{key: float(box.attrib[key]) for key in ("x", "width")} for box in root.iter("rect")]
    assert boxes[0]["width"] == pytest.approx(2 * boxes[1]["width"], abs=0.02)
    assert boxes[1]["width"] == pytest.approx(boxes[2]["width"], abs=0.02)
    assert boxes[2]["x"] + boxes[2]["width"] == pytest.approx(boxes[0]["x"], abs=0.02)
    (whisker,) = [path for path in root.iter("path") if path.attrib.get("class") == "interval"]
    low, high = re.match(r"M([\d.]+) .*H([\d.]+)m", whisker.attrib["d"]).groups()
    assert (float(high) - float(low)) == pytest.approx(boxes[0]["width"] * 4 / 10, abs=0.03)


def test_bar_plot_without_bars_and_with_a_value_that_is_not_finite():
    assert "no values yet" in [text.text for text in svg(bar_plot([], title="", x_label="")).iter("text")]
    root = svg(bar_plot([Bar(label="a", value=math.nan), Bar(label="b", value=1)], title="", x_label=""))
    assert len(list(root.iter("rect"))) == 1
    assert "not finite" in [text.text for text in root.iter("text")]


def test_plots_survive_hostile_names():
    for markup in (
        line_plot({HOSTILE: ([0, 1], [0, 1]), "b": ([0], [1])}, title=HOSTILE, x_label=HOSTILE, y_label=HOSTILE),
        bar_plot([Bar(label=HOSTILE, value=1)], title=HOSTILE, x_label=HOSTILE),
    ):
        tags = {element.tag for element in svg(markup).iter()}
        assert tags <= {"svg", "text", "title", "path", "polyline", "circle", "rect"}


# Tables


def test_table_marks_the_best_of_each_column_and_leaves_the_teacher_aside():
    estimate = Estimate(value=12.34, low=11, high=13.5)
    rows = [("teacher", 50.0, 1), ("a", estimate, 3), ("b", 12.0, 2), ("c", math.nan, 2), ("d", None, "n/a")]
    table = Table(("model", "hit", "rank"), rows, best={"hit": "highest", "rank": "lowest"}, aside={0})
    assert table.best_rows(0) == frozenset()
    assert table.best_rows(1) == {1}
    assert table.best_rows(2) == {2, 3}
    report = Report("r")
    report.section("s")
    report.table(table)
    page = Page(report.html())
    assert sum("best" in (cell.get("class") or "") for cell in page.all("td")) == 3
    assert [row.get("class") for row in page.all("tr")] == [None, "aside", None, None, None, None]
    assert "12.3 11.0 to 13.5" in page.text


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"rows": [("a",)]}, "Row 0 has 1 cells; expected 2"),
        ({"best": {"speed": "highest"}}, r"best names \['speed'\]"),
        ({"aside": {4}}, r"aside names rows \[4\], but there are 1"),
    ],
)
def test_table_refuses_what_does_not_fit(more, message):
    with pytest.raises(ValueError, match=message):
        Table(**({"headers": ("model", "hit"), "rows": [("a", 1)]} | more))


# Pages


def full_report(folder: Path, words: str) -> Path:
    metrics = folder / "metrics.jsonl"
    rows = [{"step": s, "samples": 64 * s, "loss": 5 / s, "loss/icl": 3 / s, "lr": 0.1 * s} for s in range(1, 50)]
    metrics.write_text("\n".join(json.dumps(row) for row in rows))
    image_query = ImageQuery(
        image=picture(),
        found=[RankedText(text=words, score=0.4, right=True), RankedText(text="b", score=0.3, right=False)],
        rank=1,
        gallery_size=9,
        label=words,
    )
    missed = RankedImage(image=picture(colour="blue"), score=0.0, right=True, label=words)
    return write_run_report(
        folder,
        title=words,
        lead=words,
        settings={words: words},
        metrics_path=metrics,
        tables={words: Table(("model", words), [(words, words)], caption=words)},
        galleries=[Gallery(title=words, note=words, items=[text_query(words, 700, missed=missed), image_query])],
        notes=[words],
        figures=[Figure(label=words, value=words, note=words)],
    )


@pytest.mark.parametrize("words", ["plain words", HOSTILE, "مرحبا 你好 👋"])
def test_a_full_report_is_well_formed_and_loads_nothing(tmp_path, words):
    path = full_report(tmp_path, words)
    text = path.read_text(encoding="utf-8")
    page = Page(text)
    assert {tag for tag, _ in page.elements}.isdisjoint({"script", "link", "iframe", "object", "base", "form"})
    assert len(page.all("img")) == 7
    for tag, attributes in page.elements:
        assert not [name for name in attributes if name.startswith("on")], f"{tag} has a handler"
        for name in ("src", "href", "xlink:href", "action", "srcset"):
            value = attributes.get(name)
            assert value is None or value.startswith(("data:image/jpeg;base64,", "#section-")), f"{tag} loads {value}"
    assert "url(" not in text
    assert "@import" not in text
    if words != HOSTILE:
        assert "http://" not in text
        assert "https://" not in text
        assert page.text.count(words) >= 12
    else:
        assert "alert(1)" in page.text, "the caption itself is shown"
        assert text.count("<script") == 0
    plots = re.findall(r"<svg.*?</svg>", text, flags=re.DOTALL)
    assert len(plots) == 2
    for plot in plots:
        svg(plot)


def test_a_report_is_the_same_text_twice(tmp_path):
    assert full_report(tmp_path, "a").read_bytes() == full_report(tmp_path, "a").read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["metrics.jsonl", "report.html"]


def test_gallery_frames_the_right_image_and_says_its_rank():
    report = Report("r")
    missed = RankedImage(image=picture(colour="blue"), score=0.0, right=True)
    report.gallery([text_query(rank=2), text_query("a cat", rank=1100, missed=missed)])
    page = Page(report.html())
    assert [item["class"] for item in page.all("li")] == ["wrong", "right"] + ["wrong"] * 8 + ["right missed"]
    assert "rank 2 of 1,200" in page.text
    assert "✓ 1100" in page.text
    chips = [span["class"] for span in page.all("span") if (span.get("class") or "").startswith("chip")]
    assert chips == ["chip near", "chip miss"]


@pytest.mark.parametrize("rank", [0, 1201])
def test_gallery_refuses_an_impossible_rank(rank):
    with pytest.raises(ValueError, match=f"Found rank {rank} in a gallery of 1200"):
        text_query(rank=rank)


@pytest.mark.parametrize(("size", "expected"), [((640, 320), (160, 80)), ((90, 900), (16, 160)), ((32, 24), (32, 24))])
@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_thumbnails_are_small_jpegs(size, expected, mode):
    report = Report("r")
    image = Image.new(mode, size, "white")
    report.gallery([ImageQuery(image=image, found=[], rank=1, gallery_size=1)])
    (embedded,) = Page(report.html()).all("img")
    kind, data = embedded["src"].split(",")
    assert kind == "data:image/jpeg;base64"
    opened = Image.open(io.BytesIO(base64.b64decode(data)))
    assert (opened.format, opened.size) == ("JPEG", expected)
    assert image.size == size, "the caller's image was shrunk"


def test_write_leaves_the_old_page_when_it_fails(tmp_path, monkeypatch):
    path = Report("old").write(tmp_path / "report.html")

    def fail(self, target):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "replace", fail)
    with pytest.raises(UserError, match="No space left on device"):
        Report("new").write(path)
    assert "<h1>old</h1>" in path.read_text()
    assert list(tmp_path.iterdir()) == [path]


def test_write_refuses_a_missing_folder_and_a_folder(tmp_path):
    for path in (tmp_path / "absent" / "report.html", tmp_path):
        with pytest.raises(UserError, match="cannot be written"):
            Report("r").write(path)


# Metrics


def write_lines(folder: Path, *lines: str) -> Path:
    path = folder / "metrics.jsonl"
    path.write_text("\n".join(lines))
    return path


def test_read_metrics_collects_series_by_samples(tmp_path):
    path = write_lines(
        tmp_path,
        '{"step": 1, "samples": 64, "loss/mse": 0.5, "lr": 0.1, "note": "warm", "flag": true}',
        '{"step": 1, "samples": 64, "val/hit@1": 0.25}',
        "",
        '{"step": 2, "samples": 128, "loss/mse": null, "lr": 0.2}',
    )
    metrics = read_metrics(path)
    assert metrics.keys() == {"loss/mse", "lr", "val/hit@1"}
    assert metrics["lr"] == ([64.0, 128.0], [0.1, 0.2])
    assert metrics["val/hit@1"] == ([64.0], [0.25])
    assert metrics["loss/mse"][0] == [64.0, 128.0]
    assert math.isnan(metrics["loss/mse"][1][1])


def test_read_metrics_falls_back_to_steps(tmp_path):
    assert read_metrics(write_lines(tmp_path, '{"step": 3, "lr": 1}')) == {"lr": ([3.0], [1.0])}


def test_a_resumed_run_overwrites_the_steps_it_repeats(tmp_path):
    # Killed after step 4, resumed from a checkpoint after step 1, logging more often than before.
    rows = [(1, 0.1), (3, 0.3), (4, 0.4), (2, 2.2), (3, 3.3), (4, 4.4)]
    path = write_lines(tmp_path, *(json.dumps({"step": step, "lr": lr}) for step, lr in rows))
    assert read_metrics(path) == {"lr": ([1.0, 2.0, 3.0, 4.0], [0.1, 2.2, 3.3, 4.4])}


@pytest.mark.parametrize("torn", ['{"step": 2, "lr"', '{"step": 2, "lr{"step": 2, "lr": 5}', "\x00\x00", "[1]"])
def test_a_line_that_is_not_whole_is_left_out_and_said(tmp_path, torn):
    path = write_lines(tmp_path, '{"step": 1, "lr": 0.5}', torn)
    assert read_metrics(path) == {"lr": ([1.0], [0.5])}
    page = write_run_report(tmp_path, title="r", settings={}, metrics_path=path)
    assert "Left out: one line of metrics.jsonl" in Page(page.read_text()).text


def test_read_metrics_of_a_run_killed_in_its_first_row_is_empty(tmp_path):
    for text in ("", '{"step": 1, "l'):
        assert read_metrics(write_lines(tmp_path, text)) == {}
    page = write_run_report(tmp_path, title="r", settings={}, metrics_path=tmp_path / "metrics.jsonl")
    assert "No metrics were logged." in Page(page.read_text()).text


def test_read_metrics_refuses_other_files(tmp_path):
    with pytest.raises(UserError, match="No such file"):
        read_metrics(tmp_path / "absent.jsonl")
    with pytest.raises(UserError, match="none is a row of metrics"):
        read_metrics(write_lines(tmp_path, '{"caption": "a dog"}', '{"caption": "a cat"}'))


def test_curves_are_grouped_and_ordered():
    line = ([1.0, 2.0], [1.0, 0.5])
    ranks = ([1.0, 2.0], [90.0, 40.0])
    names = ["lr", "loss", "loss/mse", "loss/icl", "val/i2t/hit@1", "val/i2t/hit@5", "val/t2i/hit@1", "odd_one"]
    series = dict.fromkeys(names, line) | {"val/t2i/median_rank": ranks}
    titles = [next(svg(plot).iter("text")).text for plot in curves(series, "steps")]
    # The rank is of another size than the hit rate beside it, so those two get plots of their own.
    assert titles == [
        "Losses per term",
        "Validation: i2t",
        "Validation: t2i, hit@1",
        "Validation: t2i, median rank",
        "Learning rate",
        "Odd one",
    ]
    assert [len(list(svg(plot).iter("polyline"))) for plot in curves(series, "steps")] == [3, 2, 1, 1, 1, 1]


def test_parts_of_a_whole_stay_together():
    shares = {"time/data": ([1.0, 2.0], [0.001, 0.002]), "time/student": ([1.0, 2.0], [0.9, 0.8])}
    (plot,) = curves(shares, "steps")
    assert next(svg(plot).iter("text")).text == "Shares of the time"
    assert len(list(svg(plot).iter("polyline"))) == 2


def test_a_report_without_parts_still_stands(tmp_path):
    page = Page(write_run_report(tmp_path, title="r", settings={"a": "1"}).read_text())
    assert [link["href"] for link in page.all("a")] == ["#section-0"]
    assert "Show all settings" in page.text
