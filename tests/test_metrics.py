"""Metrics against closed forms, published vectors and loops written from the definitions."""

from __future__ import annotations

import numpy as np
import pytest

from vlkd.errors import UserError
from vlkd.metrics import (
    PositiveRanks,
    average_precision_at_r,
    bootstrap_interval,
    bootstrap_means,
    hit_at_k,
    mean_rank,
    median_rank,
    paired_bootstrap,
    recall_at_k,
    rsum,
)


def ragged(lists):
    query = np.repeat(np.arange(len(lists)), [len(ranks) for ranks in lists])
    return PositiveRanks.of(np.concatenate([np.asarray(ranks) for ranks in lists]), query, len(lists))


def test_information_retrieval_vector_of_mteb():
    # qrels {0: {0, 1}, 1: {1}}, scores {0: {0: 1.0, 1: .9, 2: .8}, 1: {0: 0, 1: 1.0, 2: 0}}
    positives = ragged([[0, 1], [0]])
    assert [recall_at_k(positives, k).mean() for k in (1, 2, 3)] == [0.75, 1.0, 1.0]
    assert average_precision_at_r(positives).mean() == 1.0


def test_torchmetrics_document_vectors():
    # preds [.2, .3, .5], target [1, 0, 1]: the positives stand at 0 and 2.
    positives = ragged([[2, 0]])
    assert recall_at_k(positives, 2).tolist() == [0.5]
    assert hit_at_k(positives, 2).tolist() == [1.0]


def test_seven_equal_vectors():
    positives = ragged([[rank] for rank in range(7)])
    assert [hit_at_k(positives, k).mean() for k in (1, 5, 10)] == pytest.approx([1 / 7, 5 / 7, 1])
    assert mean_rank(positives) == median_rank(positives) == 4


def test_oracle_ranking_is_perfect_and_hit_differs_from_recall():
    positives = ragged([[4, 3, 2, 1, 0], [0, 1]])
    assert average_precision_at_r(positives).tolist() == [1.0, 1.0]
    assert hit_at_k(positives, 1).mean() == 1.0
    assert recall_at_k(positives, 1).tolist() == [0.2, 0.5]
    assert rsum([1.0] * 6) == 600.0


def test_against_loops_over_the_definitions():
    rng = np.random.default_rng(0)
    lists = [rng.choice(40, size=rng.integers(1, 9), replace=False).tolist() for _ in range(60)]
    positives = ragged(lists)
    for k in (1, 5, 10):
        assert hit_at_k(positives, k).tolist() == [float(any(r < k for r in ranks)) for ranks in lists]
        assert recall_at_k(positives, k) == pytest.approx([sum(r < k for r in ranks) / len(ranks) for ranks in lists])
    expected = []
    for ranks in lists:
        total = len(ranks)
        relevant = [position in ranks for position in range(total)]
        expected.append(sum(relevant[i] * sum(relevant[: i + 1]) / (i + 1) for i in range(total)) / total)
    assert average_precision_at_r(positives) == pytest.approx(expected)
    assert median_rank(positives) == np.median([min(ranks) + 1 for ranks in lists])


def test_a_query_without_a_positive_is_refused():
    with pytest.raises(UserError, match="Query 1 has no positive"):
        PositiveRanks.of([0, 3], [0, 2], 3)


def test_interval_of_a_mean_is_the_normal_one():
    values = np.random.default_rng(1).normal(size=800)
    low, high = bootstrap_interval(values, seed=0, n=4000)
    half = 1.96 * values.std() / np.sqrt(len(values))
    assert (high - low) / 2 == pytest.approx(half, rel=0.08)
    assert (high + low) / 2 == pytest.approx(values.mean(), abs=0.1 * half)


def test_groups_widen_the_interval_of_repeated_values():
    values = np.random.default_rng(2).normal(size=200)
    alone = np.subtract(*bootstrap_interval(values, seed=0)[::-1])
    repeated, groups = np.repeat(values, 5), np.repeat(np.arange(200), 5)
    assert np.subtract(*bootstrap_interval(repeated, groups=groups, seed=0)[::-1]) == pytest.approx(alone)
    assert np.subtract(*bootstrap_interval(repeated, seed=0)[::-1]) == pytest.approx(alone / np.sqrt(5), rel=0.1)


def test_unequal_groups_weigh_by_their_values():
    # Two groups, three draws are possible: {0, 0} -> 0, {1, 1} -> 1, {0, 1} -> 3 of 4.
    means = bootstrap_means([0.0, 1.0, 1.0, 1.0], groups=[0, 1, 1, 1], seed=0, n=400)
    assert set(means.tolist()) == {0.0, 0.75, 1.0}


def test_paired_interval_sees_a_constant_gain_exactly():
    noise = np.random.default_rng(3).normal(size=50)
    assert paired_bootstrap(noise + 0.25, noise, seed=0) == pytest.approx((0.25, 0.25))
    assert bootstrap_interval(noise, seed=0) == bootstrap_interval(noise, seed=0)
    assert bootstrap_interval(noise, seed=0) != bootstrap_interval(noise, seed=1)


@pytest.mark.parametrize("values", [[], [1.0, np.nan]])
def test_bootstrap_refuses_nothing_and_nan(values):
    with pytest.raises(UserError, match="finite values"):
        bootstrap_interval(values)


def test_paired_interval_refuses_different_queries():
    with pytest.raises(UserError, match="same queries twice"):
        paired_bootstrap([1.0, 0.0], [1.0])
