"""Result tables and key figures."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from vlkd.report.markup import Markup, escape, join


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """A figure with the interval around it where that is known, in the unit of its column."""

    value: float
    low: float | None = None
    high: float | None = None
    digits: int = 1


_WORDS = ' class="words"'

Value = str | int | float | Estimate | None
"""A cell: text, a count, a number (four significant digits), a figure with its interval, or nothing (a dash)."""


@dataclass(frozen=True, kw_only=True)
class Figure:
    """A key figure for the top of a page: a few words, the figure, and a remark below it."""

    label: str
    value: str
    note: str = ""


@dataclass(frozen=True)
class Table:
    """Rows under headers; the first column names the rows.

    `best` says by header which columns have a best value and whether it is the highest or the lowest; it is set in
    bold, equal values together. Rows in `aside` (by index; a teacher, say) are shown muted and take no part in that.
    `strong` names further cells in bold, by (row, column): the best of a row.

    Raises:
        ValueError: A row has not one cell per header, or `best` or `aside` name what is not there.
    """

    headers: Sequence[str]
    rows: Sequence[Sequence[Value]]
    caption: str = ""
    best: Mapping[str, Literal["highest", "lowest"]] = field(default_factory=dict)
    aside: Collection[int] = ()
    strong: Collection[tuple[int, int]] = ()

    def __post_init__(self) -> None:
        for number, row in enumerate(self.rows):
            if len(row) != len(self.headers):
                raise ValueError(f"Row {number} has {len(row)} cells; expected {len(self.headers)}, one per header.")
        if unknown := sorted(set(self.best) - set(self.headers)):
            raise ValueError(f"best names {unknown}, but the headers are {list(self.headers)}.")
        if unknown_rows := sorted(set(self.aside) - set(range(len(self.rows)))):
            raise ValueError(f"aside names rows {unknown_rows}, but there are {len(self.rows)}.")

    def best_rows(self, column: int) -> frozenset[int]:
        """The rows that hold the column's best number; none where `best` does not ask for it."""
        wanted = self.best.get(self.headers[column])
        numbers = {
            index: number
            for index, row in enumerate(self.rows)
            if index not in self.aside and (number := _number(row[column])) is not None
        }
        if wanted is None or not numbers:
            return frozenset()
        top = max(numbers.values()) if wanted == "highest" else min(numbers.values())
        return frozenset(index for index, number in numbers.items() if number == top)


def table_markup(table: Table) -> Markup:
    """The table, in a box that scrolls sideways on narrow screens."""
    best = [table.best_rows(column) for column in range(len(table.headers))]
    columns = [[row[column] for row in table.rows] for column in range(len(table.headers))]
    # A word in a column of numbers stands with the numbers; a column of words has its header above them.
    wordy = [any(isinstance(value, str) for value in own) and not any(map(_is_figure, own)) for own in columns]
    head = "".join(
        f'<th scope="col"{_WORDS if words else ""}>{escape(header)}</th>'
        for header, words in zip(table.headers, wordy, strict=True)
    )
    body = []
    for index, row in enumerate(table.rows):
        cells = [
            _cell(value, column == 0, wordy[column], index in best[column] or (index, column) in table.strong)
            for column, value in enumerate(row)
        ]
        muted = ' class="aside"' if index in table.aside else ""
        body.append(Markup(f"<tr{muted}>{''.join(cells)}</tr>"))
    caption = f"<figcaption>{escape(table.caption)}</figcaption>" if table.caption else ""
    return Markup(
        f'<figure class="table"><div><table><thead><tr>{head}</tr></thead><tbody>{join(body)}</tbody></table></div>'
        f"{caption}</figure>"
    )


def figures_markup(figures: Sequence[Figure]) -> Markup:
    """The key figures side by side."""
    cards = [
        f'<div class="figure"><dt>{escape(figure.label)}</dt><dd>{escape(figure.value)}'
        + (f"<small>{escape(figure.note)}</small>" if figure.note else "")
        + "</dd></div>"
        for figure in figures
    ]
    return Markup(f'<dl class="figures">{"".join(cards)}</dl>')


def _is_figure(value: Value) -> bool:
    return value is not None and not isinstance(value, str)


def _cell(value: Value, first: bool, wordy: bool, best: bool) -> str:
    words = _words(value)
    if first:
        return f'<th scope="row">{words}</th>'
    names = [name for name, on in (("best", best), ("number", not wordy)) if on]
    chosen = f' class="{" ".join(names)}"' if names else ""
    return f"<td{chosen}>{words}</td>"


def _words(value: Value) -> str:
    if value is None:
        return "–"
    if isinstance(value, Estimate):
        middle = f"{value.value:.{value.digits}f}"
        if value.low is None or value.high is None:
            return middle
        return f"{middle}<small>{value.low:.{value.digits}f} to {value.high:.{value.digits}f}</small>"
    if isinstance(value, float):
        return f"{value:.4g}"
    return escape(f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value))


def _number(value: Value) -> float | None:
    """The number to compare by; NaN is none."""
    number = value.value if isinstance(value, Estimate) else value
    if isinstance(number, bool) or not isinstance(number, int | float) or number != number:
        return None
    return float(number)
