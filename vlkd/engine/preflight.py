"""What a run will take, told before it."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from vlkd.data.sources import source_name
from vlkd.distill.cache import open_cache
from vlkd.distill.cache.format import MANIFEST
from vlkd.engine.cache_cost import BuildTimes, cache_bytes
from vlkd.engine.cost import (
    Host,
    advice,
    cached_rate,
    decoding_rate,
    online_rate,
    payback,
    payback_sentence,
)
from vlkd.engine.dry_run import Setup, open_setup, stored_models
from vlkd.engine.measure import Measured, measure
from vlkd.engine.teaching import cache_folder, cache_spec
from vlkd.errors import UserError


@dataclass(frozen=True, kw_only=True)
class Stored:
    """The cache of a run.

    Attributes:
        sizes: bytes by name of the model.
        missing: bytes that are not there yet.
        seconds: of building these.
        free: bytes on its disk.
    """

    sizes: dict[str, int]
    missing: int
    seconds: float
    free: int


def stored(setup: Setup, builds: Mapping[str, BuildTimes], host: Host) -> Stored:
    """Look for each cache of the run, and estimate those that are missing.

    Raises:
        UserError: one is there that cannot serve the run.
    """
    config = replace(setup.config, teachers=replace(setup.config.teachers, views=setup.views))
    # The ranks wait while the first one builds.
    alone = replace(host, ranks=1)
    sizes: dict[str, int] = {}
    missing, seconds = 0, 0.0
    for name, (model, want) in stored_models(setup).items():
        spec = cache_spec(config, want)
        sizes[name] = 0
        for ref, table in setup.sources.items():
            folder = cache_folder(config, name, ref)
            if setup.config.teachers.views and (folder / MANIFEST).is_file():
                sizes[name] += sum(
                    entry["bytes"] for entry in open_cache(folder, name, model, table, spec).manifest["shards"]
                )
                continue
            size = cache_bytes(model, table, spec, setup.accelerator)
            sizes[name] += size
            missing += size
            seconds += builds[name].seconds(len(table), table.caption_total, alone)
    place = Path(config.teachers.folder).absolute()
    place = next(path for path in (place, *place.parents) if path.is_dir())
    return Stored(sizes=sizes, missing=missing, seconds=seconds, free=shutil.disk_usage(place).free)


def plan_run(
    recipe: ModuleType, assignments: Sequence[str], *, memory: int, cores: int, ranks: int = 1
) -> dict[str, Any]:
    """What a run will take, as JSON: seconds, bytes, images per second, and two sentences.

    Args:
        recipe: what is to be run.
        assignments: changes of its settings, `key=value`.
        memory: bytes of this machine.
        cores: that the run may use.
        ranks: processes that would share the batch on this machine, each with a GPU or its share of the cores.

    Raises:
        UserError: whatever the run would refuse.
    """
    with tempfile.TemporaryDirectory() as temporary:
        setup = open_setup(recipe, assignments, Path(temporary))
        size = setup.config.train.batch_size
        if ranks < 1 or size % ranks:
            raise UserError(f"A batch of {size} does not divide among {ranks} ranks; change --ranks or the batch.")
        threads = 1 if setup.accelerator.device.type == "cuda" else torch.get_num_threads()
        workers = setup.config.data.workers
        host = Host(cores=max(1, cores // ranks), threads=threads, workers=workers, ranks=ranks)
        found = measure(setup, host, memory)
        return told(setup, host, found, stored(setup, found.builds, host))


def told(setup: Setup, host: Host, found: Measured, cache: Stored) -> dict[str, Any]:
    """What was found, by name."""
    train, times = setup.config.train, found.times
    online, cached = online_rate(times, host), cached_rate(times, host)
    rate = online if setup.online else cached
    tightest = max(found.memory, key=lambda memory: memory.total / memory.available)
    part, sentence = advice(
        times,
        host,
        tightest,
        online=setup.online,
        views=setup.views,
        accumulate=train.accumulate,
        batch_size=train.batch_size // host.ranks,
    )
    weighted = bool(setup.config.data.weights)
    epochs = [coverage.epochs for coverage in setup.plan.coverage(train.samples)]
    names = [source_name(ref) for ref in setup.sources]
    return {
        "machine": {
            "device": str(setup.accelerator.device),
            "cores": host.cores * host.ranks,
            "threads": host.threads,
            "ranks": host.ranks,
        },
        "run": {
            "samples": train.samples,
            "batch_size": train.batch_size,
            "accumulate": train.accumulate,
            "steps": max(1, train.samples // train.batch_size),
            "images": len(setup.table),
            "captions": setup.table.caption_total,
            "epochs": dict(zip(names, epochs if weighted else epochs * len(names), strict=True)),
            "checkpoint_bytes": found.checkpoint,
        },
        "measured": {"batch_size": found.batch_size, "seconds": found.seconds},
        "images_per_second": {
            "decoding_per_process": 1 / (times.data_online if setup.online else times.data),
            "decoding": decoding_rate(times.data_online if setup.online else times.data, host),
            "student": host.ranks / times.student,
            "teachers": {name: host.ranks / seconds for name, seconds in times.teachers.items()},
            "online": online,
            "cached": cached,
            "run": rate,
        },
        "seconds": {"run": train.samples / rate, "online": train.samples / online, "cached": train.samples / cached},
        "memory": [
            {
                "where": memory.where,
                "parts": dict(memory.parts),
                "total": memory.total,
                "available": memory.available,
                "fits": memory.fits,
            }
            for memory in found.memory
        ],
        "bottleneck": {"part": part, "sentence": sentence},
        "cache": _cache_told(setup, cache, online, cached) if cache.sizes else None,
    }


def _cache_told(setup: Setup, cache: Stored, online: float, cached: float) -> dict[str, Any]:
    samples, images = setup.config.train.samples, len(setup.table)
    pays = payback(online=online, cached=cached, build=cache.seconds, images=images, samples=samples)
    sentence = payback_sentence(
        pays,
        online=samples / online,
        cached=samples / cached,
        build=cache.seconds,
        epochs=samples / images,
        views=setup.views,
    )
    if cache.missing > cache.free:
        sentence += " Its disk has too little room."
    if setup.config.student.frozen_towers:
        sentence = "Frozen towers are always stored."
    return {
        "views": setup.views,
        "dtype": setup.config.teachers.dtype,
        "bytes": cache.sizes,
        "missing_bytes": cache.missing,
        "free_bytes": cache.free,
        "build_seconds": cache.seconds,
        "epochs_to_pay": pays.epochs,
        "runs_to_pay": pays.runs,
        "sentence": sentence,
    }
