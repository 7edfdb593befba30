"""Turn a captions file (JSONL or CSV) and its pictures into shards, one folder per split.

vlkd prep captions photos/captions.jsonl --out data/photos

A JSONL line is {"image": PATH, "captions": [...]} or {"image": PATH, "caption": "..."}, optionally with "split"; a
picture without captions is unlabelled. A CSV (comma, tab, semicolon or bar, found from its header) has a column image
or filepath, a column caption or title, and optionally split; rows of one picture are taken together. Paths are relative
to the file, or to --image-root, and may not leave it.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from vlkd.data.prepare import add_output_arguments, add_picture_arguments, print_summary, write_records
from vlkd.data.records import read_captions_file

EPILOG = """examples:
  vlkd prep captions photos/captions.jsonl --out data/photos --short-side 256
  vlkd prep captions flickr.csv --image-root flickr/images --out data/flickr --limit 1000
"""


def main(argv: Sequence[str]) -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(
        prog="vlkd prep captions",
        description=__doc__,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("file", type=Path, help="captions file, .jsonl or .csv/.tsv")
    parser.add_argument("--image-root", type=Path, help="folder of the pictures (default: that of the file)")
    parser.add_argument("--split", default="train", help="split of records that name none (default %(default)s)")
    add_output_arguments(parser)
    add_picture_arguments(parser)
    args = parser.parse_args(argv)
    records = read_captions_file(args.file, args.image_root, split=args.split)
    print_summary(write_records(records, args), as_json=args.json)
