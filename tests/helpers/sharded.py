"""What a spawned rank does: train a sharded student, save and load it, fail to save, measure gradients."""

from __future__ import annotations

import resource
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from helpers.distilling import batch_of, class_terms, sequence_of, terms_of, tiny_student, tiny_teachers
from helpers.tiny_models import tiny_composite
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from vlkd.data.sources import Pairs
from vlkd.distill.distiller import Distiller
from vlkd.distill.teachers import OnlineTeacher
from vlkd.engine.checkpoint import load_checkpoint, newest_checkpoint, parameter_names, random_state, save_checkpoint
from vlkd.engine.distributed import (
    agreed,
    clip_gradients,
    copy_from_first_rank,
    first_ranks_text,
    gather_rows,
    own_part,
)
from vlkd.engine.optim import AveragedWeights, parameter_groups
from vlkd.engine.sharding import fill_whole, full_optimizer_state, full_state, shard, whole_copy
from vlkd.engine.step import backward_step
from vlkd.errors import UserError
from vlkd.models.base import DualEncoderModule, channels_last
from vlkd.weighting import GradientBalanced

Shares = Sequence[Sequence[int]]

STEPS: Sequence[Shares] = (((0, 1, 3, 2), (5, 7, 4)), ((0, 1, 3, 4), (2, 5, 7)), ((6, 2, 1), (0, 3, 4, 5)))
"""Per step the rows of each rank; 2, 5 and 7 have no caption, so that a rank of the second step has none."""

LATER: Sequence[Shares] = (((1, 0, 3), (4, 6, 5)), ((7, 2, 1), (6, 3, 0)))
WITHOUT_CAPTIONS: Shares = ((2, 5), (7, 2))
LARGEST_NORM = 0.5


class Device:
    """Of an `Accelerator` what a step asks for."""

    device = torch.device("cpu")

    def __init__(self, precision: str) -> None:
        self.precision = precision

    def autocast(self) -> AbstractContextManager[Any]:
        return torch.autocast("cpu", torch.bfloat16) if self.precision == "bf16" else nullcontext()


class Trial:
    """A distiller with all that stands around it in the loop.

    Args:
        pairs: the table.
        sharded: over all ranks.
        student: `tiny_student()` by default.
        precision: "fp32" or "bf16".
    """

    def __init__(
        self,
        pairs: Pairs,
        *,
        sharded: bool,
        student: DualEncoderModule | None = None,
        seed: int = 0,
        precision: str = "fp32",
    ) -> None:
        teachers = tiny_teachers()
        student = student or tiny_student(seed)
        torch.manual_seed(7 + seed)
        terms = (*terms_of("one"), replace(terms_of("two")[1], name="images two"), *class_terms("one", "two"))
        terms = tuple(term for term in terms if term.name != "relations")
        sources = {name: OnlineTeacher(name, model) for name, model in teachers.items()}
        self.distiller = Distiller(student, terms, sources, gather=gather_rows).train()
        self.sequence = sequence_of(pairs, {"student": student} | teachers)
        self.device = Device(precision)
        exported = nn.ModuleDict({"student": self.distiller.student, "heads": self.distiller.heads})
        copy_from_first_rank(self.distiller)
        self.whole = whole_copy(exported)
        if sharded:
            shard(self.distiller)
        self.exported = exported
        self.averaged = AveragedWeights(exported, 0.9)
        # A gradient that is zero but for rounding must not become a step of full length.
        self.optimizer = torch.optim.AdamW(parameter_groups(self.distiller, 0.1), lr=1e-3, betas=(0.9, 0.98), eps=1e-6)
        self.steps = 0
        self.norms: list[Tensor] = []

    @property
    def modules(self) -> dict[str, Any]:
        return {"distiller": self.distiller, "averaged": self.averaged}

    def backward(self, rows: Sequence[int], parts: int = 1) -> None:
        self.optimizer.zero_grad(set_to_none=True)
        batch = batch_of(self.sequence, rows)
        backward_step(self.distiller, batch, GradientBalanced(0.95, normalised=True), self.device, parts)  # type: ignore[arg-type]

    def step(self, rows: Sequence[int], parts: int = 1) -> None:
        self.backward(rows, parts)
        self.norms.append(clip_gradients(self.distiller, LARGEST_NORM))
        self.optimizer.step()
        self.averaged.update(self.exported, self.steps)
        self.steps += 1

    def save(self, folder: Path) -> Path:
        return save_checkpoint(
            folder, self.steps, modules=self.modules, optimizer=self.optimizer, state={"samples": 7 * self.steps}
        )

    def load(self, path: Path) -> None:
        self.steps = load_checkpoint(path, modules=self.modules, optimizer=self.optimizer)["step"]

    def found(self) -> dict[str, Tensor]:
        """All weights, averages and moments, whole, on rank 0; scalars and norms on every rank."""
        moments, _ = full_optimizer_state(self.optimizer, parameter_names(self.modules))
        groups = {
            "weight": full_state(self.distiller.state_dict()),
            "averaged": full_state(self.averaged.state_dict()),
            "moment": moments,
            "norm": {str(number): norm for number, norm in enumerate(self.norms)},
            "scalar": {name: value for name, value in self.distiller.named_parameters() if value.dim() == 0},
        }
        return {f"{group}/{name}": value.detach() for group, part in groups.items() for name, value in part.items()}


def with_dropout(trial: Trial) -> Trial:
    """The trial, its text tower dropping out from now on."""
    for module in trial.distiller.student.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.3
    return trial


def conv_student() -> DualEncoderModule:
    """A ResNet with batch statistics in the layout that FSDP2 does not take, its first layer frozen."""
    student = channels_last(tiny_composite(seed=3))
    student.image_tower.conv1.requires_grad_(False)
    return student


def trained(trial: Trial, steps: Sequence[Shares], rank: int, parts: int = 1) -> Trial:
    for share in steps:
        trial.step(share[rank], parts)
    return trial


def resumed(trial: Trial, pairs: Pairs, rank: int, folder: Path) -> dict[str, Tensor]:
    """What follows a checkpoint of a run with dropout, without and with an interruption."""
    torch.manual_seed(100 + rank)
    path = with_dropout(trial).save(folder)
    found = {f"saved/{name}": value for name, value in random_state().items()}
    whole = trained(trial, LATER, rank)
    found |= {f"uninterrupted/{name}": value for name, value in whole.found().items()}
    other = with_dropout(Trial(pairs, sharded=True, seed=9))
    torch.manual_seed(5)
    other.step(STEPS[0][rank])
    other.norms = list(whole.norms[: len(STEPS)])
    other.load(path)
    found |= {f"restored/{name}": value for name, value in random_state().items()}
    found |= {f"continued/{name}": value for name, value in trained(other, LATER, rank).found().items()}
    # An unsharded run on these ranks goes on from there, too.
    plain = Trial(pairs, sharded=False, seed=9)
    plain.load(path)
    return found | {f"unsharded/{name}": value for name, value in plain.found().items() if name[:5] != "norm/"}


def held(trial: Trial) -> dict[str, Tensor]:
    """How many numbers this rank holds of sharded weights, averages and moments, and how many there are."""
    sharded = [value for value in trial.distiller.parameters() if isinstance(value, DTensor)]
    averages = [value for value in trial.averaged.state_dict().values() if isinstance(value, DTensor)]
    moments = [trial.optimizer.state[value]["exp_avg"] for value in sharded]
    own = [sum(own_part(value).numel() for value in values) for values in (sharded, averages, moments)]
    return {"own": torch.tensor(own), "all": torch.tensor([sum(value.numel() for value in sharded)])}


def measured(pairs: Pairs, rank: int) -> dict[str, Tensor]:
    """Gradients and their norm before and after clipping."""
    trial = Trial(pairs, sharded=True)
    trial.backward(STEPS[0][rank])
    named = dict(trial.distiller.named_parameters())
    before = full_state({name: value.grad for name, value in named.items() if value.grad is not None})
    norm = clip_gradients(trial.distiller, 0.01)
    after = full_state({name: value.grad for name, value in named.items() if value.grad is not None})
    unclipped = clip_gradients(trial.distiller, float("inf"))
    return {
        "norm": norm,
        "norm after": unclipped,
        **{f"before/{name}": value for name, value in before.items()},
        **{f"after/{name}": value for name, value in after.items()},
    }


def full_disk(trial: Trial, rank: int, folder: Path) -> str:
    """What every rank is told when rank 0 cannot write a large file."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    if rank == 0:
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
    try:
        trial.save(folder)
    except UserError as error:
        return str(error)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    return "saved"


def unwritable(trial: Trial, folder: Path) -> str:
    """What every rank is told when rank 0's state is no JSON."""
    state = {"wrong": object()}
    try:
        save_checkpoint(folder, 99, modules=trial.modules, optimizer=trial.optimizer, state=state)
    except (UserError, TypeError) as error:
        return type(error).__name__
    return "saved"


def run_sharded_rank(rank: int, folder: Path, pairs: Pairs, from_one: Path) -> None:
    """Save what this rank of two finds; rank 0 has the whole tensors."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    found: dict[str, Tensor] = {}
    texts: list[str] = []

    def keep(scenario: str, tensors: dict[str, Tensor]) -> None:
        found.update({f"{scenario}/{name}": value.detach().contiguous().clone() for name, value in tensors.items()})

    trial = trained(Trial(pairs, sharded=True), STEPS, rank)
    sharded = {name for name, value in trial.distiller.named_parameters() if isinstance(value, DTensor)}
    texts.append(",".join(sorted(sharded)))
    keep("held", held(trial))
    keep("sharded", trial.found())
    filled = fill_whole(trial.whole, trial.averaged)
    if rank == 0:
        keep("filled", {name: value for name, value in filled.state_dict().items()})
    texts.append(",".join({value.device.type for value in filled.parameters()}))
    keep("resumed", resumed(trial, pairs, rank, folder / "checkpoints"))
    texts += [full_disk(trial, rank, folder / "checkpoints"), unwritable(trial, folder / "checkpoints")]
    # Rank 1 has another opinion on what there is, and takes rank 0's.
    newest = newest_checkpoint(folder / ("checkpoints" if rank == 0 else "none"))
    texts += [newest.name if newest else "none", str(newest_checkpoint(folder / "none"))]
    trial.step(WITHOUT_CAPTIONS[rank])
    keep("without captions", trial.found())

    two = trained(Trial(pairs, sharded=True), STEPS, rank, parts=2)
    keep("parts", two.found())
    half = trained(Trial(pairs, sharded=True, precision="bf16"), STEPS[:1], rank)
    keep("bf16", half.found())
    for name, sharding in {"conv": True, "conv unsharded": False}.items():
        conv = trained(Trial(pairs, sharded=sharding, student=conv_student()), STEPS, rank)
        keep(name, conv.found())
        keep(f"{name}/buffer", {key: value for key, value in conv.distiller.named_buffers()})
    loaded = Trial(pairs, sharded=True, seed=9)
    loaded.load(from_one)
    keep("from one", loaded.found())
    keep("from one/rng", random_state())
    torch.manual_seed(6)
    loaded.load(from_one)
    keep("from one again/rng", random_state())
    keep("clip", measured(pairs, rank))
    texts += [str(agreed(rank == 0)), str(agreed(rank == 1)), first_ranks_text(f"rank {rank} ä"), first_ranks_text("")]
    (folder / f"rank-{rank}.txt").write_text("\n".join(texts))
    save_file(found, str(folder / f"sharded-{rank}.safetensors"))
    dist.destroy_process_group()
