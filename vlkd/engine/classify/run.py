"""The run of a classifier from its recipe to its report: settings, data, teacher, student, loop, evaluation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import torch
from accelerate import Accelerator

from vlkd.config import override
from vlkd.data.decoded import Decoded
from vlkd.data.files import write_whole
from vlkd.data.loader import BatchStream, plain_errors
from vlkd.data.plan import Plan
from vlkd.data.plan_subset import SubsetPlan
from vlkd.data.pool import LabelledPool, open_pool
from vlkd.data.samples import Consumer, SampleSequence
from vlkd.distill.class_distiller import STUDENT, ClassDistiller
from vlkd.distill.class_terms import ClassTerm, Part, check_class_terms, heads_trained, parts_read
from vlkd.distill.teachers import CachedTeacher
from vlkd.engine.accelerator import accelerator_of
from vlkd.engine.classify.finish import compared, finish
from vlkd.engine.classify.loop import train
from vlkd.engine.classify.settings import ClassifierRun
from vlkd.engine.classify.smoke import shrink_to_smoke
from vlkd.engine.classify.step import backward_passes
from vlkd.engine.classify.teaching import Teaching, prepare_teacher
from vlkd.engine.classify.watch import Watch
from vlkd.engine.folder import claim_folder
from vlkd.errors import UserError
from vlkd.models.base import channels_last
from vlkd.models.classifier import Classifier
from vlkd.models.classifier_spec import build_classifier
from vlkd.models.composite import load_composite
from vlkd.retrieval.zero_shot import DEFAULT_TEMPLATES, class_vectors

LABELLED, HELD_OUT = "labelled.txt", "held_out.txt"
"""Lists of a run, which `vlkd prep label_pool` reads."""


def run_classifier(recipe: ModuleType, assignments: Sequence[str]) -> Path:
    """Run `recipe.config()`, changed by `key=value` assignments, with `recipe.terms(config)`; returns its folder.

    Raises:
        UserError: a setting, a path, a model or the data are not as expected.
    """
    config: ClassifierRun = override(recipe.config(), assignments)
    accelerator = open_accelerator(config)
    with accelerator.main_process_first():
        if config.smoke:
            config = shrink_to_smoke(config)
            accelerator.print("smoke: drawn shapes and an untrained teacher stand in for data.*, model.*, teacher.ref.")
        folder = claim_folder(config)
    terms: tuple[ClassTerm, ...] = recipe.terms(config)
    check_class_terms(terms, teacher=bool(config.teacher.ref))
    trained = heads_trained(terms)
    pool = open_pool(config.data, seed=config.seed)
    for sentence in pool.told:
        accelerator.print(sentence)
    if accelerator.is_main_process:
        write_keys(folder, pool)
    for ref in config.report.compare:
        compared(ref, pool)
    teaching = prepare_teacher(config, pool, accelerator) if config.teacher.ref else None
    torch.manual_seed(config.seed)
    student = build_student(config, pool, folder, trained, teaching)
    accelerator.print(
        f"student: {student.parameter_counts()['image'] / 1e6:.2f} M parameters, {len(pool.classes)} classes, "
        f"{'one head' if student.teacher_head is None else 'two heads'}"
    )
    distiller = ClassDistiller(
        student, terms, torch.from_numpy(pool.labels), teaching.teacher if teaching is not None else None
    )
    streams = open_streams(config, pool, student, terms, teaching, accelerator)
    watch = Watch(images=pool.val, mix=config.mix, trained=trained)
    # Dropout draws anew on each rank; weights are those of rank 0.
    torch.manual_seed(config.seed + 1 + accelerator.process_index)
    surgery = recipe.surgery(config) if hasattr(recipe, "surgery") else False
    with plain_errors():
        outcome = train(
            distiller,
            streams,
            config.train,
            folder,
            accelerator,
            watch,
            surgery=surgery,
            choose=config.train.choose,
        )
    if accelerator.is_main_process:
        finish(config, folder, outcome, pool, teaching, streams, backward=backward_passes(terms, surgery=surgery))
    accelerator.end_training()
    return folder


def write_keys(folder: Path, pool: LabelledPool) -> None:
    """The keys of the images whose label is used, and of those that were kept from training, one a line."""
    lists = {LABELLED: [pool.pairs.keys[row] for row in pool.labelled], HELD_OUT: list(pool.held_out)}
    for name, keys in lists.items():
        if keys:
            write_whole(folder / name, "".join(f"{key}\n" for key in keys).encode())


def open_accelerator(config: ClassifierRun) -> Accelerator:
    """The devices, ranks and precision of a run; raises `UserError` where a GPU is asked for and there is none."""
    settings = config.train
    return accelerator_of(settings.device, settings.precision, smoke=config.smoke)


def build_student(
    config: ClassifierRun,
    pool: LabelledPool,
    folder: Path,
    trained: Sequence[str],
    teaching: Teaching | None,
) -> Classifier:
    """The classifier, from a timm tower or from a dual encoder's image side; random weights from torch's generator.

    It gets no second head that nothing would train, so that none answers at random. An aligned one has the teacher's
    temperature.
    """
    spec, vectors = config.model, None
    if "teacher" not in trained:
        spec = replace(spec, heads="one", align=False)
    elif "label" not in trained and not spec.align:
        spec = replace(spec, heads="one")
    if config.model.language_init:
        if not config.model.start:
            raise UserError("model.language_init starts the heads from the student's text tower; name it: model.start.")
        own = load_composite(config.model.start)
        vectors = class_vectors(own.encode_text, pool.classes, pool.templates or DEFAULT_TEMPLATES)
    zeta = teaching.teacher.zeta if teaching is not None else 1.0
    student = build_classifier(spec, pool.classes, class_vectors=vectors, zeta=zeta, name=str(folder / STUDENT))
    if config.train.channels_last:
        student = channels_last(student)
    return student


def open_streams(
    config: ClassifierRun,
    pool: LabelledPool,
    student: Classifier,
    terms: Sequence[ClassTerm],
    teaching: Teaching | None,
    accelerator: Accelerator,
) -> Mapping[str, BatchStream[SampleSequence]]:
    """The batches of this rank, one stream for each part that the terms read, each with epochs of its own.

    The pool holds the labelled images, too. With both parts each has half of the batch; neither ends before the run.

    Raises:
        UserError: there is less than one batch, or it does not divide among parts and ranks.
    """
    parts = parts_read(terms)
    if config.train.samples < config.train.batch_size:
        raise UserError(
            f"train.samples={config.train.samples}: expected at least one batch, train.batch_size="
            f"{config.train.batch_size}."
        )
    if config.train.batch_size % (len(parts) * accelerator.num_processes):
        raise UserError(
            f"train.batch_size={config.train.batch_size} does not divide among {len(parts)} parts (labelled and pool) "
            f"and {accelerator.num_processes} ranks; change it."
        )
    consumers = {STUDENT: Consumer(preprocessing=student.preprocessing, image=True, text=False, student=True)}
    stored = None
    if teaching is not None:
        source = teaching.teacher.teacher
        if source.preprocessing is not None:
            consumers[source.name] = Consumer(preprocessing=source.preprocessing, image=True, text=False)
        stored = source if isinstance(source, CachedTeacher) else None
    decoded = Decoded(pool.pairs, config.data.keep_short_side) if config.data.keep_short_side else None
    own = config.train.batch_size // len(parts)
    steps = config.train.samples // config.train.batch_size
    plans: dict[Part, Plan] = {
        "labelled": SubsetPlan(pool.labelled, seed=config.seed),
        "pool": Plan([[len(pool.pairs)]], seed=config.seed),
    }
    streams: dict[str, BatchStream[SampleSequence]] = {}
    for part in parts:
        sequence = SampleSequence(
            pool.pairs,
            consumers,
            config.views,
            seed=config.seed,
            plan=plans[part],
            # One pass of a teacher serves runs with any seed.
            view_seed=0 if stored else config.seed,
            view_cycle=config.teacher.views if stored else 0,
            stored_view=stored.view if stored else None,
            decoded=decoded,
            unusable=stored.unreadable_rows() if stored else (),
        )
        streams[part] = BatchStream(
            sequence,
            batch_size=own,
            samples=own * steps,
            workers=config.data.workers,
            rank=accelerator.process_index,
            world_size=accelerator.num_processes,
        )
    return streams
