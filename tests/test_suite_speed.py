"""FLOPs against closed forms, percentiles by a clock that is told the time, sizes of files."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from helpers.tiny_models import tiny_composite, tiny_images, write_open_clip
from torch import nn

from vlkd.errors import UserError
from vlkd.models.load import load
from vlkd.models.via_timm import TimmImageEncoder
from vlkd.suite import speed
from vlkd.suite.speed import as_measured, count_flops, durations, measure_speed, measure_speeds, static_figures


class Clock:
    """Every step takes the next of the given durations, in turn."""

    def __init__(self, *taken):
        self.now, self.taken = 0.0, itertools.cycle(taken)

    def __call__(self):
        return self.now

    def step(self):
        self.now += next(self.taken)


def test_flops_of_a_linear_layer_and_of_a_convolution():
    linear = nn.Linear(5, 7)
    assert count_flops(lambda: linear(torch.zeros(3, 5)), linear) == 2 * 3 * 5 * 7
    convolution = nn.Conv2d(4, 6, 3, stride=2, padding=1, groups=2)
    expected = 2 * (6 * 5 * 5) * (4 // 2 * 3 * 3)
    assert count_flops(lambda: convolution(torch.zeros(1, 4, 9, 9)), convolution) == expected


def test_flops_of_attention_and_of_a_transformer_layer_are_not_zero():
    n, c = 10, 16
    table = torch.zeros(1, 2, n, c // 2)
    attend = lambda: nn.functional.scaled_dot_product_attention(table, table, table)  # noqa: E731
    assert count_flops(attend, nn.Identity()) == 2 * (2 * n * n * c)
    layer = nn.TransformerEncoderLayer(c, 2, dim_feedforward=32, batch_first=True).eval()
    before = torch.backends.mha.get_fastpath_enabled()
    expected = 2 * n * c * (3 * c + c + 2 * 32) + 2 * (2 * n * n * c)
    assert count_flops(lambda: layer(torch.zeros(1, n, c)), layer) == expected
    assert torch.backends.mha.get_fastpath_enabled() == before


def test_flops_of_a_whole_model(tmp_path):
    """A ViT of 32 px, patches of 8, width 32, 2 layers, to 24; its text tower of 20 tokens."""
    found = static_figures(load(str(write_open_clip(tmp_path / "clip"))))
    c, layers = 32, 2

    def tower(n):
        return layers * (2 * n * c * (3 * c + c + 8 * c) + 2 * (2 * n * n * c))

    assert found["flops_image"] == 2 * 16 * (3 * 8 * 8) * c + tower(17) + 2 * c * 24
    assert found["flops_text"] == tower(20) + 2 * c * 24


def test_parameters_and_size_on_disk(tmp_path):
    model = tiny_composite()
    towers = [sum(p.numel() for p in part.parameters()) for part in (model.image_tower, model.image_projection)]
    texts = [sum(p.numel() for p in part.parameters()) for part in (model.text_tower, model.text_projection)]
    found = static_figures(model)
    assert (found["image_parameters"], found["text_parameters"]) == (sum(towers), sum(texts))
    assert found["parameters"] == sum(towers) + sum(texts)
    assert found["bytes"] == sum(v.numel() * v.element_size() for v in model.state_dict().values())
    model.save(tmp_path / "m")
    files = [path for path in (tmp_path / "m").rglob("*") if path.is_file()]
    assert static_figures(load(str(tmp_path / "m")))["bytes"] == sum(len(path.read_bytes()) for path in files)


def test_a_timm_tower_has_no_text_figures():
    import timm

    tower = timm.create_model("resnet10t", num_classes=0, channels=[8, 8, 16, 16], stem_width=8)
    found = static_figures(TimmImageEncoder(name="timm:x", tower=tower))
    assert "flops_text" not in found
    assert found["text_parameters"] == 0
    assert found["parameters"] == sum(value.numel() for value in tower.parameters())


def test_durations_warm_up_and_end_with_the_time():
    clock = Clock(0.25)
    assert durations(clock.step, 2.0, clock).tolist() == [0.25] * 8
    assert clock.now == pytest.approx(0.25 * (8 + speed.WARM_UP))
    # Slower than the time given: still a minimum of runs.
    slow = Clock(10.0)
    assert len(durations(slow.step, 1.0, slow)) == speed.MIN_RUNS


@pytest.fixture
def timed(monkeypatch):
    """Two models whose every image takes as long as told, one round after the other; threads and order are listed."""
    clock, seen = Clock(0.0), []
    costs = {"one": [0.010, 0.030, 0.020], "two": [0.002, 0.002, 0.002]}

    def encode(model):
        original = model.encode

        def told(inputs, want):
            if "pixels" in inputs:
                size, threads = len(inputs["pixels"]), torch.get_num_threads()
                seen.append((model.name, size, threads))
                turn = sum(1 for key, _ in itertools.groupby(seen) if key == (model.name, size, threads)) - 1
                clock.now += costs[model.name][turn] * (0.5 if threads > 1 else 1) * size
            return original(inputs, want)

        return told

    models = []
    for name in costs:
        model = tiny_composite()
        model.name = name
        monkeypatch.setattr(model, "encode", encode(model))
        models.append(model)
    # Counting FLOPs would take its share of the told time.
    monkeypatch.setattr(speed, "static_figures", lambda model: {"parameters": 1.0})
    return models, clock, seen


def test_models_take_turns_and_the_median_round_counts(timed):
    models, clock, seen = timed
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        found = measure_speeds(models, batch_sizes=(1, 4), seconds=0.05, rounds=3, clock=clock)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
    turn = [(size, threads) for size, threads in ((1, 1), (1, 2), (4, 2))]
    expected = [(name, *kind) for _ in range(3) for name in ("one", "two") for kind in turn]
    assert [key for key, _ in itertools.groupby(seen)] == expected
    one, two = found
    for p in (50, 90, 99):
        assert one[f"latency_ms_p{p}_1_thread"] == pytest.approx(20)
        assert one[f"latency_ms_p{p}_all_threads"] == pytest.approx(10)
        assert two[f"latency_ms_p{p}_1_thread"] == pytest.approx(2)
    assert one["images_per_second_all_threads"] == pytest.approx(100)
    assert two["images_per_second_all_threads"] == pytest.approx(1000)
    assert (one["threads"], one["parameters"]) == (2, 1)


def test_percentiles_are_those_of_the_runs(monkeypatch):
    model = tiny_composite()
    times = [1 + i / 7 for i in range(101)]
    monkeypatch.setattr(speed, "durations", lambda step, seconds, clock: np.array(times))
    found = measure_speed(model, rounds=1)
    for p in (50, 90, 99):
        assert found[f"latency_ms_p{p}_1_thread"] == pytest.approx(1000 * times[p])


def test_figures_fit_the_results_and_leave_the_model_as_it_was(tmp_path):
    model = tiny_composite().train()
    expected = model.encode_image(tiny_images(2))
    clock = Clock(0.0)
    ticking = lambda: clock.step() or clock.now  # noqa: E731
    clock.taken = itertools.cycle([0.01])
    figures = measure_speed(model, batch_sizes=(1, 2), seconds=0.05, rounds=1, clock=ticking)
    measured = as_measured(figures, batch_sizes=(1, 2), seconds=0.05, rounds=1)
    latencies = {f"latency_ms_p{p}_{name}" for p in (50, 90, 99) for name in ("1_thread", "all_threads")}
    static = {"parameters", "image_parameters", "text_parameters", "flops_image", "flops_text", "bytes"}
    assert set(measured.metrics) == latencies | static | {"images_per_second_all_threads"}
    assert measured.score == pytest.approx(10)
    assert measured.counts["threads"] == torch.get_num_threads()
    assert model.training
    assert torch.equal(model.encode_image(tiny_images(2)), expected)


@pytest.mark.parametrize("changes", [{"rounds": 0}, {"seconds": 0.0}, {"batch_sizes": (1, 0)}])
def test_senseless_settings_are_refused(changes):
    with pytest.raises(UserError, match="numbers above 0"):
        measure_speed(tiny_composite(), **changes)
    with pytest.raises(UserError, match="Found 0 models"):
        measure_speeds([])
