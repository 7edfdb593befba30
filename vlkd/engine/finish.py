"""What follows training: the exported student, the figures on the test split, the report."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from vlkd import __version__
from vlkd.data.sources import Pairs, open_pairs, source_name
from vlkd.engine.loop import Outcome
from vlkd.engine.results import Entry, evaluate_entry, write_report
from vlkd.engine.settings import Run
from vlkd.models.base import DualEncoderModule
from vlkd.models.composite import CompositeModel
from vlkd.models.heads import LinearHead
from vlkd.models.load import load
from vlkd.models.spec import with_text_of
from vlkd.retrieval.encode import encode_pairs
from vlkd.retrieval.search import evaluate_retrieval


def retrieval_figures(model: DualEncoderModule, pairs: Pairs) -> dict[str, float]:
    """The few retrieval figures that are watched during training."""
    encoded = encode_pairs(model, model, pairs, batch_size=128, progress=False)
    result = evaluate_retrieval(encoded.image_embed, encoded.text_embed, encoded.image_of_text)
    return {
        "mean_hit@1": result.mean_hit_at_1,
        "mean_hit@10": (result.image_to_text["hit@10"] + result.text_to_image["hit@10"]) / 2,
        "rsum": result.rsum,
    }


def watched_figures(model: DualEncoderModule, watched: Mapping[str, Pairs]) -> dict[str, float]:
    """The figures on each watched set; its name stands in front where there are several."""
    return {
        f"{name}/{key}" if len(watched) > 1 else key: value
        for name, pairs in watched.items()
        for key, value in retrieval_figures(model, pairs).items()
    }


def finish(
    config: Run,
    folder: Path,
    outcome: Outcome,
    teachers: dict[str, DualEncoderModule],
    pairs: Pairs,
    bad: Sequence[str],
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
    rows: list[dict[str, Any]] = [
        item.row | {"data": place, "vlkd": __version__} | run for place, items in evaluated.items() for item in items
    ]
    if rows:
        write_lines(folder / "results.jsonl", rows)
    path = write_report(config, folder, evaluated, held_out, len(pairs), bad)
    for row in rows:
        print(
            f"{source_name(row['data']):<20} {row['role']:<28} {row['name']:<40} hit@1 {100 * row['mean_hit@1']:5.1f}  "
            f"hit@10 {100 * row['mean_hit@10']:5.1f}"
        )
    if bad:
        print(f"left out: {len(bad)} images that cannot be decoded (first: {bad[0]})", flush=True)
    print(f"student: {folder / 'student'}\nreport: {path}", flush=True)


def write_lines(path: Path, rows: list[dict[str, Any]]) -> None:
    """Strict JSON, one row a line, put in place whole."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text("".join(json.dumps(row, allow_nan=False) + "\n" for row in rows), encoding="utf-8")
    temporary.replace(path)
