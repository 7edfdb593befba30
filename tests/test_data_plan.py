"""The order of samples: coverage, locality, weights, seeking, all against plain counting."""

from __future__ import annotations

import itertools
from collections import Counter

import numpy as np
import pytest

from vlkd.data.plan import CYCLE, Plan, quotas
from vlkd.errors import UserError

SIZES = [[5, 3, 8], [1, 9, 4, 4]]


def rows(plan: Plan, start: int, stop: int) -> list[int]:
    return [plan.row(position)[0] for position in range(start, stop)]


@pytest.mark.parametrize("together", [1, 2, 3, 100])
def test_without_weights_an_epoch_is_a_permutation_of_all_sources(together):
    plan = Plan(SIZES, seed=3, together=together)
    epochs = [rows(plan, start, start + 34) for start in range(0, 34 * 6, 34)]
    assert all(sorted(epoch) == list(range(34)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 6
    assert [plan.row(position)[1] for position in (0, 33, 34, 67, 68)] == [0, 0, 1, 1, 2]
    assert rows(Plan(SIZES, seed=3, together=together), 0, 204) == list(itertools.chain(*epochs))
    assert rows(Plan(SIZES, seed=4, together=together), 0, 34) != epochs[0]


def test_any_position_can_be_asked_for_in_any_order():
    plan = Plan(SIZES, seed=1, weights=(1, 3), together=2)
    expected = [plan.row(position) for position in range(3 * CYCLE)]
    backwards = Plan(SIZES, seed=1, weights=(1, 3), together=2)
    assert [backwards.row(position) for position in reversed(range(3 * CYCLE))] == expected[::-1]


def test_a_block_reads_no_more_shards_than_stated():
    sizes = list(range(1, 41))
    plan = Plan([sizes], seed=0, together=5)
    shard_of = np.repeat(np.arange(40), sizes)
    shards = shard_of[rows(plan, 0, 820)]
    changes = [set(shards[start : start + 30]) for start in range(0, 790)]
    # 30 samples are fewer than the smallest block of 5 shards holds but for one: at most two blocks.
    assert max(map(len, changes)) <= 10
    order = list(dict.fromkeys(shards.tolist()))
    for start in range(0, 40, 5):
        first = [np.flatnonzero(shards == shard) for shard in order[start : start + 5]]
        block = np.concatenate(first)
        assert block.max() - block.min() + 1 == len(block)


def test_samples_of_a_block_are_mixed_evenly():
    """In one block of two equal shards, either half of the block holds half of each, up to five deviations."""
    plan = Plan([[2000, 2000]], seed=0, together=2)
    first_half = sum(row < 2000 for row in rows(plan, 0, 2000))
    # Hypergeometric: variance n K (N-K) (N-n) / (N^2 (N-1)).
    deviation = (2000 * 2000 * 2000 * 2000 / (4000**2 * 3999)) ** 0.5
    assert abs(first_half - 1000) < 5 * deviation


def test_weights_hold_in_every_cycle_and_sources_have_their_own_epochs():
    plan = Plan([[30, 20], [7], [400]], seed=5, weights=(2.0, 1.0, 1.0))
    count = {0: 0, 1: 0, 2: 0}
    seen: dict[int, list[int]] = {0: [], 1: [], 2: []}
    for position in range(2 * CYCLE):
        row, epoch = plan.row(position)
        source = 0 if row < 50 else 1 if row < 57 else 2
        assert epoch == count[source] // (50, 7, 400)[source]
        count[source] += 1
        seen[source].append(row)
    assert count == {0: CYCLE, 1: CYCLE // 2, 2: CYCLE // 2}
    for source, size in enumerate((50, 7, 400)):
        for start in range(0, len(seen[source]) - size, size):
            assert len(set(seen[source][start : start + size])) == size


def test_coverage_counts_what_was_drawn():
    plan = Plan([[30, 20], [7], [4000]], seed=5, weights=(2.0, 0.5, 1.0))
    drawn: Counter[int] = Counter()
    rows_seen: dict[int, set[int]] = {0: set(), 1: set(), 2: set()}
    for position in range(CYCLE + 777):
        if position in (1, 500, CYCLE - 1, CYCLE, CYCLE + 3):
            for source, part in enumerate(plan.coverage(position)):
                assert (part.drawn, part.distinct) == (drawn[source], len(rows_seen[source]))
        row = plan.row(position)[0]
        source = 0 if row < 50 else 1 if row < 57 else 2
        drawn[source] += 1
        rows_seen[source].add(row)
    (whole,) = Plan([[30, 20], [7]], seed=5).coverage(171)
    assert (whole.drawn, whole.distinct, whole.rows, whole.epochs) == (171, 57, 57, 3.0)


@pytest.mark.parametrize("weights", [(), (1.0, 2.0)])
def test_shards_are_announced_before_they_are_read(weights):
    sizes = [[50, 60, 70, 80, 90] * 4, [40] * 12]
    plan = Plan(sizes, seed=2, weights=weights, together=3)
    shard_of = np.repeat(np.arange(32), [size for source in sizes for size in source])
    start = 700
    announced: set[int] = set()
    upcoming = plan.shards_from(start)
    place, shard = next(upcoming)
    for position in range(start, start + 2000):
        # What begins within a cycle of here counts as announced.
        while place <= position + CYCLE:
            announced.add(shard)
            place, shard = next(upcoming)
        assert shard_of[plan.row(position)[0]] in announced


def test_a_large_plan_is_sought_through_without_walking():
    plan = Plan([[10_000] * 1000], seed=0)
    far = 7 * 10_000_000 + 123_456
    row, epoch = plan.row(far)
    assert epoch == 7
    assert 0 <= row < 10_000_000
    held = sum(block.nbytes for block in plan.sources[0]._blocks.values())
    assert held <= 2 * 8 * 10_000 * 8


@pytest.mark.parametrize("weights", [(1, 1), (1, 2, 3.5), (1e-9, 1), (0, 5, 1e-12, 1e-12)])
def test_quotas_are_whole_fair_and_complete(weights):
    found = quotas(weights, CYCLE)
    assert found.sum() == CYCLE
    shares = np.array(weights) / sum(weights) * CYCLE
    assert np.all(np.abs(found - shares) <= len(weights))
    assert [bool(quota) for quota in found] == [weight > 0 for weight in weights]


@pytest.mark.parametrize(
    ("sizes", "weights", "message"),
    [
        ([[1], [2]], (1.0,), "1 numbers for 2 sources"),
        ([[1], [2]], (1.0, -1.0), "0 or more"),
        ([[1], [2]], (0.0, 0.0), "above 0"),
        ([[1], [2]], (1.0, float("nan")), "0 or more"),
        ([[1], []], (1.0, 1.0), "Source 2"),
        ([[], [0]], (), "no sample"),
    ],
)
def test_what_cannot_be_planned_is_refused(sizes, weights, message):
    with pytest.raises(UserError, match=message):
        Plan(sizes, seed=0, weights=weights)


def test_the_fingerprint_tells_orders_apart():
    base = {"seed": 0, "weights": (1.0, 2.0), "together": 8}
    changes = [{}, {"seed": 1}, {"weights": (1.0, 3.0)}, {"together": 9}, {"weights": ()}]
    assert len({Plan(SIZES, **(base | change)).fingerprint() for change in changes}) == 5
    assert Plan(SIZES, **base).fingerprint() == Plan(SIZES, **base).fingerprint()
