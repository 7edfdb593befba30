"""Rows of all ranks together, with gradients."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor


def gather_rows(rows: Tensor) -> Tensor:
    """The rows of every rank, rank after rank; ranks may hold different numbers of them.

    Gradients flow back to each rank's own rows, summed over the ranks' losses. Each rank computes the loss of the whole
    global batch, so the mean over ranks that data parallelism takes is the gradient of that loss.
    """
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return rows
    world_size = dist.get_world_size()
    counts = [torch.zeros(1, dtype=torch.int64, device=rows.device) for _ in range(world_size)]
    dist.all_gather(counts, torch.tensor([len(rows)], device=rows.device))
    sizes = [int(count) for count in counts]
    padded = torch.cat([rows, rows.new_zeros(max(sizes) - len(rows), *rows.shape[1:])])
    if padded.is_floating_point():
        from torch.distributed.nn.functional import all_gather

        parts = all_gather(padded)  # type: ignore[no-untyped-call]
    else:
        wire = padded.to(torch.uint8) if padded.dtype == torch.bool else padded
        received = [torch.empty_like(wire) for _ in range(world_size)]
        dist.all_gather(received, wire)
        parts = [part.to(padded.dtype) for part in received]
    return torch.cat([part[:size] for part, size in zip(parts, sizes, strict=True)])
