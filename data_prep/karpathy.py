"""Turn a Karpathy-split JSON (dataset_coco.json, dataset_flickr30k.json) and its pictures into shards per split.

vlkd prep karpathy dataset_coco.json --image-root coco --out data/coco

A picture is IMAGE_ROOT/filepath/filename (filepath is COCO's train2014 or val2014 and may be missing). All raw
sentences are kept. COCO's 30,504 `restval` pictures join train, as published numbers assume; --restval changes that.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from vlkd.data.prepare import add_output_arguments, add_picture_arguments, print_summary, write_records
from vlkd.data.records import read_karpathy
from vlkd.errors import UserError

EPILOG = """examples:
  vlkd prep karpathy dataset_coco.json --image-root coco --out data/coco --short-side 256
  vlkd prep karpathy dataset_flickr30k.json --image-root flickr30k-images --out data/flickr --splits val test
"""


def main(argv: Sequence[str]) -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(
        prog="vlkd prep karpathy",
        description=__doc__,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("file", type=Path, help="the JSON file")
    parser.add_argument("--image-root", type=Path, help="folder of the pictures (default: that of the file)")
    parser.add_argument(
        "--restval",
        choices=("train", "own", "drop"),
        default="train",
        help="restval joins train, becomes a split of its own, or is left out (default %(default)s)",
    )
    parser.add_argument("--splits", nargs="+", help="only these splits")
    add_output_arguments(parser)
    add_picture_arguments(parser)
    args = parser.parse_args(argv)
    records = read_karpathy(args.file, args.image_root, restval=args.restval)
    if args.splits:
        found = sorted({record.split for record in records})
        if missing := sorted(set(args.splits) - set(found)):
            raise UserError(f"{args.file} has no split {', '.join(missing)}; it has {', '.join(found)}.")
        records = [record for record in records if record.split in args.splits]
    print_summary(write_records(records, args), as_json=args.json)
