"""The retriever's evidence: one student, with and without teachers, on real data, several seeds, one table.

    python scripts/evidence_retriever.py coco --data DATA --teachers runs/lite2/student,runs/lite0/student
    python scripts/evidence_retriever.py emoji --data DATA --teachers runs/emoji2/student,runs/emoji0/student

DATA holds shards per split (train, val, test) as `vlkd prep` writes them. Every variant sees the same number of student
samples; recipes were chosen on val (`--tune` prints the trials). Finished runs are kept, so the same command continues.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from vlkd.metrics import bootstrap_means, interval, mean_over_seeds, percent_interval

STUDENT = [
    "model.image=resnet10t",
    'model.image_kwargs={"channels":[32,64,128,216]}',
    "model.image_size=64",
    "model.text_width=192",
    "model.text_layers=1",
    "model.context_length=20",
    "model.width=256",
    "train.precision=bf16",
]
DATASETS = {
    "coco": ["train.samples=60000", "data.keep_short_side=96", "teachers.views=4"],
    "emoji": ["train.samples=20000", "data.keep_short_side=64", "views.flip=0", "teachers.views=2"],
}
TUNED = ["train.batch_size=64", "train.lr=0.003", "train.weight_decay=0.05", "method.contrastive=0.5"]
MATCHING, RELATIONAL = "method.matching=8", "method.relational=2"


@dataclass(frozen=True)
class Variant:
    """How many teachers, which changes, and whether images without captions have a term to take part in."""

    teachers: int
    changes: list[str]
    unlabelled: bool = False


VARIANTS = {
    "matching, one teacher": Variant(1, [*TUNED, MATCHING], unlabelled=True),
    "relational KL, one teacher": Variant(1, [*TUNED, RELATIONAL]),
    "mix, one teacher": Variant(1, [*TUNED, MATCHING, RELATIONAL], unlabelled=True),
    "mix, two teachers": Variant(2, [*TUNED, MATCHING, RELATIONAL], unlabelled=True),
    "alone": Variant(0, ["train.batch_size=128", "train.lr=0.002", "train.ema=0.99", "views.color=0.3"]),
}
TRIALS = {
    "alone": [
        Variant(0, ["train.batch_size=128", "train.lr=0.001"]),
        Variant(0, ["train.batch_size=64", "train.lr=0.003", "train.weight_decay=0.05"]),
        Variant(0, ["train.batch_size=64", "train.lr=0.001", "views.crop_scale=0.3,1"]),
        Variant(0, ["train.batch_size=128", "train.lr=0.002", "train.ema=0.99", "views.color=0.3"]),
    ],
    "mix": [
        Variant(1, ["train.batch_size=128", "train.lr=0.001", "method.matching=4"], unlabelled=True),
        Variant(
            1, ["train.batch_size=128", "train.lr=0.002", "method.matching=4", "method.relational=1"], unlabelled=True
        ),
        Variant(
            1,
            [
                "train.batch_size=64",
                "train.lr=0.003",
                "train.weight_decay=0.05",
                "method.matching=4",
                "method.relational=1",
            ],
            unlabelled=True,
        ),
        Variant(1, [*TUNED, MATCHING, RELATIONAL], unlabelled=True),
    ],
}


def main() -> None:
    """Run what is missing, then print and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dataset", choices=DATASETS)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--unlabelled", default="", help="a further source without captions")
    parser.add_argument("--teachers", required=True, help="references, the better on val first, separated by commas")
    parser.add_argument("--out", type=Path, default=Path("runs/evidence"))
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time, one thread each")
    parser.add_argument("--tune", action="store_true", help="run the trials on val instead, one seed")
    args = parser.parse_args()
    if args.tune:
        tune(args)
        return
    jobs = [(name, seed) for seed in range(args.seeds) for name in VARIANTS]
    with ThreadPoolExecutor(args.jobs) as pool:
        folders = list(
            pool.map(lambda job: run(args, VARIANTS[job[0]], folder_of(args, *job), job[1], test=True), jobs)
        )
    rows: dict[str, list[dict]] = {}
    teachers: dict[str, dict] = {}
    for (name, _), folder in zip(jobs, folders, strict=True):
        for row in map(json.loads, (folder / "results.jsonl").read_text().splitlines()):
            if row["role"] == "student":
                rows.setdefault(name, []).append(row)
            elif row["role"] == "teacher":
                teachers[row["name"]] = row
    print_table(rows, teachers)


def folder_of(args: argparse.Namespace, name: str, seed: int) -> Path:
    """Where a run lies."""
    return args.out / args.dataset / f"{name.replace(', ', '-').replace(' ', '_')}-{seed}"


def run(args: argparse.Namespace, variant: Variant, out: Path, seed: int, *, test: bool) -> Path:
    """One training run in a process of its own, on one thread."""
    if (out / "results.jsonl").is_file():
        return out
    refs = args.teachers.split(",")[: variant.teachers]
    train = f"{args.data}/train" + (f",{args.unlabelled}" if variant.unlabelled and args.unlabelled else "")
    command = [sys.executable, "-m", "vlkd.cli.main", "train", "retriever", *STUDENT, *DATASETS[args.dataset]]
    command += variant.changes
    command += [f"data.train={train}", f"data.val={args.data}/val", f"seed={seed}", f"out={out}"]
    command += [f"data.test={args.data}/test"] if test else ["train.samples=40000"]
    command += [f"teachers.refs={','.join(refs)}"] if refs else []
    out.parent.mkdir(parents=True, exist_ok=True)
    with out.with_name(out.name + ".log").open("w") as log:
        subprocess.run(["env", "OMP_NUM_THREADS=1", *command], check=True, stdout=log, stderr=subprocess.STDOUT)
    print(f"done: {out}", flush=True)
    return out


def tune(args: argparse.Namespace) -> None:
    """Equal numbers of trials per method, one seed, figures on val."""
    jobs = [(name, i) for name, trials in TRIALS.items() for i in range(len(trials))]

    def one(job: tuple[str, int]) -> tuple[str, Variant, dict]:
        name, i = job
        out = args.out / f"{args.dataset}-tune" / f"{name}-{i}"
        results = run(args, TRIALS[name][i], out, 0, test=False) / "results.jsonl"
        return name, TRIALS[name][i], json.loads(results.read_text().splitlines()[0])

    with ThreadPoolExecutor(args.jobs) as pool:
        for name, variant, row in pool.map(one, jobs):
            figures = f"{100 * row['mean_hit@1']:5.1f} {100 * row['mean_hit@10']:5.1f}"
            print(f"{name:<8} {' '.join(variant.changes):<90} {figures}", flush=True)


def print_table(rows: dict[str, list[dict]], teachers: dict[str, dict]) -> None:
    """Markdown: mean over seeds, interval from a bootstrap over images (the same draws for all), spread, cost."""
    print("| model | hit@1 | hit@10 | seeds' standard deviation of hit@1 | minutes |\n|---|---|---|---|---|")
    for name, row in teachers.items():
        print(f"| teacher {Path(name).name} | {cell([row], 1)} | {cell([row], 10)} | | |")
    for name, found in rows.items():
        spread = 100 * float(np.std([row["mean_hit@1"] for row in found], ddof=1)) if len(found) > 1 else float("nan")
        minutes = np.mean([row["seconds"] for row in found]) / 60
        print(f"| {name} | {cell(found, 1)} | {cell(found, 10)} | {spread:.1f} | {minutes:.1f} |")
    base = rows["alone"]
    for k in (1, 10):
        for name, found in rows.items():
            if name != "alone":
                ratio, low, high = ratio_of(found, base, k)
                print(f"{name} / alone, hit@{k}: {ratio:.2f} [{low:.2f}, {high:.2f}]")


def cell(seeds: list[dict], k: int) -> str:
    """Mean [95 % interval], percent."""
    return percent_interval(mean_over_seeds(seeds, k))


def ratio_of(found: list[dict], base: list[dict], k: int) -> tuple[float, float, float]:
    """Ratio of means with its interval from the same draws of images."""
    ours, theirs = mean_over_seeds(found, k), mean_over_seeds(base, k)
    draws = bootstrap_means(ours, seed=0) / bootstrap_means(theirs, seed=0)
    return float(ours.mean() / theirs.mean()), *interval(draws)


if __name__ == "__main__":
    main()
