"""A run from its recipe to its report: settings, data, models, loop, export, evaluation."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

import torch
from accelerate import Accelerator

from vlkd import config as settings_module
from vlkd.data.decoded import Decoded
from vlkd.data.images import BadImage
from vlkd.data.loader import BatchStream, plain_errors
from vlkd.data.local_copies import LocalCopies
from vlkd.data.plan import Plan
from vlkd.data.samples import Consumer, SampleSequence
from vlkd.data.shard_table import ShardTable, open_shards
from vlkd.data.sources import MAX_BAD_SHARE, Pairs, open_sources, source_name, union
from vlkd.data.table import Table
from vlkd.distill.distiller import Distiller
from vlkd.distill.teachers import CachedTeacher
from vlkd.distill.term import Term, wanted
from vlkd.engine.accelerator import accelerator_of
from vlkd.engine.checkpoint import whole_checkpoints
from vlkd.engine.distributed import gather_rows, mean_over_ranks, own_rows
from vlkd.engine.finish import Watched, finish
from vlkd.engine.folder import TOKENIZER, claim_folder
from vlkd.engine.loop import train
from vlkd.engine.settings import Run
from vlkd.engine.smoke import shrink_to_smoke
from vlkd.engine.teaching import Teaching, class_vector_banks, frozen_towers, prepare_teachers
from vlkd.errors import UserError
from vlkd.models.base import DualEncoderModule, channels_last
from vlkd.models.composite import load_composite
from vlkd.models.spec import build_composite
from vlkd.models.tokenizer import CompactTokenizer, train_tokenizer
from vlkd.weighting import Fixed, Weighting, fixed_weights, uniform_weights

TOKENIZER_ROWS = 200_000


def run_recipe(recipe: ModuleType, assignments: Sequence[str]) -> Path:
    """Run `recipe.config()`, changed by `key=value` assignments, with `recipe.terms(config)`; returns its folder.

    Raises:
        UserError: a setting, a path, a model or the data are not as expected.
    """
    config: Run = settings_module.override(recipe.config(), assignments)
    accelerator = open_accelerator(config)
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
    with accelerator.main_process_first():
        sources = open_tables(config)
    tables = list(sources.values())
    table, plan = joined(tables, config.data.shuffle_shards), planned(config, tables)
    report_data(table)
    watched = Watched.open(config)
    torch.manual_seed(config.seed)
    student = build_student(config, table, plan, folder)
    teaching = prepare_teachers(config, terms, sources, table, accelerator)
    towers = frozen_towers(config, student, terms, sources, accelerator)
    stream = open_stream(config, table, plan, student, terms, teaching, towers, accelerator)
    banks = class_vector_banks(config, stream.sequence, teaching, accelerator)
    torch.manual_seed(config.seed + 1)
    distiller = Distiller(
        student,
        terms,
        teaching.sources,
        towers=towers,
        banks=banks,
        gather=gather_rows,
        local=config.train.local_loss and accelerator.num_processes > 1,
        share=own_rows,
        mean=mean_over_ranks,
    )
    # Dropout draws anew on each rank; weights are those of rank 0.
    torch.manual_seed(config.seed + 1 + accelerator.process_index)
    with plain_errors():
        outcome = train(
            distiller,
            stream,
            weighting,
            config.train,
            folder,
            accelerator,
            watched.figures,
        )
    if accelerator.is_main_process:
        finish(config, folder, outcome, teaching.models, stream)
    accelerator.end_training()
    return folder


def open_accelerator(config: Run) -> Accelerator:
    """The devices, ranks and precision of a run; raises `UserError` where a GPU is asked for and there is none."""
    settings = config.train
    return accelerator_of(
        settings.device, settings.precision, smoke=config.smoke, trackers=settings.trackers, out=config.out
    )


def open_tables(config: Run) -> dict[str, Pairs | ShardTable]:
    """Each training source alone, by its reference."""
    if not config.data.stream:
        return dict(zip(config.data.train, open_sources(config.data.train), strict=True))
    if not config.data.train:
        raise UserError("No data are named; set data.train=FOLDER_OF_SHARDS.")
    copies = LocalCopies(Path(config.data.copies), int(config.data.copies_gb * 2**30))
    return {ref: open_shards(ref, copies) for ref in config.data.train}


def joined(tables: Sequence[Pairs | ShardTable], together: int) -> Pairs | ShardTable:
    """All sources as one table, of whose shards each source has so many read at a time."""
    streamed = [table for table in tables if isinstance(table, ShardTable)]
    if streamed:
        shards = [shard for table in streamed for shard in table.shards]
        problems = [problem for table in streamed for problem in table.problems]
        return ShardTable(shards, streamed[0].copies, problems=problems, opened=2 * together * len(streamed))
    return union([table for table in tables if isinstance(table, Pairs)])


def planned(config: Run, tables: Sequence[Pairs | ShardTable]) -> Plan:
    """The order of the samples: a table in memory is shuffled as a whole."""
    return Plan(
        [table.sizes() for table in tables],
        seed=config.seed,
        weights=config.data.weights,
        together=config.data.shuffle_shards,
    )


def report_data(table: Table) -> None:
    """One line about what was found."""
    left_out = f", {len(table.problems)} left out (first: {table.problems[0]})" if table.problems else ""
    print(
        f"data: {len(table)} images, {table.captioned} with {table.caption_total} captions{left_out}",
        flush=True,
    )


def build_student(config: Run, table: Table, plan: Plan, folder: Path) -> DualEncoderModule:
    """The student: from a folder, or built, with a tokenizer trained on the captions where it needs one."""
    if config.student.start:
        model = load_composite(config.student.start)
    else:
        tokenizer = None
        if config.model.text == "compact" and not config.model.tokenizer:
            tokenizer = own_tokenizer(config, table, plan, folder)
        model = build_composite(config.model, tokenizer=tokenizer, name=str(folder / "student"))
    if config.student.frozen_towers:
        model.image_tower.requires_grad_(False)
        if model.text_tower is not None:
            model.text_tower.requires_grad_(False)
    if config.train.channels_last:
        channels_last(model)
    counts = model.parameter_counts()
    print(f"student: {counts['image'] / 1e6:.2f} M image and {counts['text'] / 1e6:.2f} M text parameters", flush=True)
    return model


def own_tokenizer(config: Run, table: Table, plan: Plan, folder: Path) -> CompactTokenizer:
    """Trained on the captions of the first `TOKENIZER_ROWS` samples; a run that is continued has it in its folder."""
    if whole_checkpoints(folder / "checkpoints") and (folder / TOKENIZER).is_file():
        return CompactTokenizer.load(folder / TOKENIZER)
    texts = table.texts() if isinstance(table, Pairs) else streamed_captions(table, plan)
    tokenizer = train_tokenizer(dict.fromkeys(texts), vocab_size=config.student.vocab_size)
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as temporary:
        tokenizer.save(Path(temporary))
        (Path(temporary) / TOKENIZER).replace(folder / TOKENIZER)
    return tokenizer


def streamed_captions(table: Table, plan: Plan) -> list[str]:
    """The captions of the first samples; a few that cannot be read are passed over, as in training."""
    texts: list[str] = []
    rows, failed = min(len(table), TOKENIZER_ROWS), 0
    for position in range(rows):
        try:
            texts += table.captions_of(plan.row(position)[0])
        except BadImage:
            failed += 1
            if failed > max(1, MAX_BAD_SHARE * rows):
                raise
    return texts


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
    table: Table,
    plan: Plan,
    student: DualEncoderModule,
    terms: Sequence[Term],
    teaching: Teaching,
    towers: CachedTeacher | None,
    accelerator: Accelerator,
) -> BatchStream[SampleSequence]:
    """The batches of this rank, prepared for the student and each teacher that runs beside it."""
    consumers: dict[str, Consumer] = {}
    if towers is None:
        want = wanted(terms, "student")
        consumers["student"] = Consumer(preprocessing=student.preprocessing, student=True, **_sides(want))
    for name, source in teaching.sources.items():
        if source.preprocessing is not None:
            sides = _sides(wanted(terms, "teacher", name))
            # Text features of a table in memory were computed ahead; those of streamed captions are not.
            text = sides["text"] and config.data.stream
            consumers[name] = Consumer(preprocessing=source.preprocessing, image=sides["image"], text=text)
    stored = [source for source in (towers, *teaching.sources.values()) if isinstance(source, CachedTeacher)]
    decoding = any(consumer.image for consumer in consumers.values())
    sequence = SampleSequence(
        table,
        consumers,
        config.views,
        seed=config.seed,
        plan=plan,
        # One pass of a teacher serves runs with any seed.
        view_seed=0 if stored else config.seed,
        view_cycle=config.teachers.views if stored else 0,
        stored_view=stored[0].view if stored else None,
        decoded=Decoded(table, config.data.keep_short_side) if config.data.keep_short_side and decoding else None,
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
