"""Greedy k-centre against the definition, computed from all distances at every step."""

from __future__ import annotations

import sys
import tracemalloc

import numpy as np
import pytest

from vlkd.active import k_centre
from vlkd.errors import UserError


def softmaxes(rows, classes, seed=0, size=3.0):
    logits = size * np.random.default_rng(seed).standard_normal((rows, classes))
    powers = np.exp(logits)
    return (powers / powers.sum(1, keepdims=True)).astype(np.float32)


def brute_force(points, count, chosen):
    points, selected, picks = points.astype(np.float64), list(chosen), []
    for _ in range(count):
        distances = ((points[:, None] - points[selected]) ** 2).sum(2).min(1).astype(np.float32)
        distances[selected] = -1
        picks.append(int(distances.argmax()))
        selected.append(picks[-1])
    return picks


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize(("rows", "classes", "labelled"), [(60, 4, 3), (40, 1, 1), (80, 30, 25), (30, 2, 29)])
def test_equals_brute_force(rows, classes, labelled, seed):
    points = (
        softmaxes(rows, classes, seed) if classes > 1 else np.random.default_rng(seed).random((rows, 1), np.float32)
    )
    chosen = np.random.default_rng(seed).choice(rows, labelled, replace=False)
    left = rows - labelled
    assert k_centre(points, left, chosen, seed=0).tolist() == brute_force(points, left, chosen)


@pytest.mark.parametrize("offset", [0.0, 100.0])
def test_points_that_lie_close_together_far_from_zero(offset):
    # |x|^2 - 2 x.c + |c|^2 in single precision gives these distances no right digit.
    points = (offset + 1e-3 * np.random.default_rng(1).standard_normal((200, 16))).astype(np.float32)
    assert k_centre(points, 50, [7, 9], seed=0).tolist() == brute_force(points, 50, [7, 9])


def test_blocks_give_the_same_choice(monkeypatch):
    points = softmaxes(300, 10)
    whole = k_centre(points, 40, range(30), seed=0)
    monkeypatch.setattr(sys.modules["vlkd.active.k_centre"], "_ENTRIES", 64)
    assert k_centre(points, 40, range(30), seed=0).tolist() == whole.tolist()
    assert whole.tolist() == brute_force(points, 40, range(30))


def test_classes_in_another_order():
    points = softmaxes(500, 20)
    order = np.random.default_rng(3).permutation(20)
    np.testing.assert_array_equal(
        k_centre(points[:, order], 100, range(5), seed=0), k_centre(points, 100, range(5), seed=0)
    )


def test_rows_in_another_order():
    points = softmaxes(400, 12)
    order = np.random.default_rng(4).permutation(400)
    place = np.argsort(order)
    shuffled = k_centre(points[order], 60, place[:6], seed=0)
    np.testing.assert_array_equal(order[shuffled], k_centre(points, 60, range(6), seed=0))


def test_none_twice_ties_by_row_and_duplicates_last():
    corners = np.eye(4, dtype=np.float32)[[0, 0, 1, 1, 2, 3, 3, 0]]
    picks = k_centre(corners, 7, [1], seed=0)
    # Equally far corners by row, then duplicates by row.
    assert picks.tolist() == [2, 4, 5, 0, 3, 6, 7]
    same = np.full((9, 3), 1 / 3, dtype=np.float32)
    assert k_centre(same, 8, [4], seed=0).tolist() == [0, 1, 2, 3, 5, 6, 7, 8]


def test_the_first_of_none_is_drawn():
    points = softmaxes(50, 5)
    runs = [k_centre(points, 10, [], seed=seed).tolist() for seed in (0, 0, 1, 2, 3)]
    assert runs[0] == runs[1]
    assert len({run[0] for run in runs}) > 1
    for run in runs:
        assert run[1:] == brute_force(points, 9, run[:1])
    assert k_centre(points, 10, [3], seed=0).tolist() == k_centre(points, 10, [3], seed=1).tolist()
    assert sorted(k_centre(points, 50, [], seed=0)) == list(range(50))


def test_fewer_are_the_beginning_of_more_and_each_is_told():
    points, told = softmaxes(80, 6), []
    more = k_centre(points, 30, [0], seed=0, on_pick=lambda: told.append(1))
    assert more[:12].tolist() == k_centre(points, 12, [0], seed=0).tolist()
    assert len(told) == 30


def test_memory_does_not_grow_with_what_is_chosen():
    points = softmaxes(60_000, 64)
    tracemalloc.start()
    k_centre(points, 5, range(2000), seed=0)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1.5 * points.nbytes  # all distances to the chosen would be 30 times the points


@pytest.mark.parametrize(("count", "left"), [(0, 7), (-1, 7), (8, 7)])
def test_a_count_larger_than_what_is_left(count, left):
    with pytest.raises(UserError, match=f"count of {count}; expected 1 to {left}, .*10 in all, 3 already chosen"):
        k_centre(softmaxes(10, 3), count, [1, 1, 2, 5], seed=0)


@pytest.mark.parametrize("chosen", [[10], [-1], [[1, 2]], [0.5]])
def test_chosen_rows_that_are_none(chosen):
    with pytest.raises(UserError, match=r"row numbers in \[0, 10\)"):
        k_centre(softmaxes(10, 3), 2, chosen, seed=0)


@pytest.mark.parametrize("wrong", [np.nan, np.inf, 1e30])
def test_points_that_are_not_finite(wrong):
    points = softmaxes(10, 3)
    points[6, 1] = wrong
    with pytest.raises(UserError, match="1 of 10 points, first in row 6"):
        k_centre(points, 2, [0], seed=0)


@pytest.mark.parametrize("shape", [(10,), (0, 3), (3, 0)])
def test_points_that_are_no_matrix(shape):
    with pytest.raises(UserError, match=r"expected \(N, D\)"):
        k_centre(np.zeros(shape), 1, [], seed=0)
