"""Small files that tools write and anyone may have touched: written whole or not at all, read as strict JSON."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vlkd.data.shards import MAX_CAPTIONS
from vlkd.errors import UserError


def strict_json(text: str) -> Any:
    """Parse JSON; `ValueError` also for NaN, for numbers of thousands of digits, and for absurd depth."""

    def refuse(constant: str) -> None:
        raise ValueError(f"{constant} is no JSON")

    try:
        return json.loads(text, parse_constant=refuse)
    except RecursionError:
        raise ValueError("nested too deeply") from None


def write_whole(path: Path, data: bytes) -> None:
    """Write a file under a temporary name, and rename it: a killed or failed writer leaves the old one.

    Raises:
        UserError: the disk is full, or nothing may be written there.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        with temporary.open("wb") as stream:
            stream.write(data)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(temporary, path)
    except OSError as error:
        raise UserError(
            f"{path} cannot be written ({error.strerror}); free some space or give another folder."
        ) from None
    finally:
        temporary.unlink(missing_ok=True)


def check_counts(values: Mapping[str, Any], *more: str) -> None:
    """Raise `ValueError` unless sizes, counts, hash and problems of a shard have their types and are possible."""
    for name in ("bytes", "samples", "labelled", "captions", "most_captions", *more):
        if not _is_count(values[name]):
            raise ValueError(f"{name} is {values[name]!r:.80}")
    problems = values["problems"]
    if not isinstance(problems, dict) or not all(map(_is_count, problems.values())):
        raise ValueError("problems are no counts")
    if not isinstance(values["sha256"], str) or not re.fullmatch(r"[0-9a-f]{64}", values["sha256"]):
        raise ValueError(f"sha256 is {values['sha256']!r:.80}")
    labelled, captions, most = values["labelled"], values["captions"], values["most_captions"]
    if not labelled <= min(values["samples"], captions) or not most <= captions <= labelled * most:
        raise ValueError("counts contradict each other")
    if most > MAX_CAPTIONS:
        raise ValueError(f"{most} captions of one sample")


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**63
