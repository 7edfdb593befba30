"""Image and text selection from files: SugarCrepe, Winoground, ARO, and a general form."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vlkd.data.eval_types import Choice, EvalSet
from vlkd.data.files import strict_json
from vlkd.data.records import resolve_inside
from vlkd.data.sources import IMAGE_SUFFIXES, MAX_BAD_SHARE, ImageFile
from vlkd.errors import UserError

LINES = (".jsonl", ".ndjson")
_HEAD_BYTES = 65536
_SIGNS = (b'"negative_caption"', b'"false_caption"', b'"image_0"')
_FORMS = (
    "filename, caption, negative_caption (SugarCrepe); image_path, true_caption, false_caption (ARO); image_0, "
    "image_1, caption_0, caption_1 (Winoground); or images, captions"
)


@dataclass(frozen=True)
class _Item:
    where: str
    images: list[str]
    captions: list[str]
    group: str
    boxed: bool


@dataclass
class _Pictures:
    """Every picture once, however many items show it; relative to the folder of the files, or to `images` in it."""

    folder: Path
    rows: dict[Path, int] = field(default_factory=dict)
    missing: list[str] = field(default_factory=list)

    def row(self, name: str, where: str) -> int | None:
        for root in (self.folder, self.folder / "images"):
            path = resolve_inside(root, name, where)
            endings = ("",) if path.suffix.lower() in IMAGE_SUFFIXES else ("", *IMAGE_SUFFIXES)
            for place in (path.with_name(path.name + ending) for ending in endings):
                if place.is_file():
                    return self.rows.setdefault(place, len(self.rows))
        self.missing.append(name)
        return None


def is_selection(path: Path) -> bool:
    """Whether a file, or the first JSON file of a folder, looks like a selection."""
    if path.is_dir():
        files = _files(path, "")
        return bool(files) and is_selection(files[0])
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
    - ARO: {"image_path", "true_caption", "false_caption": text or list, "relation_name" as group};
    - Winoground: {"image_0", "image_1", "caption_0", "caption_1", "collapsed_tag" as group};
    - general: {"images": [...], "captions": [...], "group"}; the i-th image belongs to the i-th caption.

    Pictures lie in the folder of the file or in `images` there; a name without an ending gets one. Items of missing
    pictures are left out and counted, up to 5 %. Without a group of its own, an item has the subset's name.

    Args:
        path: file or folder.
        split: one subset of a folder, "" for all.

    Raises:
        UserError: nothing there, an item of another form, a picture outside the folder, or too many missing ones.
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
        rows = [row for name in item.images if (row := pictures.row(name, item.where)) is not None]
        if len(rows) == len(item.images):
            choices.append(Choice(images=tuple(rows), captions=tuple(item.captions), group=item.group))
    lost = len(items) - len(choices)
    if not choices or lost > max(1, MAX_BAD_SHARE * len(items)):
        first = f", first {pictures.missing[0]}" if pictures.missing else ""
        raise UserError(
            f"{lost} of {len(items)} items of {path} lack a picture{first}; put the pictures beside the file or into "
            f"{folder / 'images'}."
        )
    places = list(pictures.rows)
    return EvalSet(
        kind="selection",
        keys=[Path(os.path.relpath(place, folder.absolute())).as_posix() for place in places],
        files=[ImageFile(place) for place in places],
        choices=tuple(choices),
        problems=_problems(items, pictures.missing),
    )


def _problems(items: Sequence[_Item], missing: Sequence[str]) -> tuple[str, ...]:
    problems = [f"missing: {name}" for name in dict.fromkeys(missing)]
    if boxed := sum(item.boxed for item in items):
        problems.append(f"{boxed} items name a box (bbox_x, ...) to which ARO crops; whole pictures are shown here")
    return tuple(problems)


def _files(folder: Path, split: str) -> list[Path]:
    found = sorted(path for suffix in (".json", *LINES) for path in folder.glob(f"*{suffix}"))
    return [path for path in found if not split or path.stem == split]


def _items(file: Path, subset: str) -> Iterator[_Item]:
    for where, entry in _entries(file):
        try:
            images, captions, group = _parts(entry)
        except (KeyError, TypeError) as error:
            raise UserError(f"{where}: {error} is missing or of another type; expected {_FORMS}.") from None
        if not all(isinstance(text, str) and text.strip() and _is_utf8(text) for text in images + captions):
            raise UserError(f"{where}: an image or caption is no text or empty; expected {_FORMS}.")
        if not images or not captions or len(images) * len(captions) < 2:
            raise UserError(f"{where}: {len(images)} images and {len(captions)} captions leave no choice; add another.")
        yield _Item(where, images, captions, group if isinstance(group, str) and group else subset, "bbox_x" in entry)


def _entries(file: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    try:
        text = file.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{file} cannot be read as UTF-8 text ({error}); mend it.") from None
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
    if not isinstance(entry["images"], list) or not isinstance(entry["captions"], list):
        raise TypeError("images or captions")
    return entry["images"], entry["captions"], entry.get("group")


def _is_utf8(text: str) -> bool:
    """JSON escapes can spell half a surrogate pair, which no tokenizer takes."""
    return not any("\ud800" <= letter <= "\udfff" for letter in text)
