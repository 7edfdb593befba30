"""What every protocol returns: its figures, how sure they are, and one value per item to compare models by."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from numpy.typing import NDArray


@dataclass(frozen=True, kw_only=True)
class Measured:
    """The outcome of one protocol for one model on one data set.

    Attributes:
        protocol: the file of `vlkd/protocols` that measured it.
        task: CLIP_benchmark's name of the task.
        metrics: finite figures by name.
        main_metric: the one of them by which models are ranked.
        interval: 95 % of the main metric, None where it has none.
        random_score: what guessing gives in the main metric, None where nobody knows.
        counts: images, classes, gallery sizes.
        per_item: (Q,) `correct`, one value from 0 to 1 per item, and what else `vlkd eval compare` shows.
        per_class: a figure for each class name; {} where there are no classes.
        notes: the protocol's settings: seed, tie rule, what was chosen on validation data.
    """

    protocol: str
    task: str
    metrics: Mapping[str, float]
    main_metric: str
    interval: tuple[float, float] | None
    random_score: float | None
    counts: Mapping[str, int]
    per_item: Mapping[str, NDArray[Any]]
    per_class: Mapping[str, float] = field(default_factory=dict)
    notes: Mapping[str, str | int | float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        bad = [name for name, value in self.metrics.items() if not math.isfinite(value)]
        assert not bad, f"{self.protocol}: {bad} are not finite; a figure that is not defined is left out"
        assert self.main_metric in self.metrics, f"{self.protocol}: no figure {self.main_metric}"

    @property
    def score(self) -> float:
        """The main metric."""
        return float(self.metrics[self.main_metric])
