"""Checkpoints: folders of safetensors and JSON, written beside their place and renamed: each one found is whole."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from vlkd.errors import UserError

STATE = "state.json"
KEEP = 2


def save_checkpoint(
    folder: Path,
    step: int,
    *,
    modules: dict[str, nn.Module],
    optimizer: torch.optim.Optimizer,
    state: dict[str, Any],
) -> Path:
    """Write `folder/step-N` and remove all but the newest two.

    Args:
        folder: of all checkpoints of the run.
        step: optimiser steps done.
        modules: each saved as `NAME.safetensors`.
        optimizer: its tensors go to safetensors, its numbers to JSON.
        state: further JSON, for instance of the data stream.
    """
    folder.mkdir(parents=True, exist_ok=True)
    target = folder / f"step-{step:08d}"
    temporary = folder / f".step-{step:08d}.{os.getpid()}"
    for torn in folder.glob(".step-*"):
        shutil.rmtree(torn, ignore_errors=True)
    temporary.mkdir()
    for name, module in modules.items():
        save_file(contiguous(module.state_dict()), str(temporary / f"{name}.safetensors"))
    tensors, numbers = split_optimizer(optimizer.state_dict())
    save_file(tensors, str(temporary / "optimizer.safetensors"))
    states = {"torch": torch.get_rng_state()}
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state()
    save_file(states, str(temporary / "rng-0.safetensors"))
    (temporary / STATE).write_text(json.dumps({"step": step, "optimizer": numbers, **state}))
    shutil.rmtree(target, ignore_errors=True)
    temporary.replace(target)
    for old in whole_checkpoints(folder)[:-KEEP]:
        shutil.rmtree(old)
    return target


def whole_checkpoints(folder: Path) -> list[Path]:
    """All checkpoints, oldest first; what a killed run left half-written has another name."""
    return sorted(path for path in folder.glob("step-*") if (path / STATE).is_file())


def load_checkpoint(path: Path, *, modules: dict[str, nn.Module], optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Fill modules, optimiser and the random generator; returns the state that was saved with them.

    Raises:
        UserError: a file is missing or does not fit the run's modules.
    """
    try:
        state: dict[str, Any] = json.loads((path / STATE).read_text())
        for name, module in modules.items():
            module.load_state_dict(load_file(str(path / f"{name}.safetensors")))
        tensors = load_file(str(path / "optimizer.safetensors"))
        optimizer.load_state_dict(join_optimizer(tensors, state["optimizer"]))
        states = load_file(str(path / "rng-0.safetensors"))
        torch.set_rng_state(states["torch"])
        if "cuda" in states and torch.cuda.is_available():
            torch.cuda.set_rng_state(states["cuda"])
    except (OSError, RuntimeError, KeyError, ValueError, SafetensorError) as error:
        line = str(error).splitlines()[0]
        raise UserError(f"The checkpoint {path} cannot be used ({line}); remove that folder to fall back.") from error
    return state


def contiguous(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Tensors in their own dense memory, as safetensors wants them."""
    return {name: value.detach().cpu().contiguous().clone() for name, value in state.items()}


def split_optimizer(state: dict[str, Any]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """An optimiser's state as named tensors and JSON numbers."""
    tensors, numbers = {}, {}
    for index, values in state["state"].items():
        for name, value in values.items():
            if isinstance(value, Tensor):
                tensors[f"{index}.{name}"] = value.detach().cpu().contiguous().clone()
            else:
                numbers[f"{index}.{name}"] = value
    return tensors, {"numbers": numbers, "groups": state["param_groups"]}


def join_optimizer(tensors: dict[str, Tensor], numbers: dict[str, Any]) -> dict[str, Any]:
    """The inverse of `split_optimizer`."""
    state: dict[int, dict[str, Any]] = {}
    for key, value in (tensors | numbers["numbers"]).items():
        index, _, name = key.partition(".")
        state.setdefault(int(index), {})[name] = value
    return {"state": state, "param_groups": numbers["groups"]}
