"""AMMKD's evidence: one student under three teachers that disagree, its ways to weigh them, with and without fusion.

    python scripts/evidence_ammkd.py --data DATA --unlabelled PHOTOS --cache runs/cache \\
        --teachers runs/lite2/student,runs/lite0/student,runs/drawn/student \\
        --fused runs/lite2-fused/student,runs/lite0-fused/student,runs/drawn-fused/student

DATA holds shards of three sources (coco, emoji, clipart), each with train, val and test. Every student trains on all of
them and is tested on each; every variant sees the same number of student samples. Settings were chosen on val, with
uniform weights (`--tune` prints the trials). Finished runs are kept, so the same command continues.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

import vlkd.models  # noqa: F401 - before anything imports torchvision
from vlkd.data.sources import open_pairs
from vlkd.engine.results import Entry, evaluate_entry
from vlkd.metrics import bootstrap_means, interval, mean_over_seeds, percent_interval
from vlkd.models.load import load

SOURCES = ("coco", "emoji", "clipart")
STUDENT = [
    "model.image=resnet10t",
    'model.image_kwargs={"channels":[32,64,128,216]}',
    "model.image_size=64",
    "model.text_width=192",
    "model.text_layers=1",
    "model.context_length=20",
    "model.width=256",
    "train.precision=bf16",
    "train.batch_size=64",
    "train.lr=0.003",
    "train.weight_decay=0.05",
    "data.keep_short_side=96",
    "views.flip=0",
    "report.teachers=false",
]
CHOSEN = ["method.temperature=2", "method.distillation=4", "method.contrastive=0.5", "teachers.bank=512"]
UNIFORM = "uniform"
FUSED, SUFFIX = ", fused", "-fused"
WEIGHTINGS = {
    UNIFORM: ["method.weighting=fixed"],
    "balanced, C = 0.6": ["method.weighting=balanced", "method.bound=0.6"],
    "balanced, C = 1": ["method.weighting=balanced", "method.bound=1"],
    "loss-relative": ["method.weighting=relative"],
}
BATCH = ["teachers.bank=0", "method.distillation=1"]
TRIALS = [
    BATCH,
    [*BATCH, "method.temperature=1"],
    [*BATCH, "method.temperature=4"],
    ["teachers.bank=0"],
    ["method.distillation=1"],
    [],
]


def main() -> None:
    """Run what is missing, then print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--unlabelled", default="", help="a further source without captions")
    parser.add_argument("--teachers", required=True, help="references, separated by commas")
    parser.add_argument("--fused", default="", help="the same teachers, prepared with the fusion network")
    parser.add_argument("--cache", type=Path, default=Path("runs/cache"))
    parser.add_argument("--out", type=Path, default=Path("runs/evidence_ammkd"))
    parser.add_argument("--samples", type=int, default=30_000)
    parser.add_argument("--views", type=int, default=3)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time, one thread each")
    parser.add_argument("--tune", action="store_true", help="run the trials on val instead, one seed")
    args = parser.parse_args()
    if args.tune:
        tune(args)
        return
    jobs = [(name, seed) for seed in range(args.seeds) for name in variants(args)]
    with ThreadPoolExecutor(args.jobs) as pool:
        folders = list(pool.map(lambda job: run(args, variants(args)[job[0]], args.out / slug(*job), job[1]), jobs))
    found: dict[str, list[Path]] = {}
    for (name, _), folder in zip(jobs, folders, strict=True):
        found.setdefault(name, []).append(folder)
    for source in SOURCES:
        print_table(source, found, evaluated_teachers(args, source))
    print_conflicts(found)


def variants(args: argparse.Namespace) -> dict[str, list[str]]:
    """Per row of the table its settings."""
    rows = {"no teacher": [f"teachers.refs={args.teachers}", "method.distillation=0", "method.weighting=fixed"]}
    for suffix, refs in (("", args.teachers), (FUSED, args.fused)):
        if refs:
            rows |= {f"{name}{suffix}": [f"teachers.refs={refs}", *more] for name, more in WEIGHTINGS.items()}
            rows |= {
                f"{Path(ref).parent.name} only": [f"teachers.refs={ref}", "method.weighting=fixed"]
                for ref in refs.split(",")
            }
    return rows


def slug(name: str, seed: int) -> str:
    """The folder of a run."""
    return "".join(c if c.isalnum() or c in ".-" else "_" for c in name) + f"-{seed}"


def run(args: argparse.Namespace, changes: list[str], out: Path, seed: int, split: str = "test") -> Path:
    """One training run in a process of its own, on one thread."""
    train = [f"{args.data}/{source}/train" for source in SOURCES] + ([args.unlabelled] if args.unlabelled else [])
    held_out = [f"{args.data}/{source}/{split}" for source in SOURCES]
    command = [sys.executable, "-m", "vlkd.cli.main", "train", "ammkd", *STUDENT, *CHOSEN, *changes]
    command += [f"train.samples={args.samples}", f"teachers.views={args.views}", f"teachers.folder={args.cache}"]
    command += [f"data.train={','.join(train)}", f"data.test={','.join(held_out)}", f"seed={seed}", f"out={out}"]
    out.parent.mkdir(parents=True, exist_ok=True)
    noted = out.with_name(out.name + ".command")
    if (out / "results.jsonl").is_file():
        if noted.read_text() != " ".join(command[3:]):
            raise SystemExit(f"{out} was run with other settings, see {noted}; remove it or give another --out.")
        return out
    noted.write_text(" ".join(command[3:]))
    with out.with_name(out.name + ".log").open("w") as log:
        subprocess.run(["env", "OMP_NUM_THREADS=1", *command], check=True, stdout=log, stderr=subprocess.STDOUT)
    print(f"done: {out}", flush=True)
    return out


def tune(args: argparse.Namespace) -> None:
    """The trials with uniform weights, one seed, figures on val."""

    def one(number: int) -> tuple[list[str], list[dict]]:
        changes = [f"teachers.refs={args.teachers}", *WEIGHTINGS[UNIFORM], *TRIALS[number]]
        folder = run(args, changes, args.out / f"tune-{number}", 0, split="val")
        return TRIALS[number], [row_of(folder, source) for source in SOURCES]

    with ThreadPoolExecutor(args.jobs) as pool:
        for changes, rows in pool.map(one, range(len(TRIALS))):
            figures = "  ".join(f"{100 * row['mean_hit@1']:5.1f} {100 * row['mean_hit@10']:5.1f}" for row in rows)
            print(f"{' '.join(changes) or 'as chosen':<60} {figures}", flush=True)


def row_of(folder: Path, source: str) -> dict:
    """The student's figures on one source."""
    rows = [json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines()]
    return next(row for row in rows if row["role"] == "student" and Path(row["data"]).parent.name == source)


def print_table(source: str, found: dict[str, list[Path]], teachers: dict[str, dict]) -> None:
    """Markdown: means over seeds with intervals from a bootstrap over images, and paired differences."""
    rows = {name: [row_of(folder, source) for folder in folders] for name, folders in found.items()}
    print(f"\n{source}\n")
    print(
        "| teachers' weights | hit@1 | hit@10 | spread of hit@10 | hit@10 less uniform's | fused less plain | minutes |"
    )
    print("|---|---|---|---|---|---|---|")
    for name, row in teachers.items():
        print(f"| teacher {name} | {cell([row], 1)} | {cell([row], 10)} | | | | |")
    for name, seeds in rows.items():
        fused = f"{name}{FUSED}" if f"{name}{FUSED}" in rows else name.replace(" only", f"{SUFFIX} only")
        base = rows[UNIFORM + (FUSED if "fused" in name else "")]
        against = difference(seeds, base) if base is not seeds else ""
        gain = difference(rows[fused], seeds) if fused in rows and fused != name else ""
        spread = 100 * float(np.std([row["mean_hit@10"] for row in seeds], ddof=1)) if len(seeds) > 1 else float("nan")
        minutes = np.mean([row["seconds"] for row in seeds]) / 60
        figures = f"{cell(seeds, 1)} | {cell(seeds, 10)} | {spread:.1f} | {against} | {gain} | {minutes:.1f}"
        print(f"| {name} | {figures} |")


def difference(ours: list[dict], theirs: list[dict]) -> str:
    """Mean difference of hit@10 with its interval from the same draws of images."""
    values = mean_over_seeds(ours, 10) - mean_over_seeds(theirs, 10)
    low, high = interval(bootstrap_means(values, seed=0))
    return f"{100 * values.mean():+.1f} [{100 * low:+.1f}, {100 * high:+.1f}]"


def evaluated_teachers(args: argparse.Namespace, source: str) -> dict[str, dict]:
    """Each teacher's own figures on a source, computed once."""
    rows = {}
    for ref in (args.teachers + ("," + args.fused if args.fused else "")).split(","):
        name = Path(ref).parent.name
        path = args.out / "teachers" / f"{name}-{source}.json"
        if not path.is_file():
            path.parent.mkdir(parents=True, exist_ok=True)
            pairs = open_pairs(f"{args.data}/{source}/test")
            entry = Entry(role="teacher", name=name, model=load(ref))
            path.write_text(json.dumps(evaluate_entry(entry, pairs).row))
        rows[name] = json.loads(path.read_text())
    return rows


def cell(seeds: list[dict], k: int) -> str:
    """Mean [95 % interval], percent."""
    return percent_interval(mean_over_seeds(seeds, k))


def print_conflicts(found: dict[str, list[Path]]) -> None:
    """Means over logged steps and seeds of what the balanced runs logged about the teachers' gradients."""
    for name, folders in found.items():
        if not name.startswith("balanced"):
            continue
        print(f"\n{name}\n\n| logged | mean | first tenth | last tenth |\n|---|---|---|---|")
        for key, series in sorted(logged(folders).items()):
            tenth = max(1, series.shape[1] // 10)
            parts = (series.mean(), series[:, :tenth].mean(), series[:, -tenth:].mean())
            print(f"| {key} | " + " | ".join(f"{part:.3f}" for part in parts) + " |")


def logged(folders: Iterable[Path]) -> dict[str, np.ndarray]:
    """Per figure of the teachers' balance its logged values, (seeds, steps)."""
    groups = ("weight/", "gradient_cosine/", "gradient_norm/", "common_descent/", "residual/")
    runs = []
    for folder in folders:
        rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        rows = [row for row in rows if "weight/text" in " ".join(row)]
        runs.append({key: [row[key] for row in rows] for key in rows[0] if key.startswith(groups)})
    return {key: np.array([one[key] for one in runs]) for key in runs[0]}


if __name__ == "__main__":
    main()
