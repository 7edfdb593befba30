"""Time exact chunked search and FAISS indexes on made-up clustered vectors, asked from the other modality.

python scripts/bench_index.py --items 1000000 --width 256 --types flat ivf_pq --json
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence

KINDS = ("flat", "hnsw", "ivf", "ivf_pq")
STORAGES = ("float32", "int8", "binary")
CLUSTER = 50
COLUMNS = (
    ("recall", "recall", 3), ("self recall", "self_recall", 3), ("bytes/vector", "bytes_per_vector", 0),
    ("build s", "build_seconds", 1), ("p50 ms", "p50_ms", 2), ("p99 ms", "p99_ms", 2),
)  # fmt: skip


def vectors(items: int, queries: int, width: int):
    """Gallery and queries: clusters of 50 around random directions; a query is an item with noise and an offset.

    The one offset for all queries stands for the gap between the modalities of a dual encoder.
    """
    import torch

    generator = torch.Generator().manual_seed(0)
    centre = torch.randn(max(1, items // CLUSTER), width, generator=generator)
    gallery = torch.randn(items, width, generator=generator).mul_(0.5)
    for start in range(0, items, 10_000):
        block = gallery[start : start + 10_000]
        block += centre[torch.randint(len(centre), (len(block),), generator=generator)]
    offset = torch.randn(width, generator=generator)
    asked = gallery[torch.randint(items, (queries,), generator=generator)]
    return gallery, asked + 0.5 * torch.randn(queries, width, generator=generator) + offset


def resident_mb(field: str) -> float:
    """`VmRSS` (now) or `VmHWM` (peak) of this process, MB."""
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith(field)) * 1024 / 1e6


def exact(args: argparse.Namespace) -> dict[str, float]:
    """Seconds and extra peak memory of the exact search: run in a process of its own."""
    import torch

    from vlkd.retrieval.search import topk

    torch.set_num_threads(args.threads)
    gallery, queries = vectors(args.items, args.queries, args.width)
    topk(queries[:10], gallery[:5000], min(args.k, 10))
    with open("/proc/self/clear_refs", "w") as peak:
        peak.write("5")  # the peak starts again from here
    before = resident_mb("VmRSS")
    start = time.perf_counter()
    topk(queries, gallery, args.k)
    seconds = time.perf_counter() - start
    return {"exact_seconds": seconds, "exact_extra_mb": resident_mb("VmHWM") - before}


def indexes(args: argparse.Namespace) -> Iterator[dict[str, str | float]]:
    """Every kind of index, one after the other, built and measured."""
    import torch

    from vlkd.retrieval.kinds import IndexSettings
    from vlkd.retrieval.quality import exact_neighbours, measure_against, self_truth, timed_build

    torch.set_num_threads(args.threads)
    gallery, queries = vectors(args.items, args.queries, args.width)
    truth, own = exact_neighbours(queries, gallery, args.k), self_truth(gallery, args.queries, args.k)
    for kind in args.types:
        for storage in args.storage if kind == "flat" else ["float32"]:
            for dims in [0, *args.dims]:
                settings = IndexSettings(kind=kind, storage=storage, dims=dims)
                index, seconds = timed_build(gallery, settings)
                quality = measure_against(index, truth, own)
                yield {
                    "index": settings.name, "recall": quality.recall, "self_recall": quality.self_recall,
                    "bytes_per_vector": quality.bytes_per_vector, "build_seconds": seconds,
                    "p50_ms": quality.p50_ms, "p99_ms": quality.p99_ms,
                }  # fmt: skip


def main(argv: Sequence[str] | None = None) -> None:
    """Print a table, and with --json one line of strict JSON."""
    words = list(sys.argv[1:] if argv is None else argv)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--items", type=int, default=20_000, help="vectors in the gallery (default %(default)s)")
    parser.add_argument("--queries", type=int, default=200, help="default %(default)s")
    parser.add_argument("--width", type=int, default=128, help="default %(default)s")
    parser.add_argument("-k", type=int, default=10, help="default %(default)s")
    parser.add_argument("--types", nargs="*", choices=KINDS, default=list(KINDS), help="none: exact search only")
    parser.add_argument("--storage", nargs="+", choices=STORAGES, default=list(STORAGES), help="of flat")
    parser.add_argument("--dims", nargs="+", type=int, default=[], help="also with the first so many numbers")
    parser.add_argument("--threads", type=int, default=2, help="of exact search; an index is searched by one")
    parser.add_argument("--json", action="store_true", help="end with one line of strict JSON")
    parser.add_argument("--exact-only", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args(words)
    if args.exact_only:
        print(json.dumps(exact(args)))
        return
    child = [sys.executable, __file__, *words, "--exact-only"]
    figures = json.loads(subprocess.run(child, check=True, stdout=subprocess.PIPE, text=True).stdout)
    print(
        f"{args.items:,} vectors of width {args.width}, {args.queries:,} queries, k = {args.k}: exact search "
        f"{figures['exact_seconds']:.2f} s, {figures['exact_extra_mb']:.0f} MB more memory, {args.threads} threads",
        flush=True,
    )
    rows = []
    for row in indexes(args) if args.types else ():
        if not rows:
            print("index".ljust(16) + "".join(f"{title:>14}" for title, *_ in COLUMNS))
        rows.append(row)
        figure = "".join(f"{row[key]:>14.{digits}f}" for _, key, digits in COLUMNS)
        print(str(row["index"]).ljust(16) + figure, flush=True)
    if args.json:
        size = {name: getattr(args, name) for name in ("items", "queries", "width", "k", "threads")}
        print(json.dumps({"script": "bench_index", **size, **figures, "indexes": rows}, allow_nan=False))


if __name__ == "__main__":
    main()
