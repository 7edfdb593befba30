"""The training loop."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from tqdm import tqdm

from vlkd.data.loader import BatchStream
from vlkd.distill.distiller import Distiller
from vlkd.engine.checkpoint import load_checkpoint, save_checkpoint, whole_checkpoints
from vlkd.engine.distributed import copy_from_first_rank
from vlkd.engine.log import MetricsLog
from vlkd.engine.optim import AveragedWeights, clamp_logit_scale, learning_rate, parameter_groups
from vlkd.engine.settings import Train
from vlkd.engine.step import Step, backward_step
from vlkd.models.base import DualEncoderModule
from vlkd.models.composite import CompositeModel
from vlkd.weighting import Weighting


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What a loop leaves.

    Attributes:
        student: the weights to export.
        heads: from its embeddings to the teachers', of the same weights.
        step: optimiser steps done.
        samples: student samples seen.
        seconds: in the loop, those before a resume included.
    """

    student: DualEncoderModule
    heads: nn.ModuleDict
    step: int
    samples: int
    seconds: float


def train(
    distiller: Distiller,
    stream: BatchStream,
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
    # Before the averaged weights and the optimiser are made, so that all of them are on one device.
    distiller.to(accelerator.device)
    optimizer = torch.optim.AdamW(parameter_groups(distiller, settings.weight_decay), lr=settings.lr, betas=(0.9, 0.98))
    exported = nn.ModuleDict({"student": distiller.student, "heads": distiller.heads})
    averaged = AveragedWeights(exported, settings.ema) if settings.ema else None
    modules: dict[str, nn.Module] = {"distiller": distiller} | ({"averaged": averaged.module} if averaged else {})
    step, earlier = 0, 0.0
    if saved := whole_checkpoints(folder / "checkpoints"):
        state = load_checkpoint(saved[-1], modules=modules, optimizer=optimizer)
        step, earlier = state["step"], state["seconds"]
        stream.load_state_dict(state["stream"])
        weighting.load_state_dict(state["weighting"])
        accelerator.print(f"continuing from {saved[-1]} ({stream.position} samples seen)")
    log = MetricsLog(folder / "metrics.jsonl", step) if accelerator.is_main_process else None
    copy_from_first_rank(distiller)
    best = averaged.module if averaged else exported
    student, heads = best["student"], best["heads"]
    assert isinstance(student, DualEncoderModule)
    assert isinstance(heads, nn.ModuleDict)
    started = last_saved = last_logged = time.perf_counter()
    logged_position = stream.position
    next_evaluation = _next(stream.position, settings.eval_samples)
    bar = tqdm(
        total=stream.samples,
        initial=stream.position,
        unit="sample",
        desc="training",
        disable=not accelerator.is_main_process,
    )
    distiller.train()
    for batch in stream:
        batch = batch.to(accelerator.device)
        rate = learning_rate(step, steps=steps, peak=settings.lr, warmup=settings.warmup)
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.zero_grad(set_to_none=True)
        found = backward_step(distiller, batch, weighting, accelerator, settings.accumulate)
        norm = nn.utils.clip_grad_norm_(distiller.parameters(), settings.clip or float("inf"))
        optimizer.step()
        if isinstance(distiller.student, CompositeModel):
            clamp_logit_scale(distiller.student.log_logit_scale, settings.max_logit_scale)
        if averaged:
            averaged.update(exported, step)
        step += 1
        bar.update(stream.batch_size)
        ended = step == steps
        if log and (step % settings.log_steps == 0 or ended):
            now = time.perf_counter()
            row = _figures(distiller, found, norm, rate)
            row["samples_per_second"] = (stream.position - logged_position) / (now - last_logged)
            last_logged, logged_position = now, stream.position
            bar.set_postfix({"loss": f"{row['loss']:.3f}", "lr": f"{rate:.1e}"}, refresh=False)
            log.write(step, stream.position, row)
            accelerator.log(row, step=step)
        if log and (ended or stream.position >= next_evaluation):
            next_evaluation = _next(stream.position, settings.eval_samples)
            figures = evaluate(student)
            log.write(step, stream.position, {f"val/{name}": value for name, value in figures.items()})
            accelerator.log({f"val/{name}": value for name, value in figures.items()}, step=step)
        if accelerator.is_main_process and (ended or time.perf_counter() - last_saved >= 60 * settings.save_minutes):
            save_checkpoint(
                folder / "checkpoints",
                step,
                modules=modules,
                optimizer=optimizer,
                state={
                    "stream": stream.state_dict(),
                    "weighting": weighting.state_dict(),
                    "seconds": earlier + time.perf_counter() - started,
                },
            )
            last_saved = time.perf_counter()
        if ended:
            break
    bar.close()
    accelerator.wait_for_everyone()
    seconds = earlier + last_logged - started
    return Outcome(student=student, heads=heads, step=step, samples=stream.position, seconds=seconds)


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
