"""Classifiers with classes of their own: top-1, top-5, mean per-class recall, calibration, and each head's accuracy.

vlkd eval classifier --model runs/dho --data DATA#test

The data's class names are the classifier's, in any order. Results stand beside those of `vlkd eval zero_shot` where
both are given one --out, and `vlkd eval compare` compares them image by image.
"""

from __future__ import annotations

from collections.abc import Sequence

EXAMPLES = """examples:
  vlkd eval classifier --model runs/dho --data DATA#test
  vlkd eval classifier --model runs/dho runs/labels/student --data DATA#test --out runs/compared --json
"""


def main(argv: Sequence[str]) -> None:
    """Measure the models one after another; see `--help`."""
    from vlkd.suite.single import end_single, measure_single, parse_single, single_parser

    args = parse_single(single_parser("classifier", description=__doc__, examples=EXAMPLES), argv)

    from vlkd.models.classifier_images import student_of
    from vlkd.suite.table import pivot
    from vlkd.suite.table_markdown import markdown

    args.model = [student_of(ref) for ref in args.model]
    rows = measure_single(args, "classifier")
    print(markdown(pivot(rows)))
    for row in rows:
        heads = {name: value for name, value in row["metrics"].items() if name.startswith("acc1_")}
        if heads:
            words = ", ".join(f"{name} {100 * value:.1f}" for name, value in heads.items())
            print(f"{row['model_ref']}: {words}, ece {100 * row['metrics']['ece']:.1f}")
    end_single(args, "classifier", rows)
