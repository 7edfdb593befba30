"""Ranking metrics against loops over the definitions, scikit-learn's nDCG, and their refusals."""

from __future__ import annotations

import numpy as np
import pytest

from vlkd.errors import UserError
from vlkd.metrics import (
    PositiveRanks,
    average_precision,
    average_precision_at_r,
    hit_at_k,
    knn_recall,
    ndcg_at_k,
    ndcg_graded,
    precision_at_k,
    recall_at_k,
    reciprocal_rank,
)

GALLERY = 40


def ragged(lists):
    query = np.repeat(np.arange(len(lists)), [len(ranks) for ranks in lists])
    return PositiveRanks.of(np.concatenate([np.asarray(ranks) for ranks in lists]), query, len(lists))


@pytest.fixture(scope="module")
def lists():
    rng = np.random.default_rng(0)
    return [rng.choice(GALLERY, size=rng.integers(1, 9), replace=False).tolist() for _ in range(60)]


def relevance(ranks):
    """0 or 1 for every place of the gallery."""
    return [float(place in ranks) for place in range(GALLERY)]


def test_reciprocal_rank_is_of_the_first_positive(lists):
    assert reciprocal_rank(ragged(lists)).tolist() == [1 / (min(ranks) + 1) for ranks in lists]


@pytest.mark.parametrize("k", [1, 3, 10, GALLERY])
def test_precision_and_cut_average_precision_against_loops(lists, k):
    positives = ragged(lists)
    assert precision_at_k(positives, k) == pytest.approx([sum(relevance(ranks)[:k]) / k for ranks in lists])
    expected = []
    for ranks in lists:
        relevant = relevance(ranks)
        expected.append(sum(relevant[i] * sum(relevant[: i + 1]) / (i + 1) for i in range(k)) / len(ranks))
    assert average_precision(positives, k) == pytest.approx(expected)
    if k == GALLERY:
        assert average_precision(positives) == pytest.approx(expected)


def test_average_precision_is_scikit_learns(lists):
    sklearn = pytest.importorskip("sklearn.metrics")
    scores = -np.arange(GALLERY)
    expected = [sklearn.average_precision_score(relevance(ranks), scores) for ranks in lists]
    assert average_precision(ragged(lists)) == pytest.approx(expected)


@pytest.mark.parametrize("k", [1, 2, 5, 10, GALLERY, 10 * GALLERY])
def test_binary_and_graded_ndcg_are_scikit_learns(lists, k):
    sklearn = pytest.importorskip("sklearn.metrics")
    scores = -np.arange(GALLERY)[None]
    expected = [sklearn.ndcg_score([relevance(ranks)], scores, k=k) for ranks in lists]
    assert ndcg_at_k(ragged(lists), k) == pytest.approx(expected)
    assert [ndcg_graded(relevance(ranks)[:k], relevance(ranks)) for ranks in lists] == pytest.approx(expected)
    gains = np.random.default_rng(1).integers(0, 5, GALLERY).astype(float)
    assert ndcg_graded(gains[:k], gains) == pytest.approx(sklearn.ndcg_score(gains[None], scores, k=k))


def test_a_perfect_and_a_reversed_order():
    best, last = ragged([[0, 1, 2]]), ragged([[7, 8, 9]])
    for figure in (average_precision, average_precision_at_r, reciprocal_rank, lambda p: ndcg_at_k(p, 3)):
        assert figure(best).tolist() == [1.0]
        assert figure(last)[0] < 0.5
    assert precision_at_k(best, 10).tolist() == precision_at_k(last, 10).tolist() == [0.3]


def test_knn_recall_counts_ids_not_places_and_skips_padding():
    exact = [[4, 2, 9], [1, 0, 3]]
    assert knn_recall(exact, exact) == 1.0
    assert knn_recall([[9, 4, 2], [3, 1, -1]], exact) == 5 / 6
    assert knn_recall(exact, [[9, 4, 2], [3, 1, -1]]) == 1.0
    assert knn_recall([[-1, -1], [-1]], [[5, -1], [6]]) == 0.0


@pytest.mark.parametrize("figure", [hit_at_k, recall_at_k, precision_at_k, average_precision, ndcg_at_k])
@pytest.mark.parametrize("k", [0, -3])
def test_cutoffs_below_one_are_refused(figure, k):
    with pytest.raises(UserError, match=f"k = {k}; expected 1 or more"):
        figure(ragged([[0]]), k)


@pytest.mark.parametrize(
    ("ranks", "query", "queries", "sentence"),
    [
        ([0, 1], [0], 1, r"\(2,\) and \(1,\)"),
        ([0, -1], [0, 1], 2, "Ranks start at -1"),
        ([0, 0], [0, 2], 2, "queries go from 0 to 2"),
        ([], [], 0, "has no positive"),
        ([], [], 2, "Query 0 has no positive"),
    ],
)
def test_ranks_that_belong_to_nobody_are_refused(ranks, query, queries, sentence):
    with pytest.raises(UserError, match=sentence):
        PositiveRanks.of(ranks, query, queries)


@pytest.mark.parametrize(
    ("gains", "every"),
    [([1.0, 2.0], [1.0]), ([-1.0], [1.0]), ([0.0], [0.0, 0.0]), ([np.nan], [1.0]), ([], [1.0])],
)
def test_graded_gains_are_checked(gains, every):
    with pytest.raises(UserError, match="gains"):
        ndcg_graded(gains, every)


def test_knn_recall_refuses():
    with pytest.raises(UserError, match="for 1 queries, exact ones for 2"):
        knn_recall([[1]], [[1], [2]])
    with pytest.raises(UserError, match="no exact neighbour"):
        knn_recall([[1]], [[-1]])
