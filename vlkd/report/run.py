"""The report of one run: its result table, the curves of its metrics, galleries and settings."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

from vlkd.errors import UserError
from vlkd.report.gallery import Gallery
from vlkd.report.markup import Markup
from vlkd.report.page import Report
from vlkd.report.plots import line_plot
from vlkd.report.table import Figure, Table

Series = tuple[list[float], list[float]]

_COUNTERS = ("step", "samples")
_TITLES = {
    "loss": "Losses per term",
    "val": "Validation",
    "eval": "Evaluation",
    "weight": "Weights of the teachers",
    "gradient_cosine": "Gradient cosines",
    "common_descent": "Share of the gradients' length that their sum keeps",
    "residual": "Residual of the teachers' weights",
    "lr": "Learning rate",
    "logit_scale": "Logit scale",
    "gradient_norm": "Gradient norm",
    "samples_per_second": "Samples per second",
    "time": "Shares of the time",
}
"""Known groups of metrics, in the order of their plots; others follow under their own names."""

_LOG_FROM = 50
"""Losses that span at least this ratio are drawn on a logarithmic axis."""

_PARTS_OF_A_WHOLE = ("weight", "time")
"""Groups that stay in one plot."""

_APART_FROM = 10
"""Metrics whose largest values differ by at least this ratio (hit rates and ranks) get plots of their own."""


def read_metrics(path: Path) -> dict[str, Series]:
    """The series in a `metrics.jsonl`, by name: x and y, sorted by x.

    Each line is an object such as {"step": 10, "samples": 640, "loss/mse": 0.3, "lr": 0.001}; x is `samples`, or `step`
    where a row has no samples. A resumed run repeats the steps after its checkpoint: the later row holds. `null`,
    which strict JSON has to write for NaN, is read as NaN; text and flags are passed over. A line that is not whole
    (the last of a killed run) is left out.

    Raises:
        UserError: There is no such file, or it has lines but none that can be read.
    """
    rows, _ = _read_rows(path)
    return _series(rows)


def write_run_report(
    folder: Path,
    *,
    title: str,
    settings: Mapping[str, str],
    metrics_path: Path | None = None,
    tables: Mapping[str, Table] = MappingProxyType({}),
    galleries: Sequence[Gallery] = (),
    notes: Sequence[str] = (),
    figures: Sequence[Figure] = (),
    lead: str = "",
) -> Path:
    """Write `report.html` into the run's folder and return its path; parts that are not given are left out.

    Args:
        folder: The run's folder, which exists.
        title: The run's name.
        settings: Names and values of the configuration, folded away at the end.
        metrics_path: The run's `metrics.jsonl`, for the curves.
        tables: Per held-out set its name and the table of teacher, student, and the student without a teacher.
        galleries: Best and worst queries.
        notes: Paragraphs below the tables: protocol, warnings, compute.
        figures: Key figures for the header.
        lead: One sentence below the title.

    Raises:
        UserError: The metrics cannot be read or the report cannot be written.
    """
    report = Report(title, lead)
    if figures:
        report.figures(figures)
    if tables or notes:
        report.section("Result")
        for name, table in tables.items():
            if len(tables) > 1:
                report.heading(name)
            report.table(table)
        for note in notes:
            report.text(note)
    if metrics_path is not None:
        _add_curves(report, metrics_path)
    if galleries:
        report.section("Galleries")
        for gallery in galleries:
            report.heading(gallery.title)
            if gallery.note:
                report.text(gallery.note)
            report.gallery(gallery.items)
    report.section("Settings")
    report.details("Show all settings", settings)
    return report.write(folder / "report.html")


def curves(series: Mapping[str, Series], x_label: str) -> list[Markup]:
    """One plot per group of names: what stands before the last slash, `loss` itself belonging to `loss/...`.

    A group is split where its metrics are of different size, unless they are losses or parts of a whole.
    """
    groups: dict[str, dict[str, Series]] = {}
    for name, values in series.items():
        group, _, short = name.rpartition("/")
        groups.setdefault(group or name, {})[short or name] = values
    known = list(_TITLES)
    plots = []
    for group in sorted(groups, key=lambda name: known.index(top) if (top := name.partition("/")[0]) in known else 99):
        plots += _plots(group, groups[group], x_label)
    return plots


def _plots(group: str, members: Mapping[str, Series], x_label: str) -> list[Markup]:
    top, _, rest = group.partition("/")
    title = _TITLES.get(top, _spaced(top).capitalize()) + (f": {_spaced(rest)}" if rest else "")
    sizes = [size for series in members.values() if (size := max(map(abs, _finite(series)), default=0.0)) > 0]
    if top == "loss":
        values = [y for series in members.values() for y in _finite(series)]
        log_y = bool(values) and min(values) > 0 and max(values) / min(values) >= _LOG_FROM
        return [line_plot(members, title=title, x_label=x_label, y_label="loss", log_y=log_y)]
    if sizes and top not in _PARTS_OF_A_WHOLE and max(sizes) / min(sizes) >= _APART_FROM:
        return [
            line_plot({name: series}, title=f"{title}, {_spaced(name)}", x_label=x_label, y_label="")
            for name, series in members.items()
        ]
    # One series has no legend, so its name belongs in the title.
    alone = next((name for name in members if len(members) == 1 and name != group), "")
    title += f", {_spaced(alone)}" if alone else ""
    return [line_plot(members, title=title, x_label=x_label, y_label="")]


def _finite(series: Series) -> list[float]:
    return [y for y in series[1] if math.isfinite(y)]


def _spaced(name: str) -> str:
    return name.replace("_", " ")


def _add_curves(report: Report, metrics_path: Path) -> None:
    rows, torn = _read_rows(metrics_path)
    report.section("Curves")
    series = _series(rows)
    if series:
        report.plot(*curves(series, "samples seen" if _has_samples(rows) else "steps"))
    else:
        report.text("No metrics were logged.")
    if torn:
        lines = "one line" if torn == 1 else f"{torn} lines"
        report.text(f"Left out: {lines} of {metrics_path.name} that could not be read, as a killed run leaves behind.")


def _read_rows(path: Path) -> tuple[list[dict[str, Any]], int]:
    """The rows that are whole, and how many are not."""
    try:
        lines = [line for line in path.read_bytes().splitlines() if line.strip()]
    except OSError as error:
        raise UserError(
            f"The metrics {path} cannot be read ({error.strerror}); expected the metrics.jsonl of a run."
        ) from error
    rows = []
    for line in lines:
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if isinstance(row, dict) and any(_is_number(row.get(counter)) for counter in _COUNTERS):
            rows.append(row)
    if lines and not rows and len(lines) > 1:
        raise UserError(
            f"{path} has {len(lines)} lines and none is a row of metrics; expected lines such as "
            '{"step": 1, "lr": 0.1}, as a run writes them to metrics.jsonl.'
        )
    return rows, len(lines) - len(rows)


def _series(rows: Sequence[Mapping[str, Any]]) -> dict[str, Series]:
    counter = "samples" if _has_samples(rows) else "step"
    points: dict[str, dict[float, float]] = {}
    for row in rows:
        if not _is_number(row.get(counter)):
            continue
        for name, value in row.items():
            if name not in _COUNTERS and (value is None or _is_number(value)):
                points.setdefault(name, {})[float(row[counter])] = math.nan if value is None else float(value)
    ordered = {name: sorted(values.items()) for name, values in points.items()}
    return {name: ([x for x, _ in pairs], [y for _, y in pairs]) for name, pairs in ordered.items()}


def _has_samples(rows: Sequence[Mapping[str, Any]]) -> bool:
    return all(_is_number(row.get("samples")) for row in rows)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
