"""The spike guard against its rule, transcribed; and the clock's arithmetic."""

from __future__ import annotations

import json
import math
from pathlib import Path
from statistics import median

import numpy as np
import pytest
import torch
from torch import nn

from vlkd.engine.clock import Clock, CountedTeacher
from vlkd.engine.spikes import FIRST, LONGEST_RUN, WINDOW, SpikeGuard
from vlkd.errors import UserError


def guard_of(factor: float, path: Path | None = None) -> SpikeGuard:
    guard = SpikeGuard(factor, nn.Linear(1, 1))
    if path:
        guard.write_to(path, 0)
    return guard


def takes(guard: SpikeGuard, norm: float, step: int = 1) -> bool:
    return guard.takes(torch.tensor(norm), step=step, samples=step * 8, keys=[f"k{step}"])


def test_it_takes_what_the_rule_says(tmp_path):
    norms = np.random.default_rng(0).lognormal(0, 0.8, size=600).tolist()
    norms[300] = math.nan
    norms[301] = math.inf
    guard = guard_of(3.0, tmp_path / "spikes.jsonl")
    kept: list[float] = []
    skipped = []
    for step, norm in enumerate(norms):
        norm = float(torch.tensor(norm))
        small = len(kept) < FIRST or norm <= 3.0 * median(kept[-WINDOW:])
        expected = math.isfinite(norm) and small
        assert takes(guard, norm, step) == expected
        if expected:
            kept.append(norm)
        else:
            skipped.append(step)
    assert {300, 301} < set(skipped)
    rows = [json.loads(line) for line in (tmp_path / "spikes.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == skipped
    assert rows[0]["keys"] == [f"k{skipped[0]}"]
    assert guard.skipped == len(skipped)


def test_without_a_factor_everything_is_taken(tmp_path):
    guard = guard_of(0.0, tmp_path / "spikes.jsonl")
    assert takes(guard, math.inf)
    assert not (tmp_path / "spikes.jsonl").exists()


def test_twenty_in_a_row_end_the_run_and_one_good_one_begins_anew():
    guard = guard_of(2.0)
    for _ in range(LONGEST_RUN - 1):
        assert not takes(guard, math.nan)
    assert takes(guard, 1.0)
    for _ in range(LONGEST_RUN - 1):
        assert not takes(guard, math.nan)
    with pytest.raises(UserError, match="20 updates in a row were skipped"):
        takes(guard, math.nan)


def test_its_state_goes_on_with_the_same_judgement():
    norms = np.random.default_rng(1).lognormal(0, 1, size=400).astype(np.float32).tolist()
    whole, first = guard_of(2.0), guard_of(2.0)
    expected = [takes(whole, norm) for norm in norms]
    found = [takes(first, norm) for norm in norms[:171]]
    second = guard_of(2.0)
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    assert found + [takes(second, norm) for norm in norms[171:]] == expected
    assert second.state_dict() == whole.state_dict()


def test_a_skipped_update_leaves_no_trace_in_running_statistics():
    norm = nn.BatchNorm1d(3)
    guard = SpikeGuard(2.0, norm)
    norm(torch.rand(5, 3))
    before = {name: value.clone() for name, value in norm.state_dict().items()}
    guard.before()
    norm(torch.full((5, 3), torch.nan))
    assert not norm.running_mean.isfinite().any()
    assert not takes(guard, math.nan)
    for name, value in norm.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_batches_without_a_gradient_are_no_measure():
    guard = guard_of(2.0)
    for _ in range(100):
        assert takes(guard, 1.0)
        assert takes(guard, 0.0)
    assert takes(guard, 1.9)


def test_what_was_skipped_behind_the_checkpoint_is_told_once(tmp_path):
    first = guard_of(2.0, tmp_path / "spikes.jsonl")
    for step in (3, 7):
        takes(first, math.nan, step)
    second = SpikeGuard(2.0, nn.Linear(1, 1))
    second.write_to(tmp_path / "spikes.jsonl", 5)
    takes(second, math.nan, 7)
    rows = (tmp_path / "spikes.jsonl").read_text().splitlines()
    assert [json.loads(row)["step"] for row in rows] == [3, 7]


def test_the_clock_splits_what_passes(monkeypatch):
    now = [100.0]
    monkeypatch.setattr("vlkd.engine.clock.time.perf_counter", lambda: now[0])
    clock = Clock(torch.device("cpu"))

    def wait(seconds: float) -> float:
        now[0] += seconds
        return seconds

    for _ in range(2):
        with clock.part("data"):
            wait(1.0)
        assert clock.counted("sync", wait)(0.5) == 0.5
        wait(2.5)
        with clock.part("aside"):
            wait(50.0)
    seconds, shares = clock.split()
    assert seconds == pytest.approx(8.0)
    assert shares == pytest.approx({"data": 0.25, "teacher": 0.0, "sync": 0.125, "student": 0.625})
    wait(3.0)
    assert clock.split() == (pytest.approx(3.0), pytest.approx({"data": 0, "teacher": 0, "sync": 0, "student": 1.0}))


def test_a_counted_teacher_is_the_teacher(monkeypatch):
    class Own:
        name, width, provides, preprocessing = "one", 4, frozenset({"image.embed"}), None

        def targets(self, batch, want):
            return {"image.embed": torch.ones(2, 4)}

    counted = CountedTeacher(Own(), Clock(torch.device("cpu")))
    assert (counted.name, counted.width, counted.provides, counted.preprocessing) == ("one", 4, {"image.embed"}, None)
    assert torch.equal(counted.targets(None, ["image.embed"])["image.embed"], torch.ones(2, 4))
    assert counted.clock.seconds["teacher"] > 0
