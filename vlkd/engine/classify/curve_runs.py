"""What a finished run of a classifier left behind, on one split."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from vlkd.errors import UserError
from vlkd.report.run import read_metrics

Settings = Mapping[str, Any]

ANY = "any"
"""In place of the shots of a run that reads no label."""
_ROLES = {
    "student": ("acc1", ""),
    "label head": ("label_head", "method.supervised"),
    "teacher head": ("teacher_head", "method.distillation"),
}
"""A role's figure, and the weight without which that head is not trained."""


@dataclass(frozen=True, kw_only=True)
class Result:
    """One run on one split.

    Attributes:
        folder: of the run.
        settings: as `section.key`.
        shots: as set, or `ANY`.
        place: its labels per class.
        seed: of the run.
        samples: student samples seen.
        figures: by name: acc1, label_head, teacher_head (accuracies), ece, alpha, beta, seconds, samples, and where
            they were logged the means of conflict/trunk and conflict/heads.
        teacher: the teacher's acc1 and ece, or nothing.
        images: of the split.
        classes: their number.
    """

    folder: str
    settings: Settings
    shots: str
    place: float
    seed: int
    samples: int
    figures: Mapping[str, float]
    teacher: Mapping[str, float] = field(default_factory=dict)
    images: int = 0
    classes: int = 0


def read_run(folder: Path, split: str) -> Result | str:
    """A run's result, or why it has none yet.

    Raises:
        UserError: there is no such folder, it is no classifier's run, or it has no figures of the split.
    """
    if not folder.exists():
        raise UserError(f"There is no folder {folder}; name the folders of runs of `vlkd train dho`.")
    missing = [name for name in ("config.json", "results.jsonl") if not (folder / name).is_file()]
    if missing:
        return f"not finished: no {missing[0]}"
    try:
        settings = flat(json.loads((folder / "config.json").read_text()))
        rows = [json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines()]
        own = {row["role"]: row for row in reversed(rows) if row["split"] == split}
        if not own and rows:
            found = ", ".join(dict.fromkeys(row["split"] for row in rows))
            raise UserError(f"{folder} has no figures of the split {split!r}, only of {found}; choose one by --split.")
        return _result(folder, settings, own)
    except (KeyError, TypeError, ValueError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(
            f"{folder} does not hold the settings and results of a classifier ({type(error).__name__}: {error}); "
            "expected a run of `vlkd train dho`: leave it out."
        ) from error


def _result(folder: Path, settings: Settings, rows: Mapping[str, Mapping[str, Any]]) -> Result:
    row = rows["student"]
    shots = str(settings["data.shots"])
    reads = bool(settings["method.supervised"]) or bool(settings["teacher.few_shot"])
    place = int(shots) if shots.isdecimal() else row["labelled"] / row["counts"]["classes"]
    figures = {
        name: float(rows[role]["acc1"])
        for role, (name, weight) in _ROLES.items()
        if role in rows and (not weight or settings[weight])
    }
    figures |= {"ece": float(row["metrics"]["ece"]), "seconds": float(row["seconds"]), "samples": float(row["samples"])}
    # A single head has no share to choose.
    if "label_head" in figures and "teacher_head" in figures:
        figures |= {name: float(row["best"][name]) for name in ("alpha", "beta")}
    logged = read_metrics(folder / "metrics.jsonl") if (folder / "metrics.jsonl").is_file() else {}
    for name in ("conflict/trunk", "conflict/heads"):
        values = [value for value in logged.get(name, ([], []))[1] if math.isfinite(value)]
        if values:
            figures[name] = float(np.mean(values))
    teacher = rows.get("teacher")
    return Result(
        folder=str(folder),
        settings=settings,
        shots=shots if reads else ANY,
        place=place,
        seed=int(row["seed"]),
        samples=int(row["samples"]),
        figures=figures,
        teacher={} if teacher is None else {"acc1": float(teacher["acc1"]), "ece": float(teacher["metrics"]["ece"])},
        images=int(row["counts"]["images"]),
        classes=int(row["counts"]["classes"]),
    )


def flat(settings: Settings, prefix: str = "") -> dict[str, Any]:
    """Nested settings as `section.key`."""
    found: dict[str, Any] = {}
    for key, value in settings.items():
        found |= flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return found
