"""Line and bar plots as inline SVG, without any plotting library.

Colours are those of Okabe and Ito, which colour-blind readers tell apart; every colour is a CSS variable with a
fallback, so that a page restyles the plots for dark screens and a plot alone in a file still shows.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from vlkd.report.axes import Axis, fit_axis
from vlkd.report.markup import Markup, escape, join

WIDTH = 480
POINTS = 400
"""A line of more points is thinned out to about this many, keeping each stretch's lowest and highest."""

SERIES = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#b58900", "#56b4e9", "#6b5b95", "#7f7f7f")
DASHES = ("", "6 3", "2 3")
_RIGHT, _HEIGHT = 14, 190
# Of the widest common fonts: better a gap than an overlap.
_CHARACTER = 7.2

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
    log_y: bool = False,
) -> Markup:
    """One line per name, from its x and y values, which come in the order of x.

    Values that cannot be drawn (NaN, infinite, or not positive on a logarithmic axis) interrupt their line and are
    counted below the plot. A point without drawable neighbours becomes a dot.

    Raises:
        ValueError: A series has not as many x as y values.
    """
    runs = {name: _drawable_runs(name, xs, ys, log_y) for name, (xs, ys) in series.items()}
    points = [point for stretches in runs.values() for stretch in stretches for point in stretch]
    missing = {name: len(series[name][0]) - sum(map(len, stretches)) for name, stretches in runs.items()}
    legend, top = _legend(list(series)) if len(series) > 1 else (Markup(""), 40.0)
    y_axis = fit_axis([y for _, y in points], top + _HEIGHT, top, log=log_y)
    left = 26 + _CHARACTER * max(map(len, y_axis.labels()))
    x_axis = fit_axis([x for x, _ in points], left, WIDTH - _RIGHT, snug=True)
    parts = [_frame(x_axis, y_axis, x_label, y_label), legend]
    if not points:
        parts.append(_text(WIDTH / 2, top + _HEIGHT / 2, "no values yet", anchor="middle"))
    for index, (name, stretches) in enumerate(runs.items()):
        parts += [_stretch(name, stretch, x_axis, y_axis, index) for stretch in stretches]
    height = top + _HEIGHT + 42
    skipped = ", ".join(f"{name} ({count})" for name, count in missing.items() if count)
    if skipped:
        height += 16
        reason = "finite and positive" if log_y else "finite"
        parts.append(_text(0, height - 6, _shorten(f"left out because not {reason}: {skipped}", WIDTH)))
    return _svg(title, height, parts)


def bar_plot(bars: Sequence[Bar], *, title: str, x_label: str) -> Markup:
    """One horizontal bar from zero per row, with its value and a whisker over its interval.

    A value that is not finite has no bar and says so.
    """
    drawn = [bar for bar in bars if math.isfinite(bar.value)]
    ends = [end for bar in drawn for end in (bar.value, bar.low, bar.high) if end is not None and math.isfinite(end)]
    left = min(12 + _CHARACTER * max((len(bar.label) for bar in bars), default=0), WIDTH * 0.42)
    x_axis = fit_axis([0.0, *ends] if ends else [], left, WIDTH - 58)
    top, row = 40, 26
    bottom = top + row * max(len(bars), 1)
    parts = [_x_ticks(x_axis, top, bottom), _text((left + WIDTH - 58) / 2, bottom + 32, x_label, anchor="middle")]
    if not bars:
        parts.append(_text(WIDTH / 2, (top + bottom) / 2 + 4, "no values yet", anchor="middle"))
    for index, bar in enumerate(bars):
        parts.append(_bar(bar, x_axis, top + row * index + row / 2))
    return _svg(title, bottom + 42, parts)


def _bar(bar: Bar, x_axis: Axis, middle: float) -> Markup:
    label = _text(x_axis.start - 6, middle + 4, _shorten(bar.label, x_axis.start - 6), anchor="end", strong=True)
    zero = x_axis.pixel(0)
    if not math.isfinite(bar.value):
        return join([label, _text(zero + 6, middle + 4, "not finite")])
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
            Markup(f'<path class="interval" d="{whisker}" style="fill:none;stroke:{_ink()};stroke-width:1.4"/>')
        )
    box = (
        f'<rect x="{min(zero, end):.2f}" y="{middle - 8:.2f}" width="{abs(end - zero):.2f}" height="16" rx="2" '
        f'style="fill:{_colour(0)}"><title>{escape(words)}</title></rect>'
    )
    parts.insert(1, Markup(box))
    parts.append(_text(reach + 6, middle + 4, f"{bar.value:.4g}", strong=True))
    return join(parts)


def _drawable_runs(name: str, xs: Sequence[float], ys: Sequence[float], log_y: bool) -> list[list[Point]]:
    """The series cut at values that cannot be drawn."""
    if len(xs) != len(ys):
        raise ValueError(f"Series {name!r} has {len(xs)} x values and {len(ys)} y values; expected equally many.")
    runs: list[list[Point]] = [[]]
    for x, y in zip(xs, ys, strict=True):
        if math.isfinite(x) and math.isfinite(y) and (y > 0 or not log_y):
            runs[-1].append((x, y))
        elif runs[-1]:
            runs.append([])
    return [run for run in runs if run]


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
        return Markup(f'<circle cx="{x:.2f}" cy="{y:.2f}" r="3" style="fill:{_colour(index)}">{words}</circle>')
    kept = thin_out(points)
    path = " ".join(f"{x_axis.pixel(x):.2f},{y_axis.pixel(y):.2f}" for x, y in kept)
    stroke = _stroke(index, 1.75 if len(kept) < 200 else 1.3)
    return Markup(f'<polyline points="{path}" style="fill:none;{stroke}">{words}</polyline>')


def _legend(names: Sequence[str]) -> tuple[Markup, float]:
    """Swatches and names in as many rows as they need, and where the plot below them starts."""
    parts: list[Markup] = []
    x, y = 0.0, 42.0
    for index, name in enumerate(names):
        words = _shorten(name, WIDTH - 60)
        width = 32 + _CHARACTER * len(words)
        if x > 0 and x + width > WIDTH:
            x, y = 0.0, y + 17
        parts.append(Markup(f'<path d="M{x:.1f} {y - 4:.1f}h16" style="{_stroke(index, 2.5)}"/>'))
        parts.append(_text(x + 21, y, words, strong=True))
        x += width
    return join(parts), y + 14


def _frame(x_axis: Axis, y_axis: Axis, x_label: str, y_label: str) -> Markup:
    parts = [_x_ticks(x_axis, None, y_axis.start)]
    for tick, label in zip(y_axis.ticks, y_axis.labels(), strict=True):
        y = y_axis.pixel(tick)
        parts.append(_rule(f"M{x_axis.start:.2f} {y:.2f}H{x_axis.end:.2f}"))
        parts.append(_text(x_axis.start - 6, y + 4, label, anchor="end"))
    middle = (y_axis.start + y_axis.end) / 2
    parts.append(_text((x_axis.start + x_axis.end) / 2, y_axis.start + 34, x_label, anchor="middle"))
    parts.append(_text(11, middle, y_label, anchor="middle", turn=f' transform="rotate(-90 11 {middle:.2f})"'))
    return join(parts)


def _x_ticks(axis: Axis, top: float | None, bottom: float) -> Markup:
    """Labels below and, from `top` on, grid lines; without `top` only short marks."""
    parts: list[Markup] = []
    for tick, label in zip(axis.ticks, axis.labels(), strict=True):
        x = axis.pixel(tick)
        parts.append(_rule(f"M{x:.2f} {bottom if top is None else top:.2f}V{bottom + (4 if top is None else 0):.2f}"))
        parts.append(_text(x, bottom + 17, label, anchor="middle"))
    return join(parts)


def _svg(title: str, height: float, parts: list[Markup]) -> Markup:
    heading = (
        f'<text x="0" y="20" style="fill:{_ink()};font-size:14px;font-weight:600">'
        f"{escape(_shorten(title, WIDTH * 0.85))}</text>"
    )
    return Markup(
        f'<svg class="plot" viewBox="0 0 {WIDTH} {height:.0f}" role="img" aria-label="{escape(title)}" '
        f'style="font-family:system-ui,sans-serif;font-size:12px">{heading}{join(parts)}</svg>'
    )


def _text(x: float, y: float, words: str, *, anchor: str = "start", strong: bool = False, turn: str = "") -> Markup:
    fill = _ink() if strong else "var(--soft,#5d6470)"
    return Markup(
        f'<text x="{x:.2f}" y="{y:.2f}" text-anchor="{anchor}" style="fill:{fill}"{turn}>{escape(words)}</text>'
    )


def _shorten(words: str, width: float) -> str:
    fits = max(int(width / _CHARACTER), 4)
    return words if len(words) <= fits else words[: fits - 1] + "…"


def _rule(path: str) -> Markup:
    return Markup(f'<path class="grid" d="{path}" style="stroke:var(--grid,#e3e5e8);stroke-width:1"/>')


def _stroke(index: int, width: float) -> str:
    dash = DASHES[index // len(SERIES) % len(DASHES)]
    dashed = f";stroke-dasharray:{dash}" if dash else ""
    return f"stroke:{_colour(index)};stroke-width:{width};stroke-linejoin:round{dashed}"


def _colour(index: int) -> str:
    place = index % len(SERIES)
    return f"var(--series-{place},{SERIES[place]})"


def _ink() -> str:
    return "var(--ink,#1d2127)"
