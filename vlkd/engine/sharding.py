"""Sharded training (FSDP2): each rank holds a part of the student, of its gradients and of the optimiser's moments.

Each block of the towers is gathered when it runs and dropped behind it; what lies around the blocks is gathered for the
whole pass. Heads and objectives, which are small, scalars, which cannot be divided, and frozen parameters stay whole on
every rank; `average_gradients` averages the gradients of these. Buffers (running statistics) are each rank's own.

Order: weights equal on all ranks (`copy_from_first_rank`), `whole_copy`, `shard`, then averaged weights, optimiser and
`load_checkpoint`. Evaluation and export read `fill_whole`'s copy; a sharded module cannot be copied.

Verified: gloo ranks on the CPU, float32 and bf16 autocast. Not verified, for want of several GPUs: NCCL, the overlap of
communication and computation, memory and speed, more than one machine, compiled towers. Autocast keeps the bf16 copies
of gathered weights until the towers' pass ends, so that during a pass half of the whole student's float32 size is not
saved. Convolutions run in PyTorch's default layout, because FSDP2 divides no channels-last weight.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, distribute_tensor

from vlkd.distill.distiller import Distiller
from vlkd.engine.distributed import alone, first_rank, own_part
from vlkd.errors import UserError

Module = TypeVar("Module", bound=nn.Module)

SMALLEST_BLOCK = 0.01
"""Share of the student's parameters; smaller modules are gathered with what is around them."""


class Stateful(Protocol):
    """A module, or averaged weights."""

    def state_dict(self) -> dict[str, Any]:
        """Tensors by name, sharing memory with what they are the state of."""


def shard(distiller: Distiller) -> None:
    """Divide the student over all ranks, in place; on a single rank nothing happens.

    Ranks must run `student.encode` equally often: as many parts of a batch on each of them.

    Raises:
        UserError: nothing but projections is trained, on stored features.
    """
    if distiller.towers is not None:
        raise UserError("Found frozen towers, of which nothing is to be divided; train without sharding.")
    if alone():
        return
    student = distiller.student
    student.to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]
    mesh = init_device_mesh(student.device.type, (torch.distributed.get_world_size(),))
    kept = {value for value in student.parameters() if value.dim() == 0 or not value.requires_grad}
    smallest = SMALLEST_BLOCK * sum(value.numel() for value in student.parameters())
    # Parameters are dropped after every pass, also after the last: between passes there are shards alone.
    for module in (*blocks(student, smallest), student):
        fully_shard(module, mesh=mesh, reshard_after_forward=True, ignored_params=kept)
    # FSDP2 gathers around `forward`, which a dual encoder does not have.
    register_fsdp_forward_method(student, "encode")


def blocks(module: nn.Module, smallest: float) -> Iterator[nn.Module]:
    """The outermost members of lists and sequences (a transformer's layers, a ConvNet's stages) that are large enough.

    Args:
        module: whatever is searched.
        smallest: number of parameters.
    """
    listed = isinstance(module, nn.ModuleList | nn.Sequential)
    for child in module.children():
        if listed and sum(value.numel() for value in child.parameters()) >= smallest:
            yield child
        else:
            yield from blocks(child, smallest)


def whole_copy(module: Module) -> Module:
    """A frozen copy in evaluation mode for rank 0, made before `shard`; elsewhere only names and shapes."""
    copied = copy.deepcopy(module).eval().requires_grad_(False)
    return copied if first_rank() else copied.to("meta")


def fill_whole(whole: Module, source: Stateful) -> Module:
    """Put the values of all ranks' shards into rank 0's `whole_copy`, which is returned; all ranks call it.

    Where the source needs no copy, being whole itself, it may stand in both places.
    """
    if whole is source:
        return whole
    state = full_state(source.state_dict())
    if first_rank():
        load_full_state(whole.state_dict(), state)
    return whole


@torch.no_grad()
def full_state(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Dense CPU copies of tensors, gathered where they are sharded: on rank 0, nothing elsewhere; all ranks call it."""
    found = {}
    for name, value in state.items():
        whole = value.full_tensor() if isinstance(value, DTensor) else value
        if first_rank():
            found[name] = whole.detach().cpu().contiguous().clone()
    return found


@torch.no_grad()
def load_full_state(into: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> None:
    """Copy whole tensors into equally named ones; of sharded ones each rank fills its own part, without a word.

    Raises:
        ValueError: names or shapes differ.
    """
    if different := into.keys() ^ state.keys():
        raise ValueError(f"{', '.join(sorted(different)[:3])} stands on one side alone")
    for name, value in into.items():
        if value.shape != state[name].shape:
            raise ValueError(f"{name} has the shape {tuple(state[name].shape)}, not {tuple(value.shape)}")
        own_part(value).copy_(own_part(sharded_like(state[name], value)))


def sharded_like(whole: Tensor, like: Tensor) -> Tensor:
    """A whole tensor divided as another one of its shape is; itself where that one is whole, or of another shape."""
    if not isinstance(like, DTensor) or whole.shape != like.shape:
        return whole
    on_device = whole.to(like.to_local().device)
    return distribute_tensor(on_device, like.device_mesh, like.placements, src_data_rank=None)


def full_optimizer_state(
    optimizer: torch.optim.Optimizer, names: Mapping[Tensor, str]
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """An optimiser's state under `PARAMETER.ENTRY`, whole tensors on rank 0 and numbers; all ranks call it.

    Args:
        optimizer: with a state for some or all of its parameters.
        names: of its parameters.
    """
    entries = {
        f"{names[parameter]}.{entry}": value
        for parameter, values in optimizer.state.items()
        for entry, value in values.items()
    }
    tensors = full_state({name: value for name, value in entries.items() if isinstance(value, Tensor)})
    return tensors, {name: value for name, value in entries.items() if not isinstance(value, Tensor)}


def load_full_optimizer_state(
    optimizer: torch.optim.Optimizer, names: Mapping[Tensor, str], entries: Mapping[str, Any]
) -> None:
    """The inverse of `full_optimizer_state`, sharded as the parameters are; learning rates and the like stay.

    Raises:
        KeyError: an entry belongs to no parameter.
    """
    own = [value for group in optimizer.param_groups for value in group["params"]]
    number = {names[parameter]: index for index, parameter in enumerate(own)}
    state: dict[int, dict[str, Any]] = {}
    for key, value in entries.items():
        name, _, entry = key.rpartition(".")
        index = number[name]
        state.setdefault(index, {})[entry] = sharded_like(value, own[index]) if isinstance(value, Tensor) else value
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
