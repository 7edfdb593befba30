"""Turn a captions file (JSONL or CSV) and its pictures into shards, one folder per split.

vlkd prep captions photos/captions.jsonl --out data/photos

A JSONL line is {"image": PATH, "captions": [...]} or {"image": PATH, "caption": "..."}, optionally with "split"; a
picture without captions is unlabelled. A CSV (comma, tab, semicolon or bar, found from its header) has a column image
or filepath, a column caption or title, and optionally split; rows of one picture are taken together. Paths are relative
to the file, or to --image-root, and may not leave it.
"""

from __future__ import annotations

import argparse
import csv
import io
import json
from collections.abc import Iterator, Sequence
from pathlib import Path

from vlkd.data.prepare import (
    Record,
    add_output_arguments,
    add_picture_arguments,
    print_summary,
    resolve_inside,
    write_records,
)
from vlkd.data.shards import captions_of
from vlkd.errors import UserError

IMAGE_COLUMNS = ("image", "filepath")
CAPTION_COLUMNS = ("caption", "title")
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
    if not args.file.is_file():
        raise UserError(f"There is no captions file {args.file}; check the path.")
    root = args.image_root or args.file.parent
    rows = read_jsonl(args.file) if args.file.suffix in (".jsonl", ".json", ".ndjson") else read_csv(args.file)
    records = [
        Record(
            image=resolve_inside(root, image, where),
            captions=tuple(caption.strip() for caption in captions if caption.strip()),
            split=split or args.split,
        )
        for where, image, captions, split in rows
    ]
    print_summary(write_records(records, args), as_json=args.json)


Row = tuple[str, str, list[str], str]
"""Where it was found (for messages), image path, captions, split ("" for none)."""


def read_jsonl(file: Path) -> Iterator[Row]:
    """Rows of a JSONL file; raises `UserError` with the line's number."""
    for number, line in enumerate(_text(file).split("\n"), 1):
        if not line.strip():
            continue
        where = f"{file}, line {number}"
        try:
            record = json.loads(line)
            captions = captions_of(record)
        except (ValueError, RecursionError) as error:
            raise UserError(f"{where}: {error} Expected one JSON object a line.") from None
        yield where, _image(record.get("image"), where), captions, _split(record.get("split"), where)


def read_csv(file: Path) -> Iterator[Row]:
    """Rows of a CSV file, those of one picture joined; raises `UserError` with the row's number."""
    text = _text(file)
    header = text.partition("\n")[0]
    table = csv.DictReader(io.StringIO(text, newline=""), delimiter=max(",\t;|", key=header.count))
    joined: dict[str, Row] = {}
    try:
        image_column = _column(table.fieldnames, IMAGE_COLUMNS, file)
        caption_column = _column(table.fieldnames, CAPTION_COLUMNS, file)
        for row in table:
            where = f"{file}, line {table.line_num}"
            image, split = _image(row[image_column], where), _split(row.get("split"), where)
            first = joined.setdefault(image, (where, image, [], split))
            if first[3] != split:
                raise UserError(f"{where}: {image!r} is in the splits {first[3]!r} and {split!r}; give it one split.")
            first[2].append(row[caption_column] or "")
    except csv.Error as error:
        raise UserError(f"{file}, line {table.line_num}: {error}; expected an ordinary CSV file.") from None
    yield from joined.values()


def _text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{file} is no UTF-8 text ({error}); save it as UTF-8.") from None


def _column(columns: Sequence[str] | None, wanted: Sequence[str], file: Path) -> str:
    for name in wanted:
        if name in (columns or ()):
            return name
    raise UserError(
        f"{file} has the columns {', '.join(columns or ()) or 'none'}; expected one of {', '.join(wanted)}."
    )


def _image(value: object, where: str) -> str:
    if not isinstance(value, str) or not value.strip():
        raise UserError(f"{where}: captions without an image; every record names the picture it belongs to.")
    return value


def _split(value: object, where: str) -> str:
    if value is not None and not isinstance(value, str):
        raise UserError(f"{where}: the split {value!r} is no name; expected a word such as train.")
    return value or ""
