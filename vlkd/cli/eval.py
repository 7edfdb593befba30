"""`vlkd eval`: measure models by one protocol."""

from __future__ import annotations

from collections.abc import Sequence

from vlkd.cli.shipped import run_shipped


def main(argv: Sequence[str]) -> None:
    """Run one file of eval/."""
    run_shipped(
        "eval",
        "eval",
        argv,
        "vlkd eval retrieval --model runs/retriever/student --data shards/test",
        "vlkd eval retrieval --help",
    )
