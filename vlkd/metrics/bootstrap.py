"""Intervals: the bootstrap over groups and within strata, paired differences, and Wilson's for a share."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from vlkd.errors import UserError
from vlkd.metrics.checks import Floats, at_least_one, finite, same_shape

_BLOCK = 1 << 21

_NORMAL_975 = 1.959963984540054
"""The 97.5 % point of the standard normal distribution."""


def bootstrap_means(values: ArrayLike, *, groups: ArrayLike | None = None, seed: int = 0, n: int = 2000) -> Floats:
    """Means of `n` resamples, drawing whole groups with replacement.

    The draws depend on `seed` and on the number of groups alone, so that two calls over the same groups are paired
    draw by draw (two models, or both directions of one).

    Args:
        values: (Q,) one value per query.
        groups: (Q,) the group of each value, for example its image; by default each value is its own group.
        seed: of the draws.
        n: number of resamples.

    Returns:
        (n,) mean over the values of the drawn groups.

    Raises:
        UserError: there is no value, a value is not finite, lengths differ, or n is below 1.
    """
    value = np.asarray(values, np.float64)
    if value.ndim != 1 or not len(value) or not np.isfinite(value).all():
        raise UserError(f"A bootstrap needs a row of finite values; found shape {value.shape}, or NaN among them.")
    group = np.arange(len(value)) if groups is None else np.asarray(groups)
    if group.shape != value.shape:
        raise UserError(f"A bootstrap needs one group per value; found {group.shape} groups for {value.shape} values.")
    _, index = np.unique(group, return_inverse=True)
    count = np.bincount(index).astype(np.float64)
    total = np.bincount(index, weights=value).astype(np.float64)
    return _resample(total, count, np.random.default_rng(seed), at_least_one(n, "n"))


def _resample(total: Floats, count: Floats, rng: np.random.Generator, n: int) -> Floats:
    """(n,) sum of the drawn totals over the sum of the drawn counts, for (G,) groups."""
    block = max(1, _BLOCK // len(count))
    means = []
    for start in range(0, n, block):
        drawn = rng.integers(len(count), size=(min(block, n - start), len(count)))
        means.append(total[drawn].sum(1) / count[drawn].sum(1))
    return np.concatenate(means)


def interval(means: Floats) -> tuple[float, float]:
    """The central 95 % of bootstrap means (percentile method)."""
    low, high = np.percentile(means, [2.5, 97.5])
    return float(low), float(high)


def bootstrap_interval(
    values: ArrayLike, *, groups: ArrayLike | None = None, seed: int = 0, n: int = 2000
) -> tuple[float, float]:
    """95 % percentile bootstrap interval of the mean over groups; arguments as in `bootstrap_means`."""
    return interval(bootstrap_means(values, groups=groups, seed=seed, n=n))


def paired_bootstrap(
    a: ArrayLike, b: ArrayLike, groups: ArrayLike | None = None, *, seed: int = 0, n: int = 2000
) -> tuple[float, float]:
    """95 % interval of mean(a) - mean(b), both measured on the same queries; arguments as in `bootstrap_means`.

    Raises:
        UserError: the two do not hold the same number of values.
    """
    first, second = np.asarray(a, np.float64), np.asarray(b, np.float64)
    if first.shape != second.shape:
        raise UserError(
            f"A paired interval needs the same queries twice; found {first.shape} and {second.shape} values."
        )
    return bootstrap_interval(first - second, groups=groups, seed=seed, n=n)


def stratified_interval(values: ArrayLike, strata: ArrayLike, *, seed: int = 0, n: int = 2000) -> tuple[float, float]:
    """95 % percentile bootstrap interval of the mean over strata of the mean within each, such as per-class recall.

    Every resample draws within each stratum as many values as it has (Efron and Tibshirani, 1993, section 8.4). A
    stratum of one value does not vary, so with many of them the interval is too narrow.

    Args:
        values: (I,) one value per image.
        strata: (I,) the stratum of each, for example its class id.
        seed: of the draws.
        n: number of resamples.

    Raises:
        UserError: there is no value, a value is not finite, lengths differ, or n is below 1.
    """
    value, stratum = finite(values, "values"), np.asarray(strata)
    same_shape(value, stratum, "values and their strata")
    _, index, sizes = np.unique(stratum, return_inverse=True, return_counts=True)
    rng = np.random.default_rng(seed)
    means = np.zeros(at_least_one(n, "n"))
    for part in np.split(value[np.argsort(index, kind="stable")], np.cumsum(sizes)[:-1]):
        means += _resample(part, np.ones(len(part)), rng, n)
    return interval(means / len(sizes))


def wilson_interval(hits: float, n: int) -> tuple[float, float]:
    """95 % score interval of a share, centre (p + z^2/2n) / (1 + z^2/n) with p = hits / n and z = 1.96.

    Unlike the bootstrap it is sensible for shares of 0 and 1 (Wilson, 1927,
    https://doi.org/10.1080/01621459.1927.10502953).

    Args:
        hits: number of hits; a fraction, where items count partly, is allowed.
        n: number of trials.

    Raises:
        UserError: n is below 1, or hits lies outside 0 to n.
    """
    if not 0 <= hits <= at_least_one(n, "n"):
        raise UserError(f"{hits} hits in {n} trials; expected from 0 to {n}.")
    share, square = hits / n, _NORMAL_975**2 / n
    centre = share + square / 2
    half = math.sqrt(square * (share * (1 - share) + square / 4))
    return max(0.0, (centre - half) / (1 + square)), min(1.0, (centre + half) / (1 + square))


def mean_over_seeds(rows: Sequence[Mapping[str, Any]], k: int) -> Floats:
    """Per image the mean of its hits at `k` over runs with other seeds, (I,).

    Args:
        rows: of `results.jsonl`, of one model and one held-out set.
        k: 1 or 10.
    """
    return np.asarray(np.mean([row[f"per_image_hit@{k}"] for row in rows], axis=0))


def percent_interval(values: Floats) -> str:
    """The mean of values per image and its 95 % interval (bootstrap over images), in percent: `31.4 [28.0, 34.9]`."""
    low, high = interval(bootstrap_means(values, seed=0))
    return f"{100 * values.mean():.1f} [{100 * low:.1f}, {100 * high:.1f}]"
