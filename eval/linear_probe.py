"""Linear probe: logistic regression on the frozen image features, its strength chosen within the training part.

vlkd eval linear_probe --model timm:resnet18@resnet18.safetensors --data caltech101#test
"""

from __future__ import annotations

from collections.abc import Sequence

EXAMPLES = """examples:
  vlkd eval linear_probe --model timm:resnet18@resnet18.safetensors --data caltech101#test
  vlkd eval linear_probe --model runs/a/student runs/b/student --data caltech101#test --train train --json
"""


def main(argv: Sequence[str]) -> None:
    """Measure the models one after another; see `--help`."""
    from vlkd.suite.single import run_single

    run_single(argv, "linear_probe", description=__doc__, examples=EXAMPLES, train=True)
