"""The table of results as one HTML page with plots."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from vlkd.report import Bar, Dot, Estimate, Report, Table, grouped_bar_plot, scatter_plot
from vlkd.suite.declaration import Aggregate
from vlkd.suite.metric_words import metric_words
from vlkd.suite.results import UNOPENED
from vlkd.suite.table import AGREEMENT, SPEED, Line, Pivot, retention, spaced
from vlkd.suite.table_markdown import aggregate_cells

LATENCY = "latency_ms_p50_1_thread"
_BARS = 60
"""A plot holds about so many bars; more go into further plots."""


def page(
    table: Pivot, aggregates: Sequence[Aggregate] = (), teacher: str | None = None, title: str = "Benchmark"
) -> Report:
    """Overview, bars per data set, accuracy against parameters and latency, classes, errors and meanings.

    Args:
        table: the results.
        aggregates: below the overview, where they are complete.
        teacher: reference of the model that the others are compared with.
        title: of the page.
    """
    datasets = {line.dataset for line in table.lines if line.protocol != SPEED}
    report = Report(
        title, f"{len(table.models)} models, {len(datasets)} data sets. Scores in percent, with 95 % intervals."
    )
    report.section("Overview")
    report.table(_overview(table, teacher))
    cells = aggregate_cells(table, aggregates)
    if cells:
        report.table(Table(["mean over", *_names(table)], [[name, *own] for name, own in cells]))
    for remark in table.remarks:
        report.text(remark)
    if teacher is not None and len(table.models) > 1:
        _add_retention(report, table, teacher)
    _add_bars(report, table)
    _add_scatter(report, table)
    _add_classes(report, table)
    _add_errors(report, table)
    report.section("Models")
    report.table(
        Table(["model", "reference", "parameters", "weights"], [_model(table, model) for model in table.models])
    )
    report.section("What the figures mean")
    metrics = dict.fromkeys(line.metric for line in table.lines if line.metric)
    report.table(
        Table(["figure", "meaning"], [[name, metric_words(name).meaning or "see its protocol"] for name in metrics])
    )
    return report


def mean_scores(table: Pivot, protocol: str) -> tuple[dict[str, float], list[str]]:
    """Each model's mean main metric over the protocol's data sets that every model has, and the names of these.

    Models without any result of the protocol are left out, and so are lines that are not comparable.
    """
    lines = [line for line in table.lines if line.protocol == protocol and line.comparable and line.words.percent]
    models = [model for model in table.models if any(line.score(model) is not None for line in lines)]
    scores = {line.dataset: [line.score(model) for model in models] for line in lines}
    whole = {name: [value for value in row if value is not None] for name, row in scores.items()}
    shared = {name: row for name, row in whole.items() if len(row) == len(models)}
    if not shared:
        return {}, []
    means = {model: sum(row[place] for row in shared.values()) / len(shared) for place, model in enumerate(models)}
    return means, list(shared)


def _names(table: Pivot) -> list[str]:
    return [table.names[model] for model in table.models]


def _overview(table: Pivot, teacher: str | None) -> Table:
    rows = []
    strong = []
    for number, line in enumerate(table.lines):
        chance = line.chance()
        cells = [_cell(line, model) for model in table.models]
        guess = None if chance is None else Estimate(value=line.words.number(chance))
        rows.append([line.title, line.metric or "–", guess, *cells])
        best = line.best(teacher)
        strong += [(number, place + 3) for place, model in enumerate(table.models) if model in best]
    return Table(
        ["data set", "metric", "chance", *_names(table)],
        rows,
        caption="Best of each line in bold" + ("." if teacher is None else f", {table.names[teacher]} aside."),
        strong=strong,
    )


def _cell(line: Line, model: str) -> str | float | Estimate | None:
    score = line.score(model)
    if score is None:
        return "error" if line.failed(model) else None
    ends = line.rows[model]["interval"]
    if not line.words.percent:
        return score
    low, high = ends or (None, None)
    return Estimate(
        value=100 * score, low=None if low is None else 100 * low, high=None if high is None else 100 * high
    )


def _add_retention(report: Report, table: Pivot, teacher: str) -> None:
    students = [model for model in table.models if model != teacher]
    rows = [[line.title, *(_percent(retention(line, model, teacher)) for model in students)] for line in table.lines]
    rows = [row for row in rows if any(cell is not None for cell in row[1:])]
    report.heading(f"Share of the score of {table.names[teacher]} that is kept, in percent")
    report.table(Table(["data set", *(table.names[model] for model in students)], rows))


def _add_bars(report: Report, table: Pivot) -> None:
    report.section("Data sets")
    plots = []
    for protocol in dict.fromkeys(line.protocol for line in table.lines if line.protocol not in (SPEED, UNOPENED)):
        lines = [line for line in table.lines if line.protocol == protocol and line.metric and line.words.percent]
        models = _measured(table, lines)
        parts = math.ceil(len(lines) * len(models) / _BARS)
        size = math.ceil(len(lines) / max(1, parts))
        for start in range(0, len(lines), size or 1):
            part = lines[start : start + size]
            groups = {_group(line, lines): [_bar(line, model) for model in models] for line in part}
            metrics = ", ".join(dict.fromkeys(line.metric for line in part))
            names = [table.names[model] for model in models]
            colours = [table.models.index(model) for model in models]
            plots.append(
                grouped_bar_plot(groups, names, title=spaced(protocol), x_label=f"{metrics}, percent", colours=colours)
            )
    report.plot(*plots)


def _measured(table: Pivot, lines: Sequence[Line]) -> tuple[str, ...]:
    """The models with a value; the teacher has none of its agreement with itself, a tower none without texts."""
    return tuple(model for model in table.models if any(line.score(model) is not None for line in lines))


def _group(line: Line, lines: Sequence[Line]) -> str:
    twice = sum(other.dataset == line.dataset for other in lines) > 1
    return f"{line.dataset}, {line.metric}" if twice else line.dataset


def _bar(line: Line, model: str) -> Bar | None:
    score = line.score(model)
    if score is None:
        return None
    low, high = line.rows[model]["interval"] or (None, None)
    return Bar(
        label=model,
        value=round(100 * score, 1),
        low=None if low is None else 100 * low,
        high=None if high is None else 100 * high,
    )


def _add_scatter(report: Report, table: Pivot) -> None:
    axes: tuple[tuple[str, Callable[[Pivot, str], float | None]], ...] = (
        ("parameters", _parameters),
        ("milliseconds per image, one thread", _latency),
    )
    plots, notes = [], []
    for protocol in dict.fromkeys(
        line.protocol for line in table.lines if line.protocol not in (SPEED, AGREEMENT, UNOPENED)
    ):
        means, datasets = mean_scores(table, protocol)
        name = spaced(protocol)
        for x_label, value in axes:
            dots = [
                Dot(label=table.names[model], x=x, y=100 * means[model], series=table.models.index(model))
                for model in means
                if (x := value(table, model)) is not None
            ]
            if len(dots) > 1:
                plots.append(scatter_plot(dots, title=name, x_label=x_label, y_label="mean score, percent", log_x=True))
        if datasets:
            over = f"mean over the {len(datasets)} data sets" if len(datasets) > 1 else "score on the one data set"
            notes.append(f"{name}: {over} that all its models have: {', '.join(datasets)}.")
    if plots:
        report.section("Accuracy against size and speed")
        report.plot(*plots)
        for note in notes:
            report.text(note)


def _parameters(table: Pivot, model: str) -> float | None:
    for line in table.lines:
        row = line.rows.get(model)
        known = row and (row.get("parameters") or row["metrics"].get("parameters"))
        if known:
            return float(known)
    return None


def _latency(table: Pivot, model: str) -> float | None:
    for line in table.lines:
        row = line.rows.get(model)
        if line.protocol == SPEED and row is not None and row["status"] == "ok":
            found = row["metrics"].get(LATENCY)
            return None if found is None else float(found)
    return None


def _add_classes(report: Report, table: Pivot) -> None:
    lines = [line for line in table.lines if any(row["per_class"] for row in line.rows.values())]
    if not lines:
        return
    report.section("Classes")
    for line in lines:
        own = {model: line.rows[model]["per_class"] if model in line.rows else {} for model in table.models}
        classes = dict.fromkeys(name for values in own.values() for name in values)
        rows = [[name, *(_percent(own[model].get(name)) for model in table.models)] for name in classes]
        report.folded(f"{line.title}: {len(classes)} classes", Table(["class", *_names(table)], rows))


def _percent(value: float | None) -> Estimate | None:
    return None if value is None else Estimate(value=100 * value)


def _add_errors(report: Report, table: Pivot) -> None:
    rows = [
        [line.title, table.names[model], str(line.rows[model].get("error"))]
        for line in table.lines
        for model in table.models
        if line.failed(model)
    ]
    if rows:
        report.section("Errors")
        report.table(Table(["data set", "model", "what was found"], list(dict.fromkeys(map(tuple, rows)))))


def _model(table: Pivot, model: str) -> list[str | int | None]:
    parameters = _parameters(table, model)
    rows = [line.rows[model] for line in table.lines if model in line.rows]
    weights = dict.fromkeys(str(row.get("fingerprint") or "unknown") for row in rows)
    return [table.names[model], model, None if parameters is None else int(parameters), ", ".join(weights)]
