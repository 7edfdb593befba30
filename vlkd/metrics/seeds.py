"""Means over few repetitions, such as seeds, with Student's t interval."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import ArrayLike

from vlkd.metrics.checks import finite

_BISECTIONS = 80


def t_interval(values: ArrayLike) -> tuple[float, float] | None:
    """95 % interval of the mean: mean -+ t s / sqrt(S) with S - 1 degrees of freedom; None for a single value.

    Args:
        values: (S,) one value per repetition.

    Raises:
        UserError: there is no value, or one is not finite.
    """
    value = finite(values, "values")
    if len(value) < 2:
        return None
    half = t_quantile(len(value) - 1) * float(np.std(value, ddof=1)) / math.sqrt(len(value))
    return float(value.mean()) - half, float(value.mean()) + half


def t_quantile(degrees: int, coverage: float = 0.95) -> float:
    """The t that a t-distributed variable exceeds in size with probability 1 - `coverage`.

    Args:
        degrees: of freedom, 1 or more.
        coverage: above 0 and below 1.
    """
    low, high = 0.0, math.pi / 2
    for _ in range(_BISECTIONS):
        middle = (low + high) / 2
        low, high = (middle, high) if _within(middle, degrees) < coverage else (low, middle)
    return math.sqrt(degrees) * math.tan((low + high) / 2)


def _within(angle: float, degrees: int) -> float:
    """P(|T| < t) at angle = arctan(t / sqrt(degrees)): Abramowitz and Stegun, 1964, equations 26.7.3 and 26.7.4."""
    odd = degrees % 2
    # Odd: 1, 2/3, 2 4/(3 5), ... of odd powers of the cosine; even: 1, 1/2, 1 3/(2 4), ... of even ones.
    term, total = math.cos(angle) if odd else 1.0, 0.0
    for number in range(1 + odd, degrees, 2):
        total += term
        term *= math.cos(angle) ** 2 * number / (number + 1)
    return 2 / math.pi * (angle + math.sin(angle) * total) if odd else math.sin(angle) * total
