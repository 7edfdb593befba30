"""Streaming's evidence: a student pretrained from weighted sources of real shards, with and without cached teachers.

    python scripts/evidence_stream.py --data DATA --cache runs/cache \\
        --teachers runs/lite2/student,runs/drawn/student --zero-shot caltech101/test

DATA holds folders of shards of three sources (coco, emoji, clipart), each with train, val and test. Every run streams
them through the index of `vlkd prep scan` and sees as many samples. Of the first seed with teachers a twin is killed
with SIGKILL after a third and after two thirds of its samples, and continued by the same command: its weights must be
those of the run that was not killed. Settings were chosen on val (`--tune` prints the trials). Finished runs are kept,
so the same command continues.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from vlkd.metrics import bootstrap_means, interval, mean_over_seeds, percent_interval

SOURCES = ("coco", "emoji", "clipart")
STUDENT = [
    "model.image=resnet10t",
    'model.image_kwargs={"channels":[32,64,128,216]}',
    "model.image_size=64",
    "model.text_width=192",
    "model.text_layers=1",
    "model.context_length=20",
    "model.width=256",
    "views.flip=0",
    "train.precision=bf16",
    "train.batch_size=64",
    "train.lr=0.0015",
    "train.weight_decay=0.05",
    "train.ema=0.99",
    "train.spike_factor=10",
    "train.save_steps=100",
    "data.shuffle_shards=2",
    "report.teachers=false",
]
WEIGHTED = "data.weights=2,1,1"
MATCHED = ["method.matching=8"]
MIXED = "data.shuffle_shards=8"
SIGLIP = ["method.loss=siglip", "model.logit_bias=-10", "model.logit_scale=10"]
ALONE, TAUGHT = "no teacher", "two cached teachers"
KILLED = "killed twice"
FASTER = "train.lr=0.003"
TRIALS = [MATCHED, [*MATCHED, FASTER], ["method.matching=16", FASTER], [*MATCHED, FASTER, "train.batch_size=256"]]
PARTS = ("data", "teacher", "student", "sync")


def main() -> None:
    """Run what is missing, then print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--teachers", required=True, help="two references, separated by a comma")
    parser.add_argument("--cache", type=Path, default=Path("runs/cache"))
    parser.add_argument("--views", type=int, default=3)
    parser.add_argument("--zero-shot", default="", help="a folder PATH/CLASS/*.jpg that is watched in training")
    parser.add_argument("--out", type=Path, default=Path("runs/evidence_stream"))
    parser.add_argument("--samples", type=int, default=60_000)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time, one thread and one worker each")
    parser.add_argument("--tune", action="store_true", help="run the trials on val instead, one seed")
    args = parser.parse_args()
    if args.tune:
        tune(args)
        return
    jobs = [(name, seed) for seed in range(args.seeds) for name in variants(args)] + [(KILLED, 0)]
    with ThreadPoolExecutor(args.jobs) as pool:
        folders = list(pool.map(lambda job: run(args, *job), jobs))
    found: dict[str, list[Path]] = {}
    for (name, _), folder in zip(jobs, folders, strict=True):
        found.setdefault(name, []).append(folder)
    killed = found.pop(KILLED)[0]
    for source in SOURCES:
        print_table(source, found)
    print_course(found)
    print_kill(found[TAUGHT][0], killed)


def variants(args: argparse.Namespace) -> dict[str, list[str]]:
    """Per row of the table its settings."""
    taught = [f"teachers.refs={args.teachers}", f"teachers.folder={args.cache}", f"teachers.views={args.views}"]
    taught += MATCHED
    return {
        ALONE: [WEIGHTED],
        TAUGHT: [WEIGHTED, *taught],
        f"{TAUGHT}, 8 shards mixed": [WEIGHTED, *taught, MIXED],
        f"{TAUGHT}, no weights": taught,
        f"{TAUGHT}, no weights, 8 shards mixed": [*taught, MIXED],
        f"{TAUGHT}, SigLIP": [WEIGHTED, *taught, *SIGLIP],
    }


def command_of(args: argparse.Namespace, changes: list[str], out: Path, seed: int, split: str = "test") -> list[str]:
    """One training run, on one thread beside one worker."""
    places = {part: ",".join(f"{args.data}/{source}/{part}" for source in SOURCES) for part in ("train", "val", split)}
    words = [*STUDENT, *changes, f"train.samples={args.samples}", f"seed={seed}", f"out={out}"]
    words += [f"data.train={places['train']}", f"data.val={places['val']}", f"data.test={places[split]}"]
    words += ["data.workers=1", f"train.eval_samples={args.samples // 3}", f"data.zero_shot={args.zero_shot}"]
    return ["env", "OMP_NUM_THREADS=1", sys.executable, "-m", "vlkd.cli.main", "train", "pretrain", *words]


def run(args: argparse.Namespace, name: str, seed: int) -> Path:
    """Train, or find what was trained; the twin is killed on its way."""
    out = args.out / ("".join(c if c.isalnum() or c in ".-" else "_" for c in name) + f"-{seed}")
    changes = variants(args)[TAUGHT if name == KILLED else name]
    command = command_of(args, changes, out, seed)
    noted = out.with_name(out.name + ".command")
    if (out / "results.jsonl").is_file():
        if noted.read_text() != " ".join(command[5:]):
            raise SystemExit(f"{out} was run with other settings, see {noted}; remove it or give another --out.")
        return out
    out.parent.mkdir(parents=True, exist_ok=True)
    noted.write_text(" ".join(command[5:]))
    if name == KILLED:
        for third in (1, 2):
            kill_at(command, out, third * args.samples // 3)
    with out.with_name(out.name + ".log").open("a") as log:
        subprocess.run(command, check=True, stdout=log, stderr=subprocess.STDOUT)
    print(f"done: {out}", flush=True)
    return out


def kill_at(command: list[str], out: Path, samples: int) -> None:
    """Start a run and kill it with all its processes when it has logged so many samples."""
    with out.with_name(out.name + ".log").open("a") as log:
        started = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, start_new_session=True)
    while started.poll() is None:
        rows = metrics(out)
        if rows and rows[-1]["samples"] >= samples:
            os.killpg(started.pid, signal.SIGKILL)
            started.wait()
            print(f"killed: {out} at {rows[-1]['samples']} samples", flush=True)
            return
        time.sleep(0.2)
    raise SystemExit(f"{out} ended before it could be killed; see its log.")


def metrics(out: Path) -> list[dict]:
    """The whole lines that a run has logged."""
    path = out / "metrics.jsonl"
    lines = path.read_text().split("\n")[:-1] if path.is_file() else []
    return [json.loads(line) for line in lines]


def tune(args: argparse.Namespace) -> None:
    """The trials with two teachers, one seed, figures on val."""

    def one(number: int) -> list[dict]:
        out = args.out / f"tune-{number}"
        changes = [*variants(args)[TAUGHT], *TRIALS[number]]
        if not (out / "results.jsonl").is_file():
            subprocess.run(command_of(args, changes, out, 0, "val"), check=True, stdout=subprocess.DEVNULL)
        return [row_of(out, source) for source in SOURCES]

    with ThreadPoolExecutor(args.jobs) as pool:
        for trial, rows in zip(TRIALS, pool.map(one, range(len(TRIALS))), strict=True):
            figures = "  ".join(f"{100 * row['mean_hit@1']:5.1f} {100 * row['mean_hit@10']:5.1f}" for row in rows)
            print(f"{' '.join(trial):<60} {figures}", flush=True)


def row_of(folder: Path, source: str) -> dict:
    """The student's figures on one source."""
    rows = [json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines()]
    return next(row for row in rows if row["role"] == "student" and Path(row["data"]).parent.name == source)


def print_table(source: str, found: dict[str, list[Path]]) -> None:
    """Markdown: means over seeds with intervals from a bootstrap over images, and differences from the taught row."""
    rows = {name: [row_of(folder, source) for folder in folders] for name, folders in found.items()}
    print(f"\n{source}\n\n| run | hit@1 | hit@10 | spread of hit@10 | hit@10 less that of {TAUGHT} | minutes |")
    print("|---|---|---|---|---|---|")
    for name, seeds in rows.items():
        values = mean_over_seeds(seeds, 10)
        change = values - mean_over_seeds(rows[TAUGHT], 10)
        low, high = interval(bootstrap_means(change, seed=0))
        against = f"{100 * change.mean():+.1f} [{100 * low:+.1f}, {100 * high:+.1f}]" if name != TAUGHT else ""
        spread = 100 * float(np.std([row["mean_hit@10"] for row in seeds], ddof=1)) if len(seeds) > 1 else float("nan")
        minutes = np.mean([row["seconds"] for row in seeds]) / 60
        cells = (percent_interval(mean_over_seeds(seeds, 1)), percent_interval(values), f"{spread:.1f}", against)
        print(f"| {name} | {' | '.join(cells)} | {minutes:.1f} |")


def print_course(found: dict[str, list[Path]]) -> None:
    """Coverage of the sources, the split of time, the rate, and the zero-shot figure, means over seeds."""
    print("\n| run | epochs of each source | samples/s | " + " | ".join(PARTS) + " | zero-shot acc1 | skipped |")
    print("|---" * (5 + len(PARTS)) + "|")
    for name, folders in found.items():
        covered = [json.loads(line) for line in (folders[0] / "coverage.jsonl").read_text().splitlines()]
        epochs = ", ".join(f"{part['epochs']:.2f}" for part in covered)
        rows = [row for folder in folders for row in metrics(folder)]
        times = [row for row in rows if "samples_per_second" in row]
        rate = np.median([row["samples_per_second"] for row in times])
        shares = " | ".join(f"{100 * np.mean([row[f'time/{part}'] for row in times]):.1f} %" for part in PARTS)
        last = [[row for row in metrics(folder) if any("acc1" in key for key in row)][-1:] for folder in folders]
        accuracy = [value for rows in last for row in rows for key, value in row.items() if key.endswith("acc1")]
        shown = f"{100 * np.mean(accuracy):.1f}" if accuracy else ""
        skipped = sum(len(path.read_text().splitlines()) for f in folders for path in f.glob("spikes.jsonl"))
        print(f"| {name} | {epochs} | {rate:.0f} | {shares} | {shown} | {skipped} |")


def print_kill(whole: Path, killed: Path) -> None:
    """Whether the run that was killed twice ended as its twin."""
    hashes = [
        hashlib.sha256((out / "student" / "model.safetensors").read_bytes()).hexdigest() for out in (whole, killed)
    ]
    resumed = killed.with_name(killed.name + ".log").read_text().count("continuing from")
    steps = [[row["step"] for row in metrics(out) if "loss" in row] for out in (whole, killed)]
    same = "equal to the bit" if hashes[0] == hashes[1] else "DIFFERENT"
    print(f"\n{killed.name}: continued {resumed} times; weights {same} ({hashes[0][:16]}, {hashes[1][:16]}); ", end="")
    print(f"{len(steps[1])} logged steps, {'the same' if steps[0] == steps[1] else 'OTHERS'} as the twin's")


if __name__ == "__main__":
    main()
