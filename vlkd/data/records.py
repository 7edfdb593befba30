"""Pictures and captions as other people list them: captions JSONL, captions CSV, and the Karpathy-split JSON."""

from __future__ import annotations

import csv
import io
import json
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from vlkd.data.shard_writer import is_safe_key
from vlkd.data.shards import captions_of
from vlkd.errors import UserError

IMAGE_COLUMNS = ("image", "filepath")
CAPTION_COLUMNS = ("caption", "title")


@dataclass(frozen=True, kw_only=True)
class Record:
    """One listed picture: its file, its captions (() is unlabelled), its split, and what else is kept of it."""

    image: Path
    captions: tuple[str, ...]
    split: str = "train"
    extra: Mapping[str, object] = field(default_factory=dict)


def read_captions_file(file: Path, root: Path | None = None, *, split: str = "train") -> list[Record]:
    """The records of a captions file, in its order.

    A JSONL line is {"image": PATH, "captions": [...]} or {"image": PATH, "caption": "..."}, optionally with "split". A
    CSV (comma, tab, semicolon or bar, found from its header) has a column image or filepath, a column caption or title,
    and optionally split; rows of one picture are taken together.

    Args:
        file: .jsonl, .ndjson or .json (one object a line), else CSV.
        root: folder of the pictures, which no path may leave; that of the file by default.
        split: of records that name none.

    Raises:
        UserError: a line is not as expected, or a picture is named twice; the sentence has the line's number.
    """
    if not file.is_file():
        raise UserError(f"There is no captions file {file}; check the path.")
    rows = _jsonl_rows(file) if file.suffix in (".jsonl", ".json", ".ndjson") else _csv_rows(file)
    records = [
        Record(
            image=resolve_inside(root or file.parent, image, where),
            captions=_clean(captions, where),
            split=own_split or split,
        )
        for where, image, captions, own_split in rows
    ]
    _check_named_once(records)
    return records


def read_karpathy(file: Path, root: Path | None = None, *, restval: str = "train") -> list[Record]:
    """The records of a Karpathy JSON, in its order; a picture is ROOT/filepath/filename, all raw sentences are kept.

    Args:
        file: top level {"images": [{"filename", "split", "sentences": [{"raw"}], ...}]}.
        root: folder of the pictures; that of the file by default.
        restval: COCO's split of that name joins "train", as published numbers assume, stays its "own", or is a "drop".

    Raises:
        UserError: the file has another form, or names a picture twice.
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
        record = _karpathy_record(entry, root or file.parent, f"{file}, image {number}")
        if record.split != "restval" or restval == "own":
            records.append(record)
        elif restval == "train":
            records.append(replace(record, split="train"))
    _check_named_once(records)
    return records


def record_keys(images: Sequence[Path]) -> list[str]:
    """A key per picture: the files' names without extension where all are safe and different, else padded numbers."""
    stems = [image.stem for image in images]
    if len(set(stems)) == len(stems) and all(is_safe_key(stem) for stem in stems):
        return stems
    return [f"{number:08d}" for number in range(len(images))]


def resolve_inside(root: Path, relative: str, source: str) -> Path:
    """`root / relative`; raises `UserError` when that lies outside `root` (by its name: links are the user's own)."""
    path = os.path.normpath(root.absolute() / relative)
    if not Path(path).is_relative_to(os.path.normpath(root.absolute())):
        raise UserError(
            f"{source}: the picture {relative!r} lies outside {root}; name its folder with `vlkd prep` --image-root."
        )
    return Path(path)


Row = tuple[str, str, list[str], str]
"""Where it was found (for messages), image path, captions, split ("" for none)."""


def _jsonl_rows(file: Path) -> Iterator[Row]:
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


def _csv_rows(file: Path) -> Iterator[Row]:
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


def _karpathy_record(entry: object, root: Path, where: str) -> Record:
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
    return Record(image=path, captions=_clean(captions, where), split=entry["split"], extra=extra)


def _check_named_once(records: Iterable[Record]) -> None:
    repeated = [path for path, count in Counter(record.image for record in records).items() if count > 1]
    if repeated:
        raise UserError(
            f"{len(repeated)} pictures are named more than once, first {repeated[0]}; give all captions together."
        )


def _clean(captions: Iterable[str], where: str) -> tuple[str, ...]:
    """Stripped, without empty ones, equal ones once."""
    kept = tuple(dict.fromkeys(caption.strip() for caption in captions if caption.strip()))
    try:
        for caption in kept:
            caption.encode()  # JSON escapes can spell half a surrogate pair, which no tokenizer takes.
    except UnicodeError as error:
        raise UserError(f"{where}: a caption that is no UTF-8 ({error}); mend its escapes.") from None
    return kept


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
