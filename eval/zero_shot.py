"""Zero-shot classification by prompts: top-1, top-5, mean per-class recall, calibration, worst group.

vlkd eval zero_shot --model runs/student/student --data benchmarks/wds_cars
"""

from __future__ import annotations

from collections.abc import Sequence

EXAMPLES = """examples:
  vlkd eval zero_shot --model runs/student/student --data benchmarks/wds_cars
  vlkd eval zero_shot --model runs/a/student runs/b/student --data photos#test --out runs/zero_shot --json
"""


def main(argv: Sequence[str]) -> None:
    """Measure the models one after another; see `--help`."""
    from vlkd.suite.single import run_single

    run_single(argv, "zero_shot", description=__doc__, examples=EXAMPLES, train=False)
