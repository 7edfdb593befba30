"""Finished runs of classifiers side by side: methods named by their settings, means over seeds, paired differences."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from vlkd.engine.classify.curve_runs import ANY, Result, Settings, read_run
from vlkd.errors import UserError
from vlkd.metrics.seeds import t_interval

OURS, ONE_HEAD = "DHO", "one head (logits)"
NAMES: tuple[tuple[Settings, str], ...] = (
    ({"method.distillation": 0}, "labels only"),
    ({"method.supervised": 0}, "teacher only"),
    ({"model.heads": "one", "method.match": "features"}, "one head (features)"),
    ({"model.heads": "one", "method.surgery": True}, "one head + PCGrad"),
    ({"model.heads": "one"}, ONE_HEAD),
    ({"method.match": "binary"}, "auxiliary head (DHKD)"),
    ({"teacher.few_shot": False}, OURS),
    ({"teacher.few_shot": True}, "DHO-F"),
)
"""What a run is called: the words of the first settings that are all its own."""
FURTHER: tuple[tuple[Settings, str], ...] = (
    ({"model.heads": "one"}, "one head"),
    ({"method.match": "features"}, "features"),
    ({"method.match": "binary"}, "binary KL"),
    ({"method.surgery": True}, "PCGrad"),
    ({"teacher.few_shot": True}, "few-shot teacher"),
)
"""What is added to the name, unless the name tells it."""
FREE = (
    "out", "seed", "smoke", "data.shots", "data.workers", "teacher.folder", "teacher.batch_size", "train.conflicts",
    "train.log_steps", "train.save_minutes", "train.save_steps", "train.device", "report.teacher", "report.compare",
)  # fmt: skip
"""Settings that make no other method."""
_HEADS = ("model.heads", "model.language_init", "model.align")


@dataclass(frozen=True, kw_only=True)
class Summary:
    """Attributes: mean. low, high: Student's 95 % interval over seeds, None for one seed. values: by seed."""

    mean: float
    low: float | None
    high: float | None
    values: Mapping[int, float]


@dataclass(frozen=True, kw_only=True)
class Line:
    """One method.

    Attributes:
        base: its words.
        more: what tells it from others of the same words.
        results: by shots, or under `ANY`, by seed.
        student: False for a teacher.
    """

    base: str
    more: str
    results: Mapping[str, Mapping[int, Result]]
    student: bool = True

    @property
    def name(self) -> str:
        """All words."""
        return f"{self.base}, {self.more}" if self.more else self.base

    def at(self, shots: str, figure: str) -> dict[int, float]:
        """The figure by seed, of the runs that have it; a run that reads no label stands at all shots."""
        own = self.results.get(shots) or self.results.get(ANY) or {}
        return {seed: one.figures[figure] for seed, one in sorted(own.items()) if figure in one.figures}


@dataclass(frozen=True, kw_only=True)
class Curve:
    """Attributes: split. shots: ascending. places: labels per class. lines: methods, then teachers. left_out: runs."""

    split: str
    shots: tuple[str, ...]
    places: tuple[float, ...]
    lines: tuple[Line, ...]
    left_out: tuple[tuple[str, str], ...]


def learning_curve(folders: Sequence[str], split: str) -> Curve:
    """Read runs and put them side by side.

    Args:
        folders: of runs; one that is not finished, or repeats another, is left out and listed.
        split: "test" or "val".

    Raises:
        UserError: nothing is finished, a run is no classifier's or lacks the split, or data, student or student samples
            differ.
    """
    results: list[Result] = []
    left_out: list[tuple[str, str]] = []
    for folder in dict.fromkeys(folders):
        found = read_run(Path(folder), split)
        if isinstance(found, Result):
            results.append(found)
        else:
            left_out.append((folder, found))
    if not results:
        raise UserError(
            f"None of {len(left_out)} folders is a finished run (first: {left_out[0][0]}, {left_out[0][1]}); name "
            "folders that hold results.jsonl and config.json of `vlkd train dho`."
        )
    check_comparable(results)
    lines, repeated = group(results)
    places = {one.shots: one.place for one in results if one.shots != ANY} or {results[0].settings["data.shots"]: 1.0}
    shots = tuple(sorted(places, key=lambda own: (places[own], own)))
    every = (*lines, *teacher_lines(results))
    return Curve(
        split=split,
        shots=shots,
        places=tuple(places[own] for own in shots),
        lines=every,
        left_out=(*left_out, *repeated),
    )


def check_comparable(results: Sequence[Result]) -> None:
    """Raise `UserError` unless data, student and student samples are the same: shots, heads and terms may differ."""

    def fixed(one: Result) -> dict[str, Any]:
        own = {
            key: value
            for key, value in one.settings.items()
            if key.startswith(("data.", "model.")) and key not in (*FREE, *_HEADS)
        }
        return own | {"student samples": one.samples, "images of the split": one.images, "classes": one.classes}

    first = fixed(results[0])
    for one in results[1:]:
        own = fixed(one)
        for key in sorted(first.keys() | own.keys()):
            if first.get(key) != own.get(key):
                raise UserError(
                    f"{results[0].folder} and {one.folder} differ in {key} ({first.get(key)!r} and {own.get(key)!r}); "
                    "expected runs of the same data, student and student samples: make a curve of each kind."
                )


def group(results: Sequence[Result]) -> tuple[list[Line], list[tuple[str, str]]]:
    """The methods in the order of `NAMES`, and the runs that repeat another."""
    named: dict[tuple[str, str], dict[str, dict[int, Result]]] = {}
    repeated = []
    words = [words_of(one.settings) for one in results]
    for base in dict.fromkeys(name for name, _ in words):
        members = [(one, told) for one, (name, told) in zip(results, words, strict=True) if name == base]
        differing = {
            key
            for one, told in members
            for key, value in one.settings.items()
            if key not in (*FREE, *told) and value != members[0][0].settings.get(key)
        }
        for one, _ in members:
            more = ", ".join(f"{key}={_short(one.settings.get(key))}" for key in sorted(differing))
            own = named.setdefault((base, more), {}).setdefault(one.shots, {})
            if one.seed in own:
                repeated.append((one.folder, f"the same method, shots and seed as {own[one.seed].folder}"))
            else:
                own[one.seed] = one
    order = {name: place for place, (_, name) in enumerate(NAMES)}
    lines = [Line(base=base, more=more, results=own) for (base, more), own in named.items()]
    return sorted(lines, key=lambda line: (_place(line.base, order), line.name)), repeated


def words_of(settings: Settings) -> tuple[str, frozenset[str]]:
    """A run's words, and the settings that these tell."""
    condition, name = next(one for one in NAMES if _holds(one[0], settings))
    further = [one for one in FURTHER if _holds(one[0], settings) and not one[0].keys() <= condition.keys()]
    told = frozenset(key for own, _ in (*further, (condition, name)) for key in own)
    return ", ".join([name, *(words for _, words in further)]), told


def _holds(condition: Settings, settings: Settings) -> bool:
    return all(settings.get(key) == value for key, value in condition.items())


def _place(base: str, order: Mapping[str, int]) -> int:
    """Of a name with further words that of the name it begins with."""
    return max((place for name, place in order.items() if base == name or base.startswith(f"{name}, ")), default=0)


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 40 else f"...{text[-37:]}"


def teacher_lines(results: Iterable[Result]) -> list[Line]:
    """The teachers' own figures: zero-shot once, few-shot by shots and seed."""
    found: dict[tuple[str, str], dict[str, dict[int, Result]]] = {}
    for one in results:
        if one.teacher:
            few = bool(one.settings["teacher.few_shot"])
            key = ("teacher, few-shot" if few else "teacher, zero-shot", str(one.settings["teacher.ref"]))
            # A zero-shot teacher is the same for every seed.
            own = found.setdefault(key, {}).setdefault(one.shots if few else ANY, {})
            own.setdefault(one.seed if few else 0, replace(one, figures=one.teacher, teacher={}))
    several = len({ref for _, ref in found}) > 1
    return [
        Line(base=words, more=_short(ref) if several else "", results=own, student=False)
        for (words, ref), own in sorted(found.items(), key=lambda item: (item[0][0] != "teacher, zero-shot", item[0]))
    ]


def summary(values: Mapping[int, float]) -> Summary | None:
    """The mean over seeds with its interval; None without values."""
    if not values:
        return None
    found = list(values.values())
    low, high = t_interval(found) or (None, None)
    return Summary(mean=float(np.mean(found)), low=low, high=high, values=dict(values))


def differences(ours: Line, other: Line, shots: str, figure: str = "acc1") -> Summary | None:
    """`ours` minus `other` by the seeds that both have: the same seed draws the same shots."""
    first, second = ours.at(shots, figure), other.at(shots, figure)
    return summary({seed: first[seed] - second[seed] for seed in sorted(first.keys() & second.keys())})


def pairs(curve: Curve) -> list[tuple[Line, Line]]:
    """DHO against each other method, one head first; DHO with further settings against those with the same or none."""
    students = [line for line in curve.lines if line.student]
    found = [
        (ours, other)
        for ours in students
        for other in students
        if ours.base == OURS and other.base != OURS and (not ours.more or other.more in ("", ours.more))
    ]
    return sorted(found, key=lambda pair: pair[1].base != ONE_HEAD)
