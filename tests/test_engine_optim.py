"""Schedule, groups, averaged weights and the clamp against closed forms."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from vlkd.engine.distributed import clip_gradients
from vlkd.engine.optim import AveragedWeights, clamp_logit_scale, learning_rate, parameter_groups


def test_learning_rate_by_hand():
    rates = [learning_rate(step, steps=10, peak=2.0, warmup=0.2) for step in range(10)]
    assert rates[:3] == [1.0, 2.0, 2.0]
    # The cosine has eight steps, so its quarter, half and three quarters are whole steps.
    assert rates[4] == pytest.approx(2.0 * (1 + math.sqrt(0.5)) / 2)
    assert rates[6] == pytest.approx(1.0)
    assert rates[8] == pytest.approx(2.0 * (1 - math.sqrt(0.5)) / 2)
    assert learning_rate(10, steps=10, peak=2.0, warmup=0.2) == pytest.approx(0.0)


def test_learning_rate_agrees_with_torchs_cosine_after_the_warmup():
    parameter = nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([parameter], lr=3.0)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=90)
    for step in range(10, 100):
        assert learning_rate(step, steps=100, peak=3.0, warmup=0.1) == pytest.approx(
            schedule.get_last_lr()[0], abs=1e-9
        )
        optimizer.step()
        schedule.step()


@pytest.mark.parametrize("steps", [1, 2, 3])
@pytest.mark.parametrize("warmup", [0.0, 0.05, 1.0])
def test_tiny_runs_have_positive_finite_rates(steps, warmup):
    rates = [learning_rate(step, steps=steps, peak=1.0, warmup=warmup) for step in range(steps)]
    assert all(0 < rate <= 1 for rate in rates)


def test_only_matrices_decay():
    module = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Linear(4, 2))
    module.log_logit_scale = nn.Parameter(torch.ones(()))
    module[2].bias.requires_grad_(False)
    decayed, kept = parameter_groups(module, 0.3)
    names = {id(value): name for name, value in module.named_parameters()}
    assert {names[id(value)] for value in decayed["params"]} == {"0.weight", "2.weight"}
    assert {names[id(value)] for value in kept["params"]} == {"0.bias", "1.weight", "1.bias", "log_logit_scale"}
    assert (decayed["weight_decay"], kept["weight_decay"]) == (0.3, 0.0)


def test_averaged_weights_follow_their_recursion():
    module = nn.BatchNorm1d(2)
    averaged = AveragedWeights(module, 0.6)
    expected = 1.0
    with torch.no_grad():
        for step in range(8):
            module.weight.fill_(step + 5.0)
            module.running_mean.fill_(-step)
            module.num_batches_tracked.fill_(step)
            averaged.update(module, step)
            decay = min(0.6, (1 + step) / (10 + step))
            expected = decay * expected + (1 - decay) * (step + 5.0)
    values = averaged.state_dict()
    assert float(values["weight"][0]) == pytest.approx(expected, rel=1e-6)
    assert int(values["num_batches_tracked"]) == 7
    assert -7 < float(values["running_mean"][0]) < -5


def test_averaged_weights_are_copies_without_gradients():
    module = nn.Linear(2, 2).train()
    averaged = AveragedWeights(module, 0.9)
    before = module.weight.detach().clone()
    with torch.no_grad():
        module.weight.add_(1)
    values = averaged.state_dict()
    assert torch.equal(values["weight"], before)
    assert not any(value.requires_grad for value in values.values())
    averaged.update(module, 0)
    torch.testing.assert_close(values["weight"], 0.1 * before + 0.9 * module.weight.detach())


def test_clipping_whole_gradients_is_torchs_own():
    modules = [nn.Linear(3, 4), nn.Linear(3, 4)]
    modules[1].load_state_dict(modules[0].state_dict())
    inputs = torch.randn(5, 3)
    for module in modules:
        module(inputs).square().sum().backward()
    norm = clip_gradients(modules[0], 0.1)
    assert torch.equal(norm, nn.utils.clip_grad_norm_(modules[1].parameters(), 0.1))
    assert torch.equal(modules[0].weight.grad, modules[1].weight.grad)
    assert float(norm) > 0.1


@pytest.mark.parametrize(("value", "expected"), [(99.0, 99.0), (101.0, 100.0), (1e9, 100.0)])
def test_clamp(value, expected):
    scale = nn.Parameter(torch.tensor(math.log(value)))
    clamp_logit_scale(scale, 100.0)
    assert math.exp(scale.item()) == pytest.approx(expected, rel=1e-5)
    assert scale.requires_grad
