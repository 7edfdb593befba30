"""Running the command line in a test of generative models, and reading what it leaves."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from vlkd.cli.main import main


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
