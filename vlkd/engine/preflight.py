"""What a run will take, told before it."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from vlkd.data.sources import source_name
from vlkd.distill.cache import open_cache
from vlkd.distill.cache.format import MANIFEST
from vlkd.distill.term import wanted
from vlkd.engine.cache_cost import cache_bytes
from vlkd.engine.cost import (
    Host,
    advice,
    cached_rate,
    decoding_rate,
    online_rate,
    payback,
    payback_sentence,
)
from vlkd.engine.dry_run import Setup, StoredModels, open_setup, stored_models
from vlkd.engine.measure import Measured, measure
from vlkd.engine.teaching import cache_folder, cache_spec
from vlkd.errors import UserError


@dataclass(frozen=True, kw_only=True)
class Stored:
    """The cache of a run.

    Attributes:
        sizes: bytes by name of the model.
        missing_bytes: that are not there yet.
        missing: what these are of: the model's name, and the rows and captions of a source.
        free: bytes on its disk.
    """

    sizes: dict[str, int]
    missing_bytes: int
    missing: list[tuple[str, int, int]]
    free: int


def stored(setup: Setup, models: StoredModels) -> Stored:
    """Look for each cache of the run, and estimate those that are missing.

    Raises:
        UserError: one is there that cannot serve the run.
    """
    config = replace(setup.config, teachers=replace(setup.config.teachers, views=setup.views))
    found, missing, missing_bytes = dict.fromkeys(models, 0), [], 0
    for name, (model, want) in models.items():
        spec = cache_spec(config, want)
        for ref, table in setup.sources.items():
            folder = cache_folder(config, name, ref)
            if setup.config.teachers.views and (folder / MANIFEST).is_file():
                reader = open_cache(folder, name, model, table, spec)
                found[name] += sum(entry["bytes"] for entry in reader.manifest["shards"])
                continue
            size = cache_bytes(model, table, spec, setup.accelerator)
            found[name] += size
            missing_bytes += size
            missing.append((name, len(table), table.caption_total))
    place = Path(config.teachers.folder).absolute()
    place = next(path for path in (place, *place.parents) if path.is_dir())
    return Stored(sizes=found, missing_bytes=missing_bytes, missing=missing, free=shutil.disk_usage(place).free)


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
        # Steps change the student, and with it the name of a cache of its towers.
        models = stored_models(setup)
        cache = stored(setup, models)
        return told(setup, host, measure(setup, models, host, memory), cache)


def told(setup: Setup, host: Host, found: Measured, cache: Stored) -> dict[str, Any]:
    """What was found, by name."""
    train, times = setup.config.train, found.times
    online, cached = online_rate(times, host), cached_rate(times, host)
    rate, start = online if setup.online else cached, _start_seconds(setup, found)
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
        "seconds": {
            "run": train.samples / rate + (start if setup.online else 0.0),
            "online": train.samples / online + start,
            "cached": train.samples / cached,
        },
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
        "cache": _cache_told(setup, host, found, cache) if cache.sizes else None,
    }


def _start_seconds(setup: Setup, found: Measured) -> float:
    """Of encoding all captions of a table in memory before the first step, for teachers that run beside the student."""
    if setup.config.data.stream:
        return 0.0
    reading = [
        name
        for name in setup.models
        if any(feature.startswith("text.") for feature in wanted(setup.terms, "teacher", name))
    ]
    return sum(found.builds[name].text for name in reading) * setup.table.caption_total


def _cache_told(setup: Setup, host: Host, found: Measured, cache: Stored) -> dict[str, Any]:
    samples, images = setup.config.train.samples, len(setup.table)
    online, cached = online_rate(found.times, host), cached_rate(found.times, host)
    # The other ranks wait while the first one builds.
    alone = replace(host, ranks=1)
    build = sum(found.builds[name].seconds(rows, captions, alone) for name, rows, captions in cache.missing)
    start = _start_seconds(setup, found)
    pays = payback(online=online, cached=cached, build=build, start=start, images=images, samples=samples)
    sentence = payback_sentence(
        pays,
        online=samples / online + start,
        cached=samples / cached,
        build=build,
        epochs=samples / images,
        views=setup.views,
    )
    if cache.missing_bytes > cache.free:
        sentence += " Its disk has too little room."
    if setup.config.student.frozen_towers:
        sentence = "Frozen towers are always stored."
    return {
        "views": setup.views,
        "dtype": setup.config.teachers.dtype,
        "bytes": cache.sizes,
        "missing_bytes": cache.missing_bytes,
        "free_bytes": cache.free,
        "build_seconds": build,
        "epochs_to_pay": pays.epochs,
        "runs_to_pay": pays.runs,
        "sentence": sentence,
    }
