"""The training loop."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from tqdm import tqdm

from vlkd.data.loader import BatchStream
from vlkd.data.samples import SampleSequence
from vlkd.distill.distiller import Distiller
from vlkd.engine.checkpoint import load_checkpoint, newest_checkpoint, save_checkpoint
from vlkd.engine.clock import Clock, CountedTeacher
from vlkd.engine.distributed import agreed, clip_gradients, copy_from_first_rank, every_ranks_text
from vlkd.engine.log import MetricsLog
from vlkd.engine.optim import AveragedWeights, clamp_logit_scale, learning_rate, parameter_groups
from vlkd.engine.settings import Train
from vlkd.engine.sharding import Stateful, fill_whole, shard, whole_copy
from vlkd.engine.spikes import SpikeGuard
from vlkd.engine.step import Step, backward_step
from vlkd.models.base import DualEncoderModule
from vlkd.models.composite import CompositeModel
from vlkd.weighting import Weighting

SPIKES = "spikes.jsonl"


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What a loop leaves.

    Attributes:
        student: the weights to export, on rank 0.
        heads: from its embeddings to the teachers', of the same weights.
        step: optimiser steps done.
        samples: student samples seen.
        seconds: of training, without evaluation and saving, those before a resume included.
        skipped: updates that the spike guard did not take.
    """

    student: DualEncoderModule
    heads: nn.ModuleDict
    step: int
    samples: int
    seconds: float
    skipped: int


def train(
    distiller: Distiller,
    stream: BatchStream[SampleSequence],
    weighting: Weighting,
    settings: Train,
    folder: Path,
    accelerator: Accelerator,
    evaluate: Callable[[DualEncoderModule], dict[str, float]],
) -> Outcome:
    """Train until the stream ends: data, forward and backward (`backward_step`), update, log, evaluate, save.

    The newest whole checkpoint in `folder` is continued.

    Args:
        distiller: student, heads and terms.
        stream: the batches of this rank.
        weighting: how teachers are combined.
        settings: of the optimiser, the log and the checkpoints.
        folder: of the run.
        accelerator: devices, ranks and precision.
        evaluate: figures of a student, to be logged.

    Raises:
        UserError: a loss is not finite; the sentence names the term and the samples.
    """
    steps = max(1, stream.samples // stream.batch_size)
    writing = accelerator.is_main_process
    # Before the averaged weights and the optimiser are made, so that all of them are on one device, and divided alike.
    distiller.to(accelerator.device)
    copy_from_first_rank(distiller)
    exported = nn.ModuleDict({"student": distiller.student, "heads": distiller.heads})
    whole = whole_copy(exported)
    if settings.shard:
        shard(distiller)
    if settings.compile:
        compile_towers(distiller)
    optimizer = torch.optim.AdamW(parameter_groups(distiller, settings.weight_decay), lr=settings.lr, betas=(0.9, 0.98))
    averaged = AveragedWeights(exported, settings.ema) if settings.ema else None
    modules: dict[str, Stateful] = {"distiller": distiller} | ({"averaged": averaged} if averaged else {})
    guard = SpikeGuard(settings.spike_factor, distiller)
    step, seconds = 0, 0.0
    if saved := newest_checkpoint(folder / "checkpoints"):
        state = load_checkpoint(saved, modules=modules, optimizer=optimizer)
        step, seconds = state["step"], state["seconds"]
        stream.load_state_dict(state["stream"])
        weighting.load_state_dict(state["weighting"])
        guard.load_state_dict(state["spikes"])
        accelerator.print(f"continuing from {saved} ({stream.position} samples seen)")
    log = MetricsLog(folder / "metrics.jsonl", step) if writing else None
    if writing:
        guard.write_to(folder / SPIKES, step)
    clock = counted(distiller, accelerator.device)
    last_saved = time.perf_counter()
    logged_position = stream.position
    next_evaluation = _next(stream.position, settings.eval_samples)
    bar = tqdm(total=stream.samples, initial=stream.position, unit="sample", desc="training", disable=not writing)
    distiller.train()
    batches = iter(stream)
    while step < steps:
        with clock.part("data"):
            batch = next(batches).to(accelerator.device)
        rate = learning_rate(step, steps=steps, peak=settings.lr, warmup=settings.warmup)
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.zero_grad(set_to_none=True)
        guard.before()
        found = backward_step(
            distiller, batch, weighting, accelerator, settings.accumulate, finite=not settings.spike_factor, clock=clock
        )
        norm = clip_gradients(distiller, settings.clip or float("inf"))
        step += 1
        if guard.takes(norm, step=step, samples=stream.position, keys=batch.keys):
            optimizer.step()
            if isinstance(distiller.student, CompositeModel):
                clamp_logit_scale(distiller.student.log_logit_scale, settings.max_logit_scale)
            if averaged:
                averaged.update(exported, step - 1)
        bar.update(stream.batch_size)
        ended = step == steps
        if step % settings.log_steps == 0 or ended:
            interval, shares = clock.split()
            seconds += interval
            row = _figures(distiller, found, norm, rate) | {f"time/{name}": share for name, share in shares.items()}
            row |= {"samples_per_second": (stream.position - logged_position) / interval, "left_out": len(stream.bad)}
            logged_position = stream.position
            bar.set_postfix({"loss": f"{row['loss']:.3f}", "lr": f"{rate:.1e}"}, refresh=False)
            # A skipped update may have had others.
            row = {name: value for name, value in row.items() if math.isfinite(value)}
            if log:
                log.write(step, stream.position, row)
                accelerator.log(row, step=step)
        with clock.part("aside"):
            if ended or stream.position >= next_evaluation:
                next_evaluation = _next(stream.position, settings.eval_samples)
                fill_whole(whole, averaged or exported)
                if log:
                    figures = {f"val/{name}": value for name, value in evaluate(_student(whole)).items()}
                    log.write(step, stream.position, figures)
                    accelerator.log(figures, step=step)
            due = time.perf_counter() - last_saved >= 60 * settings.save_minutes
            if agreed(ended or due) or (settings.save_steps and step % settings.save_steps == 0):
                share_left_out(stream)
                state = {"stream": stream.state_dict(), "weighting": weighting.state_dict()}
                state |= {"spikes": guard.state_dict(), "seconds": seconds}
                save_checkpoint(folder / "checkpoints", step, modules=modules, optimizer=optimizer, state=state)
                last_saved = time.perf_counter()
    bar.close()
    fill_whole(whole, averaged or exported)
    accelerator.wait_for_everyone()
    heads = whole["heads"]
    assert isinstance(heads, nn.ModuleDict)
    return Outcome(
        student=_student(whole),
        heads=heads,
        step=step,
        samples=stream.position,
        seconds=seconds,
        skipped=guard.skipped,
    )


def share_left_out(stream: BatchStream[Any]) -> None:
    """Tell all ranks which samples each of them left out since the last call."""
    for found in every_ranks_text(json.dumps(stream.unshared)):
        stream.bad |= json.loads(found)
    stream.unshared = {}


def counted(distiller: Distiller, device: torch.device) -> Clock:
    """A clock on a distiller's teachers and on what it gathers from other ranks."""
    clock = Clock(device)
    distiller.teachers = {name: CountedTeacher(teacher, clock) for name, teacher in distiller.teachers.items()}
    distiller.gather = clock.counted("sync", distiller.gather)
    return clock


def compile_towers(distiller: Distiller) -> None:
    """Compile the student's towers in place, under the same names of weights."""
    if isinstance(distiller.student, CompositeModel):
        distiller.student.image_tower.compile()
        if distiller.student.text_tower is not None:
            distiller.student.text_tower.compile(dynamic=True)


def _student(whole: nn.ModuleDict) -> DualEncoderModule:
    student = whole["student"]
    assert isinstance(student, DualEncoderModule)
    return student


def _next(position: int, interval: int) -> float:
    return (position // interval + 1) * interval if interval else float("inf")


def _figures(distiller: Distiller, found: Step, norm: Tensor, rate: float) -> dict[str, float]:
    """What is logged: each term raw and weighted, the teachers' weights, the total, the gradient's norm, the rate."""
    row = {f"loss/{name}": float(value.detach()) for name, value in found.losses.items()}
    for term in distiller.terms:
        if term.name in found.losses:
            weight = term.weight * found.balance.weights.get(term.name, 1.0)
            row[f"weighted/{term.name}"] = weight * row[f"loss/{term.name}"]
    scale = distiller.student.scale_features()["logit_scale"].detach()
    own = {"loss": float(found.total.detach()), "gradient_norm": float(norm), "lr": rate, "logit_scale": float(scale)}
    return row | found.balance.figures | own
