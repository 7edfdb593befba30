"""The folder of a run: new, or of a run with the same settings, which is then continued."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

from vlkd.config import differences, to_json
from vlkd.engine.settings import Job
from vlkd.errors import UserError

FREE = (
    "data.workers:", "data.copies:", "data.copies_gb:", "train.log_steps:", "train.eval_samples:", "train.trackers:",
    "train.save_minutes:", "train.save_steps:", "train.spike_factor:", "train.val_questions:", "train.eval_batch:",
    "train.max_new_tokens:", "report.",
)  # fmt: skip
"""Settings with whose other values a run may be continued: they change none of its samples or weights. The guard's
factor is among them all the same, because a run that it has ended can only go on with a higher one."""
TOKENIZER = "tokenizer.json"
FIRST_WEIGHTS = ("start", "tokenizer")
"""Folders that a generative model's run builds of its settings and data before its first step."""


def claim_folder(config: Job) -> Path:
    """The output folder, new or of the same settings.

    Raises:
        UserError: it belongs to a run with other settings, or is no run's folder.
    """
    folder = Path(config.out)
    settings = to_json(config)
    stored = folder / "config.json"
    # What stopped before its first step left nothing but its settings: a corrected command may have the folder.
    begun = folder.is_dir() and any(
        path.name not in ("config.json", TOKENIZER, *FIRST_WEIGHTS)
        and not path.name.startswith(".config.json.")
        and not (path.name == "metrics.jsonl" and not path.stat().st_size)
        for path in folder.iterdir()
    )
    if stored.is_file() and begun:
        found = differences(json.loads(stored.read_text()), json.loads(json.dumps(settings)))
        found = [difference for difference in found if not difference.startswith(FREE)]
        if found:
            raise UserError(
                f"{folder} belongs to a run with other settings ({'; '.join(found[:4])}); "
                "give the same ones to continue it, or another out=FOLDER."
            )
    elif begun:
        raise UserError(f"{folder} holds files that are no run's; give a new or empty folder with out=FOLDER.")
    folder.mkdir(parents=True, exist_ok=True)
    if not begun and stored.is_file() and json.loads(stored.read_text()) != json.loads(json.dumps(settings)):
        for name in FIRST_WEIGHTS:
            shutil.rmtree(folder / name, ignore_errors=True)
    temporary = folder / f".config.json.{os.getpid()}"
    temporary.write_text(json.dumps(settings, indent=2) + "\n")
    temporary.replace(stored)
    return folder
