"""Teacher and students on the same data: top-1 and top-k agreement, KL, Kendall's tau, CKA, retention.

vlkd eval agreement --teacher teachers/large --model runs/student --data data/birds#test
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from vlkd.suite.options import check_numbers

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from vlkd.data.eval_set import EvalSet
    from vlkd.protocols.agreement import Scores

EXAMPLES = """examples:
  vlkd eval agreement --teacher teachers/large --model runs/retriever/student --data data/birds#test
  vlkd eval agreement --teacher open_clip:ViT-B-32@w.safetensors --model runs/a/student runs/b/student --data c.json#val
"""


def main(argv: Sequence[str]) -> None:
    """Encode the data with the teacher once and with each model, and compare; see `--help`."""
    parser = argparse.ArgumentParser(
        prog="vlkd eval agreement",
        description=__doc__,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--teacher", required=True, metavar="REF", help="the model to agree with")
    parser.add_argument("--model", required=True, nargs="+", metavar="REF", help="students")
    parser.add_argument(
        "--data", required=True, metavar="PATH[#SPLIT]", help="labelled images, or images with captions"
    )
    parser.add_argument("-k", type=int, default=5, help="best candidates whose overlap is measured")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--json", action="store_true", help="end with one line of strict JSON")
    args = parser.parse_args(argv)
    check_numbers(args, batch_size=1, k=1)

    from vlkd.data.eval_set import open_eval_set
    from vlkd.errors import UserError
    from vlkd.protocols.agreement import agreement
    from vlkd.suite.job import check_references

    check_references([args.teacher, *args.model])
    data = open_eval_set(args.data)
    check_kind(data, args.data)
    teacher, teacher_score, unreadable = scores_of(args.teacher, data, args.batch_size)
    rows, problems = [], []
    for ref in args.model:
        try:
            student, student_score, _ = scores_of(ref, data, args.batch_size)
            measured = agreement(teacher, student, k=args.k, teacher_score=teacher_score, student_score=student_score)
        except UserError as error:
            problems.append(f"{ref} was left out: {error}")
            continue
        rows.append({
            "task": measured.task, "teacher": args.teacher, "model": ref, "data": args.data, "kind": data.kind,
            "metrics": dict(measured.metrics), "interval": measured.interval, "random_score": measured.random_score,
            "teacher_score": teacher_score, "student_score": student_score, "counts": dict(measured.counts),
            "unreadable": unreadable, "notes": dict(measured.notes),
        })  # fmt: skip
    if rows:
        print(table(rows))
    if args.json and rows:
        print(json.dumps({"command": "eval agreement", "results": rows}, allow_nan=False))
    if problems:
        raise UserError(" ".join(problems))


def check_kind(data: EvalSet, path: str) -> None:
    """Refuse a set without candidates that are common to all images."""
    from vlkd.errors import UserError

    if data.kind == "selection":
        raise UserError(
            f"{path} is a set for selection, whose images have few candidates each; agreement needs classes or a "
            "gallery of captions: name a set for classification or retrieval."
        )


def scores_of(ref: str, data: EvalSet, batch_size: int) -> tuple[Scores, float | None, int]:
    """One model's embeddings, its quality (accuracy, or the mean hit@1 of both directions), unreadable images."""
    from vlkd.models.load import load
    from vlkd.protocols.agreement import Scores
    from vlkd.retrieval.encode import encode_images, encode_texts
    from vlkd.retrieval.search import evaluate_retrieval
    from vlkd.retrieval.zero_shot import DEFAULT_TEMPLATES, accuracy, class_vectors

    model = load(ref)
    images = encode_images(model, data, batch_size=batch_size)
    score = None
    if data.kind == "retrieval":
        captions, owner = captions_of(data, images.index)
        candidates = encode_texts(model, captions, batch_size=4 * batch_size)
        score = evaluate_retrieval(images.embed, candidates, owner).mean_hit_at_1
    else:
        candidates = class_vectors(
            model.encode_text, data.classes, data.templates or DEFAULT_TEMPLATES, prompts=data.prompts, progress=True
        )
        if data.kind == "classification" and data.labels is not None:
            score = accuracy(images.embed, candidates, data.labels[images.index])["acc1"]
    scale = float(model.encode({}, ("logit_scale",))["logit_scale"].detach())
    return Scores(image_embed=images.embed, candidates=candidates, logit_scale=scale), score, len(images.bad)


def captions_of(data: EvalSet, index: NDArray[Any]) -> tuple[list[str], NDArray[Any]]:
    """All captions of the readable images, and for each the place of its image among these."""
    import numpy as np

    kept = index.tolist()
    captions = [caption for i in kept for caption in data.captions[i]]
    return captions, np.repeat(np.arange(len(kept)), [len(data.captions[i]) for i in kept])


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """One student per line, the figures as they are; a missing one is a dash."""
    names = list(dict.fromkeys(name for row in rows for name in row["metrics"]))
    width = max(len("model"), *(len(row["model"]) for row in rows))
    counts = rows[0]["counts"]
    lines = [
        f"{counts['images']} images x {counts['candidates']} candidates, {rows[0]['unreadable']} unreadable images; "
        f"teacher {rows[0]['teacher']}; kl in nats, the other figures from 0 to 1 (tau from -1)",
        "model".ljust(width) + "".join(f"{name:>16}" for name in names) + "   95 % of top1_agreement",
    ]
    for row in rows:
        figures = "".join(
            f"{row['metrics'][name]:>16.4f}" if name in row["metrics"] else f"{'-':>16}" for name in names
        )
        low, high = row["interval"]
        lines.append(f"{row['model'].ljust(width)}{figures}   {low:.4f} to {high:.4f}")
    return "\n".join(lines)
