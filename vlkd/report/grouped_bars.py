"""Bars in groups, one group per data set and one colour per model."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from vlkd.report.axes import Axis, fit_axis
from vlkd.report.markup import Markup, escape, join
from vlkd.report.plots import Bar
from vlkd.report.svg import CHARACTER, WIDTH, colour, drawing, ink, legend, shorten, text, x_ticks

_BAR, _GAP = 13.0, 12.0
"""Height of a bar, and the room between groups."""


def grouped_bar_plot(
    groups: Mapping[str, Sequence[Bar | None]],
    names: Sequence[str],
    *,
    title: str,
    x_label: str,
    colours: Sequence[int] | None = None,
) -> Markup:
    """Horizontal bars from zero: in each group one bar per name, in the colour of its name.

    Args:
        groups: per group its bars in the order of `names`; None, or a value that is not finite, says "no value". The
            labels of the bars are not drawn.
        names: what the colours stand for, in the legend.
        title: heading.
        x_label: below the axis.
        colours: the number of each name's colour, where several plots show different ones of the same names; else the
            colours follow each other.

    Raises:
        ValueError: a group has not one bar per name.
    """
    for group, bars in groups.items():
        if len(bars) != len(names):
            raise ValueError(f"Group {group!r} has {len(bars)} bars; expected {len(names)}, one per name.")
    drawn = [bar for bars in groups.values() for bar in bars if bar is not None and math.isfinite(bar.value)]
    ends = [end for bar in drawn for end in (bar.value, bar.low, bar.high) if end is not None and math.isfinite(end)]
    left = min(12 + CHARACTER * max(map(len, groups), default=0), WIDTH * 0.42)
    x_axis = fit_axis([0.0, *ends] if ends else [], left, WIDTH - 50)
    numbers = range(len(names)) if colours is None else colours
    words, top = legend(names, numbers)
    size = _BAR * len(names) + _GAP
    bottom = top + size * max(len(groups), 1)
    parts = [words, x_ticks(x_axis, top, bottom)]
    parts.append(text((left + WIDTH - 50) / 2, bottom + 32, x_label, anchor="middle"))
    if not groups:
        parts.append(text(WIDTH / 2, (top + bottom) / 2 + 4, "no values yet", anchor="middle"))
    for number, (group, bars) in enumerate(groups.items()):
        start = top + size * number + _GAP / 2
        middle = start + _BAR * len(names) / 2
        parts.append(text(left - 6, middle + 4, shorten(group, left - 6), anchor="end", strong=True))
        for place, (name, bar, series) in enumerate(zip(names, bars, numbers, strict=True)):
            parts.append(_bar(f"{group}, {name}", bar, x_axis, start + _BAR * place, series))
    return drawing(title, bottom + 42, parts)


def _bar(what: str, bar: Bar | None, axis: Axis, top: float, series: int) -> Markup:
    zero = axis.pixel(0)
    if bar is None or not math.isfinite(bar.value):
        return Markup(
            f'<text x="{zero + 4:.2f}" y="{top + 10:.2f}" style="fill:var(--soft,#5d6470);font-size:10px">no value'
            f"<title>{escape(what)}</title></text>"
        )
    end = axis.pixel(bar.value)
    words, reach, whisker = f"{what}: {bar.value:.4g}", max(zero, end), ""
    if bar.low is not None and bar.high is not None and math.isfinite(bar.low) and math.isfinite(bar.high):
        low, high, middle = axis.pixel(bar.low), axis.pixel(bar.high), top + _BAR / 2
        words += f" ({bar.low:.4g} to {bar.high:.4g})"
        reach = max(reach, high)
        path = f"M{low:.2f} {middle - 3:.2f}v6m0 -3H{high:.2f}m0 -3v6"
        whisker = f'<path class="interval" d="{path}" style="fill:none;stroke:{ink()};stroke-width:1.1"/>'
    box = (
        f'<rect x="{min(zero, end):.2f}" y="{top + 1:.2f}" width="{abs(end - zero):.2f}" height="{_BAR - 2:g}" '
        f'style="fill:{colour(series)}"><title>{escape(words)}</title></rect>'
    )
    value = f'<text x="{reach + 5:.2f}" y="{top + 10:.2f}" style="fill:{ink()};font-size:10px">{bar.value:.4g}</text>'
    return join([Markup(box), Markup(whisker), Markup(value)])
