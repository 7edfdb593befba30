"""One protocol on one data set: a suite of a single entry, for the files of `eval/` that are called by its name."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

PRECISIONS = ("fp32", "bf16")


def run_single(argv: Sequence[str], protocol: str, *, description: str | None, examples: str, train: bool) -> None:
    """Parse the words of `vlkd eval PROTOCOL`, measure, and print the table.

    Args:
        argv: the words.
        protocol: which of `vlkd.suite.measure`.
        description: what `--help` says first.
        examples: what `--help` says last.
        train: the protocol learns from a training part, `--train SPLIT`.
    """
    parser = argparse.ArgumentParser(
        prog=f"vlkd eval {protocol}",
        description=description,
        epilog=examples,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--model", required=True, nargs="+", metavar="REF", help="models, one after the other")
    parser.add_argument("--data", required=True, metavar="PATH[#SPLIT]", help="class folder, webdataset, or JSON")
    if train:
        parser.add_argument("--train", default="train", metavar="SPLIT", help="to learn from (default %(default)s)")
    parser.add_argument("--out", type=Path, metavar="FOLDER", help=f"of the results (default runs/eval/{protocol})")
    parser.add_argument("--batch-size", type=int, default=64, help="default %(default)s")
    parser.add_argument("--workers", type=int, default=2, help="threads that decode (default %(default)s)")
    parser.add_argument("--precision", default="fp32", choices=PRECISIONS, help="of the encoders")
    parser.add_argument("--device", default="cpu", help="default %(default)s")
    parser.add_argument("--seed", type=int, default=0, help="default %(default)s")
    parser.add_argument("--json", action="store_true", help="end with one line of strict JSON")
    args = parser.parse_args(argv)
    if args.batch_size < 1 or args.workers < 1 or args.seed < 0:
        parser.error(
            f"found --batch-size {args.batch_size}, --workers {args.workers}, --seed {args.seed}; expected 1, 1, 0 "
            "or more"
        )
    _run(args, protocol)


def _run(args: argparse.Namespace, protocol: str) -> None:
    from vlkd.data.sources import place_of, source_name
    from vlkd.errors import UserError
    from vlkd.suite.declaration import DataEntry, Suite
    from vlkd.suite.results import read_results
    from vlkd.suite.run import EMBEDDINGS, Job, run_suite
    from vlkd.suite.subject import Encoding
    from vlkd.suite.table import pivot
    from vlkd.suite.table_markdown import markdown

    place, split = place_of(args.data)
    path = Path(place).absolute()
    if not path.exists():
        raise UserError(f"There is nothing at {place}; give a class folder, a webdataset folder, or a JSON file.")
    entry = DataEntry(
        name=source_name(args.data), paths=(path.name,), split=split, train=getattr(args, "train", ""),
        protocols=(protocol,),
    )  # fmt: skip
    out = args.out or Path("runs") / "eval" / protocol
    encoding = Encoding(batch_size=args.batch_size, workers=args.workers, precision=args.precision, seed=args.seed)
    job = Job(
        suite=Suite(name=protocol, title=protocol, entries=(entry,)),
        root=path.parent,
        refs=tuple(args.model),
        out=out,
        store=out / EMBEDDINGS,
        encoding=encoding,
        device=args.device,
    )
    run_suite(job)
    rows = [row for row in read_results(out) if row["dataset"] == entry.name and row["model_ref"] in job.refs]
    print(markdown(pivot(rows)))
    failed = [row for row in rows if row["status"] != "ok"]
    if args.json:
        print(json.dumps({"command": f"eval {protocol}", "results": rows}, allow_nan=False))
    if failed:
        raise UserError(str(failed[0]["error"]))
