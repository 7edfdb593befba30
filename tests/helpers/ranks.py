"""What a spawned rank does: gather rows, and one backward pass of a distiller."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed as dist
from helpers.distilling import batch_of, class_terms, sequence_of, terms_of, tiny_student, tiny_teachers
from safetensors.torch import save_file
from torch import Tensor, nn

from vlkd.data.sources import Pairs
from vlkd.distill.balance import balance_teachers
from vlkd.distill.distiller import Distiller
from vlkd.distill.teachers import OnlineTeacher
from vlkd.engine.distributed import average_gradients, copy_from_first_rank, gather_rows, mean_over_ranks
from vlkd.weighting import GradientBalanced

ROWS = ([[1.0, 2.0]], [[3.0, 4.0], [5.0, 6.0], [7.0, 8.0]])
"""Per rank."""


def distil(pairs: Pairs, rows: Sequence[int], gather: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
    """Losses, teacher weights and gradients (averaged over ranks) of a distiller on the given rows of the table."""
    student, teachers = tiny_student(), tiny_teachers()
    torch.manual_seed(7)
    sources = {name: OnlineTeacher(name, model) for name, model in teachers.items()}
    terms = (*terms_of("one"), replace(terms_of("two")[1], name="images two"), *class_terms("one", "two"))
    terms = tuple(term for term in terms if term.name != "relations")
    distiller = Distiller(student, terms, sources, gather=gather)
    compared = distiller(batch_of(sequence_of(pairs, {"student": student} | teachers), rows))
    balance = balance_teachers(terms, compared, GradientBalanced(0.95, normalised=True), mean_over_ranks)
    distiller.total(compared.losses, balance.weights).backward()
    average_gradients(distiller)
    gradients = {
        f"gradient/{name}": torch.zeros_like(value) if value.grad is None else value.grad
        for name, value in distiller.named_parameters()
    }
    weights = {f"weight/{name}": torch.tensor(value) for name, value in balance.weights.items()}
    return {f"loss/{name}": value.detach() for name, value in compared.losses.items()} | weights | gradients


def synchronised_weight(rank: int) -> Tensor:
    """A layer that starts different on each rank."""
    layer = nn.Linear(2, 2)
    with torch.no_grad():
        layer.weight.fill_(rank + 1.0)
    copy_from_first_rank(layer)
    return layer.weight.detach()


def run_rank(rank: int, folder: Path, pairs: Pairs, shares: Sequence[Sequence[Sequence[int]]]) -> None:
    """Save what this rank of two finds."""
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
        "mean": mean_over_ranks(torch.tensor([1.0, 2.0]) * (rank + 1)),
        "weight": synchronised_weight(rank),
    }
    for number, share in enumerate(shares):
        result = distil(pairs, share[rank], gather_rows)
        for name, value in result.items():
            found[f"{number}/{name}"] = value
    save_file({name: value.contiguous() for name, value in found.items()}, str(folder / f"rank-{rank}.safetensors"))
    dist.destroy_process_group()
