"""The parts of a run, measured for some seconds on this machine and these data.

Nothing is written but to temporary folders. The loop itself runs a few steps on one batch, teachers' stored features
replaced by one vector each, so that steps and memory are those of the run; data and teachers are timed alone.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch

from vlkd.data.loader import BatchStream
from vlkd.data.samples import SampleSequence
from vlkd.distill.distiller import Distiller
from vlkd.engine.cache_cost import BuildTimes, build_times
from vlkd.engine.cost import Host, Memory, Times
from vlkd.engine.dry_run import Setup, StoredModels, stream_of, teachers_of, towers_of
from vlkd.engine.footprint import (
    ODD,
    batch_bytes,
    held_bytes,
    loss_matrix_bytes,
    memories,
    peak_bytes,
    reset_peak,
    state_bytes,
)
from vlkd.engine.probe import Brief, DecodedOnce, TimedTeacher, brief, one_of_each, prepared, sample_seconds
from vlkd.engine.run import weighting_of
from vlkd.engine.teaching import HELD, cache_spec
from vlkd.models.base import DualEncoderModule

STEP_SECONDS = 15.0
DISTINCT = 32
"""Different samples in a measured batch, which repeats them."""
CPU = torch.device("cpu")


@dataclass(frozen=True, kw_only=True)
class Measured:
    """What was found.

    Attributes:
        times: per image.
        batch_size: of the steps that were measured.
        memory: of the device, and of the machine where that is another place.
        builds: per model that is, or would be, stored.
        checkpoint: bytes.
        seconds: that measuring took.
    """

    times: Times
    batch_size: int
    memory: tuple[Memory, ...]
    builds: Mapping[str, BuildTimes]
    checkpoint: int
    seconds: float


def measure(setup: Setup, models: StoredModels, host: Host, memory: int) -> Measured:
    """Time data, teachers and steps, and read the peaks of memory.

    Args:
        setup: of the run.
        models: that are, or would be, stored.
        host: cores and workers.
        memory: bytes of this machine.
    """
    started = time.perf_counter()
    config, accelerator = setup.config, setup.accelerator
    start_peak = peak_bytes(CPU)
    threads = 1 if host.workers else torch.get_num_threads()
    data, worker_bytes, decoded_bytes = {}, 0, 0.0
    streams = {online: stream_of(setup, online) for online in ({True, False} if setup.models else {False})}
    for online, stream in streams.items():
        before = reset_peak(CPU)
        data[online] = sample_seconds(stream.sequence, threads=threads)
        if online == setup.online:
            worker_bytes = peak_bytes(CPU) - before
            if isinstance(stream.sequence.decoded, DecodedOnce):
                decoded_bytes = stream.sequence.decoded.bytes_per_image() * len(setup.table)
                stream.sequence.decoded.known.clear()
    builds = {name: _build_times(setup, model, want, threads) for name, (model, want) in models.items()}
    stream = streams[setup.online]
    if not setup.online:
        for model in setup.models.values():
            model.cpu()
    batch_size = config.train.batch_size // host.ranks
    small, large, distiller, alone = _briefs(setup, stream, batch_size, memory)
    share = setup.table.captioned / len(setup.table) if config.data.stream else 0.0
    teachers = {
        name: alone[name] if setup.online else builds[name].view + share * builds[name].text for name in setup.models
    }
    held = held_bytes(distiller, config.train.ema)
    sample = prepared(stream.sequence, ODD, ODD)
    beside: dict[str, float] = {}
    if host.workers:
        # Each worker prepares four batches ahead.
        waiting = 4 * batch_bytes(sample) / len(sample.keys) * batch_size
        beside["workers"] = host.workers * (worker_bytes + waiting)
    if decoded_bytes:
        beside["pictures in memory"] = decoded_bytes
    memory_parts = memories(
        small.peaks,
        large.peaks,
        held,
        matrices=loss_matrix_bytes(distiller, sample, accelerator),
        teachers=_teacher_bytes(setup),
        beside=beside,
        start=start_peak,
        train=config.train,
        host=host,
        device=accelerator.device,
        machine=memory,
    )
    return Measured(
        times=Times(
            student=_step_seconds(small, large, batch_size) / batch_size,
            teachers=teachers,
            data=data[False],
            data_online=data.get(True, data[False]),
        ),
        batch_size=large.batch_size,
        memory=memory_parts,
        builds=builds,
        checkpoint=sum(held[name] for name in ("weights", "moments", "averaged weights")),
        seconds=time.perf_counter() - started,
    )


def _teacher_bytes(setup: Setup) -> float:
    """Of the teachers' weights that lie where the student is trained: those of cached ones stay on the machine."""
    beside = setup.online or setup.accelerator.device.type == "cpu"
    return sum(map(state_bytes, setup.models.values())) if beside else 0


def _build_times(setup: Setup, model: DualEncoderModule, want: frozenset[str], threads: int) -> BuildTimes:
    config = replace(setup.config, teachers=replace(setup.config.teachers, views=setup.views))
    size = config.teachers.batch_size if setup.accelerator.device.type != "cpu" else 16
    model.to(setup.accelerator.device)
    spec = cache_spec(config, want)
    return build_times(model, setup.table, spec, setup.accelerator, batch_size=size, threads=threads)


def _briefs(
    setup: Setup, stream: BatchStream[SampleSequence], batch_size: int, memory: int
) -> tuple[Brief, Brief, Distiller, dict[str, float]]:
    """A few steps of the loop on a small batch and on a larger one, the run's own where time and memory allow; the last
    distiller, and the seconds per image of each teacher beside it."""
    config, gpu = setup.config, setup.accelerator.device.type == "cuda"
    parts = config.train.accumulate
    limit = torch.cuda.get_device_properties(setup.accelerator.device).total_memory if gpu else memory
    size = min(batch_size, max(64 if gpu else 8, 2 * parts), max(2, batch_size // 2))
    small, distiller, alone = _steps(setup, stream, size, warmup=1, steps=2)
    per_image = (small.seconds + small.teachers) / size
    room = int(size * max(0.0, 0.6 * limit - small.peaks.before) / max(1, small.peaks.device - small.peaks.before))
    affordable = int(STEP_SECONDS / (3 * per_image))
    size = max(size, min(batch_size, affordable, room))
    if size == small.batch_size:
        return small, small, distiller, alone
    # The small one's optimiser state goes before the larger one's comes.
    del distiller
    steps = max(2, min(10 if gpu else 5, int(STEP_SECONDS / (size * per_image)) - 1))
    large, distiller, alone = _steps(setup, stream, size, warmup=3 if gpu else 1, steps=steps)
    return small, large, distiller, alone


def _steps(
    setup: Setup, stream: BatchStream[SampleSequence], size: int, *, warmup: int, steps: int
) -> tuple[Brief, Distiller, dict[str, float]]:
    config, accelerator = setup.config, setup.accelerator
    teachers, towers = teachers_of(setup, setup.online), towers_of(setup)
    banks = {
        name: {
            side: value.to(accelerator.device).expand(config.teachers.bank, -1).clone()
            for side, value in one_of_each(model, HELD, accelerator).items()
        }
        for name, model in setup.models.items()
        if config.teachers.bank
    }
    distiller = Distiller(setup.student, setup.terms, teachers, towers=towers, banks=banks)
    found = brief(
        distiller,
        stream,
        prepared(stream.sequence, min(size, DISTINCT), size),
        weighting_of(setup.recipe, config),
        config.train,
        accelerator,
        warmup=warmup,
        steps=steps,
    )
    alone = {
        name: sorted(teacher.seconds[warmup:])[len(teacher.seconds[warmup:]) // 2] / size
        for name, teacher in teachers.items()
        if isinstance(teacher, TimedTeacher)
    }
    return found, distiller, alone


def _step_seconds(small: Brief, large: Brief, batch_size: int) -> float:
    """Seconds of a step of the run's batch without its teachers: measured, or on the line through both batches."""
    if large.batch_size == batch_size:
        return large.seconds
    mean = large.seconds / large.batch_size
    if small.batch_size == large.batch_size:
        return mean * batch_size
    slope = (large.seconds - small.seconds) / (large.batch_size - small.batch_size)
    # Measurements scatter; what a step costs whatever its batch is a small part of it.
    return large.seconds + min(mean, max(0.7 * mean, slope)) * (batch_size - large.batch_size)
