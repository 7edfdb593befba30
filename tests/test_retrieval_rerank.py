"""Shortlists in a teacher's order, against hand-made cases and numpy."""

from __future__ import annotations

import numpy as np
import pytest

from vlkd.errors import UserError
from vlkd.retrieval.rerank import recall_by_calls, rerank


def circle(degrees):
    angle = np.deg2rad(np.asarray(degrees, float))
    return np.stack([np.cos(angle), np.sin(angle)], -1).astype(np.float32)


def test_a_hand_made_shortlist():
    order = rerank([7, 3, 5, 1], circle(0), circle([60, 10, 60, 180]) * 3)
    assert [number for number, _ in order] == [3, 5, 7, 1]
    np.testing.assert_allclose([score for _, score in order], np.cos(np.deg2rad([10, 60, 60, 180])), atol=1e-6)


def test_bad_shortlists_are_refused():
    for ids, items, sentence in (
        ([1, 1], circle([0, 1]), "give each id once"),
        ([1], circle([0, 1]), "give each id once"),
        ([1], circle([0]) * 0, "length zero"),
    ):
        with pytest.raises(UserError, match=sentence):
            rerank(ids, circle(0), items)


def test_each_call_buys_what_the_hand_says():
    # The student sees the items in the order 0..4; to the teacher item 3 is the nearest, then 4, 2, 1, 0.
    student = circle([0]), circle([1, 2, 3, 4, 5])
    teacher = circle([0]), circle([50, 40, 30, 10, 20])
    rows = recall_by_calls(student, teacher, [[3]], [2, 4, 5], ks=(1, 2))
    assert [row.calls for row in rows] == [0, 2, 4, 5, 5]
    assert [row.hit[1] for row in rows] == [0, 0, 1, 1, 1]
    assert [row.recall[2] for row in rows] == [0, 0, 0.5, 1, 1]


def test_the_whole_gallery_as_shortlist_is_the_teacher():
    random = np.random.default_rng(0)
    student = random.normal(size=(30, 8)), random.normal(size=(20, 8))
    teacher = random.normal(size=(30, 12)), random.normal(size=(20, 12))
    positives = [[i % 20] for i in range(30)]
    first, *_, whole, alone = recall_by_calls(student, teacher, positives, [5, 20])
    assert whole.hit == alone.hit
    assert alone.recall == {1: 1, 10: 1}
    queries, gallery = (side / np.linalg.norm(side, axis=1, keepdims=True) for side in student)
    best = np.argsort(-(queries @ gallery.T), axis=1)[:, :10]
    assert first.hit[10] == pytest.approx(np.mean([p[0] in b for p, b in zip(positives, best, strict=True)]))
    with pytest.raises(UserError, match="shortlists at most 20"):
        recall_by_calls(student, teacher, positives, [21])
    with pytest.raises(UserError, match="and 29 have positives"):
        recall_by_calls(student, teacher, positives[1:], [5])
