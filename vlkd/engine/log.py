"""Named scalars to `metrics.jsonl`, one strict-JSON line per logged step."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vlkd.data.files import write_whole


class MetricsLog:
    """Appends rows; what a killed run logged after the checkpoint that is continued is cut off first.

    Args:
        path: of the file.
        step: rows of later steps are removed.
    """

    def __init__(self, path: Path, step: int) -> None:
        self.path = path
        kept = []
        if path.is_file():
            for line in path.read_text(encoding="utf-8").splitlines():
                try:
                    row = json.loads(line)
                except json.JSONDecodeError:
                    break
                if row["step"] > step:
                    break
                kept.append(line + "\n")
        write_whole(path, "".join(kept).encode())

    def write(self, step: int, samples: int, values: Mapping[str, Any]) -> None:
        """Append one row and flush it."""
        row = {"step": step, "samples": samples, **values}
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row, allow_nan=False) + "\n")
