"""What a spawned rank does with a classifier: one backward pass on its half of a batch."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.distributed as dist
from helpers.classes import CLASSES, ROWS, KnownTeacher, image_batch, known_vectors, tiny_classifier
from safetensors.torch import save_file
from torch import Tensor

from vlkd import recipes
from vlkd.config import override
from vlkd.data.samples import Batch
from vlkd.distill.class_distiller import ClassDistiller
from vlkd.distill.class_teacher import ClassTeacher
from vlkd.engine.classify.loop import _figures
from vlkd.engine.classify.step import backward_step

MODES: dict[str, dict[str, bool]] = {
    "sum": {},
    "conflicts": {"conflicts": True},
    "surgery": {"surgery": True, "conflicts": True},
}
LABELLED, POOL = [0, 3, 7, 11], [3, 20, 21, 30, 31, 32]


def part(rows: list[int], begin: int, end: int) -> Batch:
    """Some images of the whole batch."""
    whole = image_batch(rows, seed=len(rows))
    own = image_batch(rows[begin:end])
    own.inputs["student"]["pixels"] = whole.inputs["student"]["pixels"][begin:end]
    return own


WHOLE = {"labelled": part(LABELLED, 0, 4), "pool": part(POOL, 0, 6)}


def class_step(batches: Mapping[str, Batch], mode: str) -> dict[str, Tensor]:
    """What is logged, and the gradients, of one head whose statistics stand still."""
    recipe = recipes.load(recipes.find("tasks", "dho"))
    terms = recipe.terms(override(recipe.config(), ["teacher.ref=known", "method.supervised=4"]))
    teacher = ClassTeacher(KnownTeacher(), -known_vectors(), 0.01)
    student = tiny_classifier(heads="one")
    distiller = ClassDistiller(student, terms, torch.arange(ROWS) % len(CLASSES), teacher).eval()
    here = SimpleNamespace(autocast=nullcontext)
    step = backward_step(distiller, batches, here, **MODES[mode])  # type: ignore[arg-type]
    found = {name: torch.tensor(value) for name, value in _figures(distiller, step).items()}
    return found | {
        f"gradient/{name}": value.grad for name, value in distiller.named_parameters() if value.grad is not None
    }


def run_class_rank(rank: int, folder: Path) -> None:
    """Save what this rank of two finds."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    own = {"labelled": part(LABELLED, 2 * rank, 2 * rank + 2), "pool": part(POOL, 3 * rank, 3 * rank + 3)}
    # As after pictures that the first rank could not read.
    uneven = {"labelled": part(LABELLED, rank, 1 + 3 * rank), "pool": part(POOL, 2 * rank, 2 + 4 * rank)}
    found = {}
    for mode in MODES:
        found |= {f"{mode}/{name}": value for name, value in class_step(own, mode).items()}
        found |= {f"{mode}, uneven/{name}": value for name, value in class_step(uneven, mode).items()}
        blank = own if rank else own | {"labelled": image_batch([])}
        found |= {f"{mode}, one empty/{name}": value for name, value in class_step(blank, mode).items()}
    save_file({name: value.contiguous() for name, value in found.items()}, str(folder / f"rank-{rank}.safetensors"))
    dist.destroy_process_group()
