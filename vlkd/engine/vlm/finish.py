"""What follows training: the answers of student, teacher and others to all questions, and the report."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vlkd import __version__
from vlkd.config import to_json
from vlkd.data.images import open_image
from vlkd.data.questions import Question
from vlkd.engine.finish import LEFT_OUT, write_lines
from vlkd.engine.results import flat
from vlkd.engine.vlm.loop import Outcome
from vlkd.engine.vlm.settings import VlmRun
from vlkd.engine.vlm.watch import AskedQuestions, ask
from vlkd.metrics.answers import Tally
from vlkd.models.generative import GenerativeVLM
from vlkd.models.load_generative import load_generative
from vlkd.protocols.vqa import MeasuredAnswers
from vlkd.report import Estimate, Figure, Gallery, Table, answer_galleries, write_run_report
from vlkd.report.table import Value

STUDENT, TEACHER, COMPARED = "student", "teacher", "compared"
SPLITS = {"val": "Validation", "test": "Test"}
"""What a report calls the splits."""
ANSWERS = "answers-{split}.jsonl"
"""The student's answers, a line for each question."""


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One line of the final table on one split."""

    split: str
    role: str
    name: str
    parameters: int
    found: MeasuredAnswers


def finish(
    config: VlmRun,
    folder: Path,
    outcomes: Mapping[str, Outcome],
    asked: AskedQuestions,
    student: GenerativeVLM,
    teacher: GenerativeVLM | None,
) -> None:
    """Ask the student, its teacher and `report.compare`; write answers, results and report."""
    entries: list[Entry] = []
    for split, questions in asked.final.items():
        own = entry(config, student, questions, split, STUDENT, STUDENT)
        write_lines(folder / ANSWERS.format(split=split), [row.as_row() for row in own.found.rows])
        entries.append(own)
        if teacher is not None and config.report.teacher:
            entries.append(entry(config, teacher.eval(), questions, split, TEACHER, config.teacher.ref))
        for ref in config.report.compare:
            other = load_generative(ref, device=student.device)
            entries.append(entry(config, other, questions, split, COMPARED, ref))
    bad = {key: reason for outcome in outcomes.values() for key, reason in outcome.bad.items()}
    if bad:
        write_lines(folder / LEFT_OUT, [{"key": key, "reason": reason} for key, reason in sorted(bad.items())])
    run = {
        "samples": sum(one.samples for one in outcomes.values()),
        "seconds": round(sum(one.seconds for one in outcomes.values()), 2),
        "tflop": sum(one.tflop for one in outcomes.values()),
        "stages": {
            name: {"steps": one.steps, "samples": one.samples, "answer_tokens": one.tokens, "tflop": one.tflop,
                   "seconds": round(one.seconds, 2)}
            for name, one in outcomes.items()
        },
        "seed": config.seed,
        "vlkd": __version__,
    }  # fmt: skip
    # A run without questions still says what it cost.
    write_lines(folder / "results.jsonl", [row_of(one) | run for one in entries] or [{"role": STUDENT} | run])
    notes = [stage_words(name, one) for name, one in outcomes.items()]
    notes += [unread_words(one) for one in entries if one.role == STUDENT and one.found.unreadable]
    if bad:
        notes.append(f"{len(bad)} conversations could not be used, all in {LEFT_OUT}.")
    path = write_report(config, folder, entries, notes, galleries(entries, asked))
    for one in entries:
        low, high = one.found.total.interval
        print(
            f"{one.split:<5} {one.role:<9} {one.name:<36} accuracy {100 * one.found.total.accuracy:5.1f} "
            f"[{100 * low:.1f}, {100 * high:.1f}]"
        )
    print("\n".join(notes))
    print(f"student: {folder / STUDENT}\nreport: {path}", flush=True)


def entry(
    config: VlmRun, model: GenerativeVLM, questions: Sequence[Question], split: str, role: str, name: str
) -> Entry:
    """A model's answers to all questions of a split."""
    return Entry(
        split=split,
        role=role,
        name=name,
        parameters=sum(value.numel() for value in model.parameters()),
        found=ask(model, questions, config.train, progress=True),
    )


def row_of(one: Entry) -> dict[str, Any]:
    """Strict JSON."""
    measured = one.found.measured
    return {
        "split": one.split,
        "role": one.role,
        "name": one.name,
        "parameters": one.parameters,
        "accuracy": one.found.total.accuracy,
        "metrics": dict(measured.metrics),
        "interval": list(one.found.total.interval),
        "counts": dict(measured.counts),
        "per_kind": {kind: {"accuracy": own.accuracy, "questions": own.questions, "unparsed": own.unparsed}
                     for kind, own in one.found.kinds.items()},
        "unreadable": len(one.found.unreadable),
        "notes": dict(measured.notes),
    }  # fmt: skip


def stage_words(name: str, one: Outcome) -> str:
    """What a stage did."""
    return (
        f"{name}: {one.samples} conversations in {one.steps} steps, {one.tokens:.0f} answer tokens, "
        f"{one.seconds:.0f} s, {one.tflop:.3g} TFLOP (counted on one step, the teacher's passes included)."
    )


def unread_words(one: Entry) -> str:
    """Which questions are in no figure."""
    count = len(one.found.unreadable)
    return f"{SPLITS[one.split]}: the pictures of {count} questions cannot be read; they are in no figure."


def galleries(entries: Sequence[Entry], asked: AskedQuestions) -> list[Gallery]:
    """The student's wrong and right answers on the last split, with their pictures."""
    own = [one for one in entries if one.role == STUDENT]
    if not own:
        return []
    images = {question.key: question.image for question in asked.final[own[-1].split]}
    of = f", {SPLITS[own[-1].split].lower()}"
    return answer_galleries(own[-1].found.rows, lambda key: open_image(images[key].read()), of=of)


def write_report(
    config: VlmRun, folder: Path, entries: Sequence[Entry], notes: Sequence[str], shown: Sequence[Gallery]
) -> Path:
    """Draw `report.html`: key figures, two tables for each split, curves, answers with pictures, settings."""
    # The final figures come first.
    splits = list(dict.fromkeys(one.split for one in reversed(entries)))
    legend = "Accuracy in percent with its 95 % interval (Wilson): the share of greedy answers that are the truth."
    return write_run_report(
        folder,
        title=folder.name,
        lead="A model that answers questions about pictures" + (", taught by a larger one." if taught(config) else "."),
        figures=[key_figure(one) for one in entries if one.split == splits[0]],
        settings=flat(json.loads(json.dumps(to_json(config)))),
        metrics_path=folder / "metrics.jsonl",
        tables={name: table for split in splits for name, table in split_tables(split, entries)},
        galleries=shown,
        notes=[*([legend] if entries else []), *notes],
    )


def taught(config: VlmRun) -> bool:
    """Whether a teacher was named."""
    return bool(config.teacher.ref)


def key_figure(one: Entry) -> Figure:
    """Accuracy in percent, and where it lies with 95 % confidence."""
    low, high = one.found.total.interval
    value = f"{100 * one.found.total.accuracy:.1f} %"
    label = one.name if one.role == COMPARED else one.role
    return Figure(label=label, value=value, note=f"{100 * low:.1f} to {100 * high:.1f}, {SPLITS[one.split].lower()}")


def split_tables(split: str, entries: Sequence[Entry]) -> list[tuple[str, Table]]:
    """The tables of a split with their titles."""
    own = [one for one in entries if one.split == split]
    return [(SPLITS[split], result_table(own)), (f"{SPLITS[split]}, by kind", kind_table(own))]


def result_table(entries: Sequence[Entry]) -> Table:
    """One row per model: all questions, percent; the last row is of one who never looks at a picture."""
    rows: list[list[Value]] = [
        [
            one.name,
            Estimate(value=one.parameters / 1e6, digits=2),
            percent(one.found.total),
            Estimate(value=100 * one.found.total.parse_failures),
        ]
        for one in entries
    ]
    commonest = Estimate(value=100 * entries[0].found.measured.metrics["commonest_answer"])
    rows.append(["always the commonest answer of each kind", None, commonest, None])
    aside = [i for i, one in enumerate(entries) if one.role == TEACHER] + [len(entries)]
    return Table(("model", "M parameters", "right", "not parsed"), rows, best={"right": "highest"}, aside=aside)


def kind_table(entries: Sequence[Entry]) -> Table:
    """One row per kind of question, one column per model, percent: kinds may be many, models are few.

    The best of several models but the teacher is set in bold.
    """
    rows: list[list[Value]] = [
        [kind, own.questions, *(percent(one.found.kinds[kind]) for one in entries)]
        for kind, own in entries[0].found.kinds.items()
    ]
    students = [place for place, one in enumerate(entries) if one.role != TEACHER]
    strong = set()
    for row, kind in enumerate(entries[0].found.kinds):
        right = {place: entries[place].found.kinds[kind].right for place in students}
        best = max(right.values())
        if min(right.values()) < best:
            strong |= {(row, 2 + place) for place, count in right.items() if count == best}
    return Table(("kind", "questions", *(one.name for one in entries)), rows, strong=strong)


def percent(own: Tally) -> Estimate:
    """Accuracy and its interval."""
    low, high = own.interval
    return Estimate(value=100 * own.accuracy, low=100 * low, high=100 * high)
