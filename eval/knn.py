"""k-nearest-neighbour classification on the frozen image features: the weighted vote of the 20 nearest training images.

vlkd eval knn --model timm:resnet18@resnet18.safetensors --data caltech101#test
"""

from __future__ import annotations

from collections.abc import Sequence

EXAMPLES = """examples:
  vlkd eval knn --model timm:resnet18@resnet18.safetensors --data caltech101#test
  vlkd eval knn --model runs/a/student runs/b/student --data caltech101#test --train train --json
"""


def main(argv: Sequence[str]) -> None:
    """Measure the models one after another; see `--help`."""
    from vlkd.suite.single import run_single

    run_single(argv, "knn", description=__doc__, examples=EXAMPLES, train=True)
