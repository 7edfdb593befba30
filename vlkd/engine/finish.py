"""What follows training: the exported student, the figures on the test split, the report."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from vlkd import __version__
from vlkd.data.labelled import Labelled, open_labelled
from vlkd.data.loader import BatchStream
from vlkd.data.samples import SampleSequence
from vlkd.data.sources import Pairs, open_pairs, source_name
from vlkd.engine.loop import SPIKES, Outcome
from vlkd.engine.results import Entry, evaluate_entry, write_report
from vlkd.engine.settings import Run
from vlkd.models.base import DualEncoderModule
from vlkd.models.composite import CompositeModel
from vlkd.models.heads import LinearHead
from vlkd.models.load import load
from vlkd.models.spec import with_text_of
from vlkd.retrieval.encode import encode_pairs
from vlkd.retrieval.search import evaluate_retrieval
from vlkd.retrieval.zero_shot import zero_shot_figures


def retrieval_figures(model: DualEncoderModule, pairs: Pairs) -> dict[str, float]:
    """The few retrieval figures that are watched during training."""
    encoded = encode_pairs(model, model, pairs, batch_size=128, progress=False)
    result = evaluate_retrieval(encoded.image_embed, encoded.text_embed, encoded.image_of_text)
    return {
        "mean_hit@1": result.mean_hit_at_1,
        "mean_hit@10": (result.image_to_text["hit@10"] + result.text_to_image["hit@10"]) / 2,
        "rsum": result.rsum,
    }


LEFT_OUT = "left_out.jsonl"


@dataclass(frozen=True, kw_only=True)
class Watched:
    """The held-out sets on which a run is watched.

    Attributes:
        retrieval: captioned, by short name.
        zero_shot: folders of classes, by short name.
    """

    retrieval: Mapping[str, Pairs]
    zero_shot: Mapping[str, Labelled]

    @classmethod
    def open(cls, config: Run) -> Watched:
        """Those of `data.val` and `data.zero_shot`; raises `UserError` for one that is not there."""
        return cls(
            retrieval={source_name(ref): open_pairs(ref) for ref in config.data.val},
            zero_shot={source_name(ref): open_labelled(ref) for ref in config.data.zero_shot},
        )

    def figures(self, model: DualEncoderModule) -> dict[str, float]:
        """The figures on each set; its name stands in front where there are several."""
        found = {
            f"{name}/{key}" if len(self.retrieval) > 1 else key: value
            for name, pairs in self.retrieval.items()
            for key, value in retrieval_figures(model, pairs).items()
        }
        for name, labelled in self.zero_shot.items():
            figures = zero_shot_figures(model, labelled)
            found |= {f"zero-shot/{name}/{key}": figures[key] for key in ("acc1", "acc5") if key in figures}
        return found


def finish(
    config: Run,
    folder: Path,
    outcome: Outcome,
    teachers: dict[str, DualEncoderModule],
    stream: BatchStream[SampleSequence],
) -> None:
    """Export the student, evaluate it beside its teachers and `report.compare`, write results and report."""
    # Everything is evaluated where the compared models are loaded.
    student = outcome.student.cpu()
    assert isinstance(student, CompositeModel)
    student.save(folder / "student", dtype=config.student.dtype, golden=True)
    entries = [Entry(role="student", name=str(folder / "student"), model=student)]
    if config.report.asymmetric:
        for name, ref in zip(config.teacher_names, config.teachers.refs, strict=True):
            if name in outcome.heads:
                head = outcome.heads[name].cpu()
                assert isinstance(head, LinearHead)
                mixed = with_text_of(student, ref, heads=(head,))
                # Its golden embeddings notice when the lender is trained on.
                mixed.save(folder / f"student-with-text-of-{name}", golden=True)
                entries.append(Entry(role="student image, teacher text", name=name, model=mixed))
    if config.report.teachers:
        entries += [Entry(role="teacher", name=name, model=model.cpu()) for name, model in teachers.items()]
    entries += [Entry(role="compared", name=ref, model=load(ref)) for ref in config.report.compare]
    held_out = {place: open_pairs(place) for place in config.data.test or config.data.val}
    evaluated = {place: [evaluate_entry(entry, found) for entry in entries] for place, found in held_out.items()}
    run = {"samples": outcome.samples, "steps": outcome.step, "seconds": outcome.seconds, "seed": config.seed}
    coverage = [asdict(part) | {"epochs": part.epochs} for part in stream.coverage()]
    write_lines(folder / "coverage.jsonl", coverage)
    if stream.bad:
        write_lines(folder / LEFT_OUT, [{"key": key, "reason": reason} for key, reason in sorted(stream.bad.items())])
    rows: list[dict[str, Any]] = [
        item.row | {"data": place, "vlkd": __version__} | run for place, items in evaluated.items() for item in items
    ]
    if rows:
        write_lines(folder / "results.jsonl", rows)
    notes = [*coverage_notes(config, stream), *skipped_notes(outcome)]
    path = write_report(config, folder, evaluated, held_out, notes)
    for row in rows:
        print(
            f"{source_name(row['data']):<20} {row['role']:<28} {row['name']:<40} hit@1 {100 * row['mean_hit@1']:5.1f}  "
            f"hit@10 {100 * row['mean_hit@10']:5.1f}"
        )
    print("\n".join(notes))
    print(f"student: {folder / 'student'}\nreport: {path}", flush=True)


def coverage_notes(config: Run, stream: BatchStream[SampleSequence]) -> list[str]:
    """What was seen of the data, and what could not be used."""
    names = [source_name(ref) for ref in config.data.train] if config.data.weights else ["the data"]
    notes = [
        f"Of {name} {part.distinct} of {part.rows} samples were drawn, {part.epochs:.2f} times."
        for name, part in zip(names, stream.coverage(), strict=True)
    ]
    if stream.bad:
        key, reason = min(stream.bad.items())
        notes.append(
            f"Left out wherever they were drawn, because they cannot be used: {len(stream.bad)} samples, all in "
            f"{LEFT_OUT}; first {key}: {reason}"
        )
    return notes


def skipped_notes(outcome: Outcome) -> list[str]:
    """The updates that the spike guard skipped."""
    return [f"Skipped updates: {outcome.skipped}; see {SPIKES}."] if outcome.skipped else []


def write_lines(path: Path, rows: list[dict[str, Any]]) -> None:
    """Strict JSON, one row a line, put in place whole."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text("".join(json.dumps(row, allow_nan=False) + "\n" for row in rows), encoding="utf-8")
    temporary.replace(path)
