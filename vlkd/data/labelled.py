"""A labelled image folder, one folder per class, as zero-shot classification reads it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL.Image import Image

from vlkd.data.files import strict_json
from vlkd.data.images import open_image
from vlkd.data.sources import IMAGE_SUFFIXES, ImageFile
from vlkd.errors import UserError

CLASSES_FILE = "classnames.txt"
TEMPLATES_FILE = "zeroshot_classification_templates.txt"
PROMPTS_FILE = "prompts.json"
_LISTED = 10


@dataclass(frozen=True)
class Labelled:
    """Images with one class each; I images, C classes.

    Attributes:
        classes: (C,) names in words, by class id; two classes may have one name.
        files: where each image is, class by class.
        labels: (I,) class id of each image.
        keys: (I,) the stable name of each image, `CLASS FOLDER/FILE`.
        templates: prompts with `{c}` in the place of the class name; () where the data bring none.
    """

    classes: tuple[str, ...]
    files: list[ImageFile]
    labels: NDArray[np.int64]
    keys: list[str]
    templates: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.files)

    @property
    def captions(self) -> list[tuple[str, ...]]:
        """(I,) none for any image, so that these are pairs without labels to what encodes pairs."""
        return [()] * len(self)

    def image(self, i: int) -> Image:
        """Decode image `i`; raises `UserError` for one that cannot be used."""
        return open_image(self.files[i].read())


def open_labelled(ref: str) -> Labelled:
    """Open `FOLDER/CLASS/*.jpg`: class ids in the order of the sorted folder names, hidden folders left out.

    The names are the folders', underscores turned to spaces, or the lines of `classnames.txt`. That file and the
    templates, `zeroshot_classification_templates.txt`, are CLIP_benchmark's; they lie inside the folder or, for all
    splits, beside it.

    Args:
        ref: the folder. Images must lie directly in the class folders: the folder above several splits is refused.

    Raises:
        UserError: no such folder, fewer than two classes, a class without images, names of another number or without
            letters, a template without `{c}`, or a file that is no UTF-8 text.
    """
    root = Path(ref)
    if not root.is_dir():
        raise UserError(f"There is no folder {ref}; give a folder with one folder of images per class.")
    return _opened(root, _folder_names(root), ("{c}",))


def open_split(root: Path, split: str) -> Labelled:
    """Open `ROOT/SPLIT/CLASS/*.jpg` with class ids that are the same in every split; templates may have a `{}`, too.

    The classes are the folders of all splits: of the folders beside this one that have a class folder of it, or of one
    of those, and so on. Without a split this is `open_labelled`.

    Raises:
        UserError: as `open_labelled`, which says all else.
    """
    folder = root / split
    if not folder.is_dir():
        there = ", ".join(_folder_names(root)) if root.is_dir() else ""
        raise UserError(
            f"There is no folder {folder}; {root} holds {there or 'no folder'}: check the path or the split."
        )
    return _opened(folder, _names_of_all_splits(root, split) if split else _folder_names(folder), ("{c}", "{}"))


def _opened(root: Path, names: list[str], marks: tuple[str, ...]) -> Labelled:
    """The pictures of one folder; `names` are the class folders that it or another split of it has."""
    folders = [root / name for name in _folder_names(root)]
    if not folders:
        raise UserError(f"{root} holds no class folder; expected FOLDER/CLASS/*.jpg with one folder per class.")
    if len(names) == 1:
        raise UserError(f"{root} holds one class, {names[0]!r}; expected two or more: name the folder of all classes.")
    images = [_images(folder) for folder in folders]
    empty = [repr(folder.name) for folder, own in zip(folders, images, strict=True) if not own]
    if empty:
        more = ", ..." if len(empty) > _LISTED else ""
        raise UserError(
            f"{len(empty)} of {len(folders)} class folders of {root} hold no image: {', '.join(empty[:_LISTED])}{more}"
            f"; expected {'|'.join(IMAGE_SUFFIXES)} files directly in each: fill or remove them, or name one split."
        )
    number = {name: i for i, name in enumerate(names)}
    ids = np.array([number[folder.name] for folder in folders], dtype=np.int64)
    return Labelled(
        _class_names(root, names),
        [ImageFile(path) for own in images for path in own],
        np.repeat(ids, [len(own) for own in images]),
        [f"{path.parent.name}/{path.name}" for own in images for path in own],
        _templates(root, marks),
    )


def _folder_names(folder: Path) -> list[str]:
    return sorted(path.name for path in _entries(folder) if path.is_dir() and not path.name.startswith("."))


def _names_of_all_splits(root: Path, split: str) -> list[str]:
    """A folder beside the split that has none of the classes, such as one of documents, is no split of them."""
    others = {name: set(_folder_names(root / name)) for name in _folder_names(root)}
    known = set(_folder_names(root / split))
    while joined := [name for name, own in others.items() if own & known]:
        for name in joined:
            known |= others.pop(name)
    return sorted(known)


def _images(folder: Path) -> list[Path]:
    paths = (path for path in _entries(folder) if path.suffix.lower() in IMAGE_SUFFIXES)
    # A dangling link stays, to be counted as unreadable; a folder or a pipe of that name is no image.
    return sorted(path for path in paths if path.is_file() or not path.exists())


def _entries(folder: Path) -> list[Path]:
    try:
        return list(folder.iterdir())
    except OSError as error:
        raise UserError(f"{folder} cannot be listed ({error.strerror}); make it readable or remove it.") from None


def _class_names(root: Path, folders: Sequence[str]) -> tuple[str, ...]:
    file = _beside(root, CLASSES_FILE)
    if file is not None:
        return read_names(file, len(folders), f"one for each class folder of {root} in sorted order")
    return _checked([name.replace("_", " ").strip() for name in folders], root)


def read_names(file: Path, count: int | None, why: str = "") -> tuple[str, ...]:
    """The lines of `classnames.txt`; raises `UserError` for other than `count` names, or one without letters."""
    names = read_lines(file)
    if count is not None and len(names) != count:
        raise UserError(f"{file} has {len(names)} names, expected {count}, {why}; mend or remove it.")
    return _checked(names, file)


def _checked(names: Sequence[str], where: Path) -> tuple[str, ...]:
    for number, name in enumerate(names):
        if not name or any("\ud800" <= letter <= "\udfff" for letter in name):
            raise UserError(f"{where}: class {number} has the name {name!r}; expected UTF-8 text, so rename it.")
    return tuple(names)


def _templates(root: Path, marks: tuple[str, ...]) -> tuple[str, ...]:
    file = _beside(root, TEMPLATES_FILE)
    return () if file is None else read_templates(file, marks)


def read_templates(file: Path, marks: tuple[str, ...] = ("{c}", "{}")) -> tuple[str, ...]:
    """The lines of a file of templates; raises `UserError` for none, or one that has none of the `marks`."""
    templates = read_lines(file)
    for number, template in enumerate(templates, 1):
        if not any(mark in template for mark in marks):
            raise UserError(f"{file}: line {number} is {template!r}; expected {marks[0]} where the class name goes.")
    if not templates:
        raise UserError(f"{file} is empty; expected one template with {{c}} per line, or remove it.")
    return tuple(templates)


def read_prompts(root: Path, classes: Sequence[str]) -> dict[str, tuple[str, ...]] | None:
    """Whole prompts for each class: `prompts.json` = {class name: [prompts]} in the folder or beside it, else None.

    Names of other classes are left out.

    Raises:
        UserError: it is no such object, or lacks a class.
    """
    file = _beside(root, PROMPTS_FILE)
    return None if file is None else read_prompts_file(file, classes)


def read_prompts_file(file: Path, classes: Sequence[str]) -> dict[str, tuple[str, ...]]:
    """As `read_prompts`, from a file of any name.

    Raises:
        UserError: it cannot be read, is no such object, or lacks a class.
    """
    try:
        content = strict_json(file.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError) as error:
        raise UserError(f"{file} cannot be read as JSON ({error}); mend or remove it.") from None
    if not isinstance(content, dict):
        raise UserError(
            f"{file} holds a {type(content).__name__}; expected an object of class names and their prompts."
        )
    prompts = {}
    for name in classes:
        own = content.get(name)
        if not isinstance(own, list) or not own or not all(isinstance(text, str) and text.strip() for text in own):
            raise UserError(f"{file} has {own!r:.80} for the class {name!r}; expected a list of one or more prompts.")
        prompts[name] = tuple(own)
    return prompts


def _beside(root: Path, name: str) -> Path | None:
    """The file inside the folder or else beside it."""
    places = (root / name, root.absolute().parent / name)
    return next((place for place in places if place.is_file()), None)


def read_lines(file: Path) -> list[str]:
    """Stripped lines, without the empty ones at the end."""
    try:
        text = file.read_text(encoding="utf-8-sig").rstrip()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{file} cannot be read as UTF-8 text ({error}); mend or remove it.") from None
    return [line.strip() for line in text.split("\n")] if text else []
