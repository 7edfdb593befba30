"""Cost of models on this machine: parameters, FLOPs, latency at one thread and at all, throughput, size on disk.

vlkd eval speed --model runs/student --out runs/eval/speed
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from vlkd.errors import UserError
from vlkd.suite.options import check_numbers

EXAMPLES = """examples:
  vlkd eval speed --model runs/retriever/student
  vlkd eval speed --model runs/retriever/student teachers/large timm:resnet18@r18.safetensors --out runs/eval/speed
"""
COLUMNS = (
    ("params M", "parameters", 1e-6, 2), ("image M", "image_parameters", 1e-6, 2),
    ("image GFLOP", "flops_image", 1e-9, 3), ("text GFLOP", "flops_text", 1e-9, 3), ("MB", "bytes", 1e-6, 1),
    ("p50 ms 1t", "latency_ms_p50_1_thread", 1, 2), ("p90", "latency_ms_p90_1_thread", 1, 2),
    ("p99", "latency_ms_p99_1_thread", 1, 2), ("p50 ms all", "latency_ms_p50_all_threads", 1, 2),
    ("images/s", "images_per_second_all_threads", 1, 1),
)  # fmt: skip


def main(argv: Sequence[str]) -> None:
    """Measure the models in turns; see `--help`."""
    parser = argparse.ArgumentParser(
        prog="vlkd eval speed",
        description=__doc__,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--model", required=True, nargs="+", metavar="REF", help="models, timm towers among them")
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="append to its results.jsonl, as eval suite does")
    parser.add_argument("--batch-size", type=int, default=64, help="images at once for the throughput")
    parser.add_argument(
        "--seconds", type=float, default=1.0, help="length of one measurement, three per model and round"
    )
    parser.add_argument("--rounds", type=int, default=5, help="turns, of which the median is taken")
    parser.add_argument("--json", action="store_true", help="end with one line of strict JSON")
    args = parser.parse_args(argv)
    check_numbers(args, batch_size=1, rounds=1)
    if not 0 < args.seconds < math.inf:
        raise UserError(f"--seconds is {args.seconds}; expected a number above 0.")

    from vlkd.models.load import load_image_encoder
    from vlkd.suite.job import check_references
    from vlkd.suite.results import RESULTS, append_row
    from vlkd.suite.speed import measure_speeds

    check_references(args.model)
    models = [load_image_encoder(ref) for ref in args.model]
    found = measure_speeds(models, batch_sizes=(1, args.batch_size), seconds=args.seconds, rounds=args.rounds)
    rows = [row_of(ref, model, figures, args) for ref, model, figures in zip(args.model, models, found, strict=True)]
    print(table(rows))
    for row in rows if args.out else ():
        append_row(args.out.parent if args.out.name == RESULTS else args.out, row)
    if args.json:
        print(json.dumps({"command": "eval speed", "results": rows}, allow_nan=False))


def row_of(ref: str, model: Any, figures: dict[str, float], args: argparse.Namespace) -> dict[str, Any]:
    """A row of results as those of `eval suite`; the data set of a model's speed is the machine, `speed`."""
    from vlkd.models.fingerprint import model_fingerprint
    from vlkd.suite.results import measured_columns, model_columns, versions
    from vlkd.suite.speed import as_measured

    measured = as_measured(figures, batch_sizes=(1, args.batch_size), seconds=args.seconds, rounds=args.rounds)
    return {
        "dataset": "speed", **model_columns(ref), "language": "en", **measured_columns(measured),
        "model_ref": ref, "fingerprint": model_fingerprint(model), "dtype": "float32",
        "parameters": int(figures["parameters"]), "versions": versions(), "items": None,
    }  # fmt: skip


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """One model per line."""
    width = max(len("model"), *(len(row["model_ref"]) for row in rows))
    notes, threads = rows[0]["notes"], rows[0]["counts"]["threads"]
    lines = [
        f"image tower on the CPU, float32, 1 image at 1 thread and at all {threads}, {notes['throughput_batch']} "
        f"images at all for the throughput; a multiply-add is two FLOPs; median of {notes['rounds']} rounds",
        "model".ljust(width) + "".join(f"{title:>13}" for title, *_ in COLUMNS),
    ]
    for row in rows:
        cells = [
            f"{factor * row['metrics'][name]:.{digits}f}" if name in row["metrics"] else "-"
            for _, name, factor, digits in COLUMNS
        ]
        lines.append(row["model_ref"].ljust(width) + "".join(f"{cell:>13}" for cell in cells))
    return "\n".join(lines)
