"""Retrieval metrics from the ranks of the positives, and bootstrap intervals over groups; numpy only.

Ranks are 0-based (0 is the best). The per-query functions return one value per query, so that the same values
feed the mean, the bootstrap and a gallery of the worst queries.

"Recall@k" has two meanings. CLIP papers print `hit_at_k` (is any positive among the first k) under that name;
`recall_at_k` is recall in the sense of information retrieval (which share of the positives is among the first k).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from vlkd.errors import UserError

Floats = NDArray[np.float64]
Integers = NDArray[np.int64]

_BLOCK = 1 << 21


@dataclass(frozen=True, kw_only=True)
class PositiveRanks:
    """The ranks of the positives of Q queries, ragged: query q owns `ranks[offsets[q]:offsets[q + 1]]`, ascending.

    Attributes:
        ranks: (P,) 0-based ranks.
        offsets: (Q + 1,) starts; every query owns at least one rank.
    """

    ranks: Integers
    offsets: Integers

    @staticmethod
    def of(ranks: ArrayLike, query: ArrayLike, queries: int) -> PositiveRanks:
        """Sort a flat list of ranks by the query that owns each.

        Args:
            ranks: (P,) 0-based ranks.
            query: (P,) number of the owning query, 0 to `queries` - 1.
            queries: Q.

        Raises:
            UserError: a query has no positive; its metrics are not defined.
        """
        rank, owner = np.asarray(ranks, np.int64), np.asarray(query, np.int64)
        counts = np.bincount(owner, minlength=queries)
        if queries == 0 or not counts.all():
            first = int(np.argmin(counts)) if queries else 0
            raise UserError(
                f"Query {first} has no positive, so its rank is not defined; leave it out or give it a positive."
            )
        return PositiveRanks(ranks=rank[np.lexsort((rank, owner))], offsets=np.concatenate([[0], np.cumsum(counts)]))

    @property
    def counts(self) -> Integers:
        """(Q,) number of positives R of each query."""
        return np.diff(self.offsets)

    @property
    def best(self) -> Integers:
        """(Q,) 0-based rank of the first positive."""
        return self.ranks[self.offsets[:-1]]


def hit_at_k(positives: PositiveRanks, k: int) -> Floats:
    """(Q,) 1 where at least one positive is among the first k, else 0."""
    return (positives.best < k).astype(np.float64)


def recall_at_k(positives: PositiveRanks, k: int) -> Floats:
    """(Q,) share of the positives that are among the first k (recall of information retrieval)."""
    return np.add.reduceat((positives.ranks < k).astype(np.float64), positives.offsets[:-1]) / positives.counts


def average_precision_at_r(positives: PositiveRanks) -> Floats:
    """(Q,) AP@R = 1/R sum over positions i <= R of precision(i) * [item i is a positive], R the query's positives.

    The mean over queries is mAP@R of ECCV Caption (Chun et al., 2022, https://arxiv.org/abs/2204.03359) and of
    Musgrave et al., 2020.
    """
    starts, counts = positives.offsets[:-1], positives.counts
    found = np.arange(len(positives.ranks)) - np.repeat(starts, counts) + 1
    precision = np.where(positives.ranks < np.repeat(counts, counts), found / (positives.ranks + 1), 0.0)
    return np.add.reduceat(precision, starts) / counts


def median_rank(positives: PositiveRanks) -> float:
    """Median over queries of the rank of the first positive, counted from 1."""
    return float(np.median(positives.best) + 1)


def mean_rank(positives: PositiveRanks) -> float:
    """Mean over queries of the rank of the first positive, counted from 1."""
    return float(positives.best.mean() + 1)


def rsum(hits: Sequence[float]) -> float:
    """Sum of hit rates in percent; over hit@1, 5, 10 of both directions it lies between 0 and 600."""
    return 100.0 * float(sum(hits))


def bootstrap_means(
    values: ArrayLike, *, groups: ArrayLike | None = None, seed: int = 0, n: int = 2000
) -> NDArray[np.float64]:
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
        UserError: there is no value, a value is not finite, or lengths differ.
    """
    value = np.asarray(values, np.float64)
    if value.ndim != 1 or not len(value) or not np.isfinite(value).all():
        raise UserError(f"A bootstrap needs a row of finite values; found shape {value.shape}, or NaN among them.")
    group = np.arange(len(value)) if groups is None else np.asarray(groups)
    if group.shape != value.shape:
        raise UserError(f"A bootstrap needs one group per value; found {group.shape} groups for {value.shape} values.")
    _, index = np.unique(group, return_inverse=True)
    count = np.bincount(index).astype(np.float64)
    total = np.bincount(index, weights=value)
    rng = np.random.default_rng(seed)
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
