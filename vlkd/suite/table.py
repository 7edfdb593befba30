"""Result rows side by side: a line per data set and protocol, a column per model, aggregates only where complete.

Two results stand on one line only if data set, protocol and main metric agree; where the data behind them differ, the
line says so and names no best.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from vlkd.errors import UserError
from vlkd.metrics import aggregate as mean_over
from vlkd.suite.declaration import Aggregate
from vlkd.suite.metric_words import MetricWords, metric_words
from vlkd.suite.results import UNOPENED, latest

Row = Mapping[str, Any]

SPEED, AGREEMENT = "speed", "agreement"
PROBES = ("linear_probe", "knn")
"""Protocols that train on the data set; a data set has at most one other protocol that counts in an aggregate."""


@dataclass(frozen=True, kw_only=True)
class Line:
    """One data set under one protocol, by one main metric.

    Attributes:
        dataset: its name.
        protocol: its name.
        metric: the main metric; "" if every model failed.
        rows: the result of each model that has one, by reference; an error row for one that failed.
        comparable: all were measured on the same data.
    """

    dataset: str
    protocol: str
    metric: str
    rows: Mapping[str, Row]
    comparable: bool

    @property
    def words(self) -> MetricWords:
        """How to read the main metric."""
        return metric_words(self.metric)

    @property
    def title(self) -> str:
        """The data set, and the protocol behind it where it is known."""
        return self.dataset if self.protocol in (UNOPENED, SPEED) else f"{self.dataset} ({spaced(self.protocol)})"

    def score(self, model: str) -> float | None:
        """The main metric of a model; None for a failed or missing one."""
        row = self.rows.get(model)
        return float(row["score"]) if row is not None and row["status"] == "ok" else None

    def failed(self, model: str) -> bool:
        """Whether the model has an error row here."""
        row = self.rows.get(model)
        return row is not None and row["status"] != "ok"

    def chance(self) -> float | None:
        """What guessing scores; None where nobody knows."""
        known = [row["random_score"] for row in self.rows.values() if row.get("random_score") is not None]
        return float(known[0]) if known else None

    def best(self, aside: str | None = None) -> frozenset[str]:
        """The models with the best score, equal ones together; `aside`, the teacher, takes no part."""
        scores = {model: score for model in self.rows if model != aside and (score := self.score(model)) is not None}
        if len(scores) < 2 or not self.comparable:
            return frozenset()
        top = min(scores.values()) if self.words.lower_is_better else max(scores.values())
        return frozenset(model for model, score in scores.items() if score == top)


@dataclass(frozen=True, kw_only=True)
class Pivot:
    """Models by their references, in the order of the rows, and the lines; `remarks` say what cannot be compared."""

    models: tuple[str, ...]
    names: Mapping[str, str]
    lines: tuple[Line, ...]
    remarks: tuple[str, ...]


def pivot(rows: Sequence[Row]) -> Pivot:
    """Bring rows into lines, in the order of first sight, `speed` last.

    Raises:
        UserError: there are no rows.
    """
    if not rows:
        raise UserError("The results hold no row; run `vlkd eval suite` first.")
    models = tuple(dict.fromkeys(str(row["model_ref"]) for row in rows))
    names = short_names(models)
    lines = [line for task, own in _tasks(rows).items() for line in _lines(*task, own)]
    lines.sort(key=lambda line: line.protocol == SPEED)
    remarks = [f"{line.title}: measured on different data; not comparable." for line in lines if not line.comparable]
    for model in models:
        weights = {row.get("fingerprint") for row in rows if row["model_ref"] == model and row["status"] == "ok"}
        if len(weights) > 1:
            remarks.append(f"{names[model]}: the rows come from {len(weights)} different models of this name.")
    for row in _unopened_again(rows):
        model = names[str(row["model_ref"])]
        remarks.append(
            f"{model}, {row['dataset']}: the figures are of an earlier run; the last one failed: {row['error']}"
        )
    return Pivot(models=models, names=names, lines=tuple(lines), remarks=tuple(remarks))


def _tasks(rows: Sequence[Row]) -> dict[tuple[str, str], list[Row]]:
    """The rows of each (data set, protocol).

    A data set that could not be opened for a model has one error row, which stands for all protocols that other
    models ran on it, and for none where the model was measured on it in an earlier run.
    """
    tasks: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        if row["protocol"] != UNOPENED:
            tasks.setdefault((str(row["dataset"]), str(row["protocol"])), []).append(row)
    again = _unopened_again(rows)
    for row in rows:
        if row["protocol"] != UNOPENED or row in again:
            continue
        dataset = str(row["dataset"])
        others = [task for task in tasks if task[0] == dataset] or [(dataset, UNOPENED)]
        for task in others:
            tasks.setdefault(task, []).append(row)
    return tasks


def _unopened_again(rows: Sequence[Row]) -> list[Row]:
    """The failures to open that came after the model was measured on the data set."""
    measured = {(row["model_ref"], row["dataset"]) for row in rows if row["protocol"] != UNOPENED}
    return [row for row in rows if row["protocol"] == UNOPENED and (row["model_ref"], row["dataset"]) in measured]


def _lines(dataset: str, protocol: str, rows: Sequence[Row]) -> Iterator[Line]:
    """A line for each main metric; a failure stands in all of them."""
    for metric in dict.fromkeys(str(row["main_metric"]) for row in rows if row["status"] == "ok") or {"": None}:
        fitting = [row for row in rows if row["status"] != "ok" or row["main_metric"] == metric]
        hashes = {row.get("data_hash") for row in fitting if row["status"] == "ok"}
        by_model = {str(row["model_ref"]): row for row in fitting}
        yield Line(dataset=dataset, protocol=protocol, metric=metric, rows=by_model, comparable=len(hashes) < 2)


def spaced(name: str) -> str:
    """A protocol's name in words."""
    return name.replace("_", " ")


def join_results(parts: Sequence[Sequence[Row]]) -> list[Row]:
    """The rows of several result files; of one measured twice the later.

    Raises:
        UserError: two files measured different models under one name.
    """
    owner: dict[tuple[str, str], int] = {}
    for number, part in enumerate(parts):
        for row in part:
            model, weights = str(row["model_ref"]), str(row.get("fingerprint"))
            others = [place for (name, print_), place in owner.items() if name == model and print_ != weights]
            if row["status"] == "ok" and any(place != number for place in others):
                raise UserError(
                    f"Two of the results call different models {model}; measure one of them under another path."
                )
            if row["status"] == "ok":
                owner.setdefault((model, weights), number)
    return latest(row for part in parts for row in part)


def short_names(refs: Sequence[str]) -> dict[str, str]:
    """For each reference the shortest end of its path that tells it from the others."""
    names: dict[str, str] = {}
    for ref in refs:
        parts = ref.rstrip("/").split("/")
        others = [other.rstrip("/").split("/") for other in refs if other != ref]
        length = next((n for n in range(1, len(parts)) if all(parts[-n:] != o[-n:] for o in others)), len(parts))
        names[ref] = "/".join(parts[-length:])
    return names


def find_model(models: Sequence[str], ref: str) -> str:
    """The model that a reference, or its short name, means.

    Raises:
        UserError: none or several.
    """
    if ref in models:
        return ref
    found = [model for model, name in short_names(models).items() if name == ref or model.endswith(f"/{ref}")]
    if len(found) != 1:
        raise UserError(f"The results have no single model {ref!r}; name one of {', '.join(models)}.")
    return found[0]


def retention(line: Line, student: str, teacher: str) -> float | None:
    """The student's score divided by the teacher's; None where one is missing, or a ratio means nothing."""
    own, full = line.score(student), line.score(teacher)
    if own is None or not full or full < 0 or not line.comparable:
        return None
    return None if line.words.lower_is_better or line.protocol in (SPEED, AGREEMENT) else own / full


def aggregate_score(lines: Sequence[Line], aggregate: Aggregate, model: str, probe: str = "") -> float | str:
    """The mean of the main metrics over the aggregate's data sets, or in words why there is none: `k of n data sets`.

    Args:
        lines: all lines.
        aggregate: which data sets.
        model: whose scores.
        probe: of a probe's protocol; by default of the protocol that needs no training.
    """
    scores: dict[str, float] = {}
    for line in lines:
        fits = line.protocol == probe if probe else line.protocol not in (SPEED, AGREEMENT, *PROBES)
        score = line.score(model)
        if fits and line.dataset in aggregate.names and score is not None:
            if line.dataset in scores:
                return f"{line.dataset} has two scores"
            scores[line.dataset] = score
    names = tuple(dict.fromkeys(aggregate.names))
    if set(scores) != set(names):
        return f"{len(scores)} of {aggregate.count} data sets"
    return mean_over(scores, names, what=aggregate.name)


def wide_rows(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """A flat row per result: CLIP_benchmark's columns, the metrics, then ours; every row has every column."""
    first = ("dataset", "model", "pretrained", "task", "language", "model_fullname")
    metrics = dict.fromkeys(name for row in rows for name in row["metrics"])
    ours = (
        "protocol", "status", "error", "main_metric", "score", "interval_low", "interval_high", "random_score",
        "model_ref", "fingerprint", "parameters", "dtype", "precision", "data_path", "data_split", "data_hash",
        "unreadable", "seconds", "suite", "tags",
    )  # fmt: skip
    counts = dict.fromkeys(f"count_{name}" for row in rows for name in row["counts"])
    columns = dict.fromkeys((*first, *metrics, *ours, *counts))
    flat = []
    for row in rows:
        low, high = row["interval"] or (None, None)
        data = row.get("data") or {}
        known = {
            **row,
            "model_fullname": f"{row.get('model')} {row.get('pretrained')}",
            "interval_low": low,
            "interval_high": high,
            "data_path": data.get("path"),
            "data_split": data.get("split"),
            "tags": " ".join(row.get("tags") or ()),
            **{f"count_{name}": value for name, value in row["counts"].items()},
            **row["metrics"],
        }
        flat.append({column: known.get(column) for column in columns})
    return flat
