"""Two models item by item: which items one gets right and the other does not, and how sure the difference is."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vlkd.errors import UserError
from vlkd.metrics import paired_bootstrap
from vlkd.suite.metric_words import metric_words
from vlkd.suite.results import read_items
from vlkd.suite.table import SPEED, spaced

_ITEMS = {"retrieval": "the mean over images of both directions' hit@1, an image's captions counting as one"}
"""What the items of a protocol are the values of, where no figure of its rows is their mean."""

_ASKED = {"classifier": "zero_shot"}
"""Protocols that ask of each item what another one asks."""

Row = Mapping[str, Any]
Items = Mapping[str, NDArray[Any]]


@dataclass(frozen=True, kw_only=True)
class ClassChange:
    """Items of one class that a wins (right in a, wrong or worse in b) and loses."""

    name: str
    items: int
    wins: int
    losses: int


@dataclass(frozen=True, kw_only=True)
class Compared:
    """Two results on the same items; Q items.

    Attributes:
        dataset: its name.
        protocol: its name.
        a: the row of the first model.
        b: of the second.
        keys: (Q,) the items' names.
        correct: (2, Q) of a and of b, from 0 to 1.
        prediction: (2, Q) class ids; None outside classification.
        label: (Q,) class ids; None outside classification.
        names: class names by class id, as far as they are known.
        difference: mean of a minus mean of b.
        interval: 95 % of the difference, both models resampled over the same items.
        p_value: two-sided sign test on the items that differ.
        classes: changes by class, the largest first; () outside classification.
    """

    dataset: str
    protocol: str
    a: Row
    b: Row
    keys: tuple[str, ...]
    correct: NDArray[np.float64]
    prediction: NDArray[np.int64] | None
    label: NDArray[np.int64] | None
    names: Mapping[int, str]
    difference: float
    interval: tuple[float, float]
    p_value: float
    classes: tuple[ClassChange, ...]

    @property
    def title(self) -> str:
        """The data set, and the protocol behind it."""
        return f"{self.dataset} ({spaced(self.protocol)})"

    @property
    def change(self) -> NDArray[np.float64]:
        """(Q,) of a minus of b, item by item."""
        gain: NDArray[np.float64] = self.correct[0] - self.correct[1]
        return gain

    @property
    def wins(self) -> int:
        """Items on which a is better."""
        return int((self.change > 0).sum())

    @property
    def losses(self) -> int:
        """Items on which b is better."""
        return int((self.change < 0).sum())

    @property
    def remark(self) -> str:
        """Where the items' mean is not the figure of the table, a sentence with both; else ""."""
        means = [float(mean) for mean in self.correct.mean(axis=1)]
        rows = (self.a, self.b)
        if all(_equal(mean, row["score"]) for mean, row in zip(means, rows, strict=True)):
            return ""
        same = [
            name
            for name in self.a["metrics"]
            if all(_equal(mean, row["metrics"].get(name)) for mean, row in zip(means, rows, strict=True))
        ]
        figure = same[0] if same else _ITEMS.get(self.protocol, "the mean over items")
        names = " and ".join(dict.fromkeys(str(row["main_metric"]) for row in rows))
        here, table = (
            " and ".join(f"{side} {text}" for side, text in zip("ab", texts, strict=True))
            for texts in (
                [f"{100 * mean:.1f}" for mean in means],
                [metric_words(str(row["main_metric"])).text(float(row["score"])) for row in rows],
            )
        )
        return (
            f"{self.title}: compared here is {figure} ({here}), whose value of each item is known, not the main metric "
            f"of the table, {names} ({table})."
        )

    def as_row(self) -> dict[str, Any]:
        """A flat row for strict JSON."""
        return {
            "dataset": self.dataset, "protocol": self.protocol, "items": len(self.keys),
            "a": float(self.correct[0].mean()), "b": float(self.correct[1].mean()), "difference": self.difference,
            "remark": self.remark or None,
            "interval": list(self.interval), "wins": self.wins, "losses": self.losses, "p_value": self.p_value,
            "classes": [
                {"class": own.name, "items": own.items, "wins": own.wins, "losses": own.losses} for own in self.classes
            ],
        }  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """All data sets that both models were measured on, and why some of them cannot be compared."""

    a: str
    b: str
    compared: tuple[Compared, ...]
    refused: tuple[str, ...]


def compare_results(
    rows_a: Sequence[Row], folder_a: Path, rows_b: Sequence[Row], folder_b: Path, *, seed: int = 0
) -> Comparison:
    """Compare two models on every (data set, protocol) that both were measured on.

    Args:
        rows_a: the rows of the first model alone.
        folder_a: the results folder in which its items lie.
        rows_b: of the second model alone.
        folder_b: its folder.
        seed: of the bootstrap.

    Raises:
        UserError: nothing can be compared; the first reason is named.
    """
    other = {_question(row): row for row in rows_b if row["status"] == "ok"}
    pairs = [
        (row, other[_question(row)])
        for row in rows_a
        if row["status"] == "ok" and row["protocol"] != SPEED and _question(row) in other
    ]
    done: list[Compared] = []
    refused: list[str] = []
    for a, b in pairs:
        try:
            done.append(compare_rows(a, folder_a, b, folder_b, seed=seed))
        except UserError as error:
            refused.append(f"{a['dataset']} ({spaced(a['protocol'])}): {error}")
    if not done:
        reason = refused[0] if refused else "no data set was measured for both by the same protocol."
        raise UserError(f"Nothing can be compared: {reason}")
    return Comparison(
        a=str(rows_a[0]["model_ref"]), b=str(rows_b[0]["model_ref"]), compared=tuple(done), refused=tuple(refused)
    )


def compare_rows(a: Row, folder_a: Path, b: Row, folder_b: Path, *, seed: int = 0) -> Compared:
    """Compare two results of the same data set and protocol.

    Raises:
        UserError: the data or the items differ, or items are missing.
    """
    if a["data_hash"] != b["data_hash"]:
        raise UserError(
            f"the data differ ({a['data_hash']} and {b['data_hash']}); measure both models on the same files."
        )
    (items_a, keys_a), (items_b, keys_b) = read_items(folder_a, a), read_items(folder_b, b)
    if keys_a != keys_b:
        only = sorted(set(keys_a) ^ set(keys_b))
        found = (
            f"{len(only)} items were measured for one model alone ({', '.join(only[:3])})" if only else "their order"
        )
        raise UserError(f"the items differ: {found}; measure both models on the same readable files.")
    correct = np.stack([_values(items_a, keys_a), _values(items_b, keys_b)])
    gain = correct[0] - correct[1]
    label = items_a.get("label")
    names = {} if label is None else _class_names(label, a["per_class"])
    both = "prediction" in items_a and "prediction" in items_b
    return Compared(
        dataset=str(a["dataset"]),
        protocol="_and_".join(dict.fromkeys((str(a["protocol"]), str(b["protocol"])))),
        a=a,
        b=b,
        keys=tuple(keys_a),
        correct=correct,
        prediction=np.stack([items_a["prediction"], items_b["prediction"]]) if both else None,
        label=label,
        names=names,
        difference=float(gain.mean()),
        interval=paired_bootstrap(correct[0], correct[1], seed=seed),
        p_value=sign_test(int((gain > 0).sum()), int((gain < 0).sum())),
        classes=() if label is None else _by_class(gain, label, names),
    )


def _question(row: Row) -> tuple[str, str]:
    """What is asked of a model: the class of each image, whether prompts or a classifier's heads answer."""
    protocol = str(row["protocol"])
    return str(row["dataset"]), _ASKED.get(protocol, protocol)


def sign_test(wins: int, losses: int) -> float:
    """Two-sided exact sign test: p = min(1, 2 P[X <= min(wins, losses)]) for X binomial(wins + losses, 1/2).

    On right and wrong answers this is McNemar's exact test; 1 without any difference.
    """
    total, fewer = wins + losses, min(wins, losses)
    terms = [math.lgamma(total + 1) - math.lgamma(i + 1) - math.lgamma(total - i + 1) for i in range(fewer + 1)]
    return min(1.0, 2 * math.fsum(math.exp(term - total * math.log(2)) for term in terms))


def _equal(mean: float, figure: float | None) -> bool:
    return figure is not None and math.isclose(mean, float(figure), rel_tol=0, abs_tol=1e-9)


def _values(items: Items, keys: Sequence[str]) -> NDArray[np.float64]:
    values = np.asarray(items.get("correct", ()), np.float64)
    if values.shape != (len(keys),):
        raise UserError(f"the items have {values.shape} values for {len(keys)} keys; run `vlkd eval suite` again.")
    return values


def _class_names(label: NDArray[np.int64], per_class: Mapping[str, float]) -> dict[int, str]:
    """Names by class id: the row names the classes that have images, in the order of their ids."""
    ids = np.unique(label).tolist()
    if len(ids) != len(per_class):
        return {}
    return dict(zip(ids, per_class, strict=True))


def _by_class(gain: NDArray[np.float64], label: NDArray[np.int64], names: Mapping[int, str]) -> tuple[ClassChange, ...]:
    changes = []
    for number in np.unique(label).tolist():
        own = gain[label == number]
        wins, losses = int((own > 0).sum()), int((own < 0).sum())
        name = names.get(number, f"class {number}")
        changes.append(ClassChange(name=name, items=len(own), wins=wins, losses=losses))
    return tuple(sorted(changes, key=lambda change: (-abs(change.wins - change.losses), change.name)))
