"""Reference values that other libraries publish or test for, and closed forms of random and constant rankings."""

from __future__ import annotations

from fractions import Fraction
from math import comb

import numpy as np
import pytest
import torch

from vlkd.errors import UserError
from vlkd.metrics import (
    PositiveRanks,
    average_precision,
    average_precision_at_r,
    from_counts,
    hit_at_k,
    knn_recall,
    mean_rank,
    median_rank,
    ndcg_at_k,
    ndcg_graded,
    precision_at_k,
    random_hit_at_k,
    recall_at_k,
    reciprocal_rank,
    rsum,
    yes_no_figures,
)
from vlkd.retrieval.search import evaluate_retrieval, positive_ranks, retrieval_ranks, topk
from vlkd.retrieval.tiles import TILE_COLUMNS

NEVER = 10**9
"""The rank of a positive that was not retrieved: behind every cut-off."""


def ragged(lists):
    query = np.repeat(np.arange(len(lists)), [len(ranks) for ranks in lists])
    return PositiveRanks.of(np.concatenate([np.asarray(ranks) for ranks in lists]), query, len(lists))


def ranks_of(scores, target, index=None):
    """From flat scores, as torchmetrics takes them: the ranks of the positives of every query."""
    scores, target = np.asarray(scores), np.asarray(target, bool)
    index = np.zeros(len(scores), int) if index is None else np.asarray(index)
    lists = []
    for query in np.unique(index):
        order = np.argsort(-scores[index == query], kind="stable")
        lists.append(np.flatnonzero(target[index == query][order]))
    return ragged(lists)


def means(figure, positives, ks=(1, 2, 3)):
    return [figure(positives, k).mean() for k in ks]


# mteb, tests/test_evaluators/test_RetrievalEvaluator.py: qrels {0: {0, 1}, 1: {1}},
# scores {0: {0: 1.0, 1: .9, 2: .8}, 1: {0: 0, 1: 1.0, 2: 0}}.


def test_mteb_vector():
    positives = ranks_of([1.0, 0.9, 0.8, 0.0, 1.0, 0.0], [1, 1, 0, 0, 1, 0], [0, 0, 0, 1, 1, 1])
    assert means(ndcg_at_k, positives) == [1, 1, 1]
    assert means(average_precision, positives) == [0.75, 1, 1]
    assert means(recall_at_k, positives) == [0.75, 1, 1]
    assert means(precision_at_k, positives) == [1, 0.75, 0.5]


def test_mteb_vector_without_the_queries_own_ids():
    # Query 0 keeps item 1 in front and never finds item 0; query 1 finds nothing.
    positives = ragged([[0, NEVER], [NEVER]])
    assert means(ndcg_at_k, positives) == pytest.approx([0.5, 0.30657, 0.30657], abs=5e-6)
    assert means(average_precision, positives) == [0.25] * 3
    assert means(recall_at_k, positives) == [0.25] * 3
    assert means(precision_at_k, positives) == pytest.approx([0.5, 0.25, 1 / 6])


def test_mteb_tie_rule():
    # Three equal scores, the positive last in the order of ids: MRR 1/3 for every order of the queries and of the call.
    same = np.ones((3, 4))
    for wanted in (0, 1, 2):
        positives = positive_ranks(same[:1], same, [[wanted]])
        assert reciprocal_rank(positives).tolist() == [1 / (wanted + 1)]
    several = positive_ranks(same, same, [[2], [0, 2], [1]])
    assert reciprocal_rank(several).tolist() == [1 / 3, 1, 1 / 2]


def test_mteb_query_without_a_relevant_document_is_not_scored_zero():
    with pytest.raises(UserError, match="Query 0 has no positive"):
        positive_ranks(np.ones((1, 4)), np.ones((3, 4)), [[]])


@pytest.mark.parametrize(("before", "after", "change"), [(2, 2, 0.0), (3, 0, -0.75), (0, 3, 0.75)])
def test_mteb_change_of_rank(before, after, change):
    # p-MRR (Weller et al., 2024) from two reciprocal ranks; mteb's cases.
    old, new = (reciprocal_rank(ragged([[rank]]))[0] for rank in (before, after))
    assert (old / new - 1 if before >= after else 1 - new / old) == pytest.approx(change)


# torchmetrics, src/torchmetrics/functional/retrieval: the values in its docstrings.


def test_torchmetrics_documented_vectors():
    positives = ranks_of([0.2, 0.3, 0.5], [1, 0, 1])
    assert recall_at_k(positives, 2).tolist() == [0.5]
    assert hit_at_k(positives, 2).tolist() == [1.0]
    assert average_precision(positives)[0] == pytest.approx(0.8333, abs=5e-5)
    assert reciprocal_rank(ranks_of([0.2, 0.3, 0.5], [0, 1, 0])).tolist() == [0.5]
    order = np.argsort(-np.array([0.1, 0.2, 0.3, 4, 70]))
    gains = np.array([10, 0, 0, 1, 5])
    assert ndcg_graded(gains[order], gains) == pytest.approx(0.6957, abs=5e-5)
    grouped = ranks_of([0.2, 0.3, 0.5, 0.1, 0.3, 0.5, 0.2], [0, 0, 1, 0, 1, 0, 1], [0, 0, 0, 1, 1, 1, 1])
    assert recall_at_k(grouped, 2).mean() == 0.75


def test_torchmetrics_negative_scores_of_a_perfect_ranking():
    # torchmetrics >= 1.7.4 takes positives with scores of zero and less for irrelevant and reports 0.0.
    angle = np.deg2rad([100.0, 120.0, 140.0, 90.0, 180.0])
    gallery = np.stack([np.cos(angle), np.sin(angle)], 1)
    positives = positive_ranks(np.array([[1.0, 0.0]]), gallery, [[3, 0, 1]])
    for figure in (recall_at_k, precision_at_k, average_precision, ndcg_at_k, hit_at_k):
        assert figure(positives, 3).tolist() == [1.0]
    assert average_precision_at_r(positives).tolist() == reciprocal_rank(positives).tolist() == [1.0]


# open_clip, tests/test_retrieval_metrics.py.


@pytest.mark.parametrize(("items", "width"), [(11, 7), (13, 5), (19, 8), (17, 9)])
def test_open_clip_chunked_equals_full(items, width):
    rng = np.random.default_rng(items)
    image, text = (rng.normal(size=(items, width)).astype(np.float32) for _ in range(2))
    full = (image / np.linalg.norm(image, axis=1)[:, None]) @ (text / np.linalg.norm(text, axis=1)[:, None]).T
    ranks = retrieval_ranks(image, text, range(items))
    own = np.diag(full)
    assert ranks.image_to_text.ranks.tolist() == (full > own[:, None]).sum(1).tolist()
    assert ranks.text_to_image.ranks.tolist() == (full > own[None]).sum(0).tolist()
    order = np.argsort(-full, axis=1)
    for chunk in (1, 4, items, 10**6):
        assert np.array_equal(topk(image, text, items, chunk=chunk)[1].numpy(), order)


def test_open_clip_half_inputs_are_upcast():
    generator = torch.Generator().manual_seed(0)
    half = [torch.randn(19, 8, generator=generator).half() for _ in range(2)]
    narrow = evaluate_retrieval(half[0], half[1], range(19))
    wide = evaluate_retrieval(half[0].float(), half[1].float(), range(19))
    assert narrow.as_row() == wide.as_row()


def test_open_clip_seven_identical_vectors():
    ranks = retrieval_ranks(np.ones((7, 3)), np.ones((7, 3)), range(7))
    for positives in (ranks.image_to_text, ranks.text_to_image):
        assert positives.ranks.tolist() == list(range(7))
        assert means(hit_at_k, positives, (1, 5, 10)) == pytest.approx([1 / 7, 5 / 7, 1])
        assert mean_rank(positives) == median_rank(positives) == 4


# faiss, tests/test_contrib.py: precision and recall of range search over all queries.


def test_faiss_precision_and_recall_of_sets():
    exact, found = [[1, 2, 3], [5, 6], [], []], [[1, 2], [6, 7], [1], []]
    assert knn_recall(found, exact) == knn_recall(exact, found) == 0.6


# POPE, LLaVA-1.5 on the random split, 2,910 questions (https://github.com/haotian-liu/LLaVA/issues/626).


def test_pope_counts():
    figures = from_counts(1183, 31, 1379, 317)
    published = {
        "accuracy": 0.8804124,
        "precision": 0.9744646,
        "recall": 0.7886667,
        "f1": 0.8717760,
        "yes_ratio": 0.4171821,
        "unparsed": 0.0,
    }
    assert figures == pytest.approx(published, abs=5e-8)
    predicted = [True] * (1183 + 31) + [False] * (1379 + 317)
    gold = [True] * 1183 + [False] * (31 + 1379) + [True] * 317
    assert yes_no_figures(predicted, gold) == figures


# Closed forms.


def test_random_rankings_of_coco_size():
    text = [random_hit_at_k(5, 25_000, k) for k in (1, 5, 10)]
    assert text == pytest.approx([2.0e-4, 1.0e-3, 2.0e-3], rel=1e-3)
    for k, chance in zip((1, 5, 10), text, strict=True):
        exact = 1 - Fraction(comb(24_995, k), comb(25_000, k))
        assert chance == pytest.approx(float(exact), rel=1e-12)
    assert [random_hit_at_k(1, 5_000, k) for k in (1, 5, 10)] == pytest.approx([k / 5_000 for k in (1, 5, 10)])


@pytest.mark.parametrize(("positives", "gallery"), [(1, 1), (1, 9), (4, 9), (9, 9), (3, 50)])
def test_random_hit_is_hypergeometric(positives, gallery):
    for k in range(1, gallery + 3):
        misses = Fraction(comb(gallery - positives, min(k, gallery)), comb(gallery, min(k, gallery)))
        assert random_hit_at_k(positives, gallery, k) == pytest.approx(float(1 - misses), rel=1e-12)


@pytest.mark.parametrize(("positives", "gallery", "k"), [(0, 5, 1), (6, 5, 1), (1, 5, 0), (1, 0, 1)])
def test_random_hit_refuses(positives, gallery, k):
    with pytest.raises(UserError, match="expected"):
        random_hit_at_k(positives, gallery, k)


def test_an_oracle_scores_one_in_everything():
    positives = ragged([list(range(count)) for count in (1, 5, 8, 3)])
    for figure in (average_precision, average_precision_at_r, reciprocal_rank):
        assert figure(positives).tolist() == [1.0] * 4
    assert hit_at_k(positives, 1).tolist() == ndcg_at_k(positives, 10).tolist() == [1.0] * 4
    assert recall_at_k(positives, 8).tolist() == [1.0] * 4
    assert rsum([1.0] * 6) == 600.0


# sentence-transformers, test_information_retrieval_evaluator.py: figures do not depend on the chunk under exact ties.


@pytest.mark.parametrize("chunk", [1, 3, 7, 20, 100])
def test_twenty_identical_documents(chunk):
    queries, documents = np.ones((2, 6)), np.ones((20, 6))
    assert topk(queries, documents, 20, chunk=chunk)[1].tolist() == [list(range(20))] * 2
    positives = positive_ranks(queries, documents, [[0, 15], [7]])
    assert positives.ranks.tolist() == [0, 15, 7]
    assert reciprocal_rank(positives).tolist() == [1, 1 / 8]
    assert average_precision(positives) == pytest.approx([(1 + 2 / 16) / 2, 1 / 8])
    assert recall_at_k(positives, 10).tolist() == [0.5, 1.0]


@pytest.mark.parametrize("chunk", [1, TILE_COLUMNS, 2 * TILE_COLUMNS, 10**6])
def test_twenty_identical_documents_among_thousands_and_over_several_chunks(chunk):
    rng = np.random.default_rng(0)
    documents = rng.normal(size=(2 * TILE_COLUMNS + 300, 8)).astype(np.float32)
    places = 3 + 105 * np.arange(20)
    query = rng.normal(size=(1, 8)).astype(np.float32)
    documents[places] = query
    assert len(set(places // TILE_COLUMNS)) == 3
    scores, ids = topk(query, documents, 20, chunk=chunk)
    assert ids[0].tolist() == places.tolist()
    assert len(set(scores[0].tolist())) == 1
    positives = positive_ranks(np.repeat(query, 2, 0), documents, [[places[0], places[15]], [places[7]]])
    assert positives.ranks.tolist() == [0, 15, 7]
