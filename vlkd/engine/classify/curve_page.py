"""The learning curve of classifiers as a page with a plot, as tables, and as rows."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from vlkd.engine.classify.curve import FREE, ONE_HEAD, OURS, Curve, Line, Summary, differences, pairs, summary
from vlkd.report import Estimate, Report, Table, line_plot
from vlkd.report.table import Value


@dataclass(frozen=True, kw_only=True)
class Measure:
    """One figure of all methods. Attributes: title. figure: its name. factor: to the unit shown. digits. best. told."""

    title: str
    figure: str
    factor: float = 1.0
    digits: int = 1
    best: Literal["highest", "lowest"] | None = None
    told: str = ""


ACCURACY = Measure(title="Accuracy", figure="acc1", factor=100, best="highest", told="Percent.")
DIFFERENCES = "Paired differences of accuracy"
FURTHER = (
    Measure(title="Expected calibration error", figure="ece", factor=100, best="lowest", told="Percent."),
    Measure(title="Label head alone", figure="label_head", factor=100, told="Accuracy in percent."),
    Measure(title="Teacher head alone", figure="teacher_head", factor=100, told="Accuracy in percent."),
    Measure(title="Share of the label head (alpha)", figure="alpha", digits=2),
    Measure(
        title="Cosine of the two gradients in the trunk",
        figure="conflict/trunk",
        digits=3,
        told="Labels' against teacher's, mean over the logged steps; below 0 they conflict.",
    ),
    Measure(
        title="Cosine of the two gradients in the heads",
        figure="conflict/heads",
        digits=3,
        told="With two heads each has one gradient, so 0 stands for none in common.",
    ),
    Measure(title="Seconds of training", figure="seconds", told="Without validation, saving and the teacher's pass."),
)


def shots_words(shots: str) -> str:
    """A column's header."""
    if shots.isdecimal():
        return f"{shots} shot" if shots == "1" else f"{shots} shots"
    return Path(shots).name


def tables(curve: Curve) -> dict[str, Table]:
    """By title: accuracy, its paired differences, and each other measure that any run has; methods by shots."""
    found = {ACCURACY.title: measure_table(curve, ACCURACY), DIFFERENCES: difference_table(curve)}
    found |= {one.title: measure_table(curve, one) for one in FURTHER}
    return {title: table for title, table in found.items() if table.rows}


def measure_table(curve: Curve, measure: Measure) -> Table:
    """Means over seeds with their intervals; a teacher stands aside."""
    rows: list[list[Value]] = []
    aside = []
    for line in curve.lines:
        cells = [summary(line.at(shots, measure.figure)) for shots in curve.shots]
        if any(cells):
            if not line.student:
                aside.append(len(rows))
            rows.append([line.name, *(estimate(cell, measure.factor, measure.digits) for cell in cells), seeds(cells)])
    headers = ("method", *map(shots_words, curve.shots), "seeds")
    best = dict.fromkeys(headers[1:-1], measure.best) if measure.best else {}
    caption = f"{measure.told} Mean over seeds with its 95 % interval (Student's t).".strip()
    return Table(headers, rows, caption=caption, best={key: way for key, way in best.items() if way}, aside=aside)


def difference_table(curve: Curve) -> Table:
    """DHO minus each other method, seed by seed."""
    rows: list[list[Value]] = []
    for ours, other in pairs(curve):
        cells = [differences(ours, other, shots) for shots in curve.shots]
        if any(cells):
            rows.append([f"{ours.name} − {other.name}", *(estimate(cell, 100, 2) for cell in cells), seeds(cells)])
    caption = (
        "Percentage points, mean over the seeds that both have, with its 95 % interval (Student's t of the "
        "differences); the same seed has the same labelled images."
    )
    return Table(("difference", *map(shots_words, curve.shots), "seeds"), rows, caption=caption)


def seed_table(curve: Curve, ours: Line, other: Line) -> Table:
    """The differences themselves."""
    cells = [differences(ours, other, shots) for shots in curve.shots]
    every = sorted({seed for cell in cells if cell for seed in cell.values})
    rows: list[list[Value]] = [
        [
            f"seed {seed}",
            *(
                Estimate(value=100 * cell.values[seed], digits=2) if cell and seed in cell.values else None
                for cell in cells
            ),
        ]
        for seed in every
    ]
    return Table(("seed", *map(shots_words, curve.shots)), rows, caption=f"{ours.name} − {other.name}, points.")


def estimate(cell: Summary | None, factor: float, digits: int) -> Estimate | None:
    """A cell of a table."""
    if cell is None:
        return None
    low, high = (None if end is None else factor * end for end in (cell.low, cell.high))
    return Estimate(value=factor * cell.mean, low=low, high=high, digits=digits)


def seeds(cells: list[Summary | None]) -> str:
    """How many seeds the cells of a row have."""
    counts = sorted({len(cell.values) for cell in cells if cell})
    return str(counts[0]) if len(counts) == 1 else f"{counts[0]} to {counts[-1]}"


def verdicts(curve: Curve) -> list[str]:
    """What the differences between two heads and one say, in a sentence each."""
    found = []
    for ours, other in pairs(curve):
        cells = [cell for shots in curve.shots if (cell := differences(ours, other, shots))]
        if other.base == ONE_HEAD and cells:
            above = sum(cell.mean > 0 for cell in cells)
            surely = sum(cell.low is not None and cell.low > 0 for cell in cells)
            below = sum(cell.high is not None and cell.high < 0 for cell in cells)
            found.append(
                f"{ours.name} minus {other.name}: above 0 at {above} of {len(cells)} shot counts; the 95 % interval "
                f"lies above 0 at {surely} and below 0 at {below}."
            )
    return found


def plot_series(
    curve: Curve,
) -> tuple[dict[str, tuple[list[float], list[float]]], dict[str, list[tuple[float, float]]]]:
    """The lines of the plot and their intervals, percent; intervals end at 0 and 100.

    DHO and one head come first, for they have the colours that are easiest to tell apart.
    """
    series: dict[str, tuple[list[float], list[float]]] = {}
    intervals: dict[str, list[tuple[float, float]]] = {}
    first = {OURS: 0, ONE_HEAD: 1}
    for line in sorted(curve.lines, key=lambda line: first.get(line.base, len(first))):
        cells = [summary(line.at(shots, ACCURACY.figure)) for shots in curve.shots]
        points = [(place, cell) for place, cell in zip(curve.places, cells, strict=True) if cell]
        series[line.name] = ([place for place, _ in points], [100 * cell.mean for _, cell in points])
        intervals[line.name] = [
            (float("nan"), float("nan"))
            if cell.low is None or cell.high is None
            else (max(0.0, 100 * cell.low), min(100.0, 100 * cell.high))
            for _, cell in points
        ]
    return series, intervals


def page(curve: Curve, title: str) -> Report:
    """Plot, tables, differences, what was left out."""
    students = [line for line in curve.lines if line.student]
    first = next(one for line in students for by_seed in line.results.values() for one in by_seed.values())
    runs = sum(len(by_seed) for line in students for by_seed in line.results.values())
    model = first.settings["model.start"] or first.settings["model.image"]
    lead = (
        f"{runs} runs of {first.samples:,} student samples each, {model}, {first.classes} classes of "
        f"{first.settings['data.root']}, {first.images} images of the split {curve.split}."
    )
    report = Report(title, lead)
    report.section("Accuracy over shots")
    series, intervals = plot_series(curve)
    report.plot(
        line_plot(
            series,
            title=f"Accuracy, {curve.split}",
            x_label="labelled images per class",
            y_label="percent",
            log_x=True,
            x_marks=curve.places,
            intervals=intervals,
            height=320,
        )
    )
    for sentence in verdicts(curve):
        report.text(sentence)
    drawn = tables(curve)
    for name in (name for name in (ACCURACY.title, DIFFERENCES) if name in drawn):
        report.section(name)
        report.table(drawn.pop(name))
    for ours, other in pairs(curve):
        if other.base == ONE_HEAD:
            report.folded(f"{ours.name} − {other.name}, seed by seed", seed_table(curve, ours, other))
    report.section("Further figures")
    for name, table in drawn.items():
        report.heading(name)
        report.table(table)
    report.section("Runs")
    report.folded("Settings in which the methods differ", settings_table(students))
    if curve.left_out:
        report.folded(f"{len(curve.left_out)} left out", Table(("folder", "reason"), curve.left_out))
    return report


def settings_table(lines: list[Line]) -> Table:
    """One row per setting that is not the same for all, of each method's first run."""
    firsts = [next(one for by_seed in line.results.values() for one in by_seed.values()) for line in lines]
    keys = sorted({key for one in firsts for key in one.settings if key not in FREE})
    rows = [[key, *(str(one.settings.get(key)) for one in firsts)] for key in keys]
    return Table(("setting", *(line.name for line in lines)), [row for row in rows if len(set(row[1:])) > 1])


def csv_rows(curve: Curve) -> list[dict[str, Any]]:
    """One row per run, then one per teacher; a figure that a run lacks is empty."""
    every = [
        (line, shots, one)
        for line in curve.lines
        for shots, by_seed in line.results.items()
        for _, one in sorted(by_seed.items())
    ]
    names = list(dict.fromkeys(name for _, _, one in every for name in one.figures))
    return [
        {"method": line.name, "student": line.student, "shots": shots, "seed": one.seed, "split": curve.split}
        | {name: one.figures.get(name, "") for name in names}
        | {"run": one.folder}
        for line, shots, one in every
    ]


def plain(curve: Curve) -> dict[str, Any]:
    """Means, intervals and values of accuracy and differences, fractions, as strict JSON."""
    methods = {
        line.name: {shots: cell_plain(summary(line.at(shots, ACCURACY.figure))) for shots in curve.shots}
        for line in curve.lines
    }
    paired = {
        f"{ours.name} - {other.name}": {shots: cell_plain(differences(ours, other, shots)) for shots in curve.shots}
        for ours, other in pairs(curve)
    }
    return {"split": curve.split, "acc1": methods, "differences": paired, "left_out": [list(o) for o in curve.left_out]}


def cell_plain(cell: Summary | None) -> Mapping[str, Any] | None:
    """One cell."""
    return (
        None if cell is None else {"mean": cell.mean, "low": cell.low, "high": cell.high, "by_seed": dict(cell.values)}
    )


def markdown(table: Table) -> str:
    """A table of names and estimates for a text file."""
    lines = [f"| {' | '.join(table.headers)} |", "|" + "---|" * len(table.headers)]
    lines += [f"| {' | '.join(map(_words, row))} |" for row in table.rows]
    return "\n".join(lines)


def _words(value: Value) -> str:
    if not isinstance(value, Estimate):
        return "" if value is None else str(value)
    words = f"{value.value:.{value.digits}f}"
    if value.low is None or value.high is None:
        return words
    return f"{words} [{value.low:.{value.digits}f}, {value.high:.{value.digits}f}]"
