"""Time and memory of an evaluation, in one run: the metrics against clip_benchmark's, the image pass against its parts.

    python scripts/bench_eval.py --json
    python scripts/bench_eval.py --part pass --data PATH --model REF --json

`metrics`: hit@1, 5, 10 in both directions of 5,000 images x 25,000 captions from the same embeddings, by
`vlkd.retrieval.search.evaluate_retrieval` and by `clip_benchmark.metrics.zeroshot_retrieval.evaluate`, which runs
unmodified on a model that hands out stored embeddings, in its default batches of 64, without amp. Each evaluation runs
in a fresh process, as from the command line, which holds the embeddings and has evaluated a small problem before the
clock starts: what an allocator keeps from an evaluation decides how long the next one takes. Seconds are medians;
extra memory is the largest peak of vlkd's against the smallest of clip_benchmark's. The figures must be equal.

`pass`: `encode_images` against the sum of its two halves, each alone: all images decoded and prepared, and the forward
pass over ready tensors. The halves use as many threads as the whole; the decoder's half is also timed in one thread.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

IMAGES, PER_IMAGE = 5000, 5
KS = (1, 5, 10)
OURS, THEIRS = "vlkd", "clip_benchmark"
WANTED_RATIO, WANTED_PASS = 10.0, 1.15


def embeddings(width: int, noise: float) -> tuple[Any, Any, Any]:
    """Unit vectors: each caption is its image plus noise, five of them per image in the order of the images."""
    import torch

    generator = torch.Generator().manual_seed(0)
    images = torch.randn(IMAGES, width, generator=generator)
    owner = torch.arange(IMAGES).repeat_interleave(PER_IMAGE)
    texts = images[owner]
    texts += noise * torch.randn(len(owner), width, generator=generator)
    images /= images.norm(dim=1, keepdim=True)
    texts /= texts.norm(dim=1, keepdim=True)
    return images, texts, owner


class Stored:
    """A model for clip_benchmark whose images and texts are row numbers of stored embeddings."""

    def __init__(self, images: Any, texts: Any) -> None:
        self.images, self.texts = images, texts

    def encode_image(self, rows: Any) -> Any:
        return self.images[rows[:, 0]]

    def encode_text(self, rows: Any) -> Any:
        return self.texts[rows[:, 0]]

    def batches(self, size: int) -> list[tuple[Any, list[list[int]]]]:
        """What its data loader gives: image rows, and the captions of each image."""
        import torch

        blocks = torch.arange(len(self.images))[:, None].split(size)
        return [(rows, [[PER_IMAGE * i + j for j in range(PER_IMAGE)] for i in rows[:, 0].tolist()]) for rows in blocks]


def their_figures(images: Any, texts: Any, batch_size: int) -> dict[str, float]:
    """clip_benchmark's own function on the stored embeddings."""
    import vlkd.models  # noqa: F401, I001 - before anything imports torchvision
    import torch
    from clip_benchmark.metrics import zeroshot_retrieval

    zeroshot_retrieval.tqdm = lambda batches: batches  # no bar between the lines
    stored = Stored(images, texts)
    found: dict[str, float] = zeroshot_retrieval.evaluate(
        stored,
        stored.batches(batch_size),
        lambda rows: torch.tensor(rows)[:, None],
        "cpu",
        amp=False,
        recall_k_list=list(KS),
    )
    return found


def our_figures(images: Any, texts: Any, owner: Any) -> dict[str, float]:
    """The same figures under the same names; clip_benchmark names a recall after what is retrieved."""
    from vlkd.retrieval.search import evaluate_retrieval

    result = evaluate_retrieval(images, texts, owner, KS)
    return {f"image_retrieval_recall@{k}": result.text_to_image[f"hit@{k}"] for k in KS} | {
        f"text_retrieval_recall@{k}": result.image_to_text[f"hit@{k}"] for k in KS
    }


def runs_of(args: argparse.Namespace) -> dict[str, Callable[[], dict[str, float]]]:
    images, texts, owner = embeddings(args.width, args.noise)
    return {
        OURS: lambda: our_figures(images, texts, owner),
        THEIRS: lambda: their_figures(images, texts, args.batch_size),
    }


def resident_mb(field: str) -> float:
    """`VmRSS` (now) or `VmHWM` (peak) of this process, MB; `ru_maxrss` would start from the parent's peak on Linux."""
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith(field)) * 1024 / 1e6


def evaluation(name: str, args: argparse.Namespace) -> dict[str, Any]:
    """One evaluation in this process: its seconds, its extra peak memory in MB (Linux), its figures."""
    import torch

    run = runs_of(args)[name]
    small, small_texts, owner = embeddings(8, args.noise)
    if name == OURS:
        our_figures(small[:64], small_texts[: 64 * PER_IMAGE], owner[: 64 * PER_IMAGE])
    else:
        their_figures(small[:64], small_texts[: 64 * PER_IMAGE], args.batch_size)
    del small, small_texts, owner
    torch.randn(256, args.width) @ torch.randn(args.width, 256)
    linux = sys.platform.startswith("linux")
    before = 0.0
    if linux:
        with open("/proc/self/clear_refs", "w") as peak:
            peak.write("5")  # the peak starts again from here
        before = resident_mb("VmRSS")
    start = time.perf_counter()
    figures = run()
    taken = time.perf_counter() - start
    return {"seconds": taken, "extra_mb": resident_mb("VmHWM") - before if linux else None, "figures": figures}


def fresh_evaluation(name: str, args: argparse.Namespace) -> dict[str, Any]:
    """`evaluation` in a process of its own."""
    given = {"threads": args.threads, "width": args.width, "noise": args.noise, "batch-size": args.batch_size}
    options = [text for option, value in given.items() for text in (f"--{option}", str(value))]
    command = [sys.executable, __file__, "--evaluate", name, *options]
    found: dict[str, Any] = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    return found


def seconds(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def timed(runs: dict[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """Seconds of each, interleaved."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            times[name].append(seconds(run))
    return times


def metrics_row(args: argparse.Namespace) -> dict[str, Any]:
    found: dict[str, list[dict[str, Any]]] = {OURS: [], THEIRS: []}
    for _ in range(args.rounds):
        for name, results in found.items():
            results.append(fresh_evaluation(name, args))
    times = {name: [result["seconds"] for result in results] for name, results in found.items()}
    median = {name: statistics.median(values) for name, values in times.items()}
    ours, theirs = found[OURS][0]["figures"], found[THEIRS][0]["figures"]
    queries = {name: IMAGES * (PER_IMAGE if name.startswith("image") else 1) for name in ours}
    equal = all(round(ours[name] * queries[name]) == round(theirs[name] * queries[name]) for name in ours)
    for name in ours:
        print(f"{name}: {THEIRS} {theirs[name]:.6f}, {OURS} {ours[name]:.6f}")
    faster = median[THEIRS] / median[OURS]
    print(f"figures {'equal' if equal else 'DIFFERENT'}")
    print(f"time: {THEIRS} {median[THEIRS]:.2f} s, {OURS} {median[OURS]:.2f} s; {faster:.1f}x faster (10x wanted)")
    extra: dict[str, float] = {}
    if found[OURS][0]["extra_mb"] is not None:
        extra = {name: round(max(choose(result["extra_mb"] for result in found[name]), 0.1), 1)
                 for name, choose in ((OURS, max), (THEIRS, min))}  # fmt: skip
        print(
            f"peak extra memory: {THEIRS} {extra[THEIRS]:.0f} MB, {OURS} {extra[OURS]:.0f} MB; "
            f"{extra[THEIRS] / extra[OURS]:.1f}x less (10x wanted)"
        )
    smaller = extra[THEIRS] / extra[OURS] if extra else None
    return {
        "bench": "eval_metrics", "images": IMAGES, "captions": IMAGES * PER_IMAGE, "width": args.width, "k": list(KS),
        "threads": args.threads, "seconds": {name: round(value, 3) for name, value in median.items()},
        "all_seconds": {name: [round(value, 3) for value in values] for name, values in times.items()},
        "peak_extra_mb": extra, "times_faster": round(faster, 1),
        "times_less_memory": None if smaller is None else round(smaller, 1), "figures": ours, "figures_equal": equal,
        "reached": equal and faster >= WANTED_RATIO and (smaller is None or smaller >= WANTED_RATIO),
    }  # fmt: skip


def pass_row(args: argparse.Namespace) -> dict[str, Any]:
    from concurrent.futures import ThreadPoolExecutor

    import torch

    from vlkd.data.sources import Pairs, open_pairs
    from vlkd.models.load import load
    from vlkd.retrieval.encode import encode_images

    model, found = load(args.model), open_pairs(args.data)
    count = min(args.images, len(found)) if args.images else len(found)
    pairs = Pairs(found.keys[:count], found.captions[:count], found.files[:count])
    prepare = model.preprocessing.image_transform
    ready = torch.stack([prepare(pairs.image(i)) for i in range(count)]).split(args.batch_size)

    def decode(workers: int) -> None:
        with ThreadPoolExecutor(workers) as pool:
            for _ in pool.map(lambda i: prepare(pairs.image(i)), range(count)):
                pass

    def forward() -> None:
        with torch.no_grad():
            for pixels in ready:
                model.encode({"pixels": pixels}, ("image.embed",))

    runs: dict[str, Callable[[], object]] = {
        "pass": lambda: encode_images(
            model, pairs, batch_size=args.batch_size, workers=args.workers, progress=False
        ),
        "decode": lambda: decode(args.workers),
        "decode_alone": lambda: decode(1),
        "forward": forward,
    }  # fmt: skip
    forward()
    times = timed(runs, args.rounds)
    median = {name: statistics.median(values) for name, values in times.items()}
    strict = median["pass"] / (median["decode"] + median["forward"])
    plain = median["pass"] / (median["decode_alone"] + median["forward"])
    print(
        f"{count} images: decoding and preparing {median['decode']:.2f} s ({args.workers} threads), "
        f"{median['decode_alone']:.2f} s (one), forward {median['forward']:.2f} s, the pass {median['pass']:.2f} s"
    )
    print(f"pass over the sum: {strict:.3f}, with one decoding thread {plain:.3f} (at most {WANTED_PASS} wanted)")
    return {
        "bench": "eval_pass", "images": count, "model": args.model, "data": args.data, "batch_size": args.batch_size,
        "threads": args.threads, "workers": args.workers, "rounds": args.rounds,
        "seconds": {name: round(value, 3) for name, value in median.items()},
        "ratio": round(strict, 3), "ratio_one_decoding_thread": round(plain, 3), "reached": strict <= WANTED_PASS,
    }  # fmt: skip


def main(argv: Sequence[str]) -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", choices=("metrics", "pass"), default="metrics")
    parser.add_argument("--rounds", type=int, default=5, help="interleaved repetitions; the median counts")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--width", type=int, default=512, help="of the embeddings")
    parser.add_argument("--noise", type=float, default=6.0, help="noise added to the captions, in units of the signal")
    parser.add_argument("--batch-size", type=int, default=64, help="clip_benchmark's, and that of the image pass")
    parser.add_argument("--data", default="", help="pass: images, as `vlkd eval retrieval` takes them")
    parser.add_argument("--model", default="", help="pass: a model reference")
    parser.add_argument("--images", type=int, default=0, help="pass: only the first so many; 0 is all")
    parser.add_argument("--workers", type=int, default=2, help="pass: decoding threads")
    parser.add_argument("--json", action="store_true", help="end with one line of strict JSON")
    parser.add_argument("--evaluate", choices=(OURS, THEIRS), help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.part == "pass" and not (args.data and args.model):
        parser.error("--part pass needs --data and --model")
    os.environ.setdefault("OMP_NUM_THREADS", str(args.threads))
    import torch

    torch.set_num_threads(args.threads)
    if args.evaluate:
        print(json.dumps(evaluation(args.evaluate, args)))
        return
    row = metrics_row(args) if args.part == "metrics" else pass_row(args)
    if args.json:
        print(json.dumps(row, allow_nan=False))


if __name__ == "__main__":
    main(sys.argv[1:])
