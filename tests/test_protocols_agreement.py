"""Agreement of two models: against closed forms and a transcription in plain numpy."""

from __future__ import annotations

import math
from itertools import combinations

import numpy as np
import pytest
import torch

from vlkd.errors import UserError
from vlkd.protocols.agreement import MAX_RANKED, Scores, agreement


def random_scores(images=37, candidates=9, width=6, scale=10.0, seed=0):
    generator = np.random.default_rng(seed)
    return Scores(
        image_embed=generator.normal(size=(images, width)).astype(np.float32),
        candidates=generator.normal(size=(candidates, width)).astype(np.float32),
        logit_scale=scale,
    )


def cosines(scores):
    images, candidates = (np.asarray(x, np.float64) for x in (scores.image_embed, scores.candidates))
    images /= np.linalg.norm(images, axis=1, keepdims=True)
    candidates /= np.linalg.norm(candidates, axis=1, keepdims=True)
    return images, images @ candidates.T


def softmax(logits):
    weights = np.exp(logits - logits.max(axis=1, keepdims=True))
    return weights / weights.sum(axis=1, keepdims=True)


def tau(left, right):
    """Without ties tau-b is tau-a."""
    pairs = list(combinations(range(len(left)), 2))
    return sum(np.sign((left[i] - left[j]) * (right[i] - right[j])) for i, j in pairs) / len(pairs)


@pytest.mark.parametrize(("images", "candidates"), [(37, 9), (500, 12)])
def test_figures_of_random_models(images, candidates):
    teacher = random_scores(images, candidates, width=6, scale=30.0)
    student = random_scores(images, candidates, width=4, scale=7.0, seed=1)
    found = agreement(teacher, student, k=3, teacher_score=0.8, student_score=0.6)
    (x, left), (y, right) = cosines(teacher), cosines(student)
    p, q = softmax(30 * left), softmax(7 * right)
    best = [np.argsort(-table, axis=1)[:, :3] for table in (left, right)]
    x, y = x - x.mean(axis=0), y - y.mean(axis=0)
    gram = [side @ side.T for side in (x, y)]
    expected = {
        "top1_agreement": np.mean(best[0][:, 0] == best[1][:, 0]),
        "top3_overlap": np.mean([len(set(a) & set(b)) / 3 for a, b in zip(*best, strict=True)]),
        "kl": np.mean(np.sum(p * np.log(p / q), axis=1)),
        "kendall_tau": np.mean([tau(a, b) for a, b in zip(left, right, strict=True)]),
        "cka": np.sum(gram[0] * gram[1]) / np.linalg.norm(gram[0]) / np.linalg.norm(gram[1]),
        "retention": 0.75,
    }
    assert found.metrics == pytest.approx(expected, rel=1e-5, abs=1e-6)
    assert found.score == found.per_item["correct"].mean()
    assert np.array_equal(found.per_item["teacher"], best[0][:, 0])
    assert np.array_equal(found.per_item["student"], best[1][:, 0])
    assert found.random_score == 1 / candidates
    assert found.counts == {"images": images, "candidates": candidates}
    low, high = found.interval
    assert low < found.score < high


def test_a_model_agrees_with_a_turned_and_scaled_copy_of_itself():
    one = random_scores()
    turn = np.linalg.qr(np.random.default_rng(5).normal(size=(6, 6)))[0].astype(np.float32)
    other = Scores(image_embed=3 * one.image_embed @ turn, candidates=one.candidates @ turn, logit_scale=10.0)
    found = agreement(one, other).metrics
    expected = {"top1_agreement": 1, "top5_overlap": 1, "kl": 0, "kendall_tau": 1, "cka": 1}
    assert found == pytest.approx(expected, abs=1e-5)


def test_a_student_that_says_the_opposite():
    one = random_scores()
    other = Scores(image_embed=-one.image_embed, candidates=one.candidates, logit_scale=10.0)
    found = agreement(one, other, k=4).metrics
    assert (found["top1_agreement"], found["top4_overlap"]) == (0, 0)
    assert found["kendall_tau"] == pytest.approx(-1)
    # Geometry alone does not see the sign.
    assert found["cka"] == pytest.approx(1)


def test_kl_has_a_direction_and_follows_each_models_own_scale():
    axes = np.eye(2, dtype=np.float32)
    sharp, flat = (Scores(image_embed=axes, candidates=axes, logit_scale=scale) for scale in (math.log(9), 1e-9))
    # Softmax of (ln 9, 0) is (0.9, 0.1), of (0, 0) one half each.
    forward = 0.9 * math.log(0.9 / 0.5) + 0.1 * math.log(0.1 / 0.5)
    backward = 0.5 * math.log(0.5 / 0.9) + 0.5 * math.log(0.5 / 0.1)
    assert agreement(sharp, flat).metrics["kl"] == pytest.approx(forward, rel=1e-6)
    assert agreement(flat, sharp).metrics["kl"] == pytest.approx(backward, rel=1e-6)


def test_what_is_not_defined_is_left_out():
    one = Scores(image_embed=torch.ones(1, 2), candidates=torch.ones(3, 2), logit_scale=1.0)
    found = agreement(one, one, k=5, teacher_score=0.0, student_score=0.5)
    # One image has no CKA, equal cosines no order, five of three candidates no overlap, and zero nothing to retain.
    assert found.metrics == pytest.approx({"top1_agreement": 1.0, "kl": 0.0})
    assert found.per_item["teacher"].tolist() == [0]


def test_the_ranking_of_many_candidates_is_that_of_the_first():
    teacher, student = (random_scores(3, MAX_RANKED + 5, seed=seed) for seed in (0, 1))
    first = [
        Scores(image_embed=s.image_embed, candidates=s.candidates[:MAX_RANKED], logit_scale=1.0)
        for s in (teacher, student)
    ]
    found = agreement(teacher, student)
    assert found.metrics["kendall_tau"] == pytest.approx(agreement(*first).metrics["kendall_tau"])
    assert found.notes["ranked_candidates"] == MAX_RANKED


@pytest.mark.parametrize(
    ("changes", "k", "sentence"),
    [
        ({"images": 36}, 5, "The teacher scored 37 images against 9 candidates, the student 36 against 9"),
        ({"candidates": 8}, 5, "the student 37 against 8"),
        ({"scale": 0.0}, 5, "The student's logit scale is 0.0"),
        ({"scale": math.inf}, 5, "The student's logit scale is inf"),
        ({}, 0, "k = 0"),
    ],
)
def test_what_cannot_be_compared(changes, k, sentence):
    with pytest.raises(UserError, match=sentence):
        agreement(random_scores(), random_scores(**changes), k=k)


def test_bad_embeddings_are_refused():
    bad = random_scores()
    bad.image_embed[3] = np.nan
    with pytest.raises(UserError, match="the student's image embeddings: row 3"):
        agreement(random_scores(), bad)
    with pytest.raises(UserError, match="Found 1 candidates"):
        agreement(random_scores(candidates=1), random_scores(candidates=1))
