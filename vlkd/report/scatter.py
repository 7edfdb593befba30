"""Scatter plots with a name at every dot, such as accuracy against parameters."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from vlkd.report.axes import Axis, fit_axis
from vlkd.report.markup import Markup, escape, join
from vlkd.report.svg import CHARACTER, WIDTH, colour, drawing, frame, ink, text

_HEIGHT, _RIGHT, _TOP = 230, 18, 40
_RADIUS = 5.0
_LINE = 14.0
"""Height of a line of text."""

Box = tuple[float, float, float, float]
"""Left, top, right, bottom."""


@dataclass(frozen=True, kw_only=True)
class Dot:
    """One dot with its name and, if known, the interval around its y value; `series` chooses its colour."""

    label: str
    x: float
    y: float
    low: float | None = None
    high: float | None = None
    series: int = 0


def scatter_plot(dots: Sequence[Dot], *, title: str, x_label: str, y_label: str, log_x: bool = False) -> Markup:
    """One dot per item, its name beside it where there is room and, if the dots are crowded, at the end of a line.

    Dots that cannot be drawn (a value that is not finite, or an x that is not positive on a logarithmic axis) are
    named below the plot.
    """
    drawn = [dot for dot in dots if math.isfinite(dot.x) and math.isfinite(dot.y) and (dot.x > 0 or not log_x)]
    ends = [end for dot in drawn for end in (dot.y, dot.low, dot.high) if end is not None and math.isfinite(end)]
    y_axis = fit_axis(ends, _TOP + _HEIGHT, _TOP)
    left = 26 + CHARACTER * max(map(len, y_axis.labels()))
    x_axis = fit_axis([dot.x for dot in drawn], left, WIDTH - _RIGHT, log=log_x)
    parts = [frame(x_axis, y_axis, x_label, y_label)]
    if not drawn:
        parts.append(text(WIDTH / 2, _TOP + _HEIGHT / 2, "no values yet", anchor="middle"))
    places = [(x_axis.pixel(dot.x), y_axis.pixel(dot.y)) for dot in drawn]
    parts += [_dot(dot, place, y_axis) for dot, place in zip(drawn, places, strict=True)]
    parts += _labels(drawn, places, (left, _TOP - _LINE, WIDTH, _TOP + _HEIGHT))
    height = _TOP + _HEIGHT + 42.0
    left_out = [dot.label for dot in dots if dot not in drawn]
    if left_out:
        height += 16
        parts.append(text(0, height - 6, f"not drawn: {', '.join(left_out)}"))
    return drawing(title, height, parts)


def _dot(dot: Dot, place: tuple[float, float], y_axis: Axis) -> Markup:
    x, y = place
    words = f"{dot.label}: {dot.x:.4g}, {dot.y:.4g}"
    parts: list[Markup] = []
    if dot.low is not None and dot.high is not None and math.isfinite(dot.low) and math.isfinite(dot.high):
        low, high = y_axis.pixel(dot.low), y_axis.pixel(dot.high)
        words += f" ({dot.low:.4g} to {dot.high:.4g})"
        whisker = f"M{x - 3:.2f} {low:.2f}h6m-3 0V{high:.2f}m-3 0h6"
        style = f"fill:none;stroke:{ink()};stroke-width:1.2;opacity:.6"
        parts.append(Markup(f'<path class="interval" d="{whisker}" style="{style}"/>'))
    parts.append(
        Markup(
            f'<circle cx="{x:.2f}" cy="{y:.2f}" r="{_RADIUS:g}" style="fill:{colour(dot.series)}">'
            f"<title>{escape(words)}</title></circle>"
        )
    )
    return join(parts)


def _labels(dots: Sequence[Dot], places: Sequence[tuple[float, float]], bounds: Box) -> list[Markup]:
    """The names, each at the first place around its dot that is inside the plot and free."""
    taken = [(x - _RADIUS, y - _RADIUS, x + _RADIUS, y + _RADIUS) for x, y in places]
    parts: list[Markup] = []
    for dot, (x, y) in zip(dots, places, strict=True):
        width = CHARACTER * len(dot.label)
        free = next((box for box in _around(x, y, width) if _is_free(box, taken, bounds)), None)
        if free is None:
            # Its name still stands in the tool tip of the dot.
            continue
        taken.append(free)
        away = max(free[1] - y, y - free[3])
        if away > _LINE:
            end = free[1] if free[1] > y else free[3]
            path = f"M{x:.2f} {y:.2f}L{min(max(x, free[0]), free[2]):.2f} {end:.2f}"
            parts.append(Markup(f'<path class="leader" d="{path}" style="stroke:{ink()};stroke-width:.6;opacity:.6"/>'))
        parts.append(text(free[0], free[3] - 3, dot.label, strong=True))
    return parts


def _around(x: float, y: float, width: float) -> list[Box]:
    """Boxes right, left, above and below the dot, then ever farther above and below."""
    near = _RADIUS + 3
    boxes = [
        (x + near, y - _LINE / 2, x + near + width, y + _LINE / 2),
        (x - near - width, y - _LINE / 2, x - near, y + _LINE / 2),
    ]
    for step in range(9):
        distance = near + step * _LINE
        for start in (x - width / 2, x - width, x):
            boxes.append((start, y - distance - _LINE, start + width, y - distance))
            boxes.append((start, y + distance, start + width, y + distance + _LINE))
    return boxes


def _is_free(box: Box, taken: Sequence[Box], bounds: Box) -> bool:
    inside = box[0] >= bounds[0] and box[1] >= bounds[1] and box[2] <= bounds[2] and box[3] <= bounds[3]
    return inside and not any(
        box[0] < other[2] and other[0] < box[2] and box[1] < other[3] and other[1] < box[3] for other in taken
    )
