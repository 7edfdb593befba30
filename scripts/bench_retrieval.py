"""Time exact retrieval metrics of 5,000 images x 25,000 captions against the bare product with its top-10.

python scripts/bench_retrieval.py --json
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence

IMAGES, CAPTIONS, WIDTH, CHUNK, K = 5000, 25000, 512, 500, 10


def embeddings(noise: float):
    """Captions are their image plus noise; five of them per image, in the order of the images."""
    import torch

    generator = torch.Generator().manual_seed(0)
    images = torch.randn(IMAGES, WIDTH, generator=generator)
    owner = torch.arange(CAPTIONS) * IMAGES // CAPTIONS
    texts = images[owner]
    texts += noise * torch.randn(CAPTIONS, WIDTH, generator=generator)
    return images, texts, owner


def bare(images, texts) -> None:
    """Chunked product and `torch.topk` in both directions: the captions' best images are merged over the chunks."""
    import torch

    images, texts = torch.nn.functional.normalize(images, dim=1), torch.nn.functional.normalize(texts, dim=1)
    best = torch.empty(len(texts), 0)
    for start in range(0, len(images), CHUNK):
        scores = images[start : start + CHUNK] @ texts.T
        scores.topk(K, dim=1)
        best = torch.cat([best, scores.T.contiguous().topk(K, dim=1).values], 1).topk(K, dim=1).values


def bare_twice(images, texts) -> None:
    """The other way to write it: one product per direction, each with its top-10."""
    import torch

    images, texts = torch.nn.functional.normalize(images, dim=1), torch.nn.functional.normalize(texts, dim=1)
    for queries, gallery in ((images, texts), (texts, images)):
        for start in range(0, len(queries), CHUNK):
            (queries[start : start + CHUNK] @ gallery.T).topk(K, dim=1)


def seconds(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def resident_mb(field: str) -> float:
    """`VmRSS` (now) or `VmHWM` (peak) of this process, MB; `ru_maxrss` would start from the parent's peak on Linux."""
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith(field)) * 1024 / 1e6


def memory(threads: int, noise: float) -> float:
    """Extra peak memory of one evaluation, MB: run in a process of its own."""
    import torch

    from vlkd.retrieval.search import evaluate_retrieval

    torch.set_num_threads(threads)
    images, texts, owner = embeddings(noise)
    (images[:256] @ images[:256].T).topk(K)
    with open("/proc/self/clear_refs", "w") as peak:
        peak.write("5")  # the peak starts again from here
    before = resident_mb("VmRSS")
    evaluate_retrieval(images, texts, owner)
    return resident_mb("VmHWM") - before


def measured_memory(threads: int, noise: float) -> float | None:
    """`memory` in a fresh process, or None where the system does not tell (not Linux)."""
    if not sys.platform.startswith("linux"):
        return None
    command = [sys.executable, __file__, "--memory-only", "--threads", str(threads), "--noise", str(noise)]
    return round(float(subprocess.run(command, check=True, capture_output=True, text=True).stdout), 1)


def main(argv: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="examples:\n  python scripts/bench_retrieval.py\n  python scripts/bench_retrieval.py --rounds 9 --json",
    )  # fmt: skip
    parser.add_argument("--rounds", type=int, default=5, help="interleaved repetitions; the median counts")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--noise", type=float, default=6.0, help="noise added to the captions, in units of the signal")
    parser.add_argument("--json", action="store_true", help="end with one line of strict JSON")
    parser.add_argument("--memory-only", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.memory_only:
        print(memory(args.threads, args.noise))
        return
    import torch

    from vlkd.retrieval.search import evaluate_retrieval

    torch.set_num_threads(args.threads)
    images, texts, owner = embeddings(args.noise)
    runs = {
        "bare": lambda: bare(images, texts),
        "bare_twice": lambda: bare_twice(images, texts),
        "evaluate": lambda: evaluate_retrieval(images, texts, owner),
    }
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(args.rounds):
        for name, run in runs.items():
            times[name].append(seconds(run))
    median = {name: statistics.median(values) for name, values in times.items()}
    result = evaluate_retrieval(images, texts, owner)
    row = {
        "bench": "retrieval", "images": IMAGES, "captions": CAPTIONS, "width": WIDTH, "threads": args.threads,
        "rounds": args.rounds, **{f"{name}_s": round(value, 3) for name, value in median.items()},
        "ratio": round(median["evaluate"] / min(median["bare"], median["bare_twice"]), 3),
        "peak_extra_mb": measured_memory(args.threads, args.noise),
        "mean_hit@1": result.mean_hit_at_1, "rsum": result.rsum,
    }  # fmt: skip
    print(
        f"bare product and top-{K}: {median['bare']:.2f} s (one product), {median['bare_twice']:.2f} s (two products)"
    )
    print(f"all metrics, both directions: {median['evaluate']:.2f} s; ratio {row['ratio']} (at most 2 wanted)")
    print(f"peak extra memory: {row['peak_extra_mb']} MB (under 300 wanted)")
    if args.json:
        print(json.dumps(row, allow_nan=False))


if __name__ == "__main__":
    main(sys.argv[1:])
