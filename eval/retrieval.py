"""Image-text retrieval in both directions: hit@k, recall@k, mAP@R, ranks, from exact scores.

vlkd eval retrieval --model runs/student/student --data data/shards#test
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

EXAMPLES = """examples:
  vlkd eval retrieval --model runs/retriever/student --data data/shards#test
  vlkd eval retrieval --model runs/a/student teachers/large --data coco.json#test --folds 5 --out runs/coco --json
"""
COLUMNS = (
    ("i>t hit@1", "image_to_text_hit@1", 100), ("@5", "image_to_text_hit@5", 100), ("@10", "image_to_text_hit@10", 100),
    ("mAP@R", "image_to_text_mAP@R", 100), ("median", "image_to_text_median_rank", 1),
    ("t>i hit@1", "text_to_image_hit@1", 100), ("@5", "text_to_image_hit@5", 100), ("@10", "text_to_image_hit@10", 100),
    ("median", "text_to_image_median_rank", 1), ("RSUM", "rsum", 1), ("mean hit@1", "mean_hit@1", 100),
)  # fmt: skip


def main(argv: Sequence[str]) -> None:
    """Measure the models one after another on the same pairs; see `--help`."""
    from vlkd.errors import UserError
    from vlkd.suite.single import end_single, measure_single, parse_single, single_parser

    parser = single_parser("retrieval", description=__doc__, examples=EXAMPLES)
    parser.add_argument("--text-model", metavar="REF", help="another model that encodes the captions, of equal width")
    parser.add_argument("--folds", type=int, default=0, metavar="N", help="also means over N galleries; COCO 1K is 5")
    args = parse_single(parser, argv)
    if args.folds < 0 or args.folds == 1:
        raise UserError(f"--folds is {args.folds}; expected 2 or more, or 0 for none.")
    if args.text_model:
        from vlkd.models.load import JOIN

        args.model = [f"{ref}{JOIN}{args.text_model}" for ref in args.model]

    rows = measure_single(args, "retrieval")
    described = described_rows([row for row in rows if row["status"] == "ok"], args.out)
    if described:
        print(table(described))
    shown = [row | {"text_model": args.text_model or row["model_ref"]} for row in described]
    end_single(args, "retrieval", [*shown, *(row for row in rows if row["status"] != "ok")])


def described_rows(rows: Sequence[Mapping[str, Any]], out: Path) -> list[dict[str, Any]]:
    """The rows with their figures and counts at the top as well, and 95 % intervals of hit@1 over images.

    The gain of a model is over the first one, both resampled over the same images; it is left out where the readable
    images differ.
    """
    from vlkd.metrics import interval
    from vlkd.protocols.retrieval import hit_means
    from vlkd.suite.results import read_items

    described = []
    first = None
    for row in rows:
        items, keys = read_items(out, row)
        by_direction = hit_means(items, row["seed"])
        mean = sum(by_direction.values()) / len(by_direction)
        intervals = {f"{name}_hit@1_interval": list(interval(means)) for name, means in by_direction.items()}
        intervals["mean_hit@1_interval"] = list(interval(mean))
        if first is not None and first[1] == keys:
            intervals["mean_hit@1_gain_interval"] = list(interval(mean - first[0]))
        first = first or (mean, keys)
        described.append({
            **row, **row["metrics"], **row["counts"], **intervals,
            "unreadable_images": row["unreadable"], "bootstrap_seed": row["seed"],
        })  # fmt: skip
    return described


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """The figures in percent, one model per line, with the interval of the mean hit@1 and the gain over the first."""
    first = rows[0]
    width = max(len("model"), *(len(row["model_ref"]) for row in rows))
    head = "model".ljust(width) + "".join(f"{title:>11}" for title, *_ in COLUMNS) + "   95 % interval"
    lines = [
        f"{first['images']} images x {first['captions']} captions ({first['duplicate_captions']} duplicates), "
        f"{first['unreadable_images']} unreadable images and {first['left_out_samples']} damaged samples skipped; "
        f"rates in percent, ranks from 1",
        head,
    ]
    for row in rows:
        figures = "".join(
            f"{factor * row[name]:>11.1f}" if name in row else f"{'-':>11}" for _, name, factor in COLUMNS
        )
        low, high = row["mean_hit@1_interval"]
        line = f"{row['model_ref'].ljust(width)}{figures}   {100 * low:.1f} to {100 * high:.1f}"
        if "mean_hit@1_gain_interval" in row:
            low, high = row["mean_hit@1_gain_interval"]
            line += f"; gain over {first['model_ref']} {100 * low:+.1f} to {100 * high:+.1f} (paired)"
        lines.append(line)
        if folds := fold_words(row["metrics"]):
            lines.append(f"{'':{width}}{folds}")
    return "\n".join(lines)


def fold_words(metrics: Mapping[str, float]) -> str:
    """The means over folds, "" where there are none."""
    parts = [
        f"{name} {value:.1f}" if name.endswith("rsum") else f"{name} {100 * value:.1f}"
        for name, value in metrics.items()
        if name.startswith("fold")
    ]
    return f"  {', '.join(parts)}" if parts else ""
