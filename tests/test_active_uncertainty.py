from __future__ import annotations

import math

import numpy as np
import pytest

from vlkd.active import entropy, margin, most_uncertain, random_choice
from vlkd.errors import UserError

ROWS = np.array([[1, 0, 0], [1 / 3, 1 / 3, 1 / 3], [0.5, 0.5, 0], [0.7, 0.2, 0.1], [0.1, 0.2, 0.7]], dtype=np.float32)


def test_closed_forms():
    mixed = -sum(p * math.log(p) for p in (0.7, 0.2, 0.1))
    assert entropy(ROWS) == pytest.approx([0, math.log(3), math.log(2), mixed, mixed], rel=1e-6)
    assert margin(ROWS) == pytest.approx([1, 0, 0, 0.5, 0.5], abs=1e-6)
    assert not np.signbit(entropy(ROWS)[0])
    assert entropy(ROWS[:0]).shape == margin(ROWS[:0]).shape == (0,)
    one = np.ones((2, 1), dtype=np.float32)
    assert entropy(one).tolist() == [0, 0]
    assert margin(one).tolist() == [1, 1]


def test_blocks(monkeypatch):
    rows = np.random.default_rng(0).dirichlet(np.ones(7), 50)
    expected = [(-(row * np.log(row)).sum(), np.sort(row)[-1] - np.sort(row)[-2]) for row in rows]
    monkeypatch.setattr("vlkd.active.uncertainty._ENTRIES", 20)
    np.testing.assert_allclose(np.stack([entropy(rows), margin(rows)], axis=1), expected)


def test_rankings_with_ties_by_row():
    assert most_uncertain(entropy(ROWS), 5, []).tolist() == [1, 3, 4, 2, 0]
    assert most_uncertain(-margin(ROWS), 4, []).tolist()[:2] == [1, 2]
    assert most_uncertain(np.zeros(6), 3, [0, 2]).tolist() == [1, 3, 4]
    assert most_uncertain(np.array([1.0, 5.0, 3.0]), 2, [1]).tolist() == [2, 0]


def test_random_choice():
    picks = random_choice(100, 20, range(50), seed=3)
    assert len(set(picks.tolist())) == 20
    assert picks.min() >= 50
    assert picks[:7].tolist() == random_choice(100, 7, range(50), seed=3).tolist()
    assert picks.tolist() != random_choice(100, 20, range(50), seed=4).tolist()
    counts = np.bincount(np.concatenate([random_choice(10, 3, [], seed=seed) for seed in range(1000)]), minlength=10)
    assert abs(counts - 300).max() < 5 * math.sqrt(1000 * 0.3 * 0.7)


def test_what_cannot_be_ranked():
    with pytest.raises(UserError, match="count of 4; expected 1 to 3"):
        most_uncertain(np.zeros(5), 4, [0, 1])
    with pytest.raises(UserError, match="count of 6; expected 1 to 5"):
        random_choice(5, 6, [], seed=0)
    with pytest.raises(UserError, match="NaN"):
        most_uncertain(np.array([0.0, np.nan]), 1, [])
