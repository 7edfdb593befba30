"""Results on disk: one strict-JSON line per model, data set and protocol, and one value per item beside it.

A line holds CLIP_benchmark's keys (`dataset`, `model`, `pretrained`, `task`, `metrics`, `language`) and what is needed
to trust and repeat the figures: counts, interval, random score, hashes, dtype, versions. Lines are only ever appended,
each in one write; the latest line for a (model, data set, protocol) counts.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from vlkd.data.files import strict_json, write_whole
from vlkd.errors import UserError
from vlkd.protocols.measured import Measured

RESULTS = "results.jsonl"
ITEMS = "items"
UNOPENED = "data"
"""In the error row of a data set or a model that could not be opened, where the protocol stands otherwise."""
PACKAGES = ("vlkd", "torch", "numpy", "pillow", "timm", "open_clip_torch", "transformers")

Row = dict[str, Any]
AnyRow = TypeVar("AnyRow", bound=Mapping[str, Any])


def versions() -> dict[str, str]:
    """Versions of the packages on which the figures depend."""
    found = {}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return found


def model_columns(ref: str) -> dict[str, str]:
    """CLIP_benchmark's `model` and `pretrained`: `open_clip:NAME@TAG` has both, any other reference is its own name."""
    family, separator, rest = ref.partition(":")
    if separator and family == "open_clip" and not Path(ref).is_dir():
        name, _, tag = rest.partition("@")
        return {"model": name, "pretrained": tag}
    return {"model": ref, "pretrained": ""}


def measured_columns(measured: Measured) -> Row:
    """The figures of a protocol, as they stand in a row."""
    return {
        "status": "ok",
        "error": None,
        "task": measured.task,
        "protocol": measured.protocol,
        "metrics": {name: float(value) for name, value in measured.metrics.items()},
        "main_metric": measured.main_metric,
        "score": measured.score,
        "interval": None if measured.interval is None else [float(end) for end in measured.interval],
        "random_score": measured.random_score,
        "counts": {name: int(value) for name, value in measured.counts.items()},
        "per_class": {name: float(value) for name, value in measured.per_class.items()},
        "notes": dict(measured.notes),
    }


def error_columns(protocol: str, task: str, sentence: str) -> Row:
    """What stands in the row of a data set that failed; `metrics` is empty, not null, for other readers' sake."""
    return {
        "status": "error", "error": sentence, "task": task, "protocol": protocol, "metrics": {}, "main_metric": None,
        "score": None, "interval": None, "random_score": None, "counts": {}, "per_class": {}, "notes": {},
    }  # fmt: skip


def identity(row: Mapping[str, Any]) -> tuple[str, str, str]:
    """By which a later line replaces an earlier one."""
    return str(row.get("model_ref")), str(row.get("dataset")), str(row.get("protocol"))


def latest(rows: Iterable[AnyRow]) -> list[AnyRow]:
    """The last row of each (model, data set, protocol), in order of first sight.

    A row of a protocol also ends what was said of a model and a data set that could not be opened before.
    """
    found: dict[tuple[str, str, str], AnyRow] = {}
    for row in rows:
        model, dataset, protocol = identity(row)
        if protocol != UNOPENED:
            found.pop((model, dataset, UNOPENED), None)
        found[model, dataset, protocol] = row
    return list(found.values())


def append_row(folder: Path, row: Mapping[str, Any]) -> None:
    """Append one line in a single write; half a line that a killed run left is cut off first.

    Raises:
        UserError: the file cannot be written.
    """
    line = (json.dumps(row, allow_nan=False) + "\n").encode()
    path = folder / RESULTS
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with path.open("ab+") as file:
            size = file.seek(0, os.SEEK_END)
            if size:
                file.seek(0)
                file.truncate(_whole_lines(file.read()))
            file.write(line)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise UserError(
            f"{path} cannot be written ({error.strerror}); free some space or give another --out."
        ) from None


def _whole_lines(data: bytes) -> int:
    return data.rfind(b"\n") + 1


def read_results(path: Path) -> list[Row]:
    """The rows of a results folder or file that count (`latest`).

    A last line without its end, left by a killed run, is passed over.

    Raises:
        UserError: there is no such file, or a line is no JSON object.
    """
    file = path / RESULTS if path.is_dir() else path
    try:
        data = file.read_bytes()
    except OSError:
        raise UserError(f"There are no results at {path}; expected {RESULTS}, made by `vlkd eval suite`.") from None
    rows: list[Row] = []
    for number, line in enumerate(data[: _whole_lines(data)].splitlines(), 1):
        if not line.strip():
            continue
        try:
            row = strict_json(line.decode())
        except ValueError:
            row = None
        if not isinstance(row, dict) or "dataset" not in row:
            raise UserError(f"{file}, line {number} is no result (strict JSON with a data set); mend or remove it.")
        rows.append(row)
    return latest(rows)


def write_items(folder: Path, row: Mapping[str, Any], per_item: Mapping[str, NDArray[Any]], keys: Sequence[str]) -> str:
    """Store one value per item, and the items' keys; returns the file's name inside `folder`."""
    name = hashlib.sha256("\n".join(identity(row)).encode()).hexdigest()[:16]
    tensors = {key: np.ascontiguousarray(value) for key, value in per_item.items()}
    place = folder / ITEMS
    place.mkdir(parents=True, exist_ok=True)
    about = {"keys": json.dumps(list(keys)), **_of_run(row)}
    write_whole(place / f"{name}.safetensors", save(tensors, metadata=about))
    return f"{ITEMS}/{name}.safetensors"


def _of_run(row: Mapping[str, Any]) -> dict[str, str]:
    """What a row and its items must have in common."""
    names = ("data_hash", "fingerprint", "precision", "settings", "score")
    return {name: json.dumps(row.get(name), sort_keys=True) for name in names}


def read_items(folder: Path, row: Mapping[str, Any]) -> tuple[dict[str, NDArray[Any]], list[str]]:
    """The values per item of a row, and the items' keys.

    Raises:
        UserError: the row has none, or its file is missing, damaged, or of another run of the same model and data.
    """
    name = str(row.get("items") or "")
    file = folder / ITEMS / Path(name).name
    again = "run `vlkd eval suite` again"
    if not name or not file.is_file():
        raise UserError(f"The result of {row.get('dataset')} has no stored items at {file}; {again}.")
    try:
        with safe_open(str(file), framework="numpy") as stored:
            about = stored.metadata() or {}
            tensors = {key: np.asarray(stored.get_tensor(key)) for key in stored.keys()}  # noqa: SIM118
            keys = json.loads(about["keys"])
    except (SafetensorError, OSError, ValueError, KeyError) as error:
        raise UserError(f"{file} cannot be read ({error}); {again}.") from None
    wanted = _of_run(row)
    if {name: about.get(name) for name in wanted} != wanted:
        raise UserError(f"{file} belongs to another version of the model or of the data than its result; {again}.")
    return tensors, [str(key) for key in keys]
