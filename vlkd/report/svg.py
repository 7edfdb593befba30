"""The pieces that plots are drawn with: texts, axes, legends and colours as SVG.

Colours are those of Okabe and Ito, which colour-blind readers tell apart; every colour is a CSS variable with a
fallback, so that a page restyles the plots for dark screens and a plot alone in a file still shows.
"""

from __future__ import annotations

from collections.abc import Sequence

from vlkd.report.axes import Axis
from vlkd.report.markup import Markup, escape, join

WIDTH = 480
"""Width of a plot in its own units."""

SERIES = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#b58900", "#56b4e9", "#6b5b95", "#7f7f7f")
DASHES = ("", "6 3", "2 3")
CHARACTER = 7.2
"""Width of a letter in the widest common fonts: better a gap than an overlap."""


def legend(names: Sequence[str], colours: Sequence[int] | None = None) -> tuple[Markup, float]:
    """Swatches and names in as many rows as they need, and where the plot below them starts.

    The colours are those of these numbers, or follow each other.
    """
    parts: list[Markup] = []
    x, y = 0.0, 42.0
    numbers = range(len(names)) if colours is None else colours
    for index, name in zip(numbers, names, strict=True):
        words = shorten(name, WIDTH - 60)
        width = 32 + CHARACTER * len(words)
        if x > 0 and x + width > WIDTH:
            x, y = 0.0, y + 17
        parts.append(Markup(f'<path d="M{x:.1f} {y - 4:.1f}h16" style="{stroke(index, 2.5)}"/>'))
        parts.append(text(x + 21, y, words, strong=True))
        x += width
    return join(parts), y + 14


def frame(x_axis: Axis, y_axis: Axis, x_label: str, y_label: str) -> Markup:
    """Both axes with their ticks, names and grid lines."""
    parts = [x_ticks(x_axis, None, y_axis.start)]
    for tick, label in zip(y_axis.ticks, y_axis.labels(), strict=True):
        y = y_axis.pixel(tick)
        parts.append(rule(f"M{x_axis.start:.2f} {y:.2f}H{x_axis.end:.2f}"))
        parts.append(text(x_axis.start - 6, y + 4, label, anchor="end"))
    middle = (y_axis.start + y_axis.end) / 2
    parts.append(text((x_axis.start + x_axis.end) / 2, y_axis.start + 34, x_label, anchor="middle"))
    parts.append(text(11, middle, y_label, anchor="middle", turn=f' transform="rotate(-90 11 {middle:.2f})"'))
    return join(parts)


def x_ticks(axis: Axis, top: float | None, bottom: float) -> Markup:
    """Labels below and, from `top` on, grid lines; without `top` only short marks."""
    parts: list[Markup] = []
    for tick, label in zip(axis.ticks, axis.labels(), strict=True):
        x = axis.pixel(tick)
        parts.append(rule(f"M{x:.2f} {bottom if top is None else top:.2f}V{bottom + (4 if top is None else 0):.2f}"))
        parts.append(text(x, bottom + 17, label, anchor="middle"))
    return join(parts)


def drawing(title: str, height: float, parts: list[Markup]) -> Markup:
    """The whole plot under its title."""
    heading = (
        f'<text x="0" y="20" style="fill:{ink()};font-size:14px;font-weight:600">'
        f"{escape(shorten(title, WIDTH * 0.85))}</text>"
    )
    return Markup(
        f'<svg class="plot" viewBox="0 0 {WIDTH} {height:.0f}" role="img" aria-label="{escape(title)}" '
        f'style="font-family:system-ui,sans-serif;font-size:12px">{heading}{join(parts)}</svg>'
    )


def text(x: float, y: float, words: str, *, anchor: str = "start", strong: bool = False, turn: str = "") -> Markup:
    """Words at a place; muted unless `strong`."""
    fill = ink() if strong else "var(--soft,#5d6470)"
    return Markup(
        f'<text x="{x:.2f}" y="{y:.2f}" text-anchor="{anchor}" style="fill:{fill}"{turn}>{escape(words)}</text>'
    )


def shorten(words: str, width: float) -> str:
    """The words, cut with an ellipsis where they would be wider than `width`."""
    fits = max(int(width / CHARACTER), 4)
    return words if len(words) <= fits else words[: fits - 1] + "…"


def rule(path: str) -> Markup:
    """A grid line."""
    return Markup(f'<path class="grid" d="{path}" style="stroke:var(--grid,#e3e5e8);stroke-width:1"/>')


def stroke(index: int, width: float) -> str:
    """A series' line style: colours repeat with other dashes."""
    dash = DASHES[index // len(SERIES) % len(DASHES)]
    dashed = f";stroke-dasharray:{dash}" if dash else ""
    return f"stroke:{colour(index)};stroke-width:{width};stroke-linejoin:round{dashed}"


def colour(index: int) -> str:
    """A series' colour."""
    place = index % len(SERIES)
    return f"var(--series-{place},{SERIES[place]})"


def ink() -> str:
    """The colour of the page's text."""
    return "var(--ink,#1d2127)"
