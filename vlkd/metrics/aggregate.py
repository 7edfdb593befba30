"""The mean over a declared list of data sets."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from vlkd.errors import UserError


def aggregate(scores: Mapping[str, float], names: Sequence[str], *, what: str) -> float:
    """The plain mean of the scores of exactly the named data sets, as DataComp's 38; others are ignored.

    A mean over whatever rows a file holds is another figure: 48 scored rows of which 38 count give another mean, and
    a mean over fewer than were declared looks like one over all.

    Args:
        scores: main metric by data set, with or without further data sets.
        names: the data sets that count, each once.
        what: name of the mean, for the error.

    Raises:
        UserError: no names, a name twice, or a named data set without a finite score.
    """
    if not names or len(set(names)) != len(names):
        raise UserError(f"{what}: {len(names)} names, {len(set(names))} of them different; expected each once.")
    missing = [name for name in names if not math.isfinite(scores.get(name, math.nan))]
    if missing:
        raise UserError(
            f"{what}: {len(missing)} of {len(names)} data sets have no score ({', '.join(missing)}); measure them, or "
            "name a mean without them."
        )
    return math.fsum(scores[name] for name in names) / len(names)
