"""One step's losses and gradients, the batch passing the towers whole or in parts."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from vlkd.data.samples import Batch
from vlkd.distill.balance import Balance, balance_teachers
from vlkd.distill.distiller import Compared, Distiller
from vlkd.engine.clock import Clock
from vlkd.engine.distributed import average_gradients, mean_over_ranks
from vlkd.errors import UserError
from vlkd.weighting import Weighting


@dataclass(frozen=True)
class Step:
    """Attributes: losses: raw, by term. balance: the teachers' weights. total: what was differentiated, ()."""

    losses: dict[str, Tensor]
    balance: Balance
    total: Tensor


def backward_step(
    distiller: Distiller,
    batch: Batch,
    weighting: Weighting,
    accelerator: Accelerator,
    parts: int = 1,
    *,
    finite: bool = True,
    clock: Clock | None = None,
) -> Step:
    """Put the gradient of the weighted losses of all ranks' batches into the parameters.

    With several parts, the features of all parts are computed without a graph, compared together, and each part passes
    the towers again with the gradient of its features (GradCache, Gao et al., 2021, arXiv:2101.06983). Losses, teacher
    weights and gradients are those of the whole batch; the random draws of a part are replayed, and running statistics
    forget once per step.

    Args:
        distiller: student, heads and terms.
        batch: of this rank.
        weighting: how teachers are combined.
        accelerator: devices, ranks and precision.
        parts: in which the batch passes the towers.
        finite: refuse losses that are not; else they make a gradient that is not, for the caller to judge.
        clock: counts the messages between ranks.

    Raises:
        UserError: a loss is not finite; the sentence names the term and the samples.
    """
    if parts == 1:
        with accelerator.autocast():
            compared = distiller(batch)
        step = _weighted(distiller, compared, batch, weighting, finite)
        step.total.backward()  # type: ignore[no-untyped-call]
    else:
        step = _backward_in_parts(distiller, batch, weighting, accelerator, parts, finite)
    with clock.part("sync") if clock else nullcontext():
        average_gradients(distiller)
    return step


def _weighted(distiller: Distiller, compared: Compared, batch: Batch, weighting: Weighting, finite: bool) -> Step:
    if finite:
        _check_finite(compared.losses, batch)
    elif not all(torch.isfinite(loss) for loss in compared.losses.values()):
        # Weights found from them would be remembered; the update is skipped anyway.
        return Step(compared.losses, Balance({}, {}), distiller.total(compared.losses, {}))
    balance = balance_teachers(distiller.terms, compared, weighting, mean_over_ranks)
    return Step(compared.losses, balance, distiller.total(compared.losses, balance.weights))


def _backward_in_parts(
    distiller: Distiller, batch: Batch, weighting: Weighting, accelerator: Accelerator, parts: int, finite: bool
) -> Step:
    pieces = list(split(batch, parts))
    generators, found = [], []
    with torch.no_grad(), accelerator.autocast(), _frozen_statistics(distiller):
        for piece in pieces:
            generators.append(_random_state(accelerator.device))
            found.append(distiller.student_features(piece))
    rows = [name for name in distiller.wanted_of_student if not name.startswith("logit_")]
    leaves = {name: torch.cat([part[name] for part in found]) for name in rows}
    leaves = {name: value.requires_grad_(value.is_floating_point()) for name, value in leaves.items()}
    scales = {
        name: value.float()
        for name, value in distiller.student.scale_features().items()
        if name in distiller.wanted_of_student
    }
    with accelerator.autocast():
        compared = distiller.compare(leaves | scales, batch)
    step = _weighted(distiller, compared, batch, weighting, finite)
    step.total.backward()  # type: ignore[no-untyped-call]
    # Objectives may draw, too: the next step goes on behind their draws, not behind the replayed ones.
    behind = _random_state(accelerator.device)
    taken = dict.fromkeys(rows, 0)
    with _statistics_of_one_update(distiller, len(pieces)):
        for piece, generator in zip(pieces, generators, strict=True):
            _set_random_state(generator, accelerator.device)
            with accelerator.autocast():
                features = distiller.student_features(piece)
            outputs, gradients = [], []
            for name in rows:
                begin, taken[name] = taken[name], taken[name] + len(features[name])
                gradient = leaves[name].grad
                if gradient is not None and features[name].requires_grad:
                    outputs.append(features[name])
                    gradients.append(gradient[begin : taken[name]])
            if outputs:
                torch.autograd.backward(outputs, gradients)
    _set_random_state(behind, accelerator.device)
    return step


def split(batch: Batch, parts: int) -> Iterator[Batch]:
    """A batch in exactly so many consecutive parts, as ranks must agree on them; their captions follow their images."""
    texts_before = [0, *batch.captioned.long().cumsum(0).tolist()]
    for images in torch.arange(len(batch.keys)).tensor_split(parts):
        first = int(images[0]) if len(images) else len(batch.keys)
        last = first + len(images)
        begin, end = texts_before[first], texts_before[last]
        # A part without captions or images still passes the towers, as a batch does; its one row is dropped behind it.
        shown = slice(begin, end) if end > begin else slice(0, 1)
        pictures = slice(first, last) if last > first else slice(0, 1)
        yield replace(
            batch,
            keys=batch.keys[first:last],
            rows=batch.rows[first:last],
            views=batch.views[first:last],
            captioned=batch.captioned[first:last],
            texts=batch.texts[begin:end],
            caption_ids=batch.caption_ids[begin:end],
            own_ids=batch.own_ids[begin:end],
            inputs={
                name: {key: value[pictures] if key == "pixels" else value[shown] for key, value in part.items()}
                for name, part in batch.inputs.items()
            },
        )


@contextmanager
def _frozen_statistics(module: nn.Module) -> Iterator[None]:
    """Inside, batch norms normalise by the batch and leave their running statistics alone."""
    tracking = [
        child
        for child in module.modules()
        if isinstance(child, nn.modules.batchnorm._BatchNorm) and child.training and child.track_running_stats
    ]
    for child in tracking:
        child.track_running_stats = False
    try:
        yield
    finally:
        for child in tracking:
            child.track_running_stats = True


@contextmanager
def _statistics_of_one_update(module: nn.Module, parts: int) -> Iterator[None]:
    """Inside, `parts` updates of running statistics together forget as much as one update does outside."""
    momenta = [
        (child, child.momentum)
        for child in module.modules()
        if isinstance(child, nn.modules.batchnorm._BatchNorm) and child.momentum
    ]
    for child, momentum in momenta:
        child.momentum = 1 - (1 - momentum) ** (1 / parts)
    try:
        yield
    finally:
        for child, momentum in momenta:
            child.momentum = momentum


def _random_state(device: torch.device) -> list[Tensor]:
    return [torch.get_rng_state(), *([torch.cuda.get_rng_state(device)] if device.type == "cuda" else [])]


def _set_random_state(states: list[Tensor], device: torch.device) -> None:
    torch.set_rng_state(states[0])
    if device.type == "cuda":
        torch.cuda.set_rng_state(states[1], device)


def _check_finite(losses: dict[str, Tensor], batch: Batch) -> None:
    if not losses or torch.isfinite(torch.stack(list(losses.values())).sum()):
        return
    wrong = ", ".join(f"{name} = {value.item()}" for name, value in losses.items() if not value.isfinite())
    raise UserError(
        f"Found a loss that is not finite ({wrong or 'their sum'}) on the samples {', '.join(batch.keys[:8])}, ...; "
        "lower train.lr, or check these samples and the teachers."
    )
