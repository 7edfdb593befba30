"""A continued run is bit for bit the run that was never interrupted; only whole checkpoints are read."""

from __future__ import annotations

import errno
import json
import os
import resource
import signal
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from vlkd.engine.checkpoint import load_checkpoint, newest_checkpoint, save_checkpoint, whole_checkpoints
from vlkd.engine.log import MetricsLog
from vlkd.engine.optim import parameter_groups
from vlkd.errors import UserError


class Run:
    """A network with dropout and batch statistics, trained on noise from the global generator."""

    def __init__(self, seed: int) -> None:
        torch.manual_seed(seed)
        layers = [nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Dropout(0.5), nn.Linear(36, 3)]
        self.module = nn.Sequential(*layers)
        groups = parameter_groups(self.module, 0.1)
        self.optimizer = torch.optim.AdamW(groups, lr=1e-2, betas=(0.9, 0.98))

    def step(self) -> float:
        loss = self.module(torch.randn(6, 3, 5, 5)).square().sum()
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        return float(loss.detach())

    def save(self, folder, step: int, **state):
        return save_checkpoint(
            folder,
            step,
            modules={"net": self.module},
            optimizer=self.optimizer,
            state={"stream": {"samples": 3, **state}},
        )

    def load(self, path):
        return load_checkpoint(path, modules={"net": self.module}, optimizer=self.optimizer)


def equal(left: object, right: object) -> bool:
    if isinstance(left, torch.Tensor):
        return torch.equal(left, right) and left.dtype == right.dtype
    if isinstance(left, dict):
        return left.keys() == right.keys() and all(equal(value, right[key]) for key, value in left.items())
    if isinstance(left, list | tuple):
        return len(left) == len(right) and all(map(equal, left, right))
    return left == right


def test_continuing_is_bit_exact(tmp_path):
    whole = Run(0)
    for _ in range(4):
        whole.step()
    path = whole.save(tmp_path, 4, bad=["k"])
    expected = [whole.step() for _ in range(4)]

    other = Run(99)
    other.step()
    state = other.load(path)
    assert state["step"] == 4
    assert state["stream"] == {"samples": 3, "bad": ["k"]}
    assert [other.step() for _ in range(4)] == expected
    assert equal(other.module.state_dict(), whole.module.state_dict())
    assert equal(other.optimizer.state_dict()["state"], whole.optimizer.state_dict()["state"])


def test_the_optimizers_moments_matter_and_are_kept(tmp_path):
    """The control of the test above: without the moments, or the generator, the run would go elsewhere."""
    run = Run(0)
    for _ in range(4):
        run.step()
    path = run.save(tmp_path, 4)
    expected = run.step()
    run.load(path)
    torch.manual_seed(5)
    assert run.step() != expected
    run.load(path)
    before = {name: value.clone() for name, value in run.module.state_dict().items()}
    fresh = torch.optim.AdamW(parameter_groups(run.module, 0.1), lr=1e-2, betas=(0.9, 0.98))
    kept, run.optimizer = run.optimizer, fresh
    run.step()
    without = run.module.state_dict()["0.weight"].clone()
    run.optimizer = kept
    run.load(path)
    assert equal(dict(run.module.state_dict()), before)
    run.step()
    assert not torch.equal(run.module.state_dict()["0.weight"], without)


def test_channels_last_weights_keep_values_and_layout(tmp_path):
    run, other = Run(0), Run(1)
    for each in (run, other):
        each.module.to(memory_format=torch.channels_last)
        each.step()
    path = run.save(tmp_path, 1)
    expected = [run.step() for _ in range(3)]
    other.load(path)
    assert other.module[0].weight.is_contiguous(memory_format=torch.channels_last)
    assert [other.step() for _ in range(3)] == expected
    assert torch.equal(other.module[0].weight, run.module[0].weight)


def test_the_newest_two_are_kept_in_order(tmp_path):
    run = Run(0)
    for step in (1, 2, 9, 10, 100):
        run.save(tmp_path, step)
    assert [path.name for path in whole_checkpoints(tmp_path)] == ["step-00000010", "step-00000100"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000010", "step-00000100"]


def test_saving_a_step_again_replaces_it(tmp_path):
    run = Run(0)
    run.save(tmp_path, 1)
    run.step()
    path = run.save(tmp_path, 1)
    other = Run(1)
    other.load(path)
    assert equal(other.module.state_dict(), run.module.state_dict())


def test_half_written_folders_are_not_checkpoints(tmp_path):
    run = Run(0)
    path = run.save(tmp_path, 3)
    (tmp_path / ".step-00000007.4711").mkdir()
    (tmp_path / ".step-00000007.4711" / "state.json").write_text("{}")
    (tmp_path / "step-00000008").mkdir()
    assert whole_checkpoints(tmp_path) == [path]
    assert whole_checkpoints(tmp_path / "none") == []


def test_a_save_that_fails_leaves_the_older_checkpoint(tmp_path):
    run = Run(0)
    path = run.save(tmp_path, 3)
    with pytest.raises(TypeError):
        run.save(tmp_path, 4, unserialisable=object())
    assert whole_checkpoints(tmp_path) == [path]
    assert Run(1).load(path)["step"] == 3


def file_too_large(monkeypatch):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    return lambda: resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def no_space_for_the_state(monkeypatch):
    def refuse(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("pathlib.Path.write_text", refuse)
    return monkeypatch.undo


@pytest.mark.parametrize("fill", [file_too_large, no_space_for_the_state])
def test_a_full_disk_ends_in_a_sentence_and_keeps_the_older_checkpoints(fill, tmp_path, monkeypatch):
    run = Run(0)
    kept = [run.save(tmp_path, step) for step in (3, 4)]
    empty = fill(monkeypatch)
    try:
        with pytest.raises(UserError, match=r"step-00000005 cannot be written \(.*\).* make room"):
            run.save(tmp_path, 5)
    finally:
        empty()
    assert sorted(tmp_path.iterdir()) == kept
    assert Run(1).load(kept[1])["step"] == 4
    run.save(tmp_path, 5)
    assert [path.name for path in whole_checkpoints(tmp_path)] == ["step-00000004", "step-00000005"]


@pytest.mark.parametrize("written", range(5))
def test_a_run_killed_while_it_saves_leaves_whole_checkpoints(written, tmp_path, monkeypatch):
    """The process dies behind its first files, or all of them with the rename outstanding."""
    run = Run(0)
    kept = run.save(tmp_path, 3)
    process = os.fork()
    if process == 0:
        count = iter(range(written))

        def one_more(write):
            def call(*arguments):
                if next(count, None) is None:
                    os.kill(os.getpid(), signal.SIGKILL)
                return write(*arguments)

            return call

        monkeypatch.setattr("vlkd.engine.checkpoint.save_file", one_more(save_file))
        monkeypatch.setattr("pathlib.Path.write_text", one_more(Path.write_text))
        monkeypatch.setattr("pathlib.Path.replace", one_more(Path.replace))
        run.save(tmp_path, 4)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) == -signal.SIGKILL
    assert whole_checkpoints(tmp_path) == [kept]
    assert newest_checkpoint(tmp_path) == kept
    assert len(list(tmp_path.iterdir())) == 2
    run.save(tmp_path, 4)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000003", "step-00000004"]


def test_moments_are_found_by_the_names_of_their_parameters(tmp_path):
    """Other groups, other order, a parameter that was never trained: each moment stands at its parameter."""
    run, other = Run(0), Run(1)
    run.module[4].bias.requires_grad_(False)
    run.step()
    path = run.save(tmp_path, 1)
    assert "net.4.bias.exp_avg" not in load_file(str(path / "optimizer.safetensors"))
    other.optimizer = torch.optim.AdamW([*other.module.parameters()][::-1], lr=3.0)
    other.load(path)
    for (name, left), right in zip(run.module.named_parameters(), other.module.parameters(), strict=True):
        assert equal(run.optimizer.state.get(left), other.optimizer.state.get(right)), name
    assert other.optimizer.param_groups[0]["lr"] == 3.0


def damage_weights(path):
    (path / "net.safetensors").write_bytes((path / "net.safetensors").read_bytes()[:50])


def remove_optimizer(path):
    (path / "optimizer.safetensors").unlink()


def damage_state(path):
    (path / "state.json").write_text("{")


@pytest.mark.parametrize("damage", [damage_weights, remove_optimizer, damage_state])
def test_damaged_checkpoints_are_refused_in_a_sentence(damage, tmp_path):
    run = Run(0)
    run.step()
    path = run.save(tmp_path, 1)
    damage(path)
    with pytest.raises(UserError, match=r"step-00000001 cannot be used .*remove that folder"):
        run.load(path)


def test_another_architecture_is_refused(tmp_path):
    path = Run(0).save(tmp_path, 1)
    other = Run(0)
    other.module[4] = nn.Linear(36, 4)
    with pytest.raises(UserError, match="cannot be used"):
        other.load(path)


def test_nothing_is_pickled(tmp_path):
    run = Run(0)
    run.step()
    path = run.save(tmp_path, 1)
    assert sorted(file.name for file in path.iterdir()) == [
        "net.safetensors",
        "optimizer.safetensors",
        "rng-0.safetensors",
        "state.json",
    ]
    json.loads((path / "state.json").read_text())


def test_the_log_drops_what_follows_the_checkpoint(tmp_path):
    path = tmp_path / "metrics.jsonl"
    log = MetricsLog(path, 0)
    for step in range(1, 6):
        log.write(step, 8 * step, {"loss": step / 4})
    with path.open("a") as file:
        file.write('{"step": 6, "lo')
    log = MetricsLog(path, 3)
    log.write(4, 32, {"loss": 9.0})
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert [(row["step"], row["samples"], row["loss"]) for row in rows] == [
        (1, 8, 0.25),
        (2, 16, 0.5),
        (3, 24, 0.75),
        (4, 32, 9.0),
    ]
    with pytest.raises(ValueError, match="JSON"):
        log.write(5, 40, {"loss": float("nan")})
