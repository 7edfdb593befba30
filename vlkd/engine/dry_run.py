"""A run that is set up without its folder and its caches: stand-ins give what stored features would."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from accelerate import Accelerator

from vlkd.config import override
from vlkd.data.loader import BatchStream
from vlkd.data.plan import Plan
from vlkd.data.samples import SampleSequence
from vlkd.data.sources import Pairs
from vlkd.data.table import Table
from vlkd.distill.teachers import Teacher
from vlkd.distill.term import Term, wanted
from vlkd.engine.finish import Watched
from vlkd.engine.probe import DecodedOnce, StoredTeacher, TimedTeacher, one_of_each
from vlkd.engine.run import (
    build_student,
    check_names,
    joined,
    open_accelerator,
    open_stream,
    open_tables,
    planned,
    report_data,
    weighting_of,
)
from vlkd.engine.settings import Run, Teachers
from vlkd.engine.smoke import shrink_to_smoke
from vlkd.engine.teaching import HELD, Teaching, frozen_towers, load_teachers, towers_name
from vlkd.models.base import DualEncoderModule
from vlkd.models.composite import tower_names

StoredModels = Mapping[str, tuple[DualEncoderModule, frozenset[str]]]
"""Per name of a cache its model and the features that it holds."""


@dataclass(frozen=True, kw_only=True)
class Setup:
    """A run as far as it is set up before its folder and its caches."""

    recipe: ModuleType
    config: Run
    accelerator: Accelerator
    terms: tuple[Term, ...]
    sources: Mapping[str, Table]
    table: Table
    plan: Plan
    student: DualEncoderModule
    models: dict[str, DualEncoderModule]

    @property
    def online(self) -> bool:
        """Whether teachers run beside the student."""
        return bool(self.models) and not self.config.teachers.views

    @property
    def views(self) -> int:
        """K, of the run, or the default where it stores none."""
        return self.config.teachers.views or Teachers().views


def open_setup(recipe: ModuleType, assignments: Sequence[str], folder: Path) -> Setup:
    """Open the data, build the student, load and check the teachers.

    Args:
        recipe: what is to be run.
        assignments: changes of its settings, `key=value`.
        folder: a temporary one, in place of the run's own.

    Raises:
        UserError: whatever the run would refuse.
    """
    config: Run = replace(override(recipe.config(), assignments), out=str(folder / "run"))
    config = replace(config, train=replace(config.train, trackers=()))
    accelerator = open_accelerator(config)
    if config.smoke:
        config = shrink_to_smoke(config)
    (folder / "run").mkdir()
    torch.manual_seed(config.seed)
    terms: tuple[Term, ...] = recipe.terms(config)
    weighting_of(recipe, config)
    check_names(config)
    tables = open_tables(config)
    table, plan = joined(list(tables.values()), config.data.shuffle_shards), planned(config, list(tables.values()))
    report_data(table)
    Watched.open(config)
    student = build_student(config, table, plan, folder / "run")
    if config.student.frozen_towers and not config.teachers.views:
        frozen_towers(config, student, terms, tables, accelerator)
    return Setup(
        recipe=recipe,
        config=config,
        accelerator=accelerator,
        terms=terms,
        sources=tables,
        table=table,
        plan=plan,
        student=student,
        models=load_teachers(config, table, accelerator),
    )


def stored_models(setup: Setup) -> StoredModels:
    """What a cache would hold."""
    found = {name: (model, wanted(setup.terms, "teacher", name) | HELD) for name, model in setup.models.items()}
    if setup.config.student.frozen_towers:
        features = tower_names(wanted(setup.terms, "student"))
        found[towers_name(setup.config, setup.student, features)] = (setup.student, features)
    return found


def teachers_of(setup: Setup, online: bool) -> dict[str, Teacher]:
    """The teachers beside the student, or what stands in for their stored features."""
    found: dict[str, Teacher] = {}
    for name, model in setup.models.items():
        want = wanted(setup.terms, "teacher", name)
        vectors = one_of_each(
            model, want | HELD | {f for f in model.provides if f.startswith("logit_")}, setup.accelerator
        )
        if online:
            # A run looks its captions up; all of them would take long to encode here.
            total = setup.table.caption_total if isinstance(setup.table, Pairs) else 0
            texts = {feature for feature in want if feature.startswith("text.")} if total else set()
            held = {feature: vectors[feature].expand(total, *vectors[feature].shape[1:]) for feature in texts}
            found[name] = TimedTeacher(name, model, held)
        else:
            found[name] = StoredTeacher(name, model, vectors)
    return found


def towers_of(setup: Setup) -> Any:
    """What stands in for the stored features of frozen towers."""
    if not setup.config.student.frozen_towers:
        return None
    features = tower_names(wanted(setup.terms, "student"))
    return StoredTeacher("towers", setup.student, one_of_each(setup.student, features, setup.accelerator))


def stream_of(setup: Setup, online: bool) -> BatchStream[SampleSequence]:
    """The run's stream; pictures that it would hold in memory are decoded when they are first used."""
    data = setup.config.data
    config = replace(setup.config, data=replace(data, keep_short_side=0))
    teaching = Teaching(models=setup.models, sources=teachers_of(setup, online))
    stream = open_stream(
        config, setup.table, setup.plan, setup.student, setup.terms, teaching, towers_of(setup), setup.accelerator
    )
    if data.keep_short_side and any(consumer.image for consumer in stream.sequence.consumers.values()):
        stream.sequence.decoded = DecodedOnce(setup.table, data.keep_short_side)
    return stream
