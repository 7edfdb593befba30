"""Switch-KD's evidence: methods by seeds at equal student samples, accuracy per kind of question, and the cost of each.

    python scripts/evidence_vlm.py --teacher runs/teacher/student --out runs/evidence_vlm --jobs 2 \\
        --set data.train=vqa/train data.val=vqa/val data.test=vqa/test distilled.samples=30000

`--set` passes settings of `vlkd train switch_kd` on to every run; `{seed}` in them is the run's seed, so that methods
may go on from students that were prepared by seed (`start=runs/base-{seed}/student`). Each run has a process of its
own and a log beside its folder. Finished runs are kept and others continued, so the same command goes on where it
stopped; what fails is listed at the end and stops nothing. The table has means over seeds with Student's 95 %
intervals, and the differences from answers alone, paired by seed.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

from vlkd.metrics.seeds import t_interval

BASE = "answers"
DIFFERENCES = ("all questions", "mean of kinds")
"""Rows that are followed by the differences from answers alone."""
# DBiLD has Switch-KD's temperature of 3, which is the recipe's; KL of all tokens did better at 1 on validation.
METHODS = {
    BASE: ["method.align=0", "method.switch=0"],
    "token-kl": ["method.switch=0", "method.match=kl", "method.tau=1"],
    "align": ["method.switch=0"],
    "switch": ["method.align=0"],
    "switch-kd": [],
    "reverse-kl": ["method.switch=0", "method.match=reverse_kl", "method.tau=1"],
    "taid": ["method.switch=0", "method.match=taid", "method.tau=1"],
    "bild": ["method.switch=0", "method.k=8", "method.reverse=false"],
    "visual": ["method.align=0", "method.switch=0", "method.visual=1"],
    "relation": ["method.align=0", "method.switch=0", "method.relation=1"],
}
CHOSEN = (BASE, "token-kl", "align", "switch", "switch-kd")


def main() -> None:
    """Run what is missing, then print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--teacher", required=True, metavar="REF")
    parser.add_argument("--out", type=Path, default=Path("runs/evidence_vlm"))
    parser.add_argument("--methods", nargs="+", choices=tuple(METHODS), default=list(CHOSEN), metavar="METHOD",
                        help=", ".join(METHODS))  # fmt: skip
    parser.add_argument("--seeds", type=int, default=5, help="how many, from 0")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time")
    parser.add_argument("--threads", type=int, default=1, help="of each run")
    parser.add_argument("--set", nargs="+", action="extend", default=[], metavar="KEY=VALUE", dest="settings")
    args = parser.parse_args()
    if min(args.seeds, args.jobs, args.threads) < 1:
        parser.error("--seeds, --jobs and --threads must be 1 or more")
    args.out.mkdir(parents=True, exist_ok=True)
    jobs = [(method, seed) for seed in range(args.seeds) for method in args.methods]
    problems = run_all(args, jobs)
    found: dict[str, list[dict]] = {}
    for method, seed in jobs:
        if (method, seed) not in problems:
            found.setdefault(method, []).append(rows_of(args.out / f"{method}-{seed}"))
    if found:
        print_tables(found)
    for (method, seed), problem in problems.items():
        print(f"failed: {method}-{seed}: {problem}")
    if problems:
        raise SystemExit(f"{len(problems)} of {len(jobs)} runs failed; mend what their logs say and run this again.")


def run_all(args: argparse.Namespace, jobs: Sequence[tuple[str, int]]) -> dict[tuple[str, int], str]:
    """Run the jobs, `args.jobs` at a time; the problems of those that failed."""
    problems: dict[tuple[str, int], str] = {}
    spent: list[float] = []
    pool = ThreadPoolExecutor(args.jobs)
    try:
        running = {pool.submit(run, args, *job): job for job in jobs}
        for number, future in enumerate(as_completed(running), 1):
            job = running[future]
            seconds, problem = future.result()
            spent += [seconds] if seconds and not problem else []
            if problem:
                problems[job] = problem
            left = (len(jobs) - number) * sum(spent) / max(1, len(spent)) / args.jobs / 60
            told = problem or (f"{seconds:.0f} s" if seconds else "kept")
            print(f"[{number}/{len(jobs)}] {job[0]}-{job[1]}: {told}; about {left:.0f} min left", flush=True)
    finally:
        # After an interrupt nothing new begins.
        pool.shutdown(cancel_futures=True)
    return problems


def run(args: argparse.Namespace, method: str, seed: int) -> tuple[float, str]:
    """One training run in a process of its own: its seconds, 0 for one that was there, and what went wrong."""
    out = args.out / f"{method}-{seed}"
    settings = [word.replace("{seed}", str(seed)) for word in args.settings]
    words = ["train", "switch_kd", *settings, *METHODS[method], f"teacher.ref={args.teacher}", f"seed={seed}"]
    noted = out.with_name(out.name + ".command")
    if (out / "results.jsonl").is_file():
        same = noted.is_file() and noted.read_text().split("\n") == words
        return 0.0, "" if same else f"it was run with other settings, see {noted}; remove it or give another --out"
    noted.write_text("\n".join(words))
    started = time.perf_counter()
    log = out.with_name(out.name + ".log")
    with log.open("a") as file:
        code = subprocess.run(
            [sys.executable, "-m", "vlkd.cli.main", *words, f"out={out}"],
            env=os.environ | {"OMP_NUM_THREADS": str(args.threads)},
            stdout=file,
            stderr=subprocess.STDOUT,
            check=False,
        ).returncode
    last = log.read_text(errors="replace").strip().splitlines()[-1:]
    return time.perf_counter() - started, f"exit code {code}, {' '.join(last)[:300]}" if code else ""


def rows_of(folder: Path) -> dict[str, dict]:
    """The student's and the teacher's figures on the last split, by role."""
    rows = [json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines()]
    return {row["role"]: row for row in rows if row["split"] == rows[-1]["split"]}


def print_tables(found: Mapping[str, Sequence[Mapping[str, dict]]]) -> None:
    """Markdown, a column for each method: accuracy overall and per kind, differences from answers alone, cost."""
    first = next(iter(found.values()))[0]["student"]
    kinds = list(first["per_kind"])
    teacher = next((one["teacher"] for seeds in found.values() for one in seeds if "teacher" in one), None)
    taught = [f"teacher, {teacher['parameters'] / 1e6:.1f} M"] if teacher else []
    print(f"\n{first['counts']['questions']} questions of {first['split']}, {first['samples']} conversations\n")
    print(f"| | {' | '.join([*taught, *found])} |\n|---|{'---|' * (len(found) + len(taught))}")
    base = found.get(BASE, ())
    for name, figure in figures(kinds).items():
        values = {method: by_seed(seeds, figure) for method, seeds in found.items()}
        own = [percent([figure(teacher)])] if teacher else []
        print(f"| {name} | {' | '.join([*own, *(percent(list(seen.values())) for seen in values.values())])} |")
        if base and len(found) > 1 and name in DIFFERENCES:
            beside = by_seed(base, figure)
            cells = [
                percent([seen[seed] - beside[seed] for seed in seen if seed in beside], sign="+")
                if method != BASE
                else ""
                for method, seen in values.items()
            ]
            print(f"| less answers alone | {' | '.join([*([''] * len(own)), *cells])} |")
    seconds = {method: sum(one["student"]["seconds"] for one in seeds) / len(seeds) for method, seeds in found.items()}
    rows = {
        "seconds of training": [f"{value:.0f}" for value in seconds.values()],
        "TFLOP": [f"{seeds[0]['student']['tflop']:.1f}" for seeds in found.values()],
        "conversations a second": [f"{first['samples'] / value:.1f}" for value in seconds.values()],
    }
    for name, cells in rows.items():
        print(f"| {name} | {' | '.join([*([''] * len(taught)), *cells])} |")


def figures(kinds: Sequence[str]) -> dict[str, Callable[[Mapping], float]]:
    """By name of the table's row what it reads of a model's figures."""
    found: dict[str, Callable[[Mapping], float]] = {
        "all questions": lambda row: row["accuracy"],
        "mean of kinds": lambda row: sum(row["per_kind"][kind]["accuracy"] for kind in kinds) / len(kinds),
    }
    for kind in kinds:
        found[kind] = lambda row, kind=kind: row["per_kind"][kind]["accuracy"]  # type: ignore[misc]
    return found | {"not parsed": lambda row: row["metrics"]["parse_failures"]}


def by_seed(seeds: Sequence[Mapping[str, dict]], figure: Callable[[Mapping], float]) -> dict[int, float]:
    """The student's figure of each seed."""
    return {one["student"]["seed"]: figure(one["student"]) for one in seeds}


def percent(values: Sequence[float], *, sign: str = "") -> str:
    """Mean [95 % interval over seeds]; "" for none."""
    if not values:
        return ""
    text = f"{100 * sum(values) / len(values):{sign}.1f}"
    interval = t_interval(values)
    return text if interval is None else f"{text} [{100 * interval[0]:{sign}.1f}, {100 * interval[1]:{sign}.1f}]"


if __name__ == "__main__":
    main()
