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
    from vlkd.suite.job import Job
    from vlkd.suite.results import RESULTS, read_results
    from vlkd.suite.run import EMBEDDINGS, run_suite
    from vlkd.suite.subject import Encoding
    from vlkd.suite.table import UNOPENED

    place, split = place_of(args.data)
    path = Path(place).absolute()
    if not path.exists():
        raise UserError(f"There is nothing at {place}; give a class folder, a webdataset folder, or a JSON file.")
    if args.out.is_file():
        raise UserError(f"--out {args.out} is a file; expected a folder, new or with earlier results: name another.")
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
    failed = run_suite(job).failed
    stored = read_results(args.out) if (args.out / RESULTS).is_file() else []
    found = {(row["model_ref"], row["protocol"]): row for row in stored if row["dataset"] == entry.name}
    # Where nothing failed, data that could not be opened are an error of another day.
    protocols = (UNOPENED, protocol) if failed else (protocol,)
    rows = [next((found[ref, name] for name in protocols if (ref, name) in found), None) for ref in job.models]
    if None in rows:
        ref = job.models[rows.index(None)]
        raise UserError(f"{ref} encodes no texts, which {protocol} needs; name a model with a text tower.")
    return [row for row in rows if row is not None]


def end_single(args: argparse.Namespace, protocol: str, rows: Sequence[dict[str, Any]]) -> None:
    """The line of JSON, if it is asked for; raises `UserError` with the first failure."""
    from vlkd.errors import UserError

    if args.json:
        print(json.dumps({"command": f"eval {protocol}", "results": list(rows)}, allow_nan=False))
    if failed := [row for row in rows if row["status"] != "ok"]:
        raise UserError(str(failed[0]["error"]))
