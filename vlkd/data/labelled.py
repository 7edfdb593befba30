"""A labelled image folder, one folder per class, as zero-shot classification reads it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL.Image import Image

from vlkd.data.images import open_image
from vlkd.data.sources import IMAGE_SUFFIXES, ImageFile
from vlkd.errors import UserError

CLASSES_FILE = "classnames.txt"
TEMPLATES_FILE = "zeroshot_classification_templates.txt"
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
    folders = sorted(path for path in _entries(root) if path.is_dir() and not path.name.startswith("."))
    if not folders:
        raise UserError(f"{ref} holds no class folder; expected FOLDER/CLASS/*.jpg with one folder per class.")
    if len(folders) == 1:
        raise UserError(
            f"{ref} holds one class, {folders[0].name!r}; expected two or more: name the folder of all classes."
        )
    images = [_images(folder) for folder in folders]
    empty = [repr(folder.name) for folder, own in zip(folders, images, strict=True) if not own]
    if empty:
        more = ", ..." if len(empty) > _LISTED else ""
        raise UserError(
            f"{len(empty)} of {len(folders)} class folders of {ref} hold no image: {', '.join(empty[:_LISTED])}{more}; "
            f"expected {'|'.join(IMAGE_SUFFIXES)} files directly in each: fill or remove them, or name one split."
        )
    return Labelled(
        _class_names(root, folders),
        [ImageFile(path) for own in images for path in own],
        np.repeat(np.arange(len(folders), dtype=np.int64), [len(own) for own in images]),
        [f"{path.parent.name}/{path.name}" for own in images for path in own],
        _templates(root),
    )


def _images(folder: Path) -> list[Path]:
    paths = (path for path in _entries(folder) if path.suffix.lower() in IMAGE_SUFFIXES)
    # A dangling link stays, to be counted as unreadable; a folder or a pipe of that name is no image.
    return sorted(path for path in paths if path.is_file() or not path.exists())


def _entries(folder: Path) -> list[Path]:
    try:
        return list(folder.iterdir())
    except OSError as error:
        raise UserError(f"{folder} cannot be listed ({error.strerror}); make it readable or remove it.") from None


def _class_names(root: Path, folders: list[Path]) -> tuple[str, ...]:
    file = _beside(root, CLASSES_FILE)
    names = [folder.name.replace("_", " ").strip() for folder in folders] if file is None else _lines(file)
    where = file or root
    if len(names) != len(folders):
        raise UserError(
            f"{where} has {len(names)} names, expected {len(folders)}, one for each class folder of {root} in sorted "
            "order; mend or remove it."
        )
    for number, name in enumerate(names):
        if not name or any("\ud800" <= letter <= "\udfff" for letter in name):
            raise UserError(f"{where}: class {number} has the name {name!r}; expected UTF-8 text, so rename it.")
    return tuple(names)


def _templates(root: Path) -> tuple[str, ...]:
    file = _beside(root, TEMPLATES_FILE)
    if file is None:
        return ()
    templates = _lines(file)
    for number, template in enumerate(templates, 1):
        if "{c}" not in template:
            raise UserError(f"{file}: line {number} is {template!r}; expected {{c}} where the class name goes.")
    if not templates:
        raise UserError(f"{file} is empty; expected one template with {{c}} per line, or remove it.")
    return tuple(templates)


def _beside(root: Path, name: str) -> Path | None:
    """The file inside the folder or else beside it."""
    places = (root / name, root.absolute().parent / name)
    return next((place for place in places if place.is_file()), None)


def _lines(file: Path) -> list[str]:
    """Stripped lines, without the empty ones at the end."""
    try:
        text = file.read_text(encoding="utf-8-sig").rstrip()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{file} cannot be read as UTF-8 text ({error}); mend or remove it.") from None
    return [line.strip() for line in text.split("\n")] if text else []
