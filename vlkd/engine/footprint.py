"""The memory of a run: what is held is summed, what passes is measured on small batches and drawn out along a line."""

from __future__ import annotations

import ctypes
import resource
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from vlkd.data.samples import Batch
from vlkd.distill.distiller import Distiller
from vlkd.engine.cost import Host, Memory
from vlkd.engine.settings import Train
from vlkd.models.base import evaluating

ODD = 7
"""A batch size that is no width of a model, so that what has it twice is a matrix of the loss."""
CUDA_CONTEXT = 0.5 * 2**30
"""What a process takes on a GPU beside its tensors, about."""


@dataclass(frozen=True, kw_only=True)
class Peaks:
    """Bytes that a few steps on a batch took.

    Attributes:
        batch_size: of the batch.
        before: in use before, on the device.
        device: the most in use there.
        host: the most of the process.
    """

    batch_size: int
    before: int
    device: int
    host: int


def held_bytes(distiller: Distiller, ema: float) -> dict[str, int]:
    """Bytes of what the loop holds beside activations: exact sums over tensors.

    Args:
        distiller: student, heads, objectives.
        ema: decay of the averaged weights; 0 keeps none.
    """
    trained = sum(tensor_bytes(value) for value in distiller.parameters() if value.requires_grad)
    exported = state_bytes(nn.ModuleDict({"student": distiller.student, "heads": distiller.heads}))
    return {
        "weights": state_bytes(distiller),
        "gradients": trained,
        "moments": 2 * trained,
        "averaged weights": exported if ema else 0,
        "evaluation copy": exported,
    }


def loss_matrix_bytes(distiller: Distiller, batch: Batch, accelerator: Accelerator) -> float:
    """Bytes of B x B matrices that comparing a batch keeps for the backward pass, per B * B, the gradient's own added.

    Args:
        distiller: on the device of the accelerator.
        batch: of `ODD` samples.
        accelerator: device and precision.
    """
    batch = batch.to(accelerator.device)
    with torch.no_grad(), evaluating(distiller), accelerator.autocast():
        features = distiller.student_features(batch)
    sides = {len(batch.keys), len(batch.texts)}
    kept: dict[int, int] = {}

    def keep(value: Tensor) -> Tensor:
        if value.dim() == 2 and set(value.shape) <= sides:
            kept[value.untyped_storage().data_ptr()] = value.numel() * value.element_size()
        return value

    leaves = {name: value.clone().requires_grad_(value.is_floating_point()) for name, value in features.items()}
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda value: value), accelerator.autocast():
        # Holding the losses holds what they keep: nothing else can take its place in memory meanwhile.
        compared = distiller.compare(leaves, batch)
    del compared
    return (sum(kept.values()) + max(kept.values(), default=0)) / len(batch.keys) ** 2


def memories(
    small: Peaks,
    large: Peaks,
    held: Mapping[str, int],
    *,
    matrices: float,
    teachers: float,
    beside: Mapping[str, float],
    start: float,
    train: Train,
    host: Host,
    device: torch.device,
    machine: float,
) -> tuple[Memory, ...]:
    """What the device must hold at the run's batch, and the machine, where that is another place.

    Args:
        small: of a few steps on a small batch.
        large: on a larger one, or the same.
        held: `held_bytes`, which `small` and `large` had, too.
        matrices: `loss_matrix_bytes`.
        teachers: bytes of the teachers' weights that lie where the student is trained.
        beside: of what a rank needs on the machine beside the process that trains, by part.
        start: the most that the process took before its first step.
        train: batch of all ranks, local loss, sharding.
        host: ranks.
        device: of the student.
        machine: bytes of this machine's memory.
    """
    own = train.batch_size // host.ranks
    slope, fixed = line(small, large, matrices, made=sum(size for name, size in held.items() if name != "weights"))
    divided = host.ranks if train.shard else 1
    parts = {name: size / (1 if name == "evaluation copy" else divided) for name, size in held.items()}
    if teachers:
        parts["teachers"] = teachers
    parts["activations"] = slope * own
    parts["loss matrices"] = matrices * train.batch_size * (own if train.local_loss else train.batch_size)
    other = max(0.0, fixed - sum(held.values()) - teachers)
    saving = sum(held[name] for name in ("weights", "moments", "averaged weights"))
    if device.type != "cuda":
        # The start of a run, or writing a checkpoint, may take more than a step.
        step = fixed + parts["activations"] + parts["loss matrices"]
        parts["process"] = other + max(0.0, start - step, fixed + saving - step)
        return (_on_machine({**parts, **beside}, host, machine),)
    capacity = torch.cuda.get_device_properties(device).total_memory
    return (
        Memory(where=str(device), parts=parts | {"other": other + CUDA_CONTEXT}, available=capacity),
        _on_machine({"process": max(start, large.host) + saving, **beside}, host, machine),
    )


def _on_machine(parts: Mapping[str, float], host: Host, machine: float) -> Memory:
    every = {name: host.ranks * size for name, size in parts.items()}
    return Memory(where="the machine", parts=every, available=machine)


def line(small: Peaks, large: Peaks, matrices: float, made: float) -> tuple[float, float]:
    """Bytes per sample, and bytes whatever the batch, from the peaks of two batches, their loss matrices taken off.

    Args:
        small: of a few samples.
        large: of more, or the same.
        matrices: bytes of loss matrices per B * B.
        made: bytes that the loop adds to what was there before it, whatever the batch.
    """
    first, second = (one.device - matrices * one.batch_size**2 for one in (small, large))
    if small.batch_size < large.batch_size:
        slope = (second - first) / (large.batch_size - small.batch_size)
    else:
        slope = (second - large.before - made) / large.batch_size
    return max(0.0, slope), second - max(0.0, slope) * large.batch_size


def state_bytes(module: nn.Module) -> int:
    """Bytes of all parameters and buffers."""
    return sum(map(tensor_bytes, module.state_dict().values()))


def tensor_bytes(value: Tensor) -> int:
    """Bytes of a tensor's elements."""
    return value.numel() * value.element_size()


def batch_bytes(batch: Batch) -> int:
    """Bytes of what is prepared for the models."""
    return sum(tensor_bytes(value) for part in batch.inputs.values() for value in part.values())


def reset_peak(device: torch.device) -> int:
    """Start counting the peaks of a device and of this process anew; returns the bytes in use on the device."""
    status = Path("/proc/self/clear_refs")
    if sys.platform == "linux" and status.exists():
        # Freed memory that the C library keeps would hide what the next step takes.
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if trim is not None:
            trim(0)
        status.write_text("5")
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return int(torch.cuda.memory_allocated(device))
    return _status("VmRSS") or peak_bytes(device)


def peak_bytes(device: torch.device) -> int:
    """The most bytes in use since `reset_peak`; of a process, where the system cannot start anew, since it began."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    unit = 1 if sys.platform == "darwin" else 1024
    return _status("VmHWM") or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _status(name: str) -> int:
    """A size of this process as Linux tells it, 0 elsewhere."""
    path = Path("/proc/self/status")
    lines: Sequence[str] = path.read_text().splitlines() if path.is_file() else ()
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:")), 0)
