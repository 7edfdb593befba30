"""The teachers of a run: loaded, checked, and their features stored or read; frozen towers and class vectors alike."""

from __future__ import annotations

import contextlib
import hashlib
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate import Accelerator
from PIL.Image import Image
from torch import Tensor

from vlkd.data.images import BadImage
from vlkd.data.samples import SampleSequence
from vlkd.data.sources import Pairs, source_name
from vlkd.data.table import Table
from vlkd.distill.cache import CacheSpec, ensure_cache
from vlkd.distill.distiller import first_of_each
from vlkd.distill.teachers import CachedTeacher, OnlineTeacher, Teacher, text_features
from vlkd.distill.term import Term, wanted
from vlkd.engine.settings import Run
from vlkd.errors import UserError
from vlkd.models.base import DualEncoderModule, channels_last
from vlkd.models.composite import tower_names
from vlkd.models.fingerprint import model_fingerprint
from vlkd.models.load import load
from vlkd.models.self_check import self_check

CHECKED_PAIRS = 128
HELD = frozenset({"image.embed", "text.embed"})
"""Stored of every teacher, so that one pass over the data serves runs with other terms."""


@dataclass(frozen=True, kw_only=True)
class Teaching:
    """The loaded teachers, and the sources of their targets."""

    models: dict[str, DualEncoderModule]
    sources: dict[str, Teacher]


def prepare_teachers(
    config: Run, terms: Sequence[Term], sources: Mapping[str, Table], pairs: Table, accelerator: Accelerator
) -> Teaching:
    """Load and check the teachers, and open their stored features; those that are missing are computed."""
    models = load_teachers(config, pairs, accelerator)
    teaching: dict[str, Teacher] = {}
    for name, model in models.items():
        want = wanted(terms, "teacher", name)
        if config.teachers.views:
            with accelerator.main_process_first():
                teaching[name] = cached_teacher(config, name, model, sources, want | HELD)
            # It runs again in the final evaluation alone.
            model.cpu()
        else:
            texts = {feature for feature in want if feature.startswith("text.")}
            held: dict[str, Tensor] = {}
            if isinstance(pairs, Pairs):
                with accelerator.autocast():
                    held = text_features(name, model, pairs.texts(), texts)
            teaching[name] = OnlineTeacher(name, model, held)
    return Teaching(models=models, sources=teaching)


def load_teachers(config: Run, pairs: Table, accelerator: Accelerator) -> dict[str, DualEncoderModule]:
    """All teachers, checked, before any work is spent on one of them."""
    models: dict[str, DualEncoderModule] = {}
    seen: dict[str, str] = {}
    for name, ref in zip(config.teacher_names, config.teachers.refs, strict=True):
        models[name] = channels_last(load(ref, device=accelerator.device))
        first = seen.setdefault(model_fingerprint(models[name]), ref)
        if first != ref or config.teachers.refs.count(ref) > 1:
            raise UserError(f"The teachers {first} and {ref} are the same model; name each one once in teachers.refs.")
    for name, model in models.items():
        check_teacher(name, model, pairs)
    return models


def check_teacher(name: str, model: DualEncoderModule, pairs: Table) -> None:
    """Refuse a teacher whose preprocessing, outputs or image-text pairing are broken, before the first step."""
    images: list[Image] = []
    captions: list[str] = []
    # Where few rows have captions, so many more are looked at.
    looked_at = CHECKED_PAIRS * len(pairs) // max(1, pairs.captioned)
    for row in pairs.spread_rows(looked_at):
        # The data's own limit on pictures that cannot be decoded is kept elsewhere.
        with contextlib.suppress(BadImage):
            if (own := pairs.captions_of(row)) and len(images) < CHECKED_PAIRS:
                images.append(pairs.image(row))
                captions.append(own[0])
    if not images:
        raise UserError(
            f"Teacher {name} cannot be checked: no readable training image has a caption; add captioned data."
        )
    report = self_check(model, images, captions)
    print(f"teacher {name}: paired captions stand out by z = {report.z:.1f} on {report.pairs} pairs", flush=True)
    for warning in report.warnings:
        print(f"warning: {warning}", flush=True)


def cached_teacher(
    config: Run, name: str, model: DualEncoderModule, sources: Mapping[str, Table], want: frozenset[str]
) -> CachedTeacher:
    """A model's features of K views of the training data, one cache per source."""
    spec = cache_spec(config, want)
    readers = [
        ensure_cache(
            cache_folder(config, name, ref),
            name,
            model,
            source,
            spec,
            workers=config.data.workers,
            batch_size=config.teachers.batch_size,
        )
        for ref, source in sources.items()
    ]
    return CachedTeacher(name, model.width, readers)


def cache_spec(config: Run, want: frozenset[str]) -> CacheSpec:
    """What the cache of a model must be to give the wanted features."""
    return CacheSpec(
        features=tuple(sorted(feature for feature in want if not feature.startswith("logit_"))),
        views=config.teachers.views,
        view_settings=config.views,
        precision=config.train.precision,
        dtype=config.teachers.dtype,
    )


def cache_folder(config: Run, name: str, ref: str) -> Path:
    """Where the features of a model on a source are stored."""
    return Path(config.teachers.folder) / name / source_name(ref)


def frozen_towers(
    config: Run,
    student: DualEncoderModule,
    terms: Sequence[Term],
    sources: Mapping[str, Table],
    accelerator: Accelerator,
) -> CachedTeacher | None:
    """The features of frozen student towers, so that only projections run in training."""
    if not config.student.frozen_towers:
        return None
    if not config.teachers.views:
        raise UserError("student.frozen_towers=true stores tower features; set teachers.views to 1 or more.")
    features = tower_names(wanted(terms, "student"))
    name = towers_name(config, student, features)
    with accelerator.main_process_first():
        return cached_teacher(config, name, student.to(accelerator.device), sources, features)


def towers_name(config: Run, student: DualEncoderModule, features: frozenset[str]) -> str:
    """Under which features of frozen towers are stored: others have a folder of their own, equal ones share it."""
    which = hashlib.sha256(repr((model_fingerprint(student, towers=True), sorted(features))).encode()).hexdigest()[:8]
    return f"towers-{Path(config.model.image).name}-{which}"


def class_vector_banks(
    config: Run, sequence: SampleSequence, teaching: Teaching, accelerator: Accelerator
) -> dict[str, dict[str, Tensor]]:
    """Per teacher its vectors of the captions and images that come first in the first epoch; none without a bank."""
    banks: dict[str, dict[str, Tensor]] = {}
    if not config.teachers.bank:
        return banks
    table = sequence.table
    usable = (sample for p in range(len(table)) if (sample := sequence[p]).text >= 0)
    samples = list(itertools.islice(usable, config.teachers.bank))
    batches = [
        sequence.collate(samples[start : start + config.teachers.batch_size])
        for start in range(0, len(samples), config.teachers.batch_size)
    ]
    ids = torch.cat([batch.caption_ids for batch in batches])
    for name, teacher in teaching.sources.items():
        with accelerator.autocast():
            found = [teacher.targets(batch.to(accelerator.device), ("image.embed", "text.embed")) for batch in batches]
        images, texts = (torch.cat([part[key] for part in found]) for key in ("image.embed", "text.embed"))
        banks[name] = {"image.embed": images, "text.embed": texts[first_of_each(ids).to(texts.device)]}
    return banks
