"""Results of `vlkd eval suite` side by side: Markdown, CSV, and an HTML page with plots.

vlkd eval table results/ --teacher teachers/large --html table.html
"""

from __future__ import annotations

import argparse
import csv
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from vlkd.suite.options import check_file

EXAMPLES = """examples:
  vlkd eval table results/
  vlkd eval table results/a results/b --suite vtab+ --teacher teachers/large --csv table.csv --html table.html
"""


def main(argv: Sequence[str]) -> None:
    """Read the results and write the tables that were asked for; see `--help`."""
    parser = argparse.ArgumentParser(
        prog="vlkd eval table",
        description=__doc__,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("results", nargs="+", type=Path, metavar="RESULTS", help="folders or results.jsonl files")
    parser.add_argument("--suite", metavar="NAME", help="show the aggregates of this suite, where they are complete")
    parser.add_argument("--teacher", metavar="REF", help="the model that the others are compared with")
    parser.add_argument(
        "--csv", type=Path, metavar="FILE", help="one row per result, CLIP_benchmark's columns and ours"
    )
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="what is printed, as a file")
    parser.add_argument("--html", type=Path, metavar="FILE", help="a page with plots")
    parser.add_argument("--json", action="store_true", help="end with one line of strict JSON")
    args = parser.parse_args(argv)
    check_file(args, "csv", "markdown", "html")

    from vlkd.suite.declaration import load_suite
    from vlkd.suite.results import read_results
    from vlkd.suite.table import find_model, join_results, pivot, wide_rows
    from vlkd.suite.table_markdown import aggregate_cells, markdown
    from vlkd.suite.table_page import page

    rows = join_results([read_results(path) for path in args.results])
    table = pivot(rows)
    suite = load_suite(args.suite) if args.suite else None
    aggregates = suite.aggregates if suite else ()
    teacher = find_model(table.models, args.teacher) if args.teacher else None
    text = markdown(table, aggregates, teacher)
    print(text)
    if args.csv:
        write_csv(args.csv, wide_rows(rows))
    if args.markdown:
        write(args.markdown, text)
    if args.html:
        args.html.parent.mkdir(parents=True, exist_ok=True)
        title = suite.title if suite else "Benchmark"
        page(table, aggregates, teacher, title).write(args.html)
    if args.json:
        lines = [
            {"dataset": line.dataset, "protocol": line.protocol, "metric": line.metric, "comparable": line.comparable,
             "scores": {model: line.score(model) for model in table.models}}
            for line in table.lines
        ]  # fmt: skip
        means = {
            name: dict(zip(table.models, cells, strict=True)) for name, cells in aggregate_cells(table, aggregates)
        }
        done = {"command": "eval table", "models": table.models, "results": lines, "aggregates_percent": means}
        print(json.dumps(done | {"remarks": table.remarks}, allow_nan=False))


def write_csv(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write flat rows under one header."""
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, fieldnames=list(rows[0]))
    writer.writeheader()
    writer.writerows(rows)
    write(path, text.getvalue())


def write(path: Path, text: str) -> None:
    """Write a file whole."""
    from vlkd.data.files import write_whole

    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, text.encode())
