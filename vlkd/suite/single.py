"""One protocol on one data set: a suite of a single entry, for the files of `eval/` that are called by its name."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vlkd.suite.options import add_encoding_options, check_numbers

if TYPE_CHECKING:
    from vlkd.suite.results import Row


def run_single(argv: Sequence[str], protocol: str, *, description: str | None, examples: str, train: bool) -> None:
    """Parse the words of `vlkd eval PROTOCOL`, measure, and print the table of scores.

    Args:
        argv: the words.
        protocol: which of `vlkd.suite.measure`.
        description: what `--help` says first.
        examples: what `--help` says last.
        train: the protocol learns from a training part, `--train SPLIT`.

    Raises:
        UserError: as `measure_single`; a model could not be measured.
    """
    parser = single_parser(protocol, description=description, examples=examples)
    if train:
        parser.add_argument("--train", default="train", metavar="SPLIT", help="to learn from (default %(default)s)")
    args = parse_single(parser, argv)
    rows = measure_single(args, protocol)

    from vlkd.suite.table import pivot
    from vlkd.suite.table_markdown import markdown

    print(markdown(pivot(rows)))
    end_single(args, protocol, rows)


def single_parser(protocol: str, *, description: str | None, examples: str) -> argparse.ArgumentParser:
    """The options that all protocols have."""
    parser = argparse.ArgumentParser(
        prog=f"vlkd eval {protocol}",
        description=description,
        epilog=examples,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--model", required=True, nargs="+", metavar="REF", help="models, one after the other")
    parser.add_argument("--data", required=True, metavar="PATH[#SPLIT]", help="class folder, webdataset, or JSON")
    parser.add_argument("--out", type=Path, metavar="FOLDER", help=f"of the results (default runs/eval/{protocol})")
    add_encoding_options(parser)
    return parser


def parse_single(parser: argparse.ArgumentParser, argv: Sequence[str]) -> argparse.Namespace:
    """The words, with the numbers of `single_parser` checked, and `out` filled in."""
    args = parser.parse_args(argv)
    check_numbers(args, batch_size=1, workers=1, seed=0)
    args.out = args.out or Path("runs", *parser.prog.split()[1:])
    return args


def measure_single(args: argparse.Namespace, protocol: str) -> list[Row]:
    """Measure the models, or find their results in `args.out`: a row for each, in their order, that of a failure too.

    Args:
        args: of `parse_single`; `train` and `folds` may be among them.
        protocol: which of `vlkd.suite.measure`.

    Raises:
        UserError: nothing is at the place of the data, a model cannot be loaded, or results cannot be written.
    """
    from vlkd.data.sources import place_of, source_name
    from vlkd.errors import UserError
    from vlkd.suite.declaration import DataEntry, Suite
    from vlkd.suite.job import Job, about_entry, about_model
    from vlkd.suite.measure import TASKS
    from vlkd.suite.results import error_columns
    from vlkd.suite.run import EMBEDDINGS, run_suite
    from vlkd.suite.subject import Encoding

    place, split = place_of(args.data)
    path = Path(place).absolute()
    if not path.exists():
        raise UserError(f"There is nothing at {place}; give a class folder, a webdataset folder, or a JSON file.")
    entry = DataEntry(
        name=source_name(args.data), paths=(path.name,), split=split, train=getattr(args, "train", ""),
        protocols=(protocol,), folds=getattr(args, "folds", 0),
    )  # fmt: skip
    job = Job(
        suite=Suite(name=protocol, title=protocol, entries=(entry,)),
        root=path.parent,
        refs=tuple(args.model),
        out=args.out,
        store=args.out / EMBEDDINGS,
        encoding=Encoding(batch_size=args.batch_size, workers=args.workers, precision=args.precision, seed=args.seed),
        device=args.device,
    )
    found = {str(row["model_ref"]): row for row in run_suite(job).rows}
    for ref in job.models:
        if ref not in found:
            sentence = f"{ref} encodes no texts, which {protocol} needs; name a model with a text tower."
            about = about_model(ref, job) | about_entry(entry, job)
            found[ref] = about | error_columns(protocol, TASKS[protocol], sentence)
    return [found[ref] for ref in job.models]


def end_single(args: argparse.Namespace, protocol: str, rows: Sequence[dict[str, Any]]) -> None:
    """The line of JSON, if it is asked for; raises `UserError` with the first failure."""
    from vlkd.errors import UserError

    if args.json:
        print(json.dumps({"command": f"eval {protocol}", "results": list(rows)}, allow_nan=False))
    if failed := [row for row in rows if row["status"] != "ok"]:
        raise UserError(str(failed[0]["error"]))
