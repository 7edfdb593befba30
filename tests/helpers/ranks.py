"""What a spawned rank does: gather rows, and one backward pass of a distiller."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed as dist
from helpers.distilling import batch_of, sequence_of, terms_of, tiny_student, tiny_teachers
from safetensors.torch import save_file
from torch import Tensor

from vlkd.data.sources import Pairs
from vlkd.distill.distiller import Distiller
from vlkd.distill.teachers import OnlineTeacher
from vlkd.engine.distributed import gather_rows

ROWS = ([[1.0, 2.0]], [[3.0, 4.0], [5.0, 6.0], [7.0, 8.0]])
"""Per rank."""


def distil(pairs: Pairs, rows: Sequence[int], gather: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
    """Losses and gradients of a distiller on the given rows of the table."""
    student, teachers = tiny_student(), tiny_teachers()
    torch.manual_seed(7)
    sources = {name: OnlineTeacher(name, model) for name, model in teachers.items()}
    terms = (*terms_of("one"), replace(terms_of("two")[1], name="images two"))
    distiller = Distiller(student, terms, sources, (0.25, 0.75), gather=gather)
    losses = distiller(batch_of(sequence_of(pairs, {"student": student} | teachers), rows))
    distiller.total(losses).backward()
    gradients = {
        f"gradient/{name}": torch.zeros_like(value) if value.grad is None else value.grad
        for name, value in distiller.named_parameters()
    }
    return {f"loss/{name}": value.detach() for name, value in losses.items()} | gradients


def run_rank(rank: int, folder: Path, pairs: Pairs, shares: Sequence[Sequence[Sequence[int]]]) -> None:
    """Save what this rank of two finds; gradients are the mean over ranks, as data parallelism takes it."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    own = torch.tensor(ROWS[rank], requires_grad=True)
    gathered = gather_rows(own)
    (gathered * torch.arange(8.0).reshape(4, 2) * (rank + 1)).sum().backward()
    assert own.grad is not None
    found = {
        "gathered": gathered.detach(),
        "own.gradient": own.grad,
        "flags": gather_rows(torch.tensor([True, False][: rank + 1])),
        "numbers": gather_rows(torch.arange(rank * 3) + 2**40),
        "empty": gather_rows(torch.zeros(0, 2)),
    }
    for number, share in enumerate(shares):
        result = distil(pairs, share[rank], gather_rows)
        for name, value in result.items():
            if name.startswith("gradient/"):
                dist.all_reduce(value)
                value /= 2
            found[f"{number}/{name}"] = value
    save_file({name: value.contiguous() for name, value in found.items()}, str(folder / f"rank-{rank}.safetensors"))
    dist.destroy_process_group()
