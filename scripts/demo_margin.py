"""The demo over several seeds: what the teacher adds to the same student, and how long each run takes.

python scripts/demo_margin.py --seeds 3 --out runs/demo_margin --json
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path

import vlkd.models  # noqa: F401 - before anything imports torchvision
from vlkd.engine.demo import run_demo


def main() -> None:
    """Run the demo per seed and print a row for each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=Path("runs/demo_margin"))
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    results = [run_demo(args.out / str(seed), seed=seed) for seed in range(args.seeds)]
    print("| seed | alone hit@1 | with the teacher hit@1 | teacher hit@1 | seconds |\n|---|---|---|---|---|")
    for seed, result in enumerate(results):
        cells = [100 * row["mean_hit@1"] for row in (result.alone, result.distilled, result.teacher)]
        print(f"| {seed} | {' | '.join(f'{cell:.1f}' for cell in cells)} | {result.seconds:.0f} |")
    margins = [100 * (result.distilled["mean_hit@1"] - result.alone["mean_hit@1"]) for result in results]
    print(f"margin: mean {statistics.mean(margins):.1f}, lowest {min(margins):.1f}, highest {max(margins):.1f}")
    if args.json:
        seconds = [result.seconds for result in results]
        print(json.dumps({"margins": margins, "seconds": seconds}, allow_nan=False))


if __name__ == "__main__":
    main()
