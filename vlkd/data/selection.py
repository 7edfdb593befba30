"""Image and text selection from files: SugarCrepe, Winoground, ARO, WinoGAViL, and a general form."""

from __future__ import annotations

import csv
import io
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vlkd.data.eval_types import Box, Choice, EvalSet
from vlkd.data.files import strict_json
from vlkd.data.records import resolve_inside
from vlkd.data.sources import IMAGE_SUFFIXES, MAX_BAD_SHARE, ImageFile
from vlkd.errors import UserError

LINES = (".jsonl", ".ndjson")
ASSOCIATIONS_FILE = "winogavil_dataset.csv"
"""The hub's own file of WinoGAViL, whose pictures lie in `winogavil_images`."""
MAX_BOX_PIXELS = 50_000_000
_PICTURE_FOLDERS = ("", "images", "winogavil_images")
_HEAD_BYTES = 65536
_SIGNS = (b'"negative_caption"', b'"false_caption"', b'"image_0"', b'"associations"')
_FORMS = (
    "filename, caption, negative_caption (SugarCrepe); image_path, true_caption, false_caption (ARO); image_0, "
    "image_1, caption_0, caption_1 (Winoground); cue, candidates, associations (WinoGAViL); or images, captions"
)


@dataclass(frozen=True)
class _Item:
    where: str
    images: list[str]
    captions: list[str]
    group: str
    box: Box | None
    gold: tuple[int, ...]


@dataclass
class _Pictures:
    """Every picture, or box of one, once, however many items show it."""

    folder: Path
    rows: dict[tuple[Path, Box | None], int] = field(default_factory=dict)
    missing: list[str] = field(default_factory=list)

    def row(self, name: str, where: str, box: Box | None) -> int | None:
        for inner in _PICTURE_FOLDERS:
            path = resolve_inside(self.folder / inner, name, where)
            endings = ("",) if path.suffix.lower() in IMAGE_SUFFIXES else ("", *IMAGE_SUFFIXES)
            for place in (path.with_name(path.name + ending) for ending in endings):
                if place.is_file():
                    return self.rows.setdefault((place, box), len(self.rows))
        self.missing.append(name)
        return None

    def key(self, place: Path, box: Box | None) -> str:
        """The box is in the key, so that whatever is kept under the keys tells two parts of a picture apart."""
        name = Path(os.path.relpath(place, self.folder.absolute())).as_posix()
        return name if box is None else f"{name}@{','.join(map(str, box))}"


def is_selection(path: Path) -> bool:
    """Whether a file, or the first JSON file of a folder, looks like a selection."""
    if path.is_dir():
        files = _files(path, "")
        return bool(files) and is_selection(files[0])
    if path.name == ASSOCIATIONS_FILE:
        return path.is_file()
    if path.suffix not in (".json", *LINES) or not path.is_file():
        return False
    with path.open("rb") as stream:
        head = stream.read(_HEAD_BYTES)
    # A Karpathy JSON has `images`, too, but is one object over many lines or without captions of its own beside them.
    general = path.suffix in LINES and b'"images"' in head.partition(b"\n")[0]
    return general or any(sign in head for sign in _SIGNS)


def open_selection(path: Path, split: str = "") -> EvalSet:
    """Open a selection file, or a folder of one JSON or JSONL per subset.

    Each JSON (an object of objects, or a list) or JSONL holds items of one of these forms.

    - SugarCrepe: {"filename", "caption", "negative_caption"};
    - ARO: {"image_path", "true_caption", "false_caption": text or list, "relation_name" as group}, with "bbox_x",
      "bbox_y", "bbox_w", "bbox_h" of the box that is cut out of the picture, as ARO does;
    - Winoground: {"image_0", "image_1", "caption_0", "caption_1", "collapsed_tag" as group};
    - WinoGAViL: {"cue", "candidates": [images], "associations": those of them that belong to the cue}, which as a
      caption is "A cue" or "An cue", as in DataComp; or the hub's `winogavil_dataset.csv`, whose lists are JSON;
    - general: {"images": [...], "captions": [...], "group"}; the i-th image belongs to the i-th caption.

    Pictures lie in the folder of the file, or in `images` or `winogavil_images` there; a name without an ending gets
    one. Items of missing pictures are left out and counted, up to 5 %. Without a group of its own, an item has the
    subset's name.

    Args:
        path: file or folder.
        split: one subset of a folder, "" for all.

    Raises:
        UserError: nothing there, an item of another form, a picture outside the folder, too many missing ones, or
            WinoGAViL's items together with others.
    """
    files = _files(path, split) if path.is_dir() else [path]
    if not files or not files[0].is_file() or (split and not path.is_dir()):
        raise UserError(
            f"There is no selection {split or 'file'} at {path}; give a .json or .jsonl, or a folder of them."
        )
    folder = path if path.is_dir() else path.parent
    pictures = _Pictures(folder)
    items = [item for file in files for item in _items(file, file.stem if path.is_dir() else "")]
    choices = []
    for item in items:
        rows = [row for name in item.images if (row := pictures.row(name, item.where, item.box)) is not None]
        if len(rows) == len(item.images):
            choices.append(Choice(images=tuple(rows), captions=tuple(item.captions), group=item.group, gold=item.gold))
    lost = len(items) - len(choices)
    if not choices or lost > max(1, MAX_BAD_SHARE * len(items)):
        first = f", first {pictures.missing[0]}" if pictures.missing else ""
        raise UserError(
            f"{lost} of {len(items)} items of {path} lack a picture{first}; put the pictures beside the file or into "
            f"{folder / 'images'}."
        )
    if len({bool(choice.gold) for choice in choices}) > 1:
        raise UserError(f"{path} mixes items of associations with others; open the files of one kind, by their split.")
    return EvalSet(
        kind="selection",
        keys=[pictures.key(place, box) for place, box in pictures.rows],
        files=[ImageFile(place) for place, _ in pictures.rows],
        choices=tuple(choices),
        boxes={row: box for (_, box), row in pictures.rows.items() if box is not None},
        problems=tuple(f"missing: {name}" for name in dict.fromkeys(pictures.missing)),
    )


def _files(folder: Path, split: str) -> list[Path]:
    found = sorted(path for suffix in (".json", *LINES) for path in folder.glob(f"*{suffix}"))
    found += [folder / ASSOCIATIONS_FILE] if (folder / ASSOCIATIONS_FILE).is_file() else []
    return [path for path in found if not split or path.stem == split]


def _items(file: Path, subset: str) -> Iterator[_Item]:
    for where, entry in _entries(file):
        try:
            images, captions, group = _parts(entry)
            box = _box(entry, where) if "bbox_x" in entry and "false_caption" in entry else None
        except (KeyError, TypeError) as error:
            raise UserError(f"{where}: {error} is missing or of another type; expected {_FORMS}.") from None
        if not all(isinstance(text, str) and text.strip() and _is_utf8(text) for text in images + captions):
            raise UserError(f"{where}: an image or caption is no text or empty; expected {_FORMS}.")
        if not images or not captions or len(images) * len(captions) < 2:
            raise UserError(f"{where}: {len(images)} images and {len(captions)} captions leave no choice; add another.")
        gold = _gold(entry, where) if "associations" in entry else ()
        yield _Item(where, images, captions, group if isinstance(group, str) and group else subset, box, gold)


def _entries(file: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    try:
        text = file.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{file} cannot be read as UTF-8 text ({error}); mend it.") from None
    if file.name == ASSOCIATIONS_FILE:
        yield from _csv_entries(file, text)
        return
    numbered: list[tuple[str, str]] = [(str(file), text)]
    if file.suffix in LINES:
        numbered = [(f"{file}, line {i}", line) for i, line in enumerate(text.split("\n"), 1) if line.strip()]
    for where, part in numbered:
        try:
            content = strict_json(part)
        except ValueError as error:
            raise UserError(f"{where} is no JSON ({error}); mend it.") from None
        for name, entry in [("", content)] if file.suffix in LINES else _named(content):
            place = f"{where}, item {name}" if name else where
            if not isinstance(entry, dict):
                raise UserError(f"{place}: a {type(entry).__name__}; expected an object with {_FORMS}.")
            yield place, entry


def _csv_entries(file: Path, text: str) -> Iterator[tuple[str, dict[str, Any]]]:
    try:
        for number, line in enumerate(csv.DictReader(io.StringIO(text, newline="")), 1):
            where = f"{file}, item {number}"
            lists = {name: strict_json(line[name] or "") for name in ("candidates", "associations")}
            yield where, {"cue": line["cue"], **lists}
    except (csv.Error, KeyError, ValueError) as error:
        raise UserError(
            f"{file} cannot be read ({error!r:.120}); expected the columns cue, candidates and associations, the last "
            "two as JSON lists: fetch it again."
        ) from None


def _named(content: object) -> list[tuple[str, Any]]:
    """Items with their names; numbers as names are sorted as numbers, so that "10" comes after "9"."""
    if isinstance(content, list):
        return [(str(number), entry) for number, entry in enumerate(content)]
    if not isinstance(content, dict):
        return [("", content)]
    if all(name.isascii() and name.isdigit() for name in content):
        return sorted(content.items(), key=lambda named: (len(named[0].lstrip("0")), named[0].lstrip("0")))
    return list(content.items())


def _parts(entry: dict[str, Any]) -> tuple[list[Any], list[Any], Any]:
    """Images, captions and group of an item of any form."""
    if "negative_caption" in entry:
        return [entry["filename"]], [entry["caption"], entry["negative_caption"]], entry.get("group")
    if "false_caption" in entry:
        false = entry["false_caption"] if isinstance(entry["false_caption"], list) else [entry["false_caption"]]
        return [entry["image_path"]], [entry["true_caption"], *false], entry.get("relation_name", entry.get("group"))
    if "image_0" in entry:
        images, captions = ([entry[f"{part}_{i}"] for i in (0, 1)] for part in ("image", "caption"))
        return images, captions, entry.get("collapsed_tag", entry.get("group"))
    if "associations" in entry:
        if not isinstance(entry["candidates"], list) or not isinstance(entry["associations"], list):
            raise TypeError("candidates or associations")
        return entry["candidates"], [_cue_caption(entry["cue"])], entry.get("group")
    if not isinstance(entry["images"], list) or not isinstance(entry["captions"], list):
        raise TypeError("images or captions")
    return entry["images"], entry["captions"], entry.get("group")


def _cue_caption(cue: object) -> str:
    """WinoGAViL's prompt, of the lower-cased cue; its article goes by the first letter."""
    if not isinstance(cue, str) or not cue.strip():
        raise TypeError("cue")
    lower = cue.lower()
    return f"{'An' if lower[0] in 'aeiou' else 'A'} {lower}"


def _gold(entry: dict[str, Any], where: str) -> tuple[int, ...]:
    """The places of the associations among the candidates."""
    candidates, associations = entry["candidates"], entry["associations"]
    gold = tuple(place for place, name in enumerate(candidates) if name in associations)
    strange = [name for name in associations if name not in candidates]
    if strange or not gold:
        raise UserError(
            f"{where}: the associations {associations!r:.80} are not all candidates; expected one or more of these."
        )
    return gold


def _box(entry: dict[str, Any], where: str) -> Box:
    """ARO's box, rounded to whole pixels as Pillow does."""
    told = [entry[f"bbox_{name}"] for name in "xywh"]
    if not all(type(value) in (int, float) and abs(value) <= MAX_BOX_PIXELS for value in told):
        raise TypeError("bbox_x, bbox_y, bbox_w or bbox_h")
    left, top, width, height = told
    box = (round(left), round(top), round(left + width), round(top + height))
    wide, high = box[2] - box[0], box[3] - box[1]
    if min(wide, high) < 1 or wide * high > MAX_BOX_PIXELS:
        raise UserError(f"{where}: the box {told} is {wide} x {high} pixels; expected 1 to {MAX_BOX_PIXELS} in all.")
    return box


def _is_utf8(text: str) -> bool:
    """JSON escapes can spell half a surrogate pair, which no tokenizer takes."""
    return not any("\ud800" <= letter <= "\udfff" for letter in text)
