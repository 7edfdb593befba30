"""From data to pixels: axes with round tick values."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Axis:
    """Maps data in [low, high] to pixels in [start, end], linearly or by logarithm."""

    low: float
    high: float
    start: float
    end: float
    ticks: tuple[float, ...]
    log: bool = False

    def pixel(self, value: float) -> float:
        """Where a value lies; a `log` axis takes positive values only."""
        low, high = self.low, self.high
        if self.log:
            low, high, value = math.log10(low), math.log10(high), math.log10(value)
        return self.start + (value - low) / (high - low) * (self.end - self.start)

    def labels(self) -> tuple[str, ...]:
        """The ticks in words, on a linear axis all with the decimals that tell neighbours apart."""
        if self.log:
            return tuple(_label(tick, tick, tick) for tick in self.ticks)
        step = min((b - a for a, b in zip(self.ticks, self.ticks[1:], strict=False)), default=1.0)
        largest = max(map(abs, self.ticks), default=1.0)
        return tuple(_label(tick, step, largest) for tick in self.ticks)


def fit_axis(values: Sequence[float], start: float, end: float, *, log: bool = False, snug: bool = False) -> Axis:
    """An axis that shows all values, which are finite, and positive on a `log` axis.

    The range is widened to whole ticks, unless `snug`; no values at all, or a single one, give a range around it.
    """
    low, high = (min(values), max(values)) if values else (1.0, 10.0) if log else (0.0, 1.0)
    if high - low <= 1e-9 * max(abs(low), abs(high)):
        half = abs(low) / 2 or 0.5
        low, high = (low / 2, high * 2) if log else (low - half, high + half)
    ticks = _log_steps(low, high) if log else _linear_ticks(low, high)
    if not snug:
        low, high = min(low, ticks[0]), max(high, ticks[-1])
    shown = [tick for tick in ticks if low <= tick <= high]
    if log and len(shown) > 6:
        decades = [tick for tick in shown if f"{tick:e}".startswith("1.0")]
        shown = decades[:: math.ceil(len(decades) / 6)]
    return Axis(low=low, high=high, start=start, end=end, ticks=tuple(shown), log=log)


def _linear_ticks(low: float, high: float, about: int = 5) -> list[float]:
    """Multiples of 1, 2 or 5 times a power of ten, about so many, from at most `low` to at least `high`."""
    rough = (high - low) / about
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    digits = max(0, 2 - math.floor(math.log10(step)))
    return [round(index * step, digits) for index in range(first, last + 1)]


def _log_steps(low: float, high: float) -> list[float]:
    """1, 2 and 5 times powers of ten, from the last one up to `low` to the first one from `high`."""
    exponents = range(math.floor(math.log10(low)) - 1, math.ceil(math.log10(high)) + 2)
    steps = [float(f"{factor}e{exponent}") for exponent in exponents for factor in (1, 2, 5)]
    below = max(step for step in steps if step <= low)
    above = min(step for step in steps if step >= high)
    return [step for step in steps if below <= step <= above]


def _label(value: float, step: float, largest: float) -> str:
    """A tick that is a multiple of `step`, in the unit that suits the largest one."""
    if value == 0:
        return "0"
    for factor, suffix in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if largest >= max(factor, 10_000):
            return f"{value / factor:.{_decimals(step / factor)}f}{suffix}"
    if largest < 1e-3:
        power = 10.0 ** math.floor(math.log10(abs(value)))
        mantissa, exponent = f"{value:.{_decimals(step / power)}e}".split("e")
        return f"{mantissa}e{int(exponent)}"
    return f"{value:.{_decimals(step)}f}"


def _decimals(step: float) -> int:
    """How many decimals write a multiple of `step`, a round number, in full."""
    return max(0, -math.floor(math.log10(step) + 1e-9))
