"""The training loop of a classifier."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate import Accelerator
from tqdm import tqdm

from vlkd.data.loader import BatchStream
from vlkd.data.samples import SampleSequence
from vlkd.distill.class_distiller import ClassDistiller
from vlkd.engine.checkpoint import load_checkpoint, newest_checkpoint, save_checkpoint
from vlkd.engine.classify.settings import ClassifierTrain
from vlkd.engine.classify.step import ClassStep, backward_step
from vlkd.engine.classify.watch import Seen
from vlkd.engine.clock import Clock
from vlkd.engine.distributed import agreed, clip_gradients, copy_from_first_rank, each_ranks
from vlkd.engine.log import MetricsLog
from vlkd.engine.loop import share_left_out
from vlkd.engine.optim import learning_rate, parameter_groups
from vlkd.models.classifier import FORMAT, VERSION, Classifier, is_classifier
from vlkd.models.folder import read_layout

STUDENT = "student"
CHOSEN = "chosen"
"""Among the notes of the kept student: its step, its accuracy on validation images, alpha, beta."""


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What a loop leaves.

    Attributes:
        step: optimiser steps done.
        samples: student samples seen.
        seconds: of training, without validation and saving, those before a resume included.
        best: the chosen state: its step, its accuracy on validation images, alpha, beta.
    """

    step: int
    samples: int
    seconds: float
    best: Mapping[str, float]


def train(
    distiller: ClassDistiller,
    streams: Mapping[str, BatchStream[SampleSequence]],
    settings: ClassifierTrain,
    folder: Path,
    accelerator: Accelerator,
    watch: Callable[[Classifier], Seen],
    *,
    surgery: bool,
    choose: bool,
) -> Outcome:
    """Train for `samples`: data, forward and backward (`backward_step`), update, log, validate, save.

    The newest whole checkpoint in `folder` is continued. The student that validation images chose, or else the last, is
    kept in `folder/student`.

    Args:
        distiller: student, terms and teacher.
        streams: the batches of this rank, per part; each goes through epochs of its own.
        settings: of the optimiser, the log and the checkpoints.
        folder: of the run.
        accelerator: devices, ranks and precision.
        watch: measures the student on validation images.
        surgery: combine the labels' and the teacher's gradients by PCGrad.
        choose: keep the state of the highest validation accuracy, the first of equal ones; else the last.

    Raises:
        UserError: a loss is not finite; the sentence names the term and the images.
    """
    steps = settings.samples // settings.batch_size
    writing = accelerator.is_main_process
    distiller.to(accelerator.device)
    if distiller.teacher is not None:
        distiller.teacher.to(accelerator.device)
    copy_from_first_rank(distiller)
    optimizer = torch.optim.AdamW(parameter_groups(distiller, settings.weight_decay), lr=settings.lr)
    step, seconds, best = 0, 0.0, {"score": -1.0}
    if saved := newest_checkpoint(folder / "checkpoints"):
        state = load_checkpoint(saved, modules={"distiller": distiller}, optimizer=optimizer)
        step, seconds, best = state["step"], state["seconds"], _kept(folder, state["best"])
        for part, stream in streams.items():
            stream.load_state_dict(state["streams"][part])
        accelerator.print(f"continuing from {saved} ({step * settings.batch_size} samples seen)")
    log = MetricsLog(folder / "metrics.jsonl", step) if writing else None
    looks = {round((i + 1) * steps / settings.validations) for i in range(settings.validations)} | {steps}
    clock = Clock(accelerator.device)
    last_saved, logged = time.perf_counter(), step
    bar = tqdm(total=steps * settings.batch_size, initial=step * settings.batch_size, unit="sample", desc="training",
               disable=not writing)  # fmt: skip
    distiller.train()
    batches = {part: iter(stream) for part, stream in streams.items()}
    while step < steps:
        with clock.part("data"):
            batch = {part: next(own).to(accelerator.device) for part, own in batches.items()}
        rate = learning_rate(step, steps=steps, peak=settings.lr, warmup=settings.warmup)
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.zero_grad(set_to_none=True)
        step += 1
        logging = step % settings.log_steps == 0 or step == steps
        found = backward_step(distiller, batch, accelerator, surgery=surgery, conflicts=settings.conflicts and logging)
        norm = clip_gradients(distiller, settings.clip or float("inf"))
        optimizer.step()
        bar.update(settings.batch_size)
        if logging:
            interval, shares = clock.split()
            seconds += interval
            row = _figures(distiller, found) | {"gradient_norm": float(norm), "lr": rate}
            row |= {f"time/{name}": share for name, share in shares.items()}
            row["samples_per_second"] = (step - logged) * settings.batch_size / interval
            row["left_out"] = len({key for stream in streams.values() for key in stream.bad})
            logged = step
            bar.set_postfix({"loss": f"{row['loss']:.3f}"}, refresh=False)
            if log:
                log.write(step, step * settings.batch_size, row)
        with clock.part("aside"):
            if step in looks and writing:
                seen = watch(distiller.student)
                if log:
                    log.write(step, step * settings.batch_size, seen.figures)
                if not choose or seen.score > best["score"]:
                    best = {"score": seen.score, "step": step, "alpha": seen.alpha, "beta": seen.beta}
                    _keep(distiller.student, best, folder)
            due = time.perf_counter() - last_saved >= 60 * settings.save_minutes
            if agreed(step == steps or due) or (settings.save_steps and step % settings.save_steps == 0):
                for stream in streams.values():
                    share_left_out(stream)
                state = {"streams": {part: stream.state_dict() for part, stream in streams.items()}}
                state |= {"seconds": seconds, "best": best}
                save_checkpoint(
                    folder / "checkpoints", step, modules={"distiller": distiller}, optimizer=optimizer, state=state
                )
                last_saved = time.perf_counter()
    bar.close()
    accelerator.wait_for_everyone()
    return Outcome(step=step, samples=step * settings.batch_size, seconds=seconds, best=best)


def _keep(student: Classifier, best: Mapping[str, float], folder: Path) -> None:
    """The student in its folder, with the constants of its mix."""
    student.alpha, student.beta = best["alpha"], best["beta"]
    student.notes = student.notes | {CHOSEN: dict(best)}
    student.save(folder / STUDENT)


def _kept(folder: Path, best: dict[str, float]) -> dict[str, float]:
    """What the kept student says of itself; a killed run may have chosen it behind its checkpoint, which says `best`.

    Without a student, as a kill between two renames leaves it, nothing is chosen yet.
    """
    if not is_classifier(folder / STUDENT):
        return {"score": -1.0}
    notes = read_layout(folder / STUDENT, FORMAT, VERSION)["notes"]
    return dict(notes.get(CHOSEN, best))


def _figures(distiller: ClassDistiller, found: ClassStep) -> dict[str, float]:
    """What is logged, means over all ranks' images: each term raw and weighted, the total, what the gradients tell."""
    none = torch.tensor(math.nan)
    own = [*(found.losses.get(term.name, none) for term in distiller.terms), found.total]
    ranks = torch.stack(each_ranks(torch.stack([value.detach().float().cpu() for value in own])))
    # A rank without an image of a part has none of its loss; without any rank's there is nothing to log.
    *losses, total = ranks.nan_to_num().mean(dim=0).masked_fill(ranks.isnan().all(dim=0), math.nan).tolist()
    row: dict[str, float] = {}
    for term, loss in zip(distiller.terms, losses, strict=True):
        if not math.isnan(loss):
            row |= {f"loss/{term.name}": loss, f"weighted/{term.name}": term.weight * loss}
    return row | found.figures | {"loss": total}
