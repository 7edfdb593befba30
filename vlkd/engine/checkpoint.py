"""Checkpoints: folders of safetensors and JSON, written beside their place and renamed: each one found is whole."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from vlkd.engine.distributed import each_ranks, first_rank, first_ranks_text, rank
from vlkd.engine.sharding import (
    Stateful,
    full_optimizer_state,
    full_state,
    load_full_optimizer_state,
    load_full_state,
)
from vlkd.errors import UserError

STATE = "state.json"
KEEP = 2


def save_checkpoint(
    folder: Path,
    step: int,
    *,
    modules: Mapping[str, Stateful],
    optimizer: torch.optim.Optimizer,
    state: Mapping[str, Any],
) -> Path:
    """Write `folder/step-N` and remove all but the newest two; all ranks call it, and rank 0 writes.

    What is sharded is written whole, and the optimiser's tensors carry the names of their parameters: any number of
    ranks, sharded or not, reads it.

    Args:
        folder: of all checkpoints of the run.
        step: optimiser steps done.
        modules: each saved as `NAME.safetensors`; they hold the optimiser's parameters.
        optimizer: its tensors go to safetensors, its numbers to JSON.
        state: further JSON, for instance of the data stream; rank 0's.

    Raises:
        UserError: rank 0 could not write; raised on every rank, and the older checkpoints are kept.
    """
    files = {name: full_state(module.state_dict()) for name, module in modules.items()}
    files["optimizer"], numbers = full_optimizer_state(optimizer, parameter_names(modules))
    own = random_state()
    every = {name: each_ranks(value) for name, value in own.items()}
    for number in range(len(every["torch"])):
        files[f"rng-{number}"] = {name: values[number] for name, values in every.items()}
    target = folder / f"step-{step:08d}"
    problem, failure = "", None
    if first_rank():
        try:
            _write(target, files, {"step": step, "optimizer": numbers, **state})
        except Exception as error:
            # The other ranks wait for a word.
            failure = error
            line = (str(error) or type(error).__name__).splitlines()[0]
            problem = (
                f"The checkpoint {target} cannot be written ({line}); the older ones are kept: "
                "make room, and give the same command to continue."
            )
    if problem := first_ranks_text(problem):
        if failure is not None and not isinstance(failure, OSError | SafetensorError):
            raise failure
        raise UserError(problem) from failure
    return target


def _write(target: Path, files: Mapping[str, dict[str, Tensor]], state: Mapping[str, Any]) -> None:
    folder = target.parent
    folder.mkdir(parents=True, exist_ok=True)
    for torn in folder.glob(".step-*"):
        shutil.rmtree(torn, ignore_errors=True)
    temporary = folder / f".{target.name}.{os.getpid()}"
    try:
        temporary.mkdir()
        for name, tensors in files.items():
            save_file(tensors, str(temporary / f"{name}.safetensors"))
        (temporary / STATE).write_text(json.dumps(state))
        for path in (*temporary.iterdir(), temporary):
            _flush(path)
        shutil.rmtree(target, ignore_errors=True)
        temporary.replace(target)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    for old in whole_checkpoints(folder)[:-KEEP]:
        shutil.rmtree(old, ignore_errors=True)


def _flush(path: Path) -> None:
    """See that a file, or what a folder holds, survives a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def whole_checkpoints(folder: Path) -> list[Path]:
    """All checkpoints, oldest first, but those that a kill or a power cut left in part."""
    return sorted(path for path in folder.glob("step-*") if _is_whole(path))


def _is_whole(path: Path) -> bool:
    try:
        json.loads((path / STATE).read_text())
    except (OSError, ValueError):
        return False
    return True


def newest_checkpoint(folder: Path) -> Path | None:
    """The newest one that rank 0 sees, on all ranks, or None; all ranks call it."""
    found = whole_checkpoints(folder) if first_rank() else []
    name = first_ranks_text(found[-1].name if found else "")
    return folder / name if name else None


def load_checkpoint(path: Path, *, modules: Mapping[str, Stateful], optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Fill modules, optimiser and this rank's random generator; returns the state that was saved with them.

    Every rank reads the same folder. A rank for which no generator was stored, because there were fewer ranks, takes a
    seed drawn from rank 0's stored one and its own number: equal numbers of ranks continue bit for bit, others with
    other draws.

    Raises:
        UserError: a file is missing or does not fit the run's modules.
    """
    try:
        state: dict[str, Any] = json.loads((path / STATE).read_text())
        for name, module in modules.items():
            load_full_state(module.state_dict(), load_file(str(path / f"{name}.safetensors")))
        entries = load_file(str(path / "optimizer.safetensors")) | state["optimizer"]
        load_full_optimizer_state(optimizer, parameter_names(modules), entries)
        load_random_state(path)
    except (OSError, RuntimeError, KeyError, ValueError, TypeError, SafetensorError) as error:
        line = str(error).splitlines()[0]
        raise UserError(f"The checkpoint {path} cannot be used ({line}); remove that folder to fall back.") from error
    return state


def parameter_names(modules: Mapping[str, Stateful]) -> dict[Tensor, str]:
    """`MODULE.PARAMETER` of each parameter of the modules."""
    return {
        parameter: f"{module_name}.{name}"
        for module_name, module in modules.items()
        if isinstance(module, nn.Module)
        for name, parameter in module.named_parameters()
    }


def random_state() -> dict[str, Tensor]:
    """The states of this rank's generators, uint8; a GPU's where one is in use."""
    states = {"torch": torch.get_rng_state()}
    return states | {"cuda": torch.cuda.get_rng_state()} if torch.cuda.is_initialized() else states  # type: ignore[no-untyped-call]


def load_random_state(path: Path) -> None:
    """Set this rank's generators to what a checkpoint holds for it, as `load_checkpoint` describes."""
    first = load_file(str(path / "rng-0.safetensors"))
    digest = hashlib.sha256(bytes(first["torch"].numpy()) + f"/{rank()}".encode()).digest()
    torch.manual_seed(int.from_bytes(digest[:8], "little") >> 1)
    stored = path / f"rng-{rank()}.safetensors"
    states = load_file(str(stored)) if stored.is_file() else {}
    if "torch" in states:
        torch.set_rng_state(states["torch"])
    if "cuda" in states and torch.cuda.is_available():
        torch.cuda.set_rng_state(states["cuda"])
