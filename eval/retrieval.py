"""Image-text retrieval in both directions: hit@k, recall@k, mAP@R, ranks, from exact scores.

vlkd eval retrieval --model runs/student --data data/shards#test --out results.jsonl
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from vlkd.retrieval.encode import EncodedPairs
    from vlkd.retrieval.search import RetrievalResult

EXAMPLES = """examples:
  vlkd eval retrieval --model runs/retriever/student --data data/shards#test
  vlkd eval retrieval --model runs/retriever/student teachers/large --data coco.json#val --out results.jsonl --json
"""
KS = (1, 5, 10)
BOOTSTRAP_SEED = 0
COLUMNS = (
    ("i>t hit@1", "image_to_text_hit@1", 100), ("@5", "image_to_text_hit@5", 100), ("@10", "image_to_text_hit@10", 100),
    ("mAP@R", "image_to_text_mAP@R", 100), ("median", "image_to_text_median_rank", 1),
    ("t>i hit@1", "text_to_image_hit@1", 100), ("@5", "text_to_image_hit@5", 100), ("@10", "text_to_image_hit@10", 100),
    ("median", "text_to_image_median_rank", 1), ("RSUM", "rsum", 1), ("mean hit@1", "mean_hit@1", 100),
)  # fmt: skip


def main(argv: Sequence[str]) -> None:
    """Evaluate the models one after another on the same pairs; see `--help`."""
    parser = argparse.ArgumentParser(
        prog="vlkd eval retrieval",
        description=__doc__,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--model", required=True, nargs="+", metavar="REF", help="models to evaluate")
    parser.add_argument("--text-model", metavar="REF", help="another model that encodes the captions, of equal width")
    parser.add_argument("--data", required=True, metavar="PATH[#SPLIT]", help="shards, captions JSONL, Karpathy JSON")
    parser.add_argument("--out", type=Path, metavar="FILE", help="append one JSON line per model")
    parser.add_argument("--folds", type=int, default=0, metavar="N", help="also means over N galleries; COCO 1K is 5")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--json", action="store_true", help="end with one line of strict JSON")
    args = parser.parse_args(argv)
    if args.batch_size < 1:
        parser.error(f"--batch-size is {args.batch_size}; expected 1 or more")
    if args.folds < 0 or args.folds == 1:
        parser.error(f"--folds is {args.folds}; expected 2 or more, or 0 for none")

    from vlkd.data.sources import open_pairs

    pairs = open_pairs(args.data)
    rows: list[dict[str, Any]] = []
    first: tuple[NDArray[Any], tuple[str, ...]] | None = None
    for ref in args.model:
        result, encoded = measure(ref, args.text_model, pairs, args.batch_size)
        means = mean_hit_bootstrap(result)
        row = (
            describe(ref, args, result, encoded) | {"left_out_samples": len(pairs.problems)} | intervals(result, means)
        )
        if first is not None and first[1] == encoded.keys:
            row |= difference(means, first[0])
        first = first or (means, encoded.keys)
        rows.append(row)
        if args.out:
            append_line(args.out, row)
    print(table(rows))
    if args.json:
        print(json.dumps({"command": "eval retrieval", "results": rows}, allow_nan=False))


def measure(ref: str, text_ref: str | None, pairs: Any, batch_size: int) -> tuple[RetrievalResult, EncodedPairs]:
    """Load, encode and rank; a text model of another width is refused before anything is encoded."""
    from vlkd.errors import UserError
    from vlkd.models.load import load
    from vlkd.retrieval.encode import encode_pairs
    from vlkd.retrieval.search import evaluate_retrieval

    model = load(ref)
    text_model = load(text_ref) if text_ref else model
    if text_model.width != model.width:
        raise UserError(
            f"{ref} has width {model.width} but the text model {text_ref} has {text_model.width}; asymmetric search "
            f"needs one joint space: give the text model that the image tower was trained towards."
        )
    encoded = encode_pairs(model, text_model, pairs, batch_size=batch_size)
    result = evaluate_retrieval(
        encoded.image_embed, encoded.text_embed, encoded.image_of_text, KS, captions=encoded.captions
    )
    return result, encoded


def describe(ref: str, args: argparse.Namespace, result: RetrievalResult, encoded: EncodedPairs) -> dict[str, Any]:
    """What was measured on what, with the figures; there is no seed, the protocol draws nothing.

    `metrics` holds all of them under the names of CLIP_benchmark, open_clip and DataComp as well.
    """
    from vlkd.protocols.retrieval import retrieval
    from vlkd.suite.results import versions

    measured = retrieval(
        encoded.image_embed, encoded.text_embed, encoded.image_of_text, encoded.captions, folds=args.folds
    )  # fmt: skip
    return {
        "task": measured.task, "dataset": args.data, "pretrained": "", "language": "en",
        "metrics": dict(measured.metrics), "counts": dict(measured.counts), "random_score": measured.random_score,
        "model": ref, "text_model": args.text_model or ref, "data": args.data,
        **result.as_row(),
        "unreadable_images": len(encoded.bad), "unreadable_keys": [key for key, _ in encoded.bad[:16]],
        "width": encoded.image_embed.shape[1], "similarity": "cosine", "ties": "smaller id first",
        "dtype": "float32", "seed": None, "versions": versions(),
    }  # fmt: skip


def mean_hit_bootstrap(result: RetrievalResult) -> NDArray[Any]:
    """(n,) bootstrap means of the mean of both directions' hit@1; an image is drawn with all its captions."""
    import numpy as np

    from vlkd.metrics import bootstrap_means, hit_at_k

    both = (
        (result.ranks.image_to_text, np.arange(result.images)),
        (result.ranks.text_to_image, result.image_of_text),
    )
    image, text = (bootstrap_means(hit_at_k(ranks, 1), groups=groups, seed=BOOTSTRAP_SEED) for ranks, groups in both)
    mean: NDArray[Any] = (image + text) / 2
    return mean


def intervals(result: RetrievalResult, means: NDArray[Any]) -> dict[str, Any]:
    """95 % intervals of hit@1 over images."""
    from vlkd.metrics import bootstrap_interval, hit_at_k, interval

    ranks = result.ranks
    return {
        "mean_hit@1_interval": list(interval(means)),
        "image_to_text_hit@1_interval": list(bootstrap_interval(hit_at_k(ranks.image_to_text, 1), seed=BOOTSTRAP_SEED)),
        "text_to_image_hit@1_interval": list(
            bootstrap_interval(hit_at_k(ranks.text_to_image, 1), groups=result.image_of_text, seed=BOOTSTRAP_SEED)
        ),
        "bootstrap_seed": BOOTSTRAP_SEED,
    }


def difference(means: NDArray[Any], first: NDArray[Any]) -> dict[str, Any]:
    """95 % interval of the gain in mean hit@1 over the first model, both resampled over the same images."""
    from vlkd.metrics import interval

    return {"mean_hit@1_gain_interval": list(interval(means - first))}


def append_line(path: Path, row: Mapping[str, Any]) -> None:
    """Append one line of strict JSON in a single write, so that a killed run leaves whole lines."""
    line = json.dumps(row, allow_nan=False) + "\n"
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        file.write(line)


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """The figures in percent, one model per line, with the interval of the mean hit@1 and the gain over the first."""
    first = rows[0]
    width = max(len("model"), *(len(row["model"]) for row in rows))
    head = "model".ljust(width) + "".join(f"{title:>11}" for title, _, _ in COLUMNS) + "   95 % interval"
    lines = [
        f"{first['images']} images x {first['captions']} captions ({first['duplicate_captions']} duplicates), "
        f"{first['unreadable_images']} unreadable images and {first['left_out_samples']} damaged samples skipped; "
        f"rates in percent, ranks from 1",
        head,
    ]
    for row in rows:
        figures = "".join(f"{factor * row[name]:>11.1f}" for _, name, factor in COLUMNS)
        low, high = row["mean_hit@1_interval"]
        line = f"{row['model'].ljust(width)}{figures}   {100 * low:.1f} to {100 * high:.1f}"
        if "mean_hit@1_gain_interval" in row:
            low, high = row["mean_hit@1_gain_interval"]
            line += f"; gain over {first['model']} {100 * low:+.1f} to {100 * high:+.1f} (paired)"
        lines.append(line)
    return "\n".join(lines)
