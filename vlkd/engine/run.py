"""A run from its recipe to its report: settings, data, models, loop, export, evaluation."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import torch
from accelerate import Accelerator

from vlkd import config as settings_module
from vlkd.data.decoded import Decoded
from vlkd.data.loader import BatchStream, Consumer, SampleSequence
from vlkd.data.sources import Pairs, open_pairs, open_union
from vlkd.distill.distiller import Distiller
from vlkd.distill.teachers import OnlineTeacher, StoredTeacher, Teacher, stored_teacher
from vlkd.distill.term import Term, wanted
from vlkd.engine.distributed import gather_rows
from vlkd.engine.finish import finish, retrieval_figures
from vlkd.engine.loop import train
from vlkd.engine.settings import Run
from vlkd.engine.smoke import shrink_to_smoke
from vlkd.errors import UserError
from vlkd.models.base import DualEncoderModule
from vlkd.models.composite import load_composite
from vlkd.models.load import load
from vlkd.models.self_check import self_check
from vlkd.models.spec import build_composite
from vlkd.models.tokenizer import train_tokenizer
from vlkd.weighting import fixed_weights, uniform_weights

CHECKED_PAIRS = 128
HELD = frozenset({"image.embed", "text.embed", "logit_scale"})
"""Held for every teacher, so that one pass over the data serves runs with other terms."""


@dataclass(frozen=True, kw_only=True)
class Teaching:
    """The loaded teachers, and the sources of their targets."""

    models: dict[str, DualEncoderModule]
    sources: dict[str, Teacher]


def run_recipe(recipe: ModuleType, assignments: Sequence[str]) -> Path:
    """Run `recipe.config()`, changed by `key=value` assignments, with `recipe.terms(config)`; returns its folder.

    Raises:
        UserError: a setting, a path, a model or the data are not as expected.
    """
    config: Run = settings_module.override(recipe.config(), assignments)
    if config.smoke:
        config = shrink_to_smoke(config)
    folder = claim_folder(config)
    accelerator = Accelerator(
        cpu=config.train.device == "cpu" or config.smoke,
        mixed_precision="bf16" if config.train.precision == "bf16" else "no",
        log_with=list(config.train.trackers) or None,
        project_dir=str(folder),
    )
    if config.train.trackers:
        accelerator.init_trackers("vlkd")
    terms: tuple[Term, ...] = recipe.terms(config)
    pairs = open_union(config.data.train)
    report_data(pairs)
    torch.manual_seed(config.seed)
    student = build_student(config, pairs, folder)
    teaching = prepare_teachers(config, terms, pairs, accelerator)
    towers = frozen_towers(config, student, pairs)
    weights = (
        fixed_weights(config.teachers.weights, len(teaching.sources))
        if config.teachers.weights
        else uniform_weights(len(teaching.sources))
    )
    torch.manual_seed(config.seed + 1)
    distiller = Distiller(student, terms, teaching.sources, weights, towers=towers, gather=gather_rows)
    stream = open_stream(config, pairs, student, terms, teaching, towers, accelerator)
    watched = open_pairs(config.data.val) if config.data.val else None
    outcome = train(
        distiller,
        stream,
        config.train,
        folder,
        accelerator,
        lambda model: retrieval_figures(model, watched) if watched else {},
    )
    if accelerator.is_main_process:
        finish(config, folder, outcome, distiller, teaching.models, pairs)
    accelerator.end_training()
    return folder


def claim_folder(config: Run) -> Path:
    """The output folder, new or of the same settings.

    Raises:
        UserError: it belongs to a run with other settings, or is no run's folder.
    """
    folder = Path(config.out)
    settings = settings_module.to_json(config)
    stored = folder / "config.json"
    # What stopped before its first step left nothing but its settings: a corrected command may have the folder.
    begun = folder.is_dir() and any(path.name != "config.json" for path in folder.iterdir())
    if stored.is_file() and begun:
        found = settings_module.differences(json.loads(stored.read_text()), json.loads(json.dumps(settings)))
        if found:
            raise UserError(
                f"{folder} belongs to a run with other settings ({'; '.join(found[:4])}); "
                "give the same ones to continue it, or another out=FOLDER."
            )
    elif begun:
        raise UserError(f"{folder} holds files that are no run's; give a new or empty folder with out=FOLDER.")
    folder.mkdir(parents=True, exist_ok=True)
    temporary = folder / f".config.json.{os.getpid()}"
    temporary.write_text(json.dumps(settings, indent=2) + "\n")
    temporary.replace(stored)
    return folder


def report_data(pairs: Pairs) -> None:
    """One line about what was found."""
    labelled = sum(1 for captions in pairs.captions if captions)
    left_out = f", {len(pairs.problems)} left out (first: {pairs.problems[0]})" if pairs.problems else ""
    print(f"data: {len(pairs)} images, {labelled} with {len(pairs.texts())} captions{left_out}", flush=True)


def build_student(config: Run, pairs: Pairs, folder: Path) -> DualEncoderModule:
    """The student: from a folder, or built, with a tokenizer trained on the captions where it needs one."""
    if config.student.start:
        return channels_last(load_composite(config.student.start))
    tokenizer = None
    if config.model.text == "compact" and not config.model.tokenizer:
        tokenizer = train_tokenizer(dict.fromkeys(pairs.texts()), vocab_size=config.student.vocab_size)
    model = build_composite(config.model, tokenizer=tokenizer, name=str(folder / "student"))
    if config.student.frozen_towers:
        model.image_tower.requires_grad_(False)
        if model.text_tower is not None:
            model.text_tower.requires_grad_(False)
    channels_last(model)
    counts = model.parameter_counts()
    print(f"student: {counts['image'] / 1e6:.2f} M image and {counts['text'] / 1e6:.2f} M text parameters", flush=True)
    return model


def channels_last(model: DualEncoderModule) -> DualEncoderModule:
    """The model in the layout in which the CPU's bf16 convolutions are about twice as fast, and no others slower."""
    return model.to(memory_format=torch.channels_last)  # type: ignore[call-overload, no-any-return]


def prepare_teachers(config: Run, terms: Sequence[Term], pairs: Pairs, accelerator: Accelerator) -> Teaching:
    """Load, check and, where asked, run the teachers over the data once."""
    models: dict[str, DualEncoderModule] = {}
    sources: dict[str, Teacher] = {}
    for name, ref in zip(config.teacher_names, config.teachers.refs, strict=True):
        model = channels_last(load(ref, device=accelerator.device))
        check_teacher(name, model, pairs)
        models[name] = model
        if not config.teachers.views:
            sources[name] = OnlineTeacher(name, model)
            continue
        with accelerator.main_process_first():
            sources[name] = hold_features(config, name, model, pairs, wanted(terms, "teacher", name) | HELD)
    return Teaching(models=models, sources=sources)


def check_teacher(name: str, model: DualEncoderModule, pairs: Pairs) -> None:
    """Refuse a teacher whose preprocessing, outputs or image-text pairing are broken, before the first step."""
    rows = [i for i, captions in enumerate(pairs.captions) if captions]
    rows = rows[:: max(1, len(rows) // CHECKED_PAIRS)][:CHECKED_PAIRS]
    if not rows:
        raise UserError(f"Teacher {name} cannot be checked: no training image has a caption; add captioned data.")
    report = self_check(model, [pairs.image(i) for i in rows], [pairs.captions[i][0] for i in rows])
    print(f"teacher {name}: paired captions stand out by z = {report.z:.1f} on {report.pairs} pairs", flush=True)
    for warning in report.warnings:
        print(f"warning: {warning}", flush=True)


def hold_features(
    config: Run, name: str, model: DualEncoderModule, pairs: Pairs, want: frozenset[str]
) -> StoredTeacher:
    """Features of K views of the training data, computed or read."""
    return stored_teacher(
        name,
        model,
        pairs,
        want,
        views=config.teachers.views,
        settings=config.views,
        view_seed=0,
        folder=Path(config.teachers.folder),
        workers=config.data.workers,
        batch_size=config.teachers.batch_size,
        precision=config.train.precision,
    )


def frozen_towers(config: Run, student: DualEncoderModule, pairs: Pairs) -> StoredTeacher | None:
    """The features of frozen student towers, so that only projections run in training."""
    if not config.student.frozen_towers:
        return None
    if not config.teachers.views:
        raise UserError("student.frozen_towers=true holds tower features in memory; set teachers.views to 1 or more.")
    name = "towers-" + Path(config.model.image).name
    return hold_features(config, name, student, pairs, frozenset({"image.pooled", "text.pooled"}))


def open_stream(
    config: Run,
    pairs: Pairs,
    student: DualEncoderModule,
    terms: Sequence[Term],
    teaching: Teaching,
    towers: StoredTeacher | None,
    accelerator: Accelerator,
) -> BatchStream:
    """The batches of this rank, prepared for the student and each teacher that runs beside it."""
    consumers: dict[str, Consumer] = {}
    if towers is None:
        want = wanted(terms, "student")
        consumers["student"] = Consumer(preprocessing=student.preprocessing, student=True, **_sides(want))
    for name, source in teaching.sources.items():
        if source.preprocessing is not None:
            want = wanted(terms, "teacher", name)
            consumers[name] = Consumer(preprocessing=source.preprocessing, **_sides(want))
    decoding = any(consumer.image for consumer in consumers.values())
    sequence = SampleSequence(
        pairs,
        consumers,
        config.views,
        seed=config.seed,
        view_cycle=config.teachers.views if towers or teaching.sources else 0,
        decoded=Decoded(pairs, config.data.keep_short_side) if config.data.keep_short_side and decoding else None,
        unusable=towers.unreadable_rows() if towers else (),
    )
    return BatchStream(
        sequence,
        batch_size=config.train.batch_size,
        samples=config.train.samples,
        workers=config.data.workers,
        rank=accelerator.process_index,
        world_size=accelerator.num_processes,
    )


def _sides(want: frozenset[str]) -> dict[str, bool]:
    return {side: any(name.startswith(f"{side}.") for name in want) for side in ("image", "text")}
