"""A run from its recipe to its report: settings, data, models, loop, export, evaluation."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from types import ModuleType

import torch
from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs

from vlkd import config as settings_module
from vlkd.data.decoded import Decoded
from vlkd.data.loader import BatchStream, Consumer, SampleSequence
from vlkd.data.sources import Pairs, open_pairs, open_sources, source_name, union
from vlkd.distill.distiller import Distiller
from vlkd.distill.teachers import CachedTeacher
from vlkd.distill.term import Term, wanted
from vlkd.engine.distributed import gather_rows
from vlkd.engine.finish import finish, watched_figures
from vlkd.engine.loop import train
from vlkd.engine.settings import Run
from vlkd.engine.smoke import shrink_to_smoke
from vlkd.engine.teaching import Teaching, class_vector_banks, frozen_towers, prepare_teachers
from vlkd.errors import UserError
from vlkd.models.base import DualEncoderModule, channels_last
from vlkd.models.composite import load_composite
from vlkd.models.spec import build_composite
from vlkd.models.tokenizer import train_tokenizer
from vlkd.weighting import Fixed, Weighting, fixed_weights, uniform_weights


def run_recipe(recipe: ModuleType, assignments: Sequence[str]) -> Path:
    """Run `recipe.config()`, changed by `key=value` assignments, with `recipe.terms(config)`; returns its folder.

    Raises:
        UserError: a setting, a path, a model or the data are not as expected.
    """
    config: Run = settings_module.override(recipe.config(), assignments)
    if config.train.device == "cuda" and not torch.cuda.is_available():
        raise UserError("train.device=cuda: torch finds no GPU here; set train.device=auto or cpu.")
    accelerator = Accelerator(
        cpu=config.train.device == "cpu" or config.smoke,
        mixed_precision="bf16" if config.train.precision == "bf16" and not config.smoke else "no",
        log_with=list(config.train.trackers) or None,
        # Ranks wait while the first one fills the teacher cache.
        kwargs_handlers=[InitProcessGroupKwargs(timeout=timedelta(days=7))],
        project_dir=config.out,
    )
    # Otherwise a rank would find files that another one is just writing.
    with accelerator.main_process_first():
        if config.smoke:
            config = shrink_to_smoke(config)
            accelerator.print(
                "smoke: drawn shapes, tiny models and untrained teachers stand in for data.*, model.*, teachers.refs."
            )
        folder = claim_folder(config)
    if config.train.trackers:
        accelerator.init_trackers("vlkd")
    # Objectives may bring weights of their own.
    torch.manual_seed(config.seed)
    terms: tuple[Term, ...] = recipe.terms(config)
    weighting = weighting_of(recipe, config)
    check_names(config)
    sources = dict(zip(config.data.train, open_sources(config.data.train), strict=True))
    pairs = union(list(sources.values()))
    report_data(pairs)
    watched = {source_name(ref): open_pairs(ref) for ref in config.data.val}
    torch.manual_seed(config.seed)
    student = build_student(config, pairs, folder)
    teaching = prepare_teachers(config, terms, sources, pairs, accelerator)
    towers = frozen_towers(config, student, terms, sources, accelerator)
    stream = open_stream(config, pairs, student, terms, teaching, towers, accelerator)
    banks = class_vector_banks(config, stream.sequence, teaching, accelerator)
    torch.manual_seed(config.seed + 1)
    distiller = Distiller(student, terms, teaching.sources, towers=towers, banks=banks, gather=gather_rows)
    outcome = train(
        distiller,
        stream,
        weighting,
        config.train,
        folder,
        accelerator,
        lambda model: watched_figures(model, watched),
    )
    if accelerator.is_main_process:
        finish(config, folder, outcome, teaching.models, pairs, sorted(stream.bad))
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
    begun = folder.is_dir() and any(
        path.name != "config.json" and not (path.name == "metrics.jsonl" and not path.stat().st_size)
        for path in folder.iterdir()
    )
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
        model = load_composite(config.student.start)
    else:
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


def check_names(config: Run) -> None:
    """Raise `UserError` where two sources of one kind would have the same short name in caches and tables."""
    for kind in ("train", "val", "test"):
        refs = getattr(config.data, kind)
        names = [source_name(ref) for ref in refs]
        twice = [ref for ref, name in zip(refs, names, strict=True) if names.count(name) > 1]
        if twice:
            raise UserError(f"data.{kind}: {' and '.join(twice)} have the same last two path parts; rename a folder.")


def weighting_of(recipe: ModuleType, config: Run) -> Weighting:
    """The recipe's `weighting(config)` where it has one; else `teachers.weights`, or uniform ones."""
    if hasattr(recipe, "weighting"):
        weighting: Weighting = recipe.weighting(config)
        return weighting
    teachers = max(1, len(config.teachers.refs))
    return Fixed(fixed_weights(config.teachers.weights or uniform_weights(teachers), teachers))


def open_stream(
    config: Run,
    pairs: Pairs,
    student: DualEncoderModule,
    terms: Sequence[Term],
    teaching: Teaching,
    towers: CachedTeacher | None,
    accelerator: Accelerator,
) -> BatchStream:
    """The batches of this rank, prepared for the student and each teacher that runs beside it."""
    consumers: dict[str, Consumer] = {}
    if towers is None:
        want = wanted(terms, "student")
        consumers["student"] = Consumer(preprocessing=student.preprocessing, student=True, **_sides(want))
    for name, source in teaching.sources.items():
        if source.preprocessing is not None:
            sides = _sides(wanted(terms, "teacher", name))
            consumers[name] = Consumer(preprocessing=source.preprocessing, image=sides["image"], text=False)
    stored = [source for source in (towers, *teaching.sources.values()) if isinstance(source, CachedTeacher)]
    decoding = any(consumer.image for consumer in consumers.values())
    sequence = SampleSequence(
        pairs,
        consumers,
        config.views,
        seed=config.seed,
        view_cycle=config.teachers.views if stored else 0,
        stored_view=stored[0].view if stored else None,
        decoded=Decoded(pairs, config.data.keep_short_side) if config.data.keep_short_side and decoding else None,
        unusable={row for source in stored for row in source.unreadable_rows()},
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
