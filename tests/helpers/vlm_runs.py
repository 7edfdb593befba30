"""Running the command line in a test of generative models, and reading what it leaves."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from vlkd import recipes
from vlkd.cli.main import main
from vlkd.config import override
from vlkd.engine.vlm.smoke import MODEL, shrink_to_smoke

TAUGHT = "teacher.ref=x"


def lines(path: Path) -> list[dict[str, Any]]:
    """The rows of a file of JSON lines."""
    return [json.loads(line) for line in path.read_text().splitlines()]


def refused(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    """The one sentence with which a command ends, exit code 2."""
    with pytest.raises(SystemExit) as stop:
        main(words)
    assert stop.value.code == 2
    (sentence,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("vlkd: ")]
    return sentence


def config_of(tmp_path: Path, *words: str) -> list[str]:
    """Assignments of a small real run, on the smoke run's data and model."""
    recipe = recipes.load(recipes.find("tasks", "switch_kd"))
    small = shrink_to_smoke(override(recipe.config(), [TAUGHT, f"out={tmp_path / 'made'}"]))
    sizes = ["image_size", "patch_size", "vision_width", "vision_layers", "vision_heads", "language_width",
             "language_layers", "language_heads", "context_length"]  # fmt: skip
    model = [f"model.{name}={getattr(MODEL, name)}" for name in sizes]
    return [
        "train", "switch_kd", f"data.train={small.data.train[0]}", f"teacher.ref={small.teacher.ref}", *model,
        "distilled.samples=32", "distilled.batch_size=16", f"out={tmp_path / 'run'}", *words,
    ]  # fmt: skip
