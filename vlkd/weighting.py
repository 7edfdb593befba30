"""How teachers are combined: one weight per teacher, summing to 1."""

from __future__ import annotations

from collections.abc import Sequence

from vlkd.errors import UserError


def uniform_weights(teachers: int) -> tuple[float, ...]:
    """alpha_m = 1/M for M teachers; () for none."""
    return tuple(1 / teachers for _ in range(teachers))


def fixed_weights(weights: Sequence[float], teachers: int) -> tuple[float, ...]:
    """alpha_m = w_m / sum(w).

    Raises:
        UserError: their number is not M, one is negative, or all are zero.
    """
    if len(weights) != teachers or any(not weight >= 0 for weight in weights) or not sum(weights) > 0:
        raise UserError(
            f"Found the teacher weights {tuple(weights)} for {teachers} teachers; expected one of at least 0 for each, "
            "not all 0."
        )
    return tuple(weight / sum(weights) for weight in weights)
