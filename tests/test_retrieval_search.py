"""Exact search and ranks against a full sort in numpy, on small numbers of which every product is exact."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from vlkd.errors import UserError
from vlkd.retrieval.search import (
    check_embeddings,
    evaluate_retrieval,
    normalize,
    positive_ranks,
    retrieval_ranks,
    topk,
)
from vlkd.retrieval.tiles import TILE_COLUMNS, TILE_ROWS


def coarse(n, seed):
    """Vectors of length 4 with entries from {-2, 0, 2} or one +-4: cosines are exact in float32 and tie often."""
    rng = np.random.default_rng(seed)
    vectors = rng.choice([-2.0, 2.0], size=(n, 4)) * 1.0
    single = rng.random(n) < 0.3
    vectors[single] = 0
    vectors[single, rng.integers(4, size=single.sum())] = rng.choice([-4.0, 4.0], size=single.sum())
    return np.ascontiguousarray(vectors, np.float32)


def order_by_sorting(queries, gallery):
    """(Q, G) ids, best first, from the whole product and a stable sort."""
    return np.argsort(-(queries @ gallery.T), axis=1, kind="stable")


def ranks_by_sorting(queries, gallery):
    return np.argsort(order_by_sorting(queries, gallery), axis=1)


SIZES = [(11, 7), (13, 5), (19, 8), (17, 9), (TILE_ROWS + 3, TILE_COLUMNS + 5), (2 * TILE_ROWS, TILE_COLUMNS)]


@pytest.mark.parametrize(("q", "g"), SIZES)
def test_topk_is_a_stable_sort_with_many_ties(q, g):
    queries, gallery = coarse(q, 0), coarse(g, 1)
    for k in (1, min(5, g), g if g < 100 else 50):
        scores, ids = topk(queries, gallery, k)
        expected = order_by_sorting(queries, gallery)[:, :k]
        assert np.array_equal(ids.numpy(), expected)
        assert np.array_equal(scores.numpy(), np.take_along_axis(queries @ gallery.T / 16, expected, 1))


def test_topk_does_not_depend_on_the_chunk():
    generator = torch.Generator().manual_seed(0)
    queries = torch.randn(300, 33, generator=generator)
    gallery = torch.randn(3 * TILE_COLUMNS + 7, 33, generator=generator)
    gallery[2 * TILE_COLUMNS + 5] = gallery[17]
    reference = topk(queries, gallery, 20)
    for chunk in (1, TILE_COLUMNS + 1, 10**6):
        scores, ids = topk(queries, gallery, 20, chunk=chunk)
        assert torch.equal(scores, reference[0])
        assert torch.equal(ids, reference[1])


def test_a_pair_has_one_score_wherever_it_stands():
    generator = torch.Generator().manual_seed(1)
    for width in (7, 100, 512):
        vector = torch.randn(1, width, generator=generator)
        queries = torch.randn(TILE_ROWS + 9, width, generator=generator)
        scores, ids = topk(queries, vector.expand(TILE_COLUMNS + 11, -1), 50)
        assert torch.equal(ids, torch.arange(50).expand(len(queries), -1))
        assert torch.equal(scores, scores[:, :1].expand(-1, 50))


@pytest.mark.parametrize(("q", "g"), SIZES)
def test_positive_ranks_equal_the_sorted_position(q, g):
    queries, gallery = coarse(q, 2), coarse(g, 3)
    rng = np.random.default_rng(4)
    positives = [rng.choice(g, size=rng.integers(1, min(g, 12)), replace=False) for _ in range(q)]
    found = positive_ranks(queries, gallery, positives)
    full = ranks_by_sorting(queries, gallery)
    for query, ids in enumerate(positives):
        own = found.ranks[found.offsets[query] : found.offsets[query + 1]]
        assert own.tolist() == sorted(full[query, ids].tolist())


@pytest.mark.parametrize("images", [20, 2 * TILE_ROWS + 31])
@pytest.mark.parametrize("shuffled", [False, True])
def test_ranks_of_both_directions_equal_the_sorted_position(images, shuffled):
    rng = np.random.default_rng(5)
    owner = np.repeat(np.arange(images), rng.integers(1, 9, size=images))
    if shuffled:
        rng.shuffle(owner)
    image, text = coarse(images, 6), coarse(len(owner), 7)
    ranks = retrieval_ranks(image, text, owner)
    of_text, of_image = ranks_by_sorting(image, text), ranks_by_sorting(text, image)
    assert ranks.text_to_image.ranks.tolist() == of_image[np.arange(len(owner)), owner].tolist()
    for i in range(images):
        own = ranks.image_to_text.ranks[ranks.image_to_text.offsets[i] : ranks.image_to_text.offsets[i + 1]]
        assert own.tolist() == sorted(of_text[i, owner == i].tolist())


def test_ranks_agree_with_topk_on_real_numbers():
    generator = torch.Generator().manual_seed(2)
    image = torch.randn(500, 64, generator=generator)
    owner = torch.arange(2500) // 5
    text = image[owner] + 3 * torch.randn(2500, 64, generator=generator)
    ranks = retrieval_ranks(image, text, owner)
    ids = topk(image, text, len(text))[1]
    best = (ids // 5 == torch.arange(500)[:, None]).int().argmax(1)
    assert torch.equal(torch.from_numpy(ranks.image_to_text.best), best)


def test_seven_equal_vectors_rank_by_id():
    same = np.ones((7, 5))
    ranks = retrieval_ranks(same, same, list(range(7)))
    assert ranks.image_to_text.ranks.tolist() == ranks.text_to_image.ranks.tolist() == list(range(7))
    result = evaluate_retrieval(same, same, list(range(7)))
    assert result.image_to_text["hit@1"] == pytest.approx(1 / 7)
    assert result.image_to_text["hit@5"] == pytest.approx(5 / 7)
    assert result.image_to_text["hit@10"] == 1
    assert result.image_to_text["mean_rank"] == result.image_to_text["median_rank"] == 4


def test_a_constant_scorer_gains_nothing():
    # A positive that stands last among equal scores is last, whatever the order of insertion.
    assert positive_ranks(np.ones((1, 3)), np.ones((3, 3)), [[2]]).ranks.tolist() == [2]


def test_negative_scores_do_not_spoil_a_perfect_ranking():
    # torchmetrics >= 1.7.4 sets positives with scores of zero or less to irrelevant and reports 0 here.
    angle = np.deg2rad([100.0, 120.0, 140.0])
    gallery = np.stack([np.cos(angle), np.sin(angle)], 1)
    ranks = positive_ranks(np.array([[1.0, 0.0]]), gallery, [[0, 1]])
    assert ranks.ranks.tolist() == [0, 1]
    result = evaluate_retrieval(np.eye(4) - 0.9, np.eye(4) - 0.9, range(4))
    assert result.image_to_text["recall@1"] == result.text_to_image["mAP@R"] == 1.0


def test_random_ranking_meets_its_expectation():
    # A random ranking hits with probability 1 - C(95, 10) / C(100, 10) (5 of 100 captions) and 10 / 20 (images).
    generator = torch.Generator().manual_seed(3)
    text_hits, image_hits = [], []
    for _ in range(60):
        draw = [torch.randn(n, 16, generator=generator) for n in (20, 100)]
        result = evaluate_retrieval(draw[0], draw[1], torch.arange(100) // 5)
        text_hits.append(result.image_to_text["hit@10"])
        image_hits.append(result.text_to_image["hit@10"])
    chance = 1 - np.prod([(95 - i) / (100 - i) for i in range(10)])
    assert np.mean(text_hits) == pytest.approx(chance, abs=4 * np.std(text_hits) / np.sqrt(60))
    assert np.mean(image_hits) == pytest.approx(0.5, abs=4 * np.std(image_hits) / np.sqrt(60))


def test_result_row_is_flat_strict_json():
    owner = [0, 0, 1, 2, 2, 2]
    result = evaluate_retrieval(
        coarse(3, 8), coarse(6, 9), owner, captions=["a dog", "a dog", "a cat", "a bird", "a cat", "a cow"]
    )
    row = json.loads(json.dumps(result.as_row(), allow_nan=False))
    assert row["duplicate_captions"] == 2
    assert (row["image_gallery"], row["text_gallery"]) == (3, 6)
    assert row["mean_hit@1"] == (row["image_to_text_hit@1"] + row["text_to_image_hit@1"]) / 2
    directions = ("image_to_text", "text_to_image")
    assert row["rsum"] == pytest.approx(100 * sum(row[f"{d}_hit@{k}"] for d in directions for k in (1, 5, 10)))
    assert row["text_to_image_recall@5"] == row["text_to_image_hit@5"]


def test_half_precision_is_taken_as_float32():
    image, text = coarse(30, 10), coarse(60, 11)
    owner = np.arange(60) // 2
    single = evaluate_retrieval(image, text, owner).as_row()
    assert (
        evaluate_retrieval(torch.from_numpy(image).half(), torch.from_numpy(text).bfloat16(), owner).as_row() == single
    )


def test_normalize_gives_unit_rows_even_for_tiny_and_huge_ones():
    x = torch.tensor([[3.0, 4.0], [3e-30, 4e-30], [3e30, 4e30]])
    assert torch.allclose(normalize(x), torch.tensor([0.6, 0.8]).expand(3, -1))


@pytest.mark.parametrize(
    ("bad", "sentence"),
    [
        (np.array([[1.0, 0.0], [np.nan, 1.0]]), "row 1 holds NaN or infinity"),
        (np.array([[1.0, 0.0], [1.0, 1.0], [np.inf, 1.0]]), "row 2 holds NaN or infinity"),
        (np.array([[0.0, 0.0], [np.nan, 1.0]]), "row 0 has length zero"),
        (np.zeros((0, 4)), "is empty"),
        (np.ones(4), r"expected a table \(N, D\)"),
        (np.ones((2, 2), np.int64), "of floats"),
        (np.ones((2, 3)), "expected vectors of width 2, found 3"),
    ],
)
def test_bad_embeddings_are_refused(bad, sentence):
    with pytest.raises(UserError, match=f"photos: .*{sentence}"):
        check_embeddings(bad, "photos", 2)


def test_bad_row_of_a_later_block_is_numbered_from_the_start():
    x = np.ones((5000, 2))
    x[4321] = 0
    with pytest.raises(UserError, match="row 4321 "):
        check_embeddings(x, "photos")


@pytest.mark.parametrize("k", [0, 4])
def test_k_outside_the_gallery_is_refused(k):
    with pytest.raises(UserError, match="k goes from 1 to 3"):
        topk(np.ones((2, 2)), np.ones((3, 2)), k)


def test_missing_foreign_and_double_positives_are_refused():
    one, three = np.ones((2, 2)), np.ones((3, 2))
    with pytest.raises(UserError, match="Image 1 has no caption"):
        retrieval_ranks(one, three, [0, 0, 0])
    with pytest.raises(UserError, match="name images 0 to 2"):
        retrieval_ranks(one, three, [0, 1, 2])
    with pytest.raises(UserError, match="one image index per caption"):
        retrieval_ranks(one, three, [0, 1])
    with pytest.raises(UserError, match="Query 1 has no positive"):
        positive_ranks(one, three, [[0], []])
    with pytest.raises(UserError, match="ids go from 0 to 2"):
        positive_ranks(one, three, [[0], [3]])
    with pytest.raises(UserError, match="given twice"):
        positive_ranks(one, three, [[0], [1, 1]])
    with pytest.raises(UserError, match="expected vectors of width 2, found 5"):
        retrieval_ranks(one, np.ones((3, 5)), [0, 1, 1])
