"""Retrieval metrics from the ranks of the positives."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from vlkd.errors import UserError
from vlkd.metrics.checks import Floats, Integers, at_least_one, finite, same_shape


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
            UserError: a query has no positive, so its metrics are not defined; lengths differ; a rank is negative, or
                an owner is none of the queries.
        """
        rank, owner = np.asarray(ranks, np.int64), np.asarray(query, np.int64)
        same_shape(rank, owner, "ranks and their queries")
        if len(rank) and (rank.min() < 0 or owner.min() < 0 or owner.max() >= queries):
            raise UserError(
                f"Ranks start at {rank.min()} and queries go from {owner.min()} to {owner.max()}; expected ranks from "
                f"0 on and queries from 0 to {queries - 1}."
            )
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
    """(Q,) 1 where at least one positive is among the first k, else 0.

    Raises:
        UserError: k is below 1, here and in every other `_at_k`.
    """
    return (positives.best < at_least_one(k, "k")).astype(np.float64)


def recall_at_k(positives: PositiveRanks, k: int) -> Floats:
    """(Q,) share of the positives that are among the first k (recall of information retrieval)."""
    return _found(positives, k) / positives.counts


def precision_at_k(positives: PositiveRanks, k: int) -> Floats:
    """(Q,) positives among the first k, divided by k, also where the gallery is smaller (as trec_eval does)."""
    return _found(positives, k) / k


def _found(positives: PositiveRanks, k: int) -> Floats:
    """(Q,) number of positives among the first k."""
    return _per_query(positives, (positives.ranks < at_least_one(k, "k")).astype(np.float64))


def _per_query(positives: PositiveRanks, values: Floats) -> Floats:
    """(Q,) sums of (P,) values, one per positive."""
    return np.add.reduceat(values, positives.offsets[:-1])


def reciprocal_rank(positives: PositiveRanks) -> Floats:
    """(Q,) 1 / (1 + rank of the first positive); its mean is MRR (Voorhees, 1999)."""
    return 1.0 / (positives.best + 1)


def average_precision(positives: PositiveRanks, k: int | None = None) -> Floats:
    """(Q,) AP = 1/R sum over the positives of the precision at their ranks, R the query's positives.

    The mean over queries is MAP; with `k` it is trec_eval's `map_cut_k`, where only positives among the first k add.

    Raises:
        UserError: k is below 1.
    """
    precision = _positions(positives) / (positives.ranks + 1)
    if k is not None:
        precision = np.where(positives.ranks < at_least_one(k, "k"), precision, 0.0)
    return _per_query(positives, precision) / positives.counts


def average_precision_at_r(positives: PositiveRanks) -> Floats:
    """(Q,) AP@R = 1/R sum over positions i <= R of precision(i) * [item i is a positive], R the query's positives.

    The mean over queries is mAP@R of ECCV Caption (Chun et al., 2022, https://arxiv.org/abs/2204.03359) and of
    Musgrave et al., 2020.
    """
    inside = positives.ranks < np.repeat(positives.counts, positives.counts)
    precision = np.where(inside, _positions(positives) / (positives.ranks + 1), 0.0)
    return _per_query(positives, precision) / positives.counts


def _positions(positives: PositiveRanks) -> Integers:
    """(P,) the place, from 1, of each positive among those of its query."""
    return np.arange(len(positives.ranks)) - np.repeat(positives.offsets[:-1], positives.counts) + 1


def ndcg_at_k(positives: PositiveRanks, k: int) -> Floats:
    """(Q,) nDCG@k with binary gains: sum over the positives among the first k of 1 / log2(rank + 2), over its maximum.

    The maximum has min(R, k) positives in front (Järvelin and Kekäläinen, 2002, https://doi.org/10.1145/582415.582418).
    """
    gains = np.where(positives.ranks < at_least_one(k, "k"), 1.0 / np.log2(positives.ranks + 2.0), 0.0)
    ideal = np.cumsum(_discounts(min(k, int(positives.counts.max()))))
    return _per_query(positives, gains) / np.asarray(ideal[np.minimum(positives.counts, k) - 1], np.float64)


def ndcg_graded(gains_in_rank_order: ArrayLike, all_gains: ArrayLike) -> float:
    """nDCG@k of one query with graded gains: sum of gain(i) / log2(i + 2) over ranks i < k, over its maximum.

    Gains enter as they are, as in trec_eval and scikit-learn (not 2^gain - 1).

    Args:
        gains_in_rank_order: (k,) gains of the first k items, best rank first.
        all_gains: (N,) gains of all items, N >= k, in any order.

    Raises:
        UserError: a gain is negative or not finite, N < k, or no item has a gain, so that the figure is not defined.
    """
    gains, every = finite(gains_in_rank_order, "gains in the order of ranks"), finite(all_gains, "gains of all items")
    if len(gains) > len(every) or min(gains.min(), every.min()) < 0 or not every.any():
        raise UserError(
            f"nDCG of {len(gains)} ranks and {len(every)} items with gains from {min(gains.min(), every.min())}; "
            "expected at least as many items as ranks, no negative gain, and one above zero."
        )
    discounts = _discounts(len(gains))
    return float((gains * discounts).sum() / (np.sort(every)[::-1][: len(gains)] * discounts).sum())


def _discounts(k: int) -> Floats:
    return np.asarray(1.0 / np.log2(np.arange(2, k + 2)), np.float64)


def knn_recall(found: Sequence[Sequence[int]], exact: Sequence[Sequence[int]]) -> float:
    """Share of the exact neighbours that an approximate search found: sum |F & E| / sum |E| over the queries.

    With the arguments exchanged it is the precision. Ids below 0 are padding and count as no item.

    Args:
        found: per query the ids the approximate search returned, in any order, any number.
        exact: per query the ids of exact search.

    Raises:
        UserError: other numbers of queries, or no exact neighbour.
    """
    if len(found) != len(exact):
        raise UserError(f"Neighbours found for {len(found)} queries, exact ones for {len(exact)}; give the same ones.")
    pairs = [({i for i in a if i >= 0}, {i for i in b if i >= 0}) for a, b in zip(found, exact, strict=True)]
    wanted = sum(len(neighbours) for _, neighbours in pairs)
    if not wanted:
        raise UserError("There is no exact neighbour to find; give at least one query that has one.")
    return sum(len(ids & neighbours) for ids, neighbours in pairs) / wanted


def median_rank(positives: PositiveRanks) -> float:
    """Median over queries of the rank of the first positive, counted from 1."""
    return float(np.median(positives.best) + 1)


def mean_rank(positives: PositiveRanks) -> float:
    """Mean over queries of the rank of the first positive, counted from 1."""
    return float(positives.best.mean() + 1)


def rsum(hits: Sequence[float]) -> float:
    """Sum of hit rates in percent; over hit@1, 5, 10 of both directions it lies between 0 and 600."""
    return 100.0 * float(sum(hits))
