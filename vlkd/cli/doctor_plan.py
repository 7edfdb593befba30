"""`vlkd doctor --plan TASK key=value ...`: what a run would take, measured in a process of its own, as a table."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import Any

from vlkd import recipes
from vlkd.cli.memory import keep_freed_memory
from vlkd.errors import UserError


def plan(task: str, settings: Sequence[str], *, memory: int, cores: int, ranks: int) -> dict[str, Any]:
    """What `vlkd train TASK key=value ...` would take, as `vlkd.engine.preflight.plan_run` tells it.

    Args:
        task: a name or a .py file.
        settings: `key=value`.
        memory: bytes of this machine.
        cores: that the run may use.
        ranks: processes of the run.

    Raises:
        UserError: whatever the run would refuse, or the machine's memory is too small even to measure.
    """
    path = recipes.find("tasks", task)
    print(f"\nplan of {task}: measuring, which takes about a minute", flush=True)
    # The peaks of memory are those of a process that has done nothing else.
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        try:
            found = pool.submit(_measured, str(path), list(settings), memory, cores, ranks).result()
        except BrokenProcessPool:
            raise UserError(
                "The measurement was killed, as a rule for want of memory; set train.batch_size lower, or "
                "train.accumulate to 2 or more."
            ) from None
    return {"task": task, "settings": list(settings), **found}


def _measured(path: str, settings: list[str], memory: int, cores: int, ranks: int) -> dict[str, Any]:
    """Runs in the process of its own."""
    keep_freed_memory()
    with open(os.devnull, "w", encoding="utf-8") as nowhere, contextlib.redirect_stderr(nowhere):
        import vlkd.models  # noqa: F401 - before anything imports torchvision
        from vlkd.engine.classify.settings import ClassifierRun
        from vlkd.engine.preflight import plan_run

        recipe = recipes.load(recipes.find("tasks", path))
        if isinstance(recipe.config(), ClassifierRun):
            raise UserError(
                "--plan measures runs of dual encoders, and this recipe trains a classifier; train it on a few "
                "train.samples instead, its metrics.jsonl says how many it sees in a second."
            )
        return plan_run(recipe, settings, memory=memory, cores=cores, ranks=ranks)


def print_plan(found: dict[str, Any]) -> None:
    """A readable table."""
    for name, value in lines(found):
        print(f"{name:<26} {value}")


def lines(found: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """Name and words of each line."""
    from vlkd.engine.cost import count, duration, gib

    run, rates, seconds, measured = (found[name] for name in ("run", "images_per_second", "seconds", "measured"))
    machine, cache = found["machine"], found["cache"]
    whole = measured["batch_size"] * machine["ranks"] == run["batch_size"]
    batch = "the run's own" if whole else f"extrapolated to {run['batch_size'] // machine['ranks']}"
    yield "measured", f"steps of {measured['batch_size']} samples ({batch}) on {machine['device']}"
    yield "steps", f"{run['steps']:,} of {run['batch_size']} samples, {run['images']:,} images"
    yield "epochs", ", ".join(f"{name} {epochs:.3g}" for name, epochs in run["epochs"].items())
    yield "checkpoint", f"{gib(run['checkpoint_bytes'])}, the newest two are kept"
    for place in found["memory"]:
        fits = "" if place["fits"] else "  TOO LITTLE"
        yield f"memory of {place['where']}", f"{gib(place['total'])} of {gib(place['available'])}{fits}"
        for name, size in place["parts"].items():
            yield f"  {name}", gib(size) + (f" ({run['accumulate']} parts)" if _in_parts(name, run) else "")
    yield "images/s", ""
    yield "  decoding, one process", count(rates["decoding_per_process"])
    yield "  decoding, all", count(rates["decoding"])
    yield "  student's step alone", count(rates["student"])
    for name, rate in rates["teachers"].items():
        yield f"  teacher {name}", count(rate)
    if cache:
        yield "  run, teachers online", count(rates["online"])
        yield "  run, teachers stored", count(rates["cached"])
    yield "  this run", count(rates["run"])
    yield "time", f"{duration(seconds['run'])} for {run['samples']:,} samples, evaluation and saving aside"
    if cache:
        sizes = ", ".join(f"{name} {gib(size)}" for name, size in cache["bytes"].items())
        yield "cache", f"{sizes} (K={cache['views']}, {cache['dtype']})"
        missing = f"{gib(cache['missing_bytes'])} in {duration(cache['build_seconds'])}"
        yield "  still to build", f"{missing}; {gib(cache['free_bytes'])} free"
        yield "  when it pays", cache["sentence"]
    yield "what limits it", found["bottleneck"]["sentence"]


def _in_parts(name: str, run: dict[str, Any]) -> bool:
    return name == "activations" and run["accumulate"] > 1
