"""The table of results as Markdown, for a terminal, a README or a pull request."""

from __future__ import annotations

from collections.abc import Sequence

from vlkd.suite.declaration import Aggregate
from vlkd.suite.table import PROBES, Line, Pivot, aggregate_score, retention, spaced


def markdown(table: Pivot, aggregates: Sequence[Aggregate] = (), teacher: str | None = None) -> str:
    """Scores in percent with their 95 % interval, the best of each line in bold; then retention and remarks.

    Args:
        table: the results.
        aggregates: shown below the lines; one that misses a data set says how many it has.
        teacher: reference of the model the others are compared with; it is never set in bold.
    """
    head = ["data set", "metric", "chance", *(table.names[model] for model in table.models)]
    rows = [[*_front(line), *(_cell(line, model, teacher) for model in table.models)] for line in table.lines]
    rows += [[name, "mean", "", *cells] for name, cells in aggregate_cells(table, aggregates)]
    parts = [grid(head, rows)]
    if teacher is not None:
        students = [model for model in table.models if model != teacher]
        kept = [[line.title, *(retention_words(line, model, teacher) for model in students)] for line in table.lines]
        kept = [row for row in kept if any(row[1:])]
        parts.append(f"Share of the score of {escape(table.names[teacher])} that is kept, in percent:")
        parts.append(grid(["data set", *(table.names[model] for model in students)], kept))
    errors = [
        f"- {escape(table.names[model])}, {escape(line.title)}: {escape(str(line.rows[model].get('error')))}"
        for line in table.lines
        for model in table.models
        if line.failed(model)
    ]
    remarks = [f"- {escape(remark)}" for remark in table.remarks]
    return "\n\n".join([*parts, *(["\n".join(dict.fromkeys(errors + remarks))] if errors or remarks else [])]) + "\n"


def aggregate_cells(table: Pivot, aggregates: Sequence[Aggregate]) -> list[tuple[str, list[str]]]:
    """Per aggregate each model's mean in percent, or what is missing; those of probes only where one is complete."""
    out = []
    for aggregate in aggregates:
        for probe in ("", *PROBES):
            scores = [aggregate_score(table.lines, aggregate, model, probe) for model in table.models]
            if probe and all(isinstance(score, str) for score in scores):
                continue
            name = f"{aggregate.name} ({spaced(probe)})" if probe else aggregate.name
            out.append((name, [score if isinstance(score, str) else f"{100 * score:.1f}" for score in scores]))
    return out


def retention_words(line: Line, student: str, teacher: str) -> str:
    """The kept share in percent, "" where there is none."""
    kept = retention(line, student, teacher)
    return "" if kept is None else f"{100 * kept:.1f}"


def grid(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table, its columns padded so that it reads well as plain text too; numbers stand to the right."""
    cells = [[escape(cell) for cell in row] for row in (head, *rows)]
    width = [max(3, *(len(row[column]) for row in cells)) for column in range(len(head))]
    left = [column < 1 or head[column] == "metric" for column in range(len(head))]

    def line(row: Sequence[str]) -> str:
        padded = (
            cell.ljust(w) if to_left else cell.rjust(w) for cell, w, to_left in zip(row, width, left, strict=True)
        )
        return f"| {' | '.join(padded)} |"

    rule = ("-" * w if to_left else "-" * (w - 1) + ":" for w, to_left in zip(width, left, strict=True))
    return "\n".join([line(cells[0]), f"| {' | '.join(rule)} |", *map(line, cells[1:])])


def escape(text: str) -> str:
    """Text that cannot end a cell."""
    return " ".join(text.replace("\\", "\\\\").replace("|", "\\|").split())


def _front(line: Line) -> list[str]:
    chance = line.chance()
    return [line.title, line.metric or "–", "–" if chance is None else line.words.text(chance)]


def _cell(line: Line, model: str, teacher: str | None) -> str:
    score = line.score(model)
    if score is None:
        return "error" if line.failed(model) else "–"
    words = line.words.text(score)
    words = f"**{words}**" if model in line.best(teacher) else words
    ends = line.rows[model]["interval"]
    return words if ends is None else f"{words} [{line.words.text(ends[0])}, {line.words.text(ends[1])}]"
