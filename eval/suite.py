"""Run a suite of zero-shot benchmarks: models times data sets, resumable, every result one line of strict JSON.

vlkd eval suite --suite vtab+ --data benchmarks --model runs/student/student open_clip:ViT-B-32@openai --out runs/vtab
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vlkd.errors import UserError
from vlkd.suite.options import add_encoding_options, check_numbers

EXAMPLES = """The same command goes on where it was stopped, and keeps what was measured with the same weights, data and
settings. --dry-run lists which data sets are there, which are missing or cut short, and where they were looked for.

examples:
  vlkd eval suite --suite tier0 --data tier0 --model runs/a/student --teacher runs/teacher/student --out runs/tier0
  vlkd eval suite --suite mine.toml --data benchmarks --model timm:resnet18@r18.safetensors --dry-run
"""


def main(argv: Sequence[str]) -> None:
    """Run, or list; see `--help`."""
    parser = argparse.ArgumentParser(
        prog="vlkd eval suite",
        description=__doc__,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--suite", required=True, metavar="NAME|FILE.toml", help="tier0, vtab, vtab+, ..., or a file")
    parser.add_argument("--data", required=True, type=Path, metavar="ROOT", help="the folder of all data sets")
    parser.add_argument("--model", nargs="+", default=[], metavar="REF", help="models; a timm tower is probed only")
    parser.add_argument("--teacher", default="", metavar="REF", help="measure the agreement of the others with it")
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="of the results (default runs/eval/SUITE)")
    parser.add_argument("--embeddings", type=Path, metavar="FOLDER", help="kept embeddings (default in --out)")
    parser.add_argument("--only", nargs="+", default=[], metavar="NAME", help="only these data sets")
    parser.add_argument("--dry-run", action="store_true", help="list the data sets and end")
    add_encoding_options(parser)
    args = parser.parse_args(argv)
    check_numbers(args, batch_size=1, workers=1, seed=0)
    if not args.dry_run and not (args.model or args.teacher):
        raise UserError("No model is named; give --model REF, or --dry-run.")

    from vlkd.suite.declaration import load_suite
    from vlkd.suite.run import restrict

    suite = restrict(load_suite(args.suite), args.only)
    if args.dry_run:
        list_data(suite, args)
    else:
        run(suite, args)


def list_data(suite: Any, args: argparse.Namespace) -> None:
    """What is there and what is not."""
    from vlkd.suite.job import check_root
    from vlkd.suite.presence import as_json, presence, presence_table, with_broken_tars

    check_root(args.data)
    found = with_broken_tars(presence(suite, args.data))
    print(presence_table(suite, found, args.data))
    if args.json:
        print(json.dumps({"command": "eval suite", "dry_run": True, "data": as_json(found)}, allow_nan=False))


def run(suite: Any, args: argparse.Namespace) -> None:
    """Measure, then print the table of all results in the folder."""
    from vlkd.suite.job import Job
    from vlkd.suite.results import read_results
    from vlkd.suite.run import EMBEDDINGS, run_suite
    from vlkd.suite.subject import Encoding
    from vlkd.suite.table import pivot
    from vlkd.suite.table_markdown import markdown

    out = args.out or Path("runs") / "eval" / suite.name
    job = Job(
        suite=suite,
        root=args.data,
        refs=tuple(args.model),
        out=out,
        store=args.embeddings or out / EMBEDDINGS,
        encoding=Encoding(
            batch_size=args.batch_size, workers=args.workers, precision=args.precision, seed=args.seed
        ),
        device=args.device,
        teacher=args.teacher,
    )  # fmt: skip
    summary = run_suite(job)
    rows = read_results(out)
    print(markdown(pivot(rows), suite.aggregates, args.teacher or None))
    print(
        f"{summary.made} results made, {summary.kept} kept, {summary.failed} failed; {out / 'results.jsonl'}. "
        f"For a page with plots: vlkd eval table {out} --html {out / 'report.html'}"
    )
    if args.json:
        figures = {"made": summary.made, "kept": summary.kept, "failed": summary.failed, "out": str(out)}
        print(json.dumps({"command": "eval suite", **figures, "results": rows}, allow_nan=False))
    if summary.failed:
        raise UserError(f"{summary.failed} results failed; their rows in {out / 'results.jsonl'} say why.")
