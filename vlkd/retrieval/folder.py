"""An index folder on disk: replaced whole, read whole, refused if a file is not what it says."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from vlkd.errors import UserError

FORMAT, FORMAT_VERSION, READABLE_VERSIONS = "vlkd-index", 2, (1, 2)
FILES = ("index.faiss", "items.jsonl")
_KEYS = {"model", "width", "settings", "count", "next_id", "files"}


def replace_folder(folder: str | Path, fill: Callable[[Path], None]) -> None:
    """Fill a hidden folder beside `folder`, then put it in its place by renaming.

    Between the two renames the former content is in the hidden folder that `readable_folder` looks into.

    Raises:
        UserError: `folder` is something else than an index or an empty folder.
    """
    place = Path(os.path.abspath(folder))
    if place.exists() and not (place.is_dir() and ((place / "index.json").is_file() or not any(place.iterdir()))):
        raise UserError(f"{folder} exists and is not a vlkd index; choose another output folder.")
    new, old = _beside(place, "saving"), _beside(place, "previous")
    shutil.rmtree(new, ignore_errors=True)
    new.mkdir(parents=True)
    fill(new)
    for path in new.iterdir():
        with path.open("rb+") as file:
            os.fsync(file.fileno())
    if place.exists():
        shutil.rmtree(old, ignore_errors=True)
        place.rename(old)
    new.rename(place)
    shutil.rmtree(old, ignore_errors=True)


def readable_folder(folder: str | Path) -> Path:
    """The folder itself, or its former content if a save was killed between its two renames."""
    place = Path(os.path.abspath(folder))
    previous = _beside(place, "previous")
    return previous if not place.exists() and previous.exists() else place


def read_description(place: Path) -> dict[str, Any]:
    """`index.json`, after checking the other files against the hashes in it.

    Raises:
        UserError: a file is missing, is not readable, has changed, or is of another version.
    """
    try:
        about = json.loads((place / "index.json").read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(f"{place} holds no index.json; expected an index folder, made by `vlkd index`.") from None
    except (ValueError, OSError) as error:
        raise UserError(f"{place / 'index.json'} cannot be read ({error}); build the index again.") from None
    known = (
        isinstance(about, dict) and about.get("format") == FORMAT and about.get("format_version") in READABLE_VERSIONS
    )
    if not known or not about.keys() >= _KEYS:
        raise UserError(
            f"{place / 'index.json'} does not describe a {FORMAT} of version {FORMAT_VERSION}; build the index again."
        )
    for name in FILES:
        if not (place / name).is_file() or sha256(place / name) != about["files"].get(name):
            raise UserError(f"{place / name} is missing or not what index.json describes; build the index again.")
    return dict(about)


def sha256(path: Path) -> str:
    """Hexadecimal hash of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _beside(place: Path, state: str) -> Path:
    return place.with_name(f".{place.name}.{state}")
