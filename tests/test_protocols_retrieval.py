"""Retrieval figures, their aliases and folds, against the whole product in numpy."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from vlkd.errors import UserError
from vlkd.protocols.retrieval import retrieval
from vlkd.retrieval.search import evaluate_retrieval


def drawn(images=60, each=5, width=12, noise=1.2, seed=0):
    rng = np.random.default_rng(seed)
    embed = rng.normal(size=(images, width))
    owner = np.repeat(np.arange(images), each)
    return embed, embed[owner] + noise * rng.normal(size=(len(owner), width)), owner


def hits(image_embed, text_embed, owner, k):
    """Both directions by sorting the product: (I,) and (T,)."""
    unit = [x / np.linalg.norm(x, axis=1, keepdims=True) for x in (image_embed, text_embed)]
    scores = unit[0] @ unit[1].T
    to_text = np.argsort(-scores, axis=1, kind="stable")[:, :k]
    to_image = np.argsort(-scores.T, axis=1, kind="stable")[:, :k]
    i2t = (owner[to_text] == np.arange(len(image_embed))[:, None]).any(1)
    return i2t, (to_image == owner[:, None]).any(1)


def test_hits_and_their_three_aliases():
    table = drawn()
    found = retrieval(*table, ["same"] * 3 + [f"caption {i}" for i in range(297)])
    for k in (1, 5, 10):
        i2t, t2i = (side.mean() for side in hits(*table, k))
        for name in (f"image_to_text_hit@{k}", f"image_to_text_R@{k}", f"text_retrieval_recall@{k}"):
            assert found.metrics[name] == pytest.approx(i2t, abs=1e-12)
        for name in (f"text_to_image_hit@{k}", f"text_to_image_R@{k}", f"image_retrieval_recall@{k}"):
            assert found.metrics[name] == pytest.approx(t2i, abs=1e-12)
    assert 0.1 < found.metrics["text_to_image_hit@1"] < found.metrics["image_to_text_hit@1"] < 1
    i2t, t2i = hits(*table, 1)
    assert found.score == found.metrics["mean_recall@1"] == pytest.approx((i2t.mean() + t2i.mean()) / 2)
    assert found.metrics["rsum"] == pytest.approx(
        100 * sum(side.mean() for k in (1, 5, 10) for side in hits(*table, k))
    )
    assert found.counts["image_gallery"] == 60
    assert found.counts["text_gallery"] == 300
    assert found.counts["duplicate_captions"] == 2
    known = evaluate_retrieval(*table).as_row()
    assert all(found.metrics[name] == value for name, value in known.items() if name in found.metrics)
    assert "image_to_text_mAP@R" in found.metrics


def test_r_precision_mrr_and_ndcg_by_walking_down_the_lists():
    image_embed, text_embed, owner = drawn(images=20, each=3)
    found = retrieval(image_embed, text_embed, owner)
    unit = [x / np.linalg.norm(x, axis=1, keepdims=True) for x in (image_embed, text_embed)]
    order = np.argsort(-(unit[0] @ unit[1].T), axis=1)
    right = owner[order] == np.arange(20)[:, None]
    assert found.metrics["image_to_text_r_precision"] == pytest.approx(right[:, :3].mean())
    assert found.metrics["image_to_text_mrr"] == pytest.approx((1 / (right.argmax(1) + 1)).mean())
    discount = 1 / np.log2(np.arange(2, 12))
    assert found.metrics["image_to_text_ndcg@10"] == pytest.approx(
        ((right[:, :10] * discount).sum(1) / discount[:3].sum()).mean()
    )


def test_values_per_image():
    table = drawn()
    found = retrieval(*table)
    i2t, t2i = hits(*table, 1)
    wanted = [(i2t[i] + t2i[table[2] == i].mean()) / 2 for i in range(60)]
    np.testing.assert_allclose(found.per_item["correct"], wanted)
    assert found.per_item["correct"].mean() == pytest.approx(found.score)
    assert ((found.per_item["image_to_text_rank"] == 1) == i2t).all()
    assert found.per_item["text_to_image_rank"].mean() == pytest.approx(found.metrics["text_to_image_mean_rank"])


def test_folds_are_galleries_of_consecutive_images():
    image_embed, text_embed, owner = drawn(images=62)
    shuffle = np.random.default_rng(3).permutation(len(owner))
    found = retrieval(image_embed, text_embed[shuffle], owner[shuffle], folds=5)
    wanted = []
    for part in np.split(np.arange(62), [13, 26, 38, 50]):
        own = np.isin(owner[shuffle], part)
        i2t, t2i = hits(image_embed[part], text_embed[shuffle][own], owner[shuffle][own] - part[0], 1)
        wanted.append((i2t.mean(), t2i.mean()))
    i2t, t2i = np.mean(wanted, axis=0)
    assert found.metrics["fold5_image_to_text_hit@1"] == pytest.approx(i2t, abs=1e-12)
    assert found.metrics["fold5_text_to_image_hit@1"] == pytest.approx(t2i, abs=1e-12)
    assert found.metrics["fold5_mean_recall@1"] == pytest.approx((i2t + t2i) / 2)
    assert found.metrics["fold5_text_to_image_hit@1"] > found.metrics["text_to_image_hit@1"]
    assert found.metrics["fold5_rsum"] > found.metrics["rsum"]


def test_random_scores():
    """One of 60 images, five of 300 captions; C(295, 10) / C(300, 10) to miss all five in ten."""
    table = drawn()
    assert retrieval(*table).random_score == pytest.approx(1 / 60)
    assert retrieval(*table, main_metric="text_to_image_R@10").random_score == pytest.approx(10 / 60)
    found = retrieval(*table, main_metric="text_retrieval_recall@10")
    assert found.random_score == pytest.approx(1 - math.comb(295, 10) / math.comb(300, 10))
    low, high = found.interval
    assert low <= found.score <= high
    found = retrieval(*table, main_metric="image_to_text_mrr")
    assert found.interval is None
    assert found.random_score is None


def test_interval_draws_images_with_their_captions():
    table = drawn()
    i2t, t2i = hits(*table, 1)
    by_image = (i2t + t2i.reshape(60, 5).mean(1)) / 2
    rng = np.random.default_rng(5)
    means = by_image[rng.integers(60, size=(4000, 60))].mean(1)
    np.testing.assert_allclose(retrieval(*table).interval, np.percentile(means, [2.5, 97.5]), atol=0.015)


def test_a_collapsed_model_and_the_ties_at_the_cuts():
    """Everything ties: image 0 and its captions are always first."""
    owner = np.repeat(np.arange(20), 5)
    found = retrieval(torch.ones(20, 4), torch.ones(100, 4), owner)
    for k, i2t in ((1, 0.05), (5, 0.05), (10, 0.10)):
        assert found.metrics[f"text_to_image_hit@{k}"] == k / 20
        assert found.metrics[f"image_to_text_hit@{k}"] == i2t
        assert found.counts[f"image_to_text_ties@{k}"] == 20
        assert found.counts[f"text_to_image_ties@{k}"] == 100
    assert retrieval(*drawn()).counts["text_to_image_ties@10"] == 0


def test_one_duplicate_image_ties_at_the_first_cut_alone():
    image_embed, _, _ = drawn(images=20)
    image_embed[7] = image_embed[3]
    found = retrieval(image_embed, image_embed, np.arange(20))
    assert found.metrics["text_to_image_hit@1"] == found.metrics["image_to_text_hit@1"] == 0.95
    assert found.counts["text_to_image_ties@1"] == 2
    assert found.metrics["image_to_text_hit@5"] == 1


def test_small_galleries_leave_out_cutoffs():
    found = retrieval(*drawn(images=6))
    assert "text_to_image_hit@5" in found.metrics
    assert not [name for name in found.metrics if name.endswith("@10")]
    assert "rsum" not in found.metrics
    with pytest.raises(UserError, match=r"Cut-offs \(1, 10\) with 6 images and 30 captions; k is 1 to 6"):
        retrieval(*drawn(images=6), ks=(1, 10))


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"image_of_text": [0, 1, 1]}, r"Image 2 has no caption"),
        ({"image_of_text": [0, 1, 3]}, "images go from 0 to 2"),
        ({"image_of_text": [0, 1]}, "3 captions but"),
        ({"image_embed": torch.full((3, 3), math.nan)}, "image embeddings: row 0 holds NaN"),
        ({"text_embed": torch.zeros(3, 3)}, "text embeddings: row 0 has length zero"),
        ({"folds": 4}, "4 folds of 3 images"),
        ({"folds": 1}, "1 folds of 3 images"),
        ({"ks": (0, 1)}, "each must be 1 or more"),
        ({"captions": ["a"]}, "1 captions but 3 text embeddings"),
        ({"main_metric": "accuracy"}, "No figure 'accuracy'"),
    ],
)
def test_bad_input_is_refused(change, sentence):
    good = {"image_embed": torch.eye(3), "text_embed": torch.eye(3), "image_of_text": [0, 1, 2]}
    assert retrieval(**good).score == 1
    with pytest.raises(UserError, match=sentence):
        retrieval(**(good | change))
