"""What a spawned rank does: gather rows, and one backward pass of a distiller."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from helpers.distilling import (
    batch_of,
    by_rows_terms,
    class_terms,
    sequence_of,
    terms_of,
    tiny_student,
    tiny_teachers,
)
from safetensors.torch import save_file
from torch import Tensor, nn

from vlkd.data.sources import Pairs
from vlkd.distill.distiller import Distiller
from vlkd.distill.teachers import OnlineTeacher
from vlkd.distill.term import Term
from vlkd.engine.distributed import copy_from_first_rank, every_ranks_text, gather_rows, mean_over_ranks, own_rows
from vlkd.engine.step import backward_step
from vlkd.weighting import GradientBalanced

ROWS = ([[1.0, 2.0]], [[3.0, 4.0], [5.0, 6.0], [7.0, 8.0]])
"""Per rank."""

BY_ROWS = {
    f"{objective}{' with matches' if match else ''}": by_rows_terms(objective, match)
    for objective, match in (
        *((objective, match) for objective in ("info_nce", "siglip", "interactive") for match in (False, True)),
        ("images", False),
    )
} | {
    # One term that reads the whole match and one that reads its own rows, in one group of teachers.
    "mixed": (
        *by_rows_terms("interactive", match=True)[:2],
        *(replace(term, by_rows=False) for term in by_rows_terms("interactive", match=True)[2:]),
        *by_rows_terms("images", match=False)[:1],
    )
}
"""Methods whose terms ranks may share by rows, by name."""

MODES: dict[str, dict[str, Any]] = {
    "global": {},
    "local": {"local": True},
    "local in parts": {"local": True, "parts": 3},
}


def mixed_terms() -> tuple[Term, ...]:
    """The objectives whose teachers are weighted by their gradients."""
    terms = (*terms_of("one"), replace(terms_of("two")[1], name="images two"), *class_terms("one", "two"))
    return tuple(term for term in terms if term.name != "relations")


def distil(
    pairs: Pairs,
    rows: Sequence[int],
    terms: Sequence[Term],
    gather: Callable[[Tensor], Tensor] = lambda rows: rows,
    *,
    local: bool = False,
    parts: int = 1,
) -> dict[str, Tensor]:
    """Losses, teacher weights and gradients (averaged over ranks) of a distiller on the given rows of the table.

    Local losses also come as this rank has them before they are averaged, under `own`.
    """
    student, teachers = tiny_student(logit_bias=-3.0), tiny_teachers()
    torch.manual_seed(7)
    sources = {name: OnlineTeacher(name, model) for name, model in teachers.items()}
    own: list[Tensor] = []

    def mean(losses: Tensor) -> Tensor:
        own.append(losses)
        return mean_over_ranks(losses)

    distiller = Distiller(student, terms, sources, gather=gather, local=local, share=own_rows, mean=mean)
    batch = batch_of(sequence_of(pairs, {"student": student} | teachers), rows)
    here = SimpleNamespace(autocast=nullcontext, device=torch.device("cpu"))
    step = backward_step(distiller, batch, GradientBalanced(0.95, normalised=True), here, parts)  # type: ignore[arg-type]
    gradients = {
        f"gradient/{name}": torch.zeros_like(value) if value.grad is None else value.grad
        for name, value in distiller.named_parameters()
    }
    weights = {f"weight/{name}": torch.tensor(value) for name, value in step.balance.weights.items()}
    losses = {f"loss/{name}": value.detach() for name, value in step.losses.items()}
    return losses | weights | gradients | ({"own": own[0]} if own else {})


def synchronised_weight(rank: int) -> Tensor:
    """A layer that starts different on each rank."""
    layer = nn.Linear(2, 2)
    with torch.no_grad():
        layer.weight.fill_(rank + 1.0)
    copy_from_first_rank(layer)
    return layer.weight.detach()


def _bounds(rows: Tensor) -> tuple[int, int, int]:
    share, ranks = own_rows(rows)
    return share.start, share.stop, ranks


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
        "share": torch.tensor([*_bounds(own), *_bounds(own[:rank])]),
        "mean": mean_over_ranks(torch.tensor([1.0, 2.0]) * (rank + 1)),
        "weight": synchronised_weight(rank),
        "texts": torch.tensor(["ä" * length for length in (0, 3)] == every_ranks_text("ä" * 3 * rank)),
    }
    for number, share in enumerate(shares):
        results = {f"{number}/": distil(pairs, share[rank], mixed_terms(), gather_rows)}
        for method, terms in BY_ROWS.items():
            for mode, options in MODES.items():
                results[f"{method}/{mode}/{number}/"] = distil(pairs, share[rank], terms, gather_rows, **options)
        for prefix, result in results.items():
            found |= {f"{prefix}{name}": value for name, value in result.items()}
    save_file({name: value.contiguous() for name, value in found.items()}, str(folder / f"rank-{rank}.safetensors"))
    dist.destroy_process_group()
