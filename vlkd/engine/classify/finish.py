"""What follows a classifier's training: figures of the student, its heads and its teacher, and the report."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from vlkd import __version__
from vlkd.config import to_json
from vlkd.data.labelled import Labelled
from vlkd.data.loader import BatchStream
from vlkd.data.pool import LabelledPool
from vlkd.data.samples import SampleSequence
from vlkd.engine.classify.compute import compute, compute_words
from vlkd.engine.classify.embedded import embedded
from vlkd.engine.classify.loop import STUDENT, Outcome
from vlkd.engine.classify.settings import ClassifierRun
from vlkd.engine.classify.teaching import Teaching
from vlkd.engine.classify.watch import HeadLogits, head_logits
from vlkd.engine.finish import LEFT_OUT, write_lines
from vlkd.engine.results import flat
from vlkd.errors import UserError
from vlkd.models.classifier import Classifier, load_classifier, mixed_probabilities
from vlkd.models.classifier_images import student_of
from vlkd.protocols.classifier import classifier
from vlkd.protocols.measured import Measured
from vlkd.report import Estimate, Figure, Table, write_run_report
from vlkd.report.table import Value

MIX, LABEL, TEACHER_HEAD, TEACHER = "student", "label head", "teacher head", "teacher"
SPLITS = {"val": "Validation", "test": "Test"}
"""What a report calls the splits."""
WORST_CLASSES = 12


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One line of the final table on one split."""

    split: str
    role: str
    name: str
    parameters: int
    measured: Measured


def finish(
    config: ClassifierRun,
    folder: Path,
    outcome: Outcome,
    pool: LabelledPool,
    teaching: Teaching | None,
    streams: Mapping[str, BatchStream[SampleSequence]],
    *,
    backward: int,
) -> None:
    """Evaluate the chosen student beside its heads, its teacher and `report.compare`; write results and report.

    A step of its training had so many `backward` passes.
    """
    student = load_classifier(folder / STUDENT)
    others = {ref: compared(ref, pool) for ref in config.report.compare}
    splits = {"val": pool.val} | ({"test": pool.test} if pool.test is not None else {})
    entries: list[Entry] = []
    for split, images in splits.items():
        entries += student_entries(student, images, split, STUDENT)
        if teaching is not None and config.report.teacher:
            entries.append(teacher_entry(teaching, images, split, config.teacher.ref, config.teacher.place))
        for ref, other in others.items():
            entries += student_entries(other, images, split, ref)[:1]
    bad = {key: reason for stream in streams.values() for key, reason in stream.bad.items()}
    if bad:
        write_lines(folder / LEFT_OUT, [{"key": key, "reason": reason} for key, reason in sorted(bad.items())])
    cost = compute(config, student, teaching, len(pool.pairs), backward=backward)
    run = {
        "samples": outcome.samples,
        "steps": outcome.step,
        "seconds": round(outcome.seconds, 2),
        "seed": config.seed,
        "shots": config.data.shots,
        "labelled": len(pool.labelled),
        "pool": len(pool.pairs),
        "best": dict(outcome.best),
        "compute": cost,
        "vlkd": __version__,
    }
    rows = [row_of(entry) | run for entry in entries]
    write_lines(folder / "results.jsonl", rows)
    tuned = config.mix.tune and student.teacher_head is not None
    notes = [*pool.told, *(teaching.told if teaching is not None else ()), chosen_words(config, outcome, tuned=tuned)]
    notes += [f"{part}: {coverage_words(stream)}" for part, stream in streams.items()]
    notes.append(compute_words(cost, config))
    for entry in entries:
        if entry.name == STUDENT and entry.role == MIX and (unreadable := entry.measured.notes["unreadable"]):
            notes.append(f"{SPLITS[entry.split]} images that cannot be read, and are in no figure: {unreadable}.")
    if bad:
        notes.append(f"{len(bad)} training images could not be used, all in {LEFT_OUT}.")
    path = write_report(config, folder, entries, notes, lead_words(pool, teaching, streams))
    for entry in entries:
        low, high = entry.measured.interval or (float("nan"), float("nan"))
        print(
            f"{entry.split:<5} {entry.role:<13} {entry.name:<36} acc1 {100 * entry.measured.score:5.1f} "
            f"[{100 * low:.1f}, {100 * high:.1f}]  ece {100 * entry.measured.metrics['ece']:5.1f}"
        )
    print("\n".join(notes))
    print(f"student: {folder / STUDENT}\nreport: {path}", flush=True)


def compared(ref: str, pool: LabelledPool) -> Classifier:
    """A further classifier, or a run's; raises `UserError` unless it has the same classes in the same order."""
    found = load_classifier(student_of(ref))
    if found.classes != pool.classes:
        raise UserError(
            f"report.compare: {ref} has {len(found.classes)} classes that are not the {len(pool.classes)} of "
            "data.root, or in another order; compare classifiers of the same classes."
        )
    return found


def student_entries(student: Classifier, images: Labelled, split: str, name: str) -> list[Entry]:
    """The mix of both heads, then each head alone where there are two."""
    found = head_logits(student, images)
    tables = head_tables(student, found)
    parameters = student.parameter_counts()["image"]
    return [
        Entry(
            split=split,
            role=role,
            name=name,
            parameters=parameters,
            measured=classifier(
                table,
                found.labels,
                classes=student.classes,
                notes={"alpha": student.alpha, "beta": student.beta, "unreadable": len(found.bad)},
            ),
        )
        for role, table in tables.items()
    ]


def head_tables(student: Classifier, found: HeadLogits) -> dict[str, NDArray[np.float64]]:
    """Probabilities (I, C) by role."""
    label, teacher = found.label.double(), found.teacher.double()
    mix = mixed_probabilities(label, teacher, alpha=student.alpha, beta=student.beta)
    tables = {MIX: mix}
    if student.teacher_head is not None:
        tables |= {LABEL: label.softmax(dim=1), TEACHER_HEAD: (teacher / student.beta).softmax(dim=1)}
    return {role: table.numpy() for role, table in tables.items()}


def teacher_entry(teaching: Teaching, images: Labelled, split: str, ref: str, kept: Path) -> Entry:
    """The teacher's own probabilities, those that it teaches."""
    embed, labels = embedded(teaching.model, images, kept)
    device = teaching.teacher.vectors.device
    with torch.no_grad():
        table = teaching.teacher.logits(embed.to(device)).double().softmax(dim=1).cpu().numpy()
    return Entry(
        split=split,
        role=TEACHER,
        name=ref,
        parameters=sum(teaching.model.parameter_counts().values()),
        measured=classifier(
            table,
            labels,
            classes=images.classes,
            notes={"zeta": teaching.teacher.zeta, "unreadable": len(images) - len(labels)},
        ),
    )


def row_of(entry: Entry) -> dict[str, Any]:
    """Strict JSON."""
    measured = entry.measured
    return {
        "split": entry.split,
        "role": entry.role,
        "name": entry.name,
        "parameters": entry.parameters,
        "metrics": dict(measured.metrics),
        "acc1": measured.metrics["acc1"],
        "interval": list(measured.interval) if measured.interval else None,
        "counts": dict(measured.counts),
        "per_class": dict(measured.per_class),
        "notes": dict(measured.notes),
    }


def chosen_words(config: ClassifierRun, outcome: Outcome, *, tuned: bool) -> str:
    """What validation images chose."""
    best = outcome.best
    how = "The state with the highest validation accuracy" if config.train.choose else "The last state"
    mix = "chosen on validation images, too" if tuned else "not tuned"
    return (
        f"{outcome.samples} student samples in {outcome.step} steps, {outcome.seconds:.0f} s, seed {config.seed}. "
        f"{how}: step {best['step']:.0f}, {100 * best['score']:.1f} % there; alpha = {best['alpha']:g} and beta = "
        f"{best['beta']:g}, {mix}. No test image chose anything."
    )


def coverage_words(stream: BatchStream[SampleSequence]) -> str:
    """How often a part was passed."""
    (part,) = stream.coverage()
    return f"{part.distinct} of {part.rows} images were drawn, in {part.epochs:.2f} passes."


def lead_words(pool: LabelledPool, teaching: Teaching | None, parts: Collection[str]) -> str:
    """What was learned from what; `parts` are those that the student saw."""
    sources = []
    if "labelled" in parts:
        sources.append(f"{len(pool.labelled)} labels")
    if "pool" in parts:
        sources.append(f"a pool of {len(pool.pairs)} training images")
    if teaching is not None:
        sources.append(f"a teacher of {100 * teaching.accuracy:.1f} % on validation images")
    *first, last = sources
    return f"A classifier of {len(pool.classes)} classes, from {', '.join(first)}{' and ' if first else ''}{last}."


def write_report(
    config: ClassifierRun, folder: Path, entries: Sequence[Entry], notes: Sequence[str], lead: str
) -> Path:
    """Draw `report.html`: key figures, the table of each split, the hardest classes, curves, settings."""
    # The final figures come first.
    splits = list(dict.fromkeys(entry.split for entry in reversed(entries)))
    tables = {SPLITS[split]: result_table(entries, split) for split in splits}
    last = [entry for entry in entries if entry.role == MIX and entry.name == STUDENT][-1]
    tables[f"Hardest classes: recall on {SPLITS[last.split].lower()}"] = class_table(entries, last)
    legend = "acc1: accuracy in percent with its 95 % interval (Wilson); ece: expected calibration error in percent."
    return write_run_report(
        folder,
        title=folder.name,
        lead=lead,
        figures=[key_figure(entry) for entry in entries if entry.split == last.split],
        settings=flat(json.loads(json.dumps(to_json(config)))),
        metrics_path=folder / "metrics.jsonl",
        tables=tables,
        notes=[legend, *notes],
    )


def key_figure(entry: Entry) -> Figure:
    """Accuracy in percent, and where it lies with 95 % confidence."""
    low, high = entry.measured.interval or (float("nan"), float("nan"))
    name = entry.name if entry.name != STUDENT and entry.role == MIX else entry.role
    value = f"{100 * entry.measured.score:.1f} %"
    return Figure(label=name, value=value, note=f"{100 * low:.1f} to {100 * high:.1f}, {SPLITS[entry.split].lower()}")


def result_table(entries: Sequence[Entry], split: str) -> Table:
    """One row per entry of a split, percent."""
    headers = ("model", "part", "M parameters", "acc1", "acc5", "mean per class", "ece")
    own = [entry for entry in entries if entry.split == split]
    rows: list[list[Value]] = []
    for entry in own:
        metrics, (low, high) = entry.measured.metrics, entry.measured.interval or (None, None)
        rows.append(
            [
                entry.name,
                entry.role,
                f"{entry.parameters / 1e6:.2f}",
                Estimate(
                    value=100 * metrics["acc1"],
                    low=None if low is None else 100 * low,
                    high=None if high is None else 100 * high,
                ),
                Estimate(value=100 * metrics["acc5"]) if "acc5" in metrics else None,
                Estimate(value=100 * metrics["mean_per_class_recall"]),
                Estimate(value=100 * metrics["ece"]),
            ]
        )
    aside = [i for i, entry in enumerate(own) if entry.role == TEACHER]
    return Table(headers, rows, best={"acc1": "highest", "ece": "lowest"}, aside=aside)


def class_table(entries: Sequence[Entry], student: Entry) -> Table:
    """Recall of the student's hardest classes, of each of its heads and of its teacher, percent."""
    own = [
        entry for entry in entries if entry.split == student.split and (entry.name == STUDENT or entry.role == TEACHER)
    ]
    recall = student.measured.per_class
    counts = np.bincount(student.measured.per_item["label"].astype(np.int64))
    images = dict(zip(recall, counts[counts > 0].tolist(), strict=True))
    hardest = sorted(recall, key=lambda name: (recall[name], name))[:WORST_CLASSES]
    rows: list[list[Value]] = [
        [name, images[name], *(Estimate(value=100 * entry.measured.per_class[name]) for entry in own)]
        for name in hardest
    ]
    return Table(("class", "images", *(entry.role for entry in own)), rows)
