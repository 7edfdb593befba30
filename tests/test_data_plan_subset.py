"""The order of a subset's samples, and streams over fewer rows than a batch has."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from helpers.pairs import picture_pairs

from vlkd.data.loader import BatchStream
from vlkd.data.plan import Coverage, Plan
from vlkd.data.plan_subset import SubsetPlan
from vlkd.data.samples import SampleSequence
from vlkd.data.views import ViewSettings
from vlkd.errors import UserError

ROWS = np.array([3, 4, 11, 19, 20], dtype=np.int64)


def test_a_subset_comes_once_per_epoch():
    plan = SubsetPlan(ROWS, seed=7)
    drawn = [plan.row(position) for position in range(50)]
    epochs = [drawn[start : start + 5] for start in range(0, 50, 5)]
    assert all(sorted(row for row, _ in epoch) == ROWS.tolist() for epoch in epochs)
    assert [epoch for _, epoch in drawn] == [position // 5 for position in range(50)]
    assert len({tuple(row for row, _ in epoch) for epoch in epochs}) > 5
    assert [SubsetPlan(ROWS, seed=7).row(position) for position in reversed(range(50))] == drawn[::-1]
    assert [SubsetPlan(ROWS, seed=8).row(position) for position in range(50)] != drawn
    assert len(plan) == 5
    assert plan.coverage(12) == [Coverage(12, 5, 5)]
    assert plan.coverage(3) == [Coverage(3, 3, 5)]
    assert list(plan.shards_from(3)) == []


def test_a_subset_of_all_rows_is_not_in_step_with_the_whole():
    whole, subset = Plan([[200]], seed=7), SubsetPlan(np.arange(200), seed=7)
    assert sum(whole.row(position) == subset.row(position) for position in range(200)) < 10


def test_the_fingerprint_depends_on_rows_and_seed():
    plans = [
        SubsetPlan(ROWS, seed=7),
        SubsetPlan(ROWS + 1, seed=7),
        SubsetPlan(ROWS, seed=8),
        SubsetPlan(ROWS[1:], seed=7),
    ]
    assert len({plan.fingerprint() for plan in plans}) == 4
    assert SubsetPlan(ROWS.copy(), seed=7).fingerprint() == plans[0].fingerprint()


@pytest.mark.parametrize(("rows", "error"), [([], UserError), ([1, 1], ValueError), ([-1, 2], ValueError)])
def test_rows_that_are_no_subset_are_refused(rows, error):
    with pytest.raises(error):
        SubsetPlan(np.array(rows, dtype=np.int64), seed=0)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_stream_of_fewer_labelled_images_than_a_batch_runs_on(tmp_path, workers):
    pairs = picture_pairs(tmp_path, [()] * 10)
    labelled = np.array([2, 5, 9], dtype=np.int64)

    def stream() -> BatchStream:
        plan = SubsetPlan(labelled, seed=0)
        sequence = SampleSequence(pairs, {}, ViewSettings(), seed=0, plan=plan)
        return BatchStream(sequence, batch_size=8, samples=24, workers=workers)

    batches = list(stream())
    assert [len(batch.keys) for batch in batches] == [8, 8, 8]
    assert Counter(key for batch in batches for key in batch.keys) == {"p2": 8, "p5": 8, "p9": 8}
    seen = [(key, view) for batch in batches for key, view in zip(batch.keys, batch.views.tolist(), strict=True)]
    assert len(set(seen)) == 24
    assert [view for _, view in seen] == [position // 3 for position in range(24)]
    assert all(pairs.keys[row] == key for b in batches for row, key in zip(b.rows.tolist(), b.keys, strict=True))

    first = stream()
    next(iter(first))
    rest = stream()
    rest.load_state_dict(first.state_dict())
    assert [batch.keys for batch in rest] == [batch.keys for batch in batches[1:]]
    other = stream()
    other.sequence.plan = SubsetPlan(labelled[1:], seed=0)
    with pytest.raises(UserError, match="with plan"):
        other.load_state_dict(first.state_dict())
