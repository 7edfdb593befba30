"""The loop of one stage: data, forward and backward, update, log, questions of validation, save."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import torch
from accelerate import Accelerator
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

from vlkd.data.conversation_sequence import ConversationSequence
from vlkd.data.loader import BatchStream
from vlkd.distill.token_distiller import TokenDistiller
from vlkd.engine.checkpoint import load_checkpoint, newest_checkpoint, save_checkpoint
from vlkd.engine.clock import Clock
from vlkd.engine.distributed import agreed, clip_gradients, copy_from_first_rank, each_ranks
from vlkd.engine.log import MetricsLog
from vlkd.engine.loop import share_left_out
from vlkd.engine.optim import learning_rate, parameter_groups
from vlkd.engine.vlm.settings import StageSettings, VlmTrain
from vlkd.engine.vlm.stages import Stage
from vlkd.engine.vlm.step import VlmStep, backward_step
from vlkd.models.base import batch_norms
from vlkd.models.generative import GenerativeVLM

Watch = Callable[[GenerativeVLM], Mapping[str, float]]


@dataclass(frozen=True, kw_only=True)
class Before:
    """What earlier stages did. Attributes: steps of the optimiser. samples: conversations seen."""

    steps: int = 0
    samples: int = 0


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What a stage leaves.

    Attributes:
        steps: of the optimiser.
        samples: conversations seen.
        tokens: answer tokens among them.
        seconds: of training, without validation and saving, those before a resume included.
        tflop: of all passes, the teacher's and those that are recomputed included, two for each multiplication with its
            addition; counted on one step.
        bad: conversations that could not be used, and why.
    """

    steps: int
    samples: int
    tokens: float
    seconds: float
    tflop: float
    bad: dict[str, str]


def train(
    distiller: TokenDistiller,
    stream: BatchStream[ConversationSequence],
    stage: Stage,
    settings: VlmTrain,
    folder: Path,
    checkpoints: Path,
    accelerator: Accelerator,
    watch: Watch,
    before: Before,
) -> Outcome:
    """Train for the stage's samples; the newest whole checkpoint of the stage is continued.

    Args:
        distiller: student, terms and teacher; what does not learn in this stage is frozen.
        stream: the batches of this rank.
        stage: its length and rate.
        settings: what all stages share.
        folder: of the run, whose metrics.jsonl is written.
        checkpoints: of this stage.
        accelerator: devices, ranks and precision.
        watch: figures of the student on validation questions, {} where there are none.
        before: of the earlier stages, after which steps are numbered.

    Raises:
        UserError: a loss is not finite; the sentence names the term and the conversations.
    """
    own, steps, writing = stage.settings, stage.steps, accelerator.is_main_process
    distiller.to(accelerator.device)
    modules = trained_modules(distiller)
    for module in modules.values():
        copy_from_first_rank(module)
    optimizer = torch.optim.AdamW(rated_groups(distiller, own, settings.weight_decay), lr=own.lr)
    step, seconds, tokens, flop = 0, 0.0, 0.0, 0.0
    if saved := newest_checkpoint(checkpoints):
        state = load_checkpoint(saved, modules=modules, optimizer=optimizer)
        stream.load_state_dict(state["stream"])
        step, seconds, tokens, flop = (state[name] for name in ("step", "seconds", "tokens", "flop"))
        accelerator.print(f"continuing from {saved} ({step * own.batch_size} conversations seen)")
    log = MetricsLog(folder / "metrics.jsonl", before.steps + step) if writing else None
    looks = {round((i + 1) * steps / settings.validations) for i in range(settings.validations)} | {steps}
    clock = Clock(accelerator.device)
    last_saved, logged = time.perf_counter(), step
    bar = tqdm(total=steps * own.batch_size, initial=step * own.batch_size, unit="sample", desc=stage.name,
               disable=not writing)  # fmt: skip
    distiller.train()
    if own.freeze_batch_norm:
        freeze_batch_norm(distiller.student)
    batches = iter(stream)
    while step < steps:
        with clock.part("data"):
            batch = next(batches).to(accelerator.device)
        rate = learning_rate(step, steps=steps, peak=own.lr, warmup=own.warmup)
        for group in optimizer.param_groups:
            group["lr"] = rate * group["share"]
        optimizer.zero_grad(set_to_none=True)
        # One step is counted for all: but for their lengths, batches are alike.
        counter = FlopCounterMode(display=False)
        with nullcontext() if flop else counter:
            found = backward_step(
                distiller, batch, accelerator, progress=step / steps, micro_batch=settings.micro_batch
            )
        flop = flop or counter.get_total_flops() * accelerator.num_processes / own.batch_size
        norm = clip_gradients(distiller, settings.clip or float("inf"))
        optimizer.step()
        step += 1
        tokens += found.tokens
        bar.update(own.batch_size)
        if step % settings.log_steps == 0 or step == steps:
            interval, shares = clock.split()
            seconds += interval
            row = figures(distiller, found) | {"gradient_norm": float(norm), "lr": rate}
            row |= {"lr/vision": rate * own.vision_lr / own.lr} if own.vision_lr else {}
            # Both models are passed through in one graph, so the rest is not divided between them.
            row |= {"time/data": shares["data"], "time/models": 1 - shares["data"]}
            row["samples_per_second"] = (step - logged) * own.batch_size / interval
            row["left_out"] = len(stream.bad)
            logged = step
            bar.set_postfix({"loss": f"{row['loss']:.3f}"}, refresh=False)
            if log:
                log.write(before.steps + step, before.samples + step * own.batch_size, row)
        with clock.part("aside"):
            if step in looks and writing and (seen := watch(distiller.student)) and log:
                log.write(before.steps + step, before.samples + step * own.batch_size, dict(seen))
            due = time.perf_counter() - last_saved >= 60 * settings.save_minutes
            if agreed(step == steps or due) or (settings.save_steps and step % settings.save_steps == 0):
                share_left_out(stream)
                state = {"stream": stream.state_dict(), "seconds": seconds, "tokens": tokens, "flop": flop}
                save_checkpoint(checkpoints, step, modules=modules, optimizer=optimizer, state=state)
                last_saved = time.perf_counter()
    bar.close()
    accelerator.wait_for_everyone()
    samples = step * own.batch_size
    return Outcome(
        steps=step, samples=samples, tokens=tokens, seconds=seconds, tflop=samples * flop / 1e12, bad=dict(stream.bad)
    )


def freeze_batch_norm(model: nn.Module) -> None:
    """Let batch norms normalise by their running statistics, and leave these as they are, in training mode too."""
    for module in batch_norms(model):
        module.eval()


def rated_groups(distiller: TokenDistiller, own: StageSettings, weight_decay: float) -> list[dict[str, object]]:
    """The optimiser's groups, each with the `share` of the stage's rate that its parameters take."""
    vision = {id(value) for value in distiller.student.part_parameters("vision")}
    shares = {True: own.vision_lr / own.lr if own.vision_lr else 1.0, False: 1.0}
    found: list[dict[str, object]] = []
    for group in parameter_groups(distiller, weight_decay):
        values = cast("list[nn.Parameter]", group["params"])
        for seeing, share in shares.items():
            if part := [value for value in values if (id(value) in vision) == seeing]:
                found.append({**group, "params": part, "share": share})
    return found


def trained_modules(distiller: TokenDistiller) -> dict[str, nn.Module]:
    """What a checkpoint holds: the teacher never changes, and may be large."""
    bridge = {} if distiller.bridge is None else {"bridge": distiller.bridge}
    return {"student": distiller.student, **bridge}


def figures(distiller: TokenDistiller, found: VlmStep) -> dict[str, float]:
    """What is logged, means over the ranks: each term raw and weighted, and the total."""
    values = torch.stack([*(found.losses[term.name].float().cpu() for term in distiller.terms), found.total.cpu()])
    *losses, total = torch.stack(each_ranks(values)).mean(dim=0).tolist()
    row: dict[str, float] = {}
    for term, loss in zip(distiller.terms, losses, strict=True):
        row |= {f"loss/{term.name}": loss, f"weighted/{term.name}": term.weight * loss}
    return row | {"loss": total, "answer_tokens": found.tokens}
