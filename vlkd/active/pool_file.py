"""The file that carries a model's view of a pool of images from prediction to the choice of what to label.

One safetensors file: `probabilities` (N, C), optionally `features` (N, F), and in the metadata, as JSON lists, `keys`,
the images' names, and optionally `classes`, the C classes' names.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from vlkd.errors import UserError

_SUM = 1e-3  # rows of half-precision probabilities add up to 1 only about


@dataclass(frozen=True, kw_only=True)
class PoolFile:
    """What a model says of N images.

    Attributes:
        keys: (N,) their names, none twice, each one line of text.
        probabilities: (N, C) float32, rows that sum to 1.
        features: (N, F) float32, or None.
        classes: (C,) names of the classes, () where the file has none.
    """

    keys: tuple[str, ...]
    probabilities: NDArray[np.float32]
    features: NDArray[np.float32] | None = None
    classes: tuple[str, ...] = ()

    def fingerprint(self) -> str:
        """A hash of keys and numbers."""
        state = hashlib.sha256(json.dumps(self.keys).encode())
        for array in (self.probabilities, self.features):
            state.update(b"none" if array is None else repr(array.shape).encode())
            state.update(b"" if array is None else np.ascontiguousarray(array).data)
        return state.hexdigest()[:16]


def write_pool(
    path: Path,
    keys: Sequence[str],
    probabilities: NDArray[Any],
    features: NDArray[Any] | None = None,
    *,
    classes: Sequence[str] = (),
) -> None:
    """Write the file whole or not at all.

    Args:
        path: where to; a file there is replaced.
        keys: (N,) names of the images.
        probabilities: (N, C), stored as float32.
        features: (N, F), stored as float32.
        classes: (C,) names, where known.

    Raises:
        UserError: what `read_pool` would refuse, or the disk is full, or nothing may be written there.
    """
    pool = _checked(path, list(keys), probabilities, features, list(classes))
    tensors = {"probabilities": pool.probabilities} | ({} if pool.features is None else {"features": pool.features})
    about = {"keys": json.dumps(pool.keys)} | ({"classes": json.dumps(pool.classes)} if pool.classes else {})
    temporary = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file(tensors, temporary, metadata=about)
        os.replace(temporary, path)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path} cannot be written ({error}); free some space or give another path.") from None
    finally:
        with suppress(OSError):
            temporary.unlink()


def read_pool(path: Path) -> PoolFile:
    """Read and check the file.

    Raises:
        UserError: it is missing or no such file, a key stands twice or is not one line of text, shapes do not fit,
            or a row of probabilities is not finite, has a negative entry or does not sum to 1.
    """
    try:
        with safe_open(str(path), framework="numpy") as stored:
            about = stored.metadata() or {}
            names = set(stored.keys())
            if "probabilities" not in names or "keys" not in about:
                raise ValueError("it lacks `probabilities` or the metadata's `keys`")
            probabilities = np.asarray(stored.get_tensor("probabilities"))
            features = np.asarray(stored.get_tensor("features")) if "features" in names else None
            keys, classes = json.loads(about["keys"]), json.loads(about.get("classes", "[]"))
    except (SafetensorError, OSError, ValueError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(
            f"{path} is no file of probabilities ({error}); write one with `vlkd predict RUN IMAGES "
            "--save-probabilities FILE.safetensors`."
        ) from None
    return _checked(path, keys, probabilities, features, classes)


def _checked(path: Path, keys: Any, probabilities: Any, features: Any, classes: Any) -> PoolFile:
    for values, name in ((keys, "keys"), (classes, "classes")):
        if not isinstance(values, list) or not all(isinstance(value, str) for value in values):
            raise UserError(f"{path}: the {name} are no list of text; write the file again.")
    bad = next((key for key in keys if not key.strip() or key != key.strip() or "\n" in key or "\r" in key), None)
    if bad is not None:
        raise UserError(
            f"{path}: the key {bad!r} is empty, has a line break or begins or ends with a space; rename that image, as "
            "keys are listed one a line."
        )
    if len(set(keys)) < len(keys):
        raise UserError(f"{path}: {len(keys) - len(set(keys))} keys stand for more than one image; expected each once.")
    rows = _matrix(path, probabilities, len(keys), "probabilities")
    if classes and len(classes) != rows.shape[1]:
        raise UserError(f"{path} names {len(classes)} classes for {rows.shape[1]} columns; expected one name for each.")
    wrong = ~((rows >= 0).all(axis=1) & (np.abs(rows.sum(axis=1) - 1) <= _SUM))
    if wrong.any():
        first = int(wrong.argmax())
        raise UserError(
            f"{path}: {np.count_nonzero(wrong)} of {len(rows)} rows of probabilities are negative or do not sum to 1, "
            f"first that of {keys[first]!r} with the sum {rows[first].sum():.6g}; expected softmax outputs, not logits."
        )
    return PoolFile(
        keys=tuple(keys),
        probabilities=rows,
        features=None if features is None else _matrix(path, features, len(keys), "features"),
        classes=tuple(classes),
    )


def _matrix(path: Path, values: Any, rows: int, name: str) -> NDArray[np.float32]:
    array: NDArray[Any] = np.asarray(values)
    if array.ndim != 2 or len(array) != rows or not array.size or array.dtype.kind != "f":
        raise UserError(
            f"{path}: the {name} are {array.shape} of {array.dtype} for {rows} keys; expected floating-point numbers, "
            "one row per key and at least one."
        )
    finite = np.isfinite(array).all(axis=1)
    if not finite.all():
        raise UserError(
            f"{path}: {np.count_nonzero(~finite)} of {rows} rows of {name} hold NaN or infinity, first row "
            f"{int(finite.argmin())}; look for a model that diverged or pictures that could not be read."
        )
    return np.ascontiguousarray(array, dtype=np.float32)
