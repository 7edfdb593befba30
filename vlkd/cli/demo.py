"""`vlkd demo`: the whole journey offline."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

EPILOG = """examples:
  vlkd demo
  vlkd demo --out runs/demo1 --seed 1 --json
"""


def main(argv: Sequence[str]) -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(
        prog="vlkd demo",
        description="Draw captioned scenes, distil a small retriever from the shipped teacher, train the same student "
        "without it, compare them on scenes neither has seen, and index these for search. Needs no network; about "
        "three minutes on two cores. Needs the extra: pip install 'vlkd[demo]'.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--out", type=Path, default=Path("runs/demo"), help="output folder (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of scenes, weights and order (default: %(default)s)")
    parser.add_argument("--json", action="store_true", help="end with one JSON line of the figures")
    args = parser.parse_args(argv)

    import json
    from dataclasses import asdict

    import vlkd.models  # noqa: F401 - before anything imports torchvision
    from vlkd.engine.demo import run_demo

    result = run_demo(args.out, seed=args.seed)
    print(f"\n{'hit@1':>34} {'hit@10':>8}   (500 unseen scenes, mean of both directions, percent)")
    for name, row in (
        ("teacher", result.teacher),
        ("student without a teacher", result.alone),
        ("student with the teacher", result.distilled),
    ):
        print(f"{name:<28} {100 * row['mean_hit@1']:5.1f} {100 * row['mean_hit@10']:8.1f}")
    print(f'\nreport: {result.report}\ntry:    vlkd search {result.index} "a red umbrella"   ({result.seconds:.0f} s)')
    if args.json:
        print(json.dumps(asdict(result), default=str, allow_nan=False))
