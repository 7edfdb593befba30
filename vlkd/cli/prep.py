"""`vlkd prep`: data preparation."""

from __future__ import annotations

from collections.abc import Sequence

from vlkd.cli.shipped import run_shipped


def main(argv: Sequence[str]) -> None:
    """Run one file of data_prep/."""
    run_shipped(
        "prep", "data_prep", argv, "vlkd prep scenes --kind shapes --out data/scenes", "vlkd prep captions --help"
    )
