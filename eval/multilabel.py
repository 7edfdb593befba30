"""Several classes per image, by prompts: mean average precision, and the average precision of each class.

vlkd eval multilabel --model runs/student/student --data benchmarks/wds_voc2007_multilabel
"""

from __future__ import annotations

from collections.abc import Sequence

EXAMPLES = """examples:
  vlkd eval multilabel --model runs/student/student --data benchmarks/wds_voc2007_multilabel
  vlkd eval multilabel --model runs/a/student runs/b/student --data benchmarks/wds_voc2007_multilabel#test --json
"""


def main(argv: Sequence[str]) -> None:
    """Measure the models one after another; see `--help`."""
    from vlkd.suite.single import run_single

    run_single(argv, "multilabel", description=__doc__, examples=EXAMPLES, train=False)
