"""Image and text selection: does each image prefer its own caption? SugarCrepe, Winoground, ARO, or your own JSONL.

vlkd eval selection --model runs/student/student --data sugar_crepe/swap_att.json
"""

from __future__ import annotations

from collections.abc import Sequence

EXAMPLES = """examples:
  vlkd eval selection --model runs/student/student --data sugar_crepe/swap_att.json
  vlkd eval selection --model runs/a/student runs/b/student --data choices.jsonl --json
"""


def main(argv: Sequence[str]) -> None:
    """Measure the models one after another; see `--help`."""
    from vlkd.suite.single import run_single

    run_single(argv, "selection", description=__doc__, examples=EXAMPLES, train=False)
