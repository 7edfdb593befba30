"""Batches of like lengths: each row once per epoch, less padding, and the same order on any machine."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from vlkd.data.bucketed_plan import BucketedPlan, text_lengths
from vlkd.data.conversations import Conversation
from vlkd.data.plan import Plan
from vlkd.data.sources import ImageFile
from vlkd.errors import UserError
from vlkd.features import Turn

LENGTHS = np.random.default_rng(3).geometric(0.05, 1003).tolist()


def bucketed(lengths=LENGTHS, *, batch_size=16, window=8, seed=5) -> BucketedPlan:
    return BucketedPlan(lengths, batch_size=batch_size, window=window, seed=seed)


def rows(plan: Plan, count: int, start: int = 0) -> list[int]:
    return [plan.row(position)[0] for position in range(start, count)]


def padded_share(order: list[int], batch_size: int) -> float:
    """Padding among all places of whole batches."""
    lengths = np.array(LENGTHS)[order[: len(order) // batch_size * batch_size]].reshape(-1, batch_size)
    return 1 - lengths.sum() / (lengths.max(axis=1) * batch_size).sum()


@pytest.mark.parametrize(
    ("count", "batch_size", "window"), [(1003, 16, 8), (7, 3, 2), (5, 8, 4), (12, 4, 1), (9, 2, 99)]
)
def test_each_row_once_per_epoch_whatever_the_borders(count, batch_size, window):
    plan = bucketed(LENGTHS[:count], batch_size=batch_size, window=window)
    epochs = [rows(plan, (epoch + 1) * count, epoch * count) for epoch in range(3)]
    for number, epoch in enumerate(epochs):
        assert sorted(epoch) == list(range(count))
        assert {plan.row(number * count + step)[1] for step in range(count)} == {number}


def test_batches_are_neighbours_of_their_window_alone():
    plan = bucketed()
    plain = Plan([[len(LENGTHS)]], seed=5)
    first = rows(plan, 128)
    assert set(first) == set(rows(plain, 128))
    batches = sorted(sorted(LENGTHS[row] for row in first[at : at + 16]) for at in range(0, 128, 16))
    assert all(left[-1] <= right[0] for left, right in pairwise(batches))
    starts = [LENGTHS[first[at]] for at in range(0, 128, 16)]
    assert starts != sorted(starts)
    assert starts != sorted(starts, reverse=True)


def test_padding_falls():
    order = rows(Plan([[len(LENGTHS)]], seed=5), 5 * len(LENGTHS))
    plain = padded_share(order, 16)
    found = {window: padded_share(rows(bucketed(window=window), 5 * len(LENGTHS)), 16) for window in (1, 8, 32)}
    assert found[1] == pytest.approx(plain, abs=0.02)
    # Random batches of 16 geometric lengths pad to about 3.4 times the mean.
    assert plain > 0.65
    assert found[8] < 0.35
    assert found[32] < 0.2


def test_the_order_is_a_function_of_position_alone():
    order = rows(bucketed(), 3000)
    plan = bucketed()
    jumps = np.random.default_rng(0).permutation(3000)[:300].tolist()
    assert [plan.row(position)[0] for position in jumps] == [order[position] for position in jumps]
    assert rows(bucketed(seed=6), 1003) != order[:1003] != order[1003:2006]


def test_the_fingerprint_covers_all_on_which_the_order_depends():
    changed = [*LENGTHS[:-1], LENGTHS[-1] + 1]
    plans = [bucketed(), bucketed(changed), bucketed(batch_size=8), bucketed(window=9), bucketed(seed=6)]
    plain = Plan([[len(LENGTHS)]], seed=5)
    assert len({plan.fingerprint() for plan in [*plans, plain]}) == 6
    assert bucketed().fingerprint() == plans[0].fingerprint()


def test_what_cannot_be_is_refused():
    with pytest.raises(UserError, match="no sample"):
        bucketed([])
    with pytest.raises(ValueError, match="must be 1 or more"):
        bucketed(window=0)


def test_lengths_are_those_of_all_that_is_said():
    turns = (Turn("user", "<image>\nwhat?"), Turn("assistant", "für"))
    assert text_lengths([Conversation(key="a", image=ImageFile(Path("a.png")), turns=turns)]) == [13 + 4]
