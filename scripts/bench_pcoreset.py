"""Time PCoreSet, k-centre in probability space, on made-up softmax outputs.

python scripts/bench_pcoreset.py --images 50000 --classes 200 --count 1000 --json
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Sequence

WANTED = 30.0


def probabilities(images: int, classes: int, seed: int = 0):
    """(N, C) float32: one class leads each row by a random amount, the others follow with noise."""
    import numpy as np

    generator = np.random.default_rng(seed)
    logits = generator.standard_normal((images, classes), dtype=np.float32)
    logits[np.arange(images), generator.integers(classes, size=images)] += 8 * generator.random(images, np.float32)
    np.exp(logits, out=logits)
    logits /= logits.sum(axis=1, keepdims=True)
    return logits


def main(argv: Sequence[str]) -> None:
    """Print the seconds, and with --json one line of strict JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="examples:\n  python scripts/bench_pcoreset.py\n  python scripts/bench_pcoreset.py --rounds 5 --json",
    )  # fmt: skip
    parser.add_argument("--images", type=int, default=50_000, help="default %(default)s")
    parser.add_argument("--classes", type=int, default=200, help="default %(default)s")
    parser.add_argument("--count", type=int, default=1000, help="images to choose (default %(default)s)")
    parser.add_argument("--labelled", type=int, default=200, help="images chosen before (default %(default)s)")
    parser.add_argument("--threads", type=int, default=2, help="of matrix products (default %(default)s)")
    parser.add_argument("--rounds", type=int, default=3, help="repetitions; the median counts (default %(default)s)")
    parser.add_argument("--json", action="store_true", help="end with one line of strict JSON")
    args = parser.parse_args(argv)
    for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
        os.environ[name] = str(args.threads)  # read when numpy is loaded

    from vlkd.active import k_centre

    rows = probabilities(args.images, args.classes)
    seconds = []
    for _ in range(args.rounds):
        start = time.perf_counter()
        k_centre(rows, args.count, range(args.labelled), seed=0)
        seconds.append(time.perf_counter() - start)
    median = sorted(seconds)[len(seconds) // 2]
    print(
        f"{args.count:,} of {args.images:,} images x {args.classes} classes, {args.labelled} labelled: {median:.2f} s, "
        f"{args.count / median:.0f} choices/s, {args.threads} threads (under {WANTED:.0f} s wanted at the default size)"
    )
    if args.json:
        size = {name: getattr(args, name) for name in ("images", "classes", "count", "labelled", "threads", "rounds")}
        row = {"bench": "pcoreset", **size, "median_s": round(median, 3), "worst_s": round(max(seconds), 3)}
        print(json.dumps(row, allow_nan=False))


if __name__ == "__main__":
    main(sys.argv[1:])
