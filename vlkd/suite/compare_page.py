"""Two models item by item, as text and as one HTML page with the pictures that changed."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from vlkd.data.eval_set import open_eval_set
from vlkd.errors import UserError
from vlkd.report import Bar, Estimate, Exhibit, ExhibitLine, Report, Table, bar_plot
from vlkd.report.table import Value
from vlkd.suite.compare import Compared, Comparison
from vlkd.suite.table import short_names
from vlkd.suite.table_markdown import grid

if TYPE_CHECKING:
    from vlkd.data.eval_types import EvalSet

SHOWN = 12
"""Pictures per data set that a wins, and as many that it loses."""
_CLASSES = 15
"""Classes that stand in the plot; the table has all."""
_HEAD = ("data set", "items", "a", "b", "a - b", "95 % interval", "wins", "losses", "p")


def comparison_markdown(comparison: Comparison) -> str:
    """One line per data set in percent, then which are no figures of the table, and what was refused."""
    rows = []
    for one in comparison.compared:
        low, high = one.interval
        a, b = 100 * one.correct.mean(axis=1)
        figures = [f"{a:.1f}", f"{b:.1f}", f"{100 * one.difference:+.1f}", f"{100 * low:+.1f} to {100 * high:+.1f}"]
        rows.append([one.title, str(len(one.keys)), *figures, str(one.wins), str(one.losses), f"{one.p_value:.2g}"])
    remarks = [one.remark for one in comparison.compared if one.remark]
    remarks += [f"Not compared: {reason}" for reason in comparison.refused]
    below = "".join(f"\n{remark}" for remark in remarks)
    return f"a = {comparison.a}\nb = {comparison.b}\n\n{grid(_HEAD, rows)}\n{below}"


def comparison_page(comparison: Comparison) -> Report:
    """Overview, then per data set the classes and a gallery of what changed."""
    names = _names(comparison)
    report = Report(
        f"{names[0]} against {names[1]}",
        f"a is {comparison.a}, b is {comparison.b}. Wins are items on which a is better. Figures in percent.",
    )
    report.section("Overview")
    rows: list[list[Value]] = [
        [
            one.title,
            len(one.keys),
            *(Estimate(value=float(100 * value)) for value in one.correct.mean(axis=1)),
            Estimate(value=100 * one.difference, low=100 * one.interval[0], high=100 * one.interval[1]),
            one.wins,
            one.losses,
            float(f"{one.p_value:.2g}"),
        ]
        for one in comparison.compared
    ]
    report.table(
        Table(
            ("data set", "items", "a", "b", "a - b", "wins", "losses", "p"),
            rows,
            caption="Mean of the items' values; the interval is a bootstrap paired over items, p the sign test.",
        )
    )
    for one in comparison.compared:
        if one.remark:
            report.text(one.remark)
    for reason in comparison.refused:
        report.text(f"Not compared: {reason}")
    for one in comparison.compared:
        report.section(one.title)
        _add_classes(report, one)
        _add_gallery(report, one, names)
    return report


def changed_items(one: Compared, count: int = SHOWN) -> tuple[list[int], list[int]]:
    """Items that a wins and that it loses, the largest changes first, at most `count` of each.

    Where more items changed equally than fit, they are taken evenly over the data set, so that no class is first.
    """
    change = one.change
    return _largest(change, count), _largest(-change, count)


def _largest(gain: NDArray[np.float64], count: int) -> list[int]:
    """At most `count` places of positive values, the largest first."""
    positive = np.flatnonzero(gain > 0)
    if len(positive) > count:
        edge = np.sort(gain)[-count]
        above, equal = np.flatnonzero(gain > edge), np.flatnonzero(gain == edge)
        places = np.linspace(0, len(equal) - 1, count - len(above)).round().astype(np.int64)
        positive = np.concatenate([above, equal[places]])
    return [int(item) for item in positive[np.argsort(-gain[positive], kind="stable")]]


def _names(comparison: Comparison) -> tuple[str, str]:
    short = short_names([comparison.a, comparison.b])
    return short[comparison.a], short[comparison.b]


def _add_classes(report: Report, one: Compared) -> None:
    changed = [own for own in one.classes if own.wins or own.losses]
    if not changed:
        return
    bars = [Bar(label=own.name, value=own.wins - own.losses) for own in changed if own.wins != own.losses][:_CLASSES]
    if bars:
        report.plot(bar_plot(bars, title="Wins less losses by class", x_label="items"))
    classes: list[list[Value]] = [[own.name, own.items, own.wins, own.losses] for own in changed]
    report.folded(f"All {len(classes)} classes that changed", Table(("class", "items", "wins", "losses"), classes))


def _add_gallery(report: Report, one: Compared, names: tuple[str, str]) -> None:
    wins, losses = changed_items(one)
    if not wins and not losses:
        report.text("No item changed.")
        return
    data = one.a["data"]
    try:
        opened = open_eval_set(data["path"], split=data["split"] or "", kind=data["kind"])
    except UserError as error:
        report.text(f"The pictures cannot be shown: {error}")
        return
    rows = {key: row for row, key in enumerate(opened.keys)}
    for title, items in (("Better in a", wins), ("Better in b", losses)):
        cards = [card for item in items if (card := _card(one, item, names, opened, rows)) is not None]
        if items:
            total = one.wins if items is wins else one.losses
            report.heading(f"{title}: {len(cards)} of {total}")
        if cards:
            report.gallery(cards)
        elif items:
            report.text("The pictures of these items cannot be read.")


def _card(one: Compared, item: int, names: tuple[str, str], opened: EvalSet, rows: dict[str, int]) -> Exhibit | None:
    key = one.keys[item]
    captions: tuple[str, ...] = ()
    if opened.kind == "selection":
        if not key.isdecimal() or int(key) >= len(opened.choices):
            return None
        choice = opened.choices[int(key)]
        shown, captions = list(choice.images), choice.captions
    elif key in rows:
        shown = [rows[key]]
        captions = opened.captions[rows[key]][:2]
    else:
        return None
    try:
        images = [(opened.image(row), opened.keys[row]) for row in shown]
    except UserError:
        return None
    lines = [ExhibitLine(who="caption", text=caption) for caption in captions]
    if one.label is not None:
        lines.append(ExhibitLine(who="is", text=_class(one, int(one.label[item]))))
    lines += [_line(one, model, item, names[model]) for model in (0, 1)]
    return Exhibit(images=images, lines=lines)


def _line(one: Compared, model: int, item: int, name: str) -> ExhibitLine:
    value, other = one.correct[model, item], one.correct[1 - model, item]
    if one.prediction is None:
        return ExhibitLine(who=name, text=f"{value:.2f}", right=bool(value > other))
    return ExhibitLine(who=name, text=_class(one, int(one.prediction[model, item])), right=bool(value > 0))


def _class(one: Compared, number: int) -> str:
    return one.names.get(number, f"class {number}")
