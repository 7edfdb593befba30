"""What a spawned rank does with a generative model: one backward pass on its part of a batch."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.distributed as dist
from helpers.tiny_conversations import blank_batch, colour_batch
from helpers.tiny_vlms import write_llava
from safetensors.torch import save_file
from torch import Tensor

from vlkd import recipes
from vlkd.data.conversation_sequence import ConversationBatch
from vlkd.distill.token_distiller import TokenDistiller
from vlkd.engine.vlm.loop import figures
from vlkd.engine.vlm.step import backward_step
from vlkd.models.load_generative import load_generative

NAMES = ["red", "blue", "a white one", "green", "a white one", "red"]
"""Answers of one and of several tokens, so that a mean of means is another number."""
PARTS = (slice(0, 2), slice(2, 6))


def write_models(folder: Path) -> None:
    """A student and another teacher with its tokenizer."""
    write_llava(folder / "teacher", seed=1)
    write_llava(folder / "student", seed=2, tokenizer=str(folder / "teacher"))


def opened(folder: Path) -> TokenDistiller:
    """All terms of Switch-KD between the two, and those of visual tokens."""
    recipe = recipes.load(recipes.find("tasks", "switch_kd"))
    method = recipe.Method(visual=0.5, relation=0.5)
    student, teacher = (load_generative(folder / name) for name in ("student", "teacher"))
    return TokenDistiller(student, recipe.terms(method), teacher)


def batch_of(distiller: TokenDistiller, names: list[str]) -> ConversationBatch:
    """These colours for both models; a blank one for none."""
    models = {"student": distiller.student, "teacher": distiller.teacher}
    return colour_batch(names, **models) if names else blank_batch(**models)


def vlm_step(distiller: TokenDistiller, names: list[str], *, micro_batch: int = 0, ranks: int = 1) -> dict[str, Tensor]:
    """What is logged, and the gradients."""
    distiller.zero_grad(set_to_none=True)
    here = SimpleNamespace(autocast=nullcontext, num_processes=ranks)
    step = backward_step(
        distiller,
        batch_of(distiller, names),
        here,
        progress=0.5,
        micro_batch=micro_batch,  # type: ignore[arg-type]
    )
    found = {name: torch.tensor(value) for name, value in figures(distiller, step).items()}
    return found | {
        f"gradient/{name}": value.grad for name, value in distiller.named_parameters() if value.grad is not None
    }


def run_vlm_rank(rank: int, folder: Path) -> None:
    """Save what this rank of two finds, with both parts and with all conversations on the second."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    distiller = opened(folder)
    found = {}
    for mode, names in {"split": NAMES[PARTS[rank]], "one empty": NAMES if rank else []}.items():
        found |= {f"{mode}/{name}": value for name, value in vlm_step(distiller, names, ranks=2).items()}
    save_file({name: value.contiguous() for name, value in found.items()}, str(folder / f"rank-{rank}.safetensors"))
    dist.destroy_process_group()
