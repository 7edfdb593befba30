"""Line and bar plots as inline SVG, without any plotting library."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType

from vlkd.report.axes import Axis, fit_axis
from vlkd.report.markup import Markup, escape, join
from vlkd.report.svg import CHARACTER, WIDTH, colour, drawing, frame, ink, legend, shorten, stroke, text, x_ticks

POINTS = 400
"""A line of more points is thinned out to about this many, keeping each stretch's lowest and highest."""

_RIGHT, _HEIGHT = 14, 190
_BESIDE = 3.0
"""Pixels between series with intervals, which would else hide each other's at the same x."""

Point = tuple[float, float]


@dataclass(frozen=True, kw_only=True)
class Bar:
    """One bar: its value and, if known, the interval around it."""

    label: str
    value: float
    low: float | None = None
    high: float | None = None


def line_plot(
    series: Mapping[str, tuple[Sequence[float], Sequence[float]]],
    *,
    title: str,
    x_label: str,
    y_label: str,
    log_x: bool = False,
    log_y: bool = False,
    x_marks: Sequence[float] = (),
    intervals: Mapping[str, Sequence[tuple[float, float]]] = MappingProxyType({}),
    height: float = _HEIGHT,
) -> Markup:
    """One line per name, from its x and y values, which come in the order of x.

    Values that cannot be drawn (NaN, infinite, or not positive on a logarithmic axis) interrupt their line and are
    counted below the plot. A point without drawable neighbours becomes a dot. Where a series has intervals, each point
    is a dot with a whisker, and the series stand a few pixels beside each other.

    Args:
        series: per name x and y values.
        title: heading.
        x_label: below the axis.
        y_label: beside the axis.
        log_x: a logarithmic x axis.
        log_y: a logarithmic y axis.
        x_marks: where the x axis has its marks, within the range of the values; () are round numbers.
        intervals: by name the low and the high end around each y value; one that is not finite is not drawn.
        height: of the y axis.

    Raises:
        ValueError: A series has not as many x as y values, or as intervals.
    """
    runs = {name: _drawable_runs(name, xs, ys, log_x, log_y) for name, (xs, ys) in series.items()}
    points = [point for stretches in runs.values() for stretch in stretches for point in stretch]
    whiskers = {name: _whiskers(name, series[name], ends, log_x, log_y) for name, ends in intervals.items()}
    reached = [y for own in whiskers.values() for _, low, high in own for y in (low, high)]
    missing = {name: len(series[name][0]) - sum(map(len, stretches)) for name, stretches in runs.items()}
    names, top = legend(list(series)) if len(series) > 1 else (Markup(""), 40.0)
    y_axis = fit_axis([*(y for _, y in points), *reached], top + height, top, log=log_y)
    left = 26 + CHARACTER * max(map(len, y_axis.labels()))
    aside = _BESIDE * (len(series) - 1) / 2 if intervals else 0.0
    x_axis = fit_axis([x for x, _ in points], left + aside, WIDTH - _RIGHT - aside, log=log_x, snug=True)
    if x_marks:
        x_axis = replace(x_axis, ticks=tuple(mark for mark in x_marks if x_axis.low <= mark <= x_axis.high))
    parts = [frame(x_axis, y_axis, x_label, y_label), names]
    if not points:
        parts.append(text(WIDTH / 2, top + height / 2, "no values yet", anchor="middle"))
    for index, (name, stretches) in enumerate(runs.items()):
        shift = _BESIDE * index - aside if intervals else 0.0
        own = replace(x_axis, start=x_axis.start + shift, end=x_axis.end + shift)
        parts += [_stretch(name, stretch, own, y_axis, index) for stretch in stretches]
        if name in whiskers:
            parts += [_whisker(whisker, own, y_axis, index) for whisker in whiskers[name]]
            parts += [_dot(point, own, y_axis, index) for stretch in stretches for point in stretch if stretch[1:]]
    bottom = top + height + 42
    skipped = ", ".join(f"{name} ({count})" for name, count in missing.items() if count)
    if skipped:
        bottom += 16
        reason = "finite and positive" if log_x or log_y else "finite"
        parts.append(text(0, bottom - 6, shorten(f"left out because not {reason}: {skipped}", WIDTH)))
    return drawing(title, bottom, parts)


def bar_plot(bars: Sequence[Bar], *, title: str, x_label: str) -> Markup:
    """One horizontal bar from zero per row, with its value and a whisker over its interval.

    A value that is not finite has no bar and says so.
    """
    drawn = [bar for bar in bars if math.isfinite(bar.value)]
    ends = [end for bar in drawn for end in (bar.value, bar.low, bar.high) if end is not None and math.isfinite(end)]
    left = min(12 + CHARACTER * max((len(bar.label) for bar in bars), default=0), WIDTH * 0.42)
    x_axis = fit_axis([0.0, *ends] if ends else [], left, WIDTH - 58)
    top, row = 40, 26
    bottom = top + row * max(len(bars), 1)
    parts = [x_ticks(x_axis, top, bottom), text((left + WIDTH - 58) / 2, bottom + 32, x_label, anchor="middle")]
    if not bars:
        parts.append(text(WIDTH / 2, (top + bottom) / 2 + 4, "no values yet", anchor="middle"))
    for index, bar in enumerate(bars):
        parts.append(_bar(bar, x_axis, top + row * index + row / 2))
    return drawing(title, bottom + 42, parts)


def _bar(bar: Bar, x_axis: Axis, middle: float) -> Markup:
    label = text(x_axis.start - 6, middle + 4, shorten(bar.label, x_axis.start - 6), anchor="end", strong=True)
    zero = x_axis.pixel(0)
    if not math.isfinite(bar.value):
        return join([label, text(zero + 6, middle + 4, "not finite")])
    end = x_axis.pixel(bar.value)
    words = f"{bar.label}: {bar.value:.4g}"
    parts = [label]
    reach = max(zero, end)
    if bar.low is not None and bar.high is not None and math.isfinite(bar.low) and math.isfinite(bar.high):
        low, high = x_axis.pixel(bar.low), x_axis.pixel(bar.high)
        words += f" ({bar.low:.4g} to {bar.high:.4g})"
        reach = max(reach, high)
        whisker = f"M{low:.2f} {middle - 4:.2f}v8m0 -4H{high:.2f}m0 -4v8"
        parts.append(
            Markup(f'<path class="interval" d="{whisker}" style="fill:none;stroke:{ink()};stroke-width:1.4"/>')
        )
    box = (
        f'<rect x="{min(zero, end):.2f}" y="{middle - 8:.2f}" width="{abs(end - zero):.2f}" height="16" rx="2" '
        f'style="fill:{colour(0)}"><title>{escape(words)}</title></rect>'
    )
    parts.insert(1, Markup(box))
    parts.append(text(reach + 6, middle + 4, f"{bar.value:.4g}", strong=True))
    return join(parts)


def _drawable_runs(name: str, xs: Sequence[float], ys: Sequence[float], log_x: bool, log_y: bool) -> list[list[Point]]:
    """The series cut at values that cannot be drawn."""
    if len(xs) != len(ys):
        raise ValueError(f"Series {name!r} has {len(xs)} x values and {len(ys)} y values; expected equally many.")
    runs: list[list[Point]] = [[]]
    for x, y in zip(xs, ys, strict=True):
        if _drawable(x, log_x) and _drawable(y, log_y):
            runs[-1].append((x, y))
        elif runs[-1]:
            runs.append([])
    return [run for run in runs if run]


def _drawable(value: float, log: bool) -> bool:
    return math.isfinite(value) and (value > 0 or not log)


def _whiskers(
    name: str,
    values: tuple[Sequence[float], Sequence[float]],
    ends: Sequence[tuple[float, float]],
    log_x: bool,
    log_y: bool,
) -> list[tuple[float, float, float]]:
    """x, low and high of each point and interval that can be drawn."""
    xs, ys = values
    if len(ends) != len(ys):
        raise ValueError(f"Series {name!r} has {len(ys)} y values and {len(ends)} intervals; expected equally many.")
    return [
        (x, low, high)
        for x, y, (low, high) in zip(xs, ys, ends, strict=True)
        if _drawable(x, log_x) and all(_drawable(end, log_y) for end in (y, low, high))
    ]


def _whisker(whisker: tuple[float, float, float], x_axis: Axis, y_axis: Axis, index: int) -> Markup:
    x, (low, high) = x_axis.pixel(whisker[0]), map(y_axis.pixel, whisker[1:])
    path = f"M{x - 2:.2f} {low:.2f}h4m-2 0V{high:.2f}m-2 0h4"
    return Markup(
        f'<path class="interval" d="{path}" style="fill:none;stroke:{colour(index)};stroke-width:1.2;opacity:.75"/>'
    )


def _dot(point: Point, x_axis: Axis, y_axis: Axis, index: int) -> Markup:
    x, y = x_axis.pixel(point[0]), y_axis.pixel(point[1])
    return Markup(f'<circle cx="{x:.2f}" cy="{y:.2f}" r="2.2" style="fill:{colour(index)}"/>')


def thin_out(points: Sequence[Point], limit: int = POINTS) -> list[Point]:
    """At most about `limit` points: the first, the last, and each stretch's lowest and highest, so that spikes stay."""
    if len(points) <= limit:
        return list(points)
    size = math.ceil(2 * len(points) / limit)
    kept = {0, len(points) - 1}
    for start in range(0, len(points), size):
        stretch = range(start, min(start + size, len(points)))
        kept.add(min(stretch, key=lambda index: points[index][1]))
        kept.add(max(stretch, key=lambda index: points[index][1]))
    return [points[index] for index in sorted(kept)]


def _stretch(name: str, points: Sequence[Point], x_axis: Axis, y_axis: Axis, index: int) -> Markup:
    words = f"<title>{escape(name)}: last {points[-1][1]:.4g}</title>"
    if len(points) == 1:
        x, y = x_axis.pixel(points[0][0]), y_axis.pixel(points[0][1])
        return Markup(f'<circle cx="{x:.2f}" cy="{y:.2f}" r="3" style="fill:{colour(index)}">{words}</circle>')
    kept = thin_out(points)
    path = " ".join(f"{x_axis.pixel(x):.2f},{y_axis.pixel(y):.2f}" for x, y in kept)
    style = stroke(index, 1.75 if len(kept) < 200 else 1.3)
    return Markup(f'<polyline points="{path}" style="fill:none;{style}">{words}</polyline>')
