"""Turn a Karpathy-split JSON (dataset_coco.json, dataset_flickr30k.json) and its pictures into shards per split.

vlkd prep karpathy dataset_coco.json --image-root coco --out data/coco

A picture is IMAGE_ROOT/filepath/filename (filepath is COCO's train2014 or val2014 and may be missing). All raw
sentences are kept. COCO's 30,504 `restval` pictures join train, as published numbers assume; --restval changes that.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

from vlkd.data.prepare import (
    Record,
    add_output_arguments,
    add_picture_arguments,
    print_summary,
    resolve_inside,
    write_records,
)
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
    records = read_karpathy(args.file, args.image_root or args.file.parent, args.restval)
    if args.splits:
        found = sorted({record.split for record in records})
        if missing := sorted(set(args.splits) - set(found)):
            raise UserError(f"{args.file} has no split {', '.join(missing)}; it has {', '.join(found)}.")
        records = [record for record in records if record.split in args.splits]
    print_summary(write_records(records, args), as_json=args.json)


def read_karpathy(file: Path, root: Path, restval: str) -> list[Record]:
    """The records of a Karpathy JSON, in its order.

    Args:
        file: top level {"images": [{"filename", "split", "sentences": [{"raw"}], ...}]}.
        root: folder of the pictures.
        restval: "train", "own" or "drop".
    """
    if not file.is_file():
        raise UserError(f"There is no file {file}; check the path.")
    try:
        content = json.loads(file.read_bytes())
    except (ValueError, RecursionError) as error:
        raise UserError(f"{file} is no JSON ({error}); expected a Karpathy split such as dataset_coco.json.") from None
    images = content.get("images") if isinstance(content, dict) else None
    if not isinstance(images, list):
        raise UserError(f"{file} has no list `images`; expected a Karpathy split such as dataset_coco.json.")
    records = []
    for number, entry in enumerate(images):
        record = _record(entry, root, f"{file}, image {number}")
        if record.split != "restval" or restval == "own":
            records.append(record)
        elif restval == "train":
            records.append(Record(image=record.image, captions=record.captions, split="train", extra=record.extra))
    return records


def _record(entry: object, root: Path, where: str) -> Record:
    try:
        if not isinstance(entry, dict):
            raise TypeError(f"a {type(entry).__name__}, not an object")
        captions = [sentence["raw"] for sentence in entry["sentences"]]
        texts = [entry["filename"], entry["split"], entry.get("filepath", ""), *captions]
        if not all(isinstance(text, str) for text in texts):
            raise TypeError("filename, split, filepath and raw are texts")
    except (KeyError, TypeError) as error:
        raise UserError(f"{where}: {error}; expected filename, split and sentences with raw.") from None
    path = resolve_inside(root, str(Path(entry.get("filepath", "")) / entry["filename"]), where)
    extra = {name: entry[name] for name in ("cocoid", "imgid") if isinstance(entry.get(name), int)}
    kept = tuple(caption.strip() for caption in captions if caption.strip())
    return Record(image=path, captions=kept, split=entry["split"], extra=extra)
