"""What ranks tell each other: rows with gradients, means, first weights, what rank 0 decided."""

from __future__ import annotations

from datetime import timedelta
from functools import cache
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor


class _AllGather(torch.autograd.Function):
    """Equal tensors of all ranks; each rank's gradient is the sum over the ranks' losses."""

    @staticmethod
    def forward(_: Any, own: Tensor) -> tuple[Tensor, ...]:
        received = [torch.empty_like(own) for _ in range(dist.get_world_size())]
        dist.all_gather(received, own.contiguous())
        return tuple(received)

    @staticmethod
    def backward(_: Any, *gradients: Tensor) -> Tensor:
        total = torch.stack(gradients)
        dist.all_reduce(total)
        return total[dist.get_rank()]


def gather_rows(rows: Tensor) -> Tensor:
    """The rows of every rank, rank after rank; ranks may hold different numbers of them.

    Gradients flow back to each rank's own rows, summed over the ranks' losses. Each rank computes the loss of the whole
    global batch, or a loss of which that one is the mean over ranks, so the mean over ranks that data parallelism takes
    of the gradients is the gradient of that loss.
    """
    if alone():
        return rows
    sizes = _row_counts(rows)
    padded = torch.cat([rows, rows.new_zeros(max(sizes) - len(rows), *rows.shape[1:])])
    if padded.is_floating_point():
        parts = list(_AllGather.apply(padded))  # type: ignore[no-untyped-call]
    else:
        wire = padded.to(torch.uint8) if padded.dtype == torch.bool else padded
        received = [torch.empty_like(wire) for _ in sizes]
        dist.all_gather(received, wire)
        parts = [part.to(padded.dtype) for part in received]
    return torch.cat([part[:size] for part, size in zip(parts, sizes, strict=True)])


def own_rows(rows: Tensor) -> tuple[slice, int]:
    """Where this rank's rows lie among those of every rank, as `gather_rows` collects them, and the number of ranks."""
    if alone():
        return slice(0, len(rows)), 1
    sizes = _row_counts(rows)
    begin = sum(sizes[: dist.get_rank()])
    return slice(begin, begin + len(rows)), len(sizes)


def _row_counts(rows: Tensor) -> list[int]:
    """How many rows each rank holds."""
    counts = [torch.zeros(1, dtype=torch.int64, device=rows.device) for _ in range(dist.get_world_size())]
    dist.all_gather(counts, torch.tensor([len(rows)], device=rows.device))
    return [int(count) for count in counts]


def alone() -> bool:
    """Whether this is the only rank."""
    return not dist.is_initialized() or dist.get_world_size() == 1


@torch.no_grad()
def mean_over_ranks(tensor: Tensor) -> Tensor:
    """The mean of a tensor over all ranks, the same bits on each; itself on one rank."""
    if alone():
        return tensor
    total = tensor.clone()
    dist.all_reduce(total)
    return total / dist.get_world_size()


@torch.no_grad()
def average_gradients(module: nn.Module) -> None:
    """Put the mean over ranks in place of every trained parameter's gradient; one that a rank lacks counts as zero.

    One flat message per dtype. A parameter that no rank used (a text tower in a batch without captions) stays without a
    gradient, so that the optimiser leaves it alone, as on one rank. Gradients of sharded parameters are means already.
    """
    if alone():
        return
    by_dtype: dict[torch.dtype, list[nn.Parameter]] = {}
    for parameter in module.parameters():
        if parameter.requires_grad and not isinstance(parameter, DTensor):
            by_dtype.setdefault(parameter.dtype, []).append(parameter)
    for parameters in by_dtype.values():
        grads = [torch.zeros_like(one) if one.grad is None else one.grad for one in parameters]
        used = torch.tensor([one.grad is not None for one in parameters], dtype=grads[0].dtype)
        flat = torch.cat([*(grad.reshape(-1) for grad in grads), used.to(grads[0].device)])
        dist.all_reduce(flat)
        # Only a rank that did not use a parameter has to learn whether another one did.
        elsewhere = flat[-len(used) :].tolist() if not used.all() else [1.0] * len(used)
        flat /= dist.get_world_size()
        parts = torch.split(flat[: -len(used)], [grad.numel() for grad in grads])
        for parameter, grad, part, ranks in zip(parameters, grads, parts, elsewhere, strict=True):
            parameter.grad = grad.copy_(part.view(grad.shape)) if ranks else None


@torch.no_grad()
def copy_from_first_rank(module: nn.Module) -> None:
    """Give all ranks the weights and buffers of rank 0; before the module is sharded."""
    if alone():
        return
    for value in module.state_dict().values():
        assert not isinstance(value, DTensor)
        dense = value.contiguous()
        dist.broadcast(dense, 0)
        value.copy_(dense)


def rank() -> int:
    """The number of this rank; 0 of the only one."""
    return 0 if alone() else dist.get_rank()


def first_rank() -> bool:
    """Whether this is rank 0, or the only one."""
    return rank() == 0


def own_part(tensor: Tensor) -> Tensor:
    """The part of a sharded tensor that this rank holds, in the same memory; a whole tensor itself."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


@torch.no_grad()
def clip_gradients(module: nn.Module, largest: float) -> Tensor:
    """Scale all gradients together so that their norm is at most `largest`; returns the norm before, ().

    Sharded and whole gradients enter one norm, the same bits on all ranks; without sharded ones this is
    `torch.nn.utils.clip_grad_norm_`. It comes behind `average_gradients`.

    Args:
        module: what is trained.
        largest: inf measures without clipping.
    """
    if not any(isinstance(parameter, DTensor) for parameter in module.parameters()):
        return nn.utils.clip_grad_norm_(module.parameters(), largest)
    gradients = [parameter.grad for parameter in module.parameters() if parameter.grad is not None]
    whole = [gradient for gradient in gradients if not isinstance(gradient, DTensor)]
    parts = [own_part(gradient) for gradient in gradients if isinstance(gradient, DTensor)]
    device = next(module.parameters()).device
    square = _square(parts, device)
    dist.all_reduce(square)
    norm = (square + _square(whole, device)).sqrt().float()
    factor = (largest / (norm + 1e-6)).clamp(max=1.0)
    for gradient in (*parts, *whole):
        gradient.mul_(factor)
    return norm


def _square(tensors: list[Tensor], device: torch.device) -> Tensor:
    norms = [torch.linalg.vector_norm(tensor, dtype=torch.float64) for tensor in tensors]
    return torch.stack(norms).square().sum() if norms else torch.zeros((), dtype=torch.float64, device=device)


@cache
def _control_group(_world: dist.ProcessGroup) -> dist.ProcessGroup:
    """A group on the CPU, so that a word between ranks waits for no accelerator; rank 0 may evaluate for hours."""
    group: dist.ProcessGroup = dist.new_group(backend="gloo", timeout=timedelta(days=7))
    return group


def _control() -> dist.ProcessGroup:
    world = dist.group.WORLD
    assert world is not None
    return _control_group(world)


def agreed(flag: bool) -> bool:
    """Rank 0's opinion, on all ranks; all of them call it."""
    if alone():
        return flag
    word = torch.tensor([flag], dtype=torch.uint8)
    dist.broadcast(word, 0, group=_control())
    return bool(word)


def first_ranks_text(text: str) -> str:
    """Rank 0's text, on all ranks; all of them call it."""
    if alone():
        return text
    words = torch.tensor(list(text.encode()), dtype=torch.uint8)
    size = torch.tensor([len(words)])
    dist.broadcast(size, 0, group=_control())
    words = words if first_rank() else torch.empty(int(size), dtype=torch.uint8)
    dist.broadcast(words, 0, group=_control())
    return bytes(words.tolist()).decode()


def each_ranks(tensor: Tensor) -> list[Tensor]:
    """The CPU tensors of all ranks, of one shape and dtype, rank after rank; all of them call it."""
    if alone():
        return [tensor]
    received = [torch.empty_like(tensor) for _ in range(dist.get_world_size())]
    dist.all_gather(received, tensor, group=_control())
    return received


def every_ranks_text(text: str) -> list[str]:
    """The texts of all ranks, rank after rank; all of them call it."""
    data = torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8) if text else torch.empty(0, dtype=torch.uint8)
    lengths = [int(length) for length in each_ranks(torch.tensor([len(data)]))]
    padded = torch.cat([data, data.new_zeros(max(lengths) - len(data))])
    parts = zip(each_ranks(padded), lengths, strict=True)
    return [part[:length].numpy().tobytes().decode() for part, length in parts]
