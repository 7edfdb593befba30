"""Classifiers over the number of labelled images: methods side by side, means over seeds, paired differences.

vlkd eval learning_curve runs/grid/* --out runs/curve
"""

from __future__ import annotations

import argparse
import csv
import io
import json
from collections.abc import Sequence
from pathlib import Path

EXAMPLES = """examples:
  vlkd eval learning_curve runs/grid/* --out runs/curve
  vlkd eval learning_curve runs/dho-1 runs/dho-4 runs/labels-1 runs/labels-4 --out runs/curve --split val --json
"""


def main(argv: Sequence[str]) -> None:
    """Read finished runs of `vlkd train dho`, write learning_curve.html and learning_curve.csv; see `--help`."""
    parser = argparse.ArgumentParser(
        prog="vlkd eval learning_curve",
        description=__doc__,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("runs", nargs="+", metavar="RUN", help="folders of runs; unfinished ones are listed, left out")
    parser.add_argument("--out", required=True, type=Path, metavar="FOLDER", help="for the page and the table of runs")
    parser.add_argument("--split", choices=("test", "val"), default="test", help="whose figures are shown")
    parser.add_argument("--json", action="store_true", help="end with one line of strict JSON")
    args = parser.parse_args(argv)

    from vlkd.data.files import write_whole
    from vlkd.engine.classify.curve import learning_curve
    from vlkd.engine.classify.curve_page import csv_rows, markdown, page, plain, tables, verdicts

    curve = learning_curve(args.runs, args.split)
    args.out.mkdir(parents=True, exist_ok=True)
    path = page(curve, "Learning curve").write(args.out / "learning_curve.html")
    rows = csv_rows(curve)
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, fieldnames=list(rows[0]))
    writer.writeheader()
    writer.writerows(rows)
    write_whole(args.out / "learning_curve.csv", text.getvalue().encode())
    for name, table in tables(curve).items():
        print(f"{name}\n\n{markdown(table)}\n\n{table.caption}\n")
    print("\n".join([*verdicts(curve), *(f"left out: {folder}: {reason}" for folder, reason in curve.left_out)]))
    print(f"page: {path}\nruns: {args.out / 'learning_curve.csv'}", flush=True)
    if args.json:
        print(json.dumps({"command": "eval learning_curve"} | plain(curve), allow_nan=False))
