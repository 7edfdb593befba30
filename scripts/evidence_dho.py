"""DHO's evidence: methods by shots by seeds at equal student samples, then the learning curve.

    python scripts/evidence_dho.py --data DATA --teacher runs/teacher/student --out runs/evidence_dho --jobs 2 \\
        --set data.leave_out=Faces_easy model.image_weights=WEIGHTS train.conflicts=true

DATA is a folder as `vlkd train dho` reads it; `--set` passes settings of it on to every run. Each run has a process of
its own and a log in OUT/logs. Finished runs are kept and others continued, so the same command goes on where it
stopped; what fails is listed at the end and stops nothing. A student that learns from the teacher alone reads no label
and is run once per seed. The teacher's features are computed once, by a first run alone.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path

LABELS, FEW_SHOT = "labels", "teacher.few_shot=true"
METHODS = {
    LABELS: ["method.distillation=0"],
    "teacher": ["method.supervised=0"],
    "one-head": ["model.heads=one"],
    "one-head-features": ["model.heads=one", "method.match=features"],
    "one-head-pcgrad": ["model.heads=one", "method.surgery=true"],
    "auxiliary": ["method.match=binary", "mix.tune=false", "mix.alpha=1"],
    "dho": [],
    "dho-f": [FEW_SHOT],
}
WITHOUT_LABELS = ("teacher",)
SHOTS = ("1", "2", "4", "8", "16")


@dataclass(frozen=True, kw_only=True)
class Job:
    """One run. Attributes: name: of its folder. words: of its command after `vlkd`. taught: reads the teacher."""

    name: str
    words: tuple[str, ...]
    taught: bool


@dataclass(frozen=True, kw_only=True)
class Done:
    """Attributes: seconds: that it took, 0 for a run that was there. problem: why it failed, or nothing."""

    seconds: float = 0.0
    problem: str = ""


def main() -> None:
    """Run what is missing, then draw the curve."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, metavar="ROOT")
    parser.add_argument("--teacher", required=True, metavar="REF")
    parser.add_argument("--out", type=Path, default=Path("runs/evidence_dho"))
    parser.add_argument("--features", type=Path, help="folder of the teacher's stored features, else one in OUT")
    parser.add_argument("--methods", nargs="+", choices=tuple(METHODS), default=list(METHODS), metavar="METHOD",
                        help=", ".join(METHODS))  # fmt: skip
    parser.add_argument("--shots", nargs="+", default=list(SHOTS))
    parser.add_argument("--seeds", type=int, default=5, help="how many, from 0")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time")
    parser.add_argument("--threads", type=int, default=1, help="of each run")
    parser.add_argument("--set", nargs="+", action="extend", default=[], metavar="KEY=VALUE", dest="settings")
    args = parser.parse_args()
    if min(args.seeds, args.jobs, args.threads) < 1:
        parser.error("--seeds, --jobs and --threads must be 1 or more")
    args.features = args.features or args.out / "teacher_features"
    (args.out / "logs").mkdir(parents=True, exist_ok=True)
    jobs = plan(args)
    failed = run_all(args, jobs)
    finished = [str(args.out / job.name) for job in jobs if job.name not in failed]
    for name, problem in failed.items():
        print(f"failed: {name}: {problem}")
    if finished:
        curve = ["eval", "learning_curve", *finished, "--out", str(args.out / "curve")]
        subprocess.run([sys.executable, "-m", "vlkd.cli.main", *curve], check=True)
    if failed:
        raise SystemExit(f"{len(failed)} of {len(jobs)} runs failed; mend what their logs say and run this again.")


def plan(args: argparse.Namespace) -> list[Job]:
    """Seed by seed, so that what is there after an interruption is even over methods and shots."""
    found: list[Job] = []
    for seed in range(args.seeds):
        for shots in args.shots:
            for name, changes in METHODS.items():
                once = name in WITHOUT_LABELS and FEW_SHOT not in args.settings
                if name not in args.methods or (once and shots != args.shots[0]):
                    continue
                taught = name != LABELS
                folder = f"{name}-seed{seed}" if once else f"{name}-{shots.replace('/', '_')}-seed{seed}"
                words = ["train", "dho", f"data.root={args.data}", f"data.shots={1 if once else shots}"]
                # A zero-shot teacher's own figures are the same in every run: one tells them.
                known = FEW_SHOT not in changes and any(job.taught and FEW_SHOT not in job.words for job in found)
                words += [f"report.teacher={str(not known).lower()}", f"teacher.folder={args.features}"]
                words += [*args.settings, *changes]
                words += [f"teacher.ref={args.teacher}"] if taught else []
                words += [f"seed={seed}", f"out={args.out / folder}"]
                found.append(Job(name=folder, words=tuple(words), taught=taught))
    return found


def run_all(args: argparse.Namespace, jobs: list[Job]) -> dict[str, str]:
    """Run the jobs; the problems by name. One that is taught goes first, alone, until the features are there."""
    progress = Progress(len(jobs), args)
    waiting = []
    for job in jobs:
        done = kept(args, job)
        if done is None:
            waiting.append(job)
        else:
            progress.add(job, done)
    # Runs at a time would each compute the same features.
    stored = args.features.is_dir() and any(job.taught and job not in waiting for job in jobs)
    while not stored and (first := next((job for job in waiting if job.taught), None)):
        waiting.remove(first)
        done = run(args, first)
        progress.add(first, done, builds=True)
        stored = not done.problem
    pool = ThreadPoolExecutor(args.jobs)
    try:
        running = {pool.submit(run, args, job): job for job in waiting}
        for future in as_completed(running):
            progress.add(running[future], future.result())
    finally:
        # After an interrupt nothing new begins.
        pool.shutdown(cancel_futures=True)
    return progress.failed


def kept(args: argparse.Namespace, job: Job) -> Done | None:
    """What is already there: a finished run, or one of other settings; None where there is something to run."""
    noted = args.out / "logs" / f"{job.name}.command"
    if not (args.out / job.name / "results.jsonl").is_file():
        return None
    if not noted.is_file() or telling(noted.read_text().split("\n")) != telling(job.words):
        return Done(problem=f"it was run with other settings, see {noted}; remove its folder or give another --out")
    return Done()


def telling(words: Sequence[str]) -> list[str]:
    """The words of a command that make another run."""
    return [word for word in words if not word.startswith(("report.", "teacher.folder=", "out="))]


def run(args: argparse.Namespace, job: Job) -> Done:
    """One process, its output in a log."""
    logs = args.out / "logs"
    (logs / f"{job.name}.command").write_text("\n".join(job.words))
    started = time.perf_counter()
    with (logs / f"{job.name}.log").open("a") as log:
        code = subprocess.run(
            [sys.executable, "-m", "vlkd.cli.main", *job.words],
            env=os.environ | {"OMP_NUM_THREADS": str(args.threads)},
            stdout=log,
            stderr=subprocess.STDOUT,
            check=False,
        ).returncode
    seconds = time.perf_counter() - started
    if code:
        last = (logs / f"{job.name}.log").read_text(errors="replace").strip().splitlines()[-1:]
        return Done(seconds=seconds, problem=f"exit code {code}, {' '.join(last)[:300]}")
    return Done(seconds=seconds)


class Progress:
    """Counts, times, problems."""

    def __init__(self, total: int, args: argparse.Namespace) -> None:
        self.total, self.args = total, args
        self.failed: dict[str, str] = {}
        self.seconds: list[float] = []
        self.count = 0

    def add(self, job: Job, done: Done, *, builds: bool = False) -> None:
        """Print one run's line, and when the rest will be done."""
        self.count += 1
        if done.problem:
            self.failed[job.name] = done.problem
            told = f"failed: {done.problem}"
        else:
            told = f"{accuracy(self.args.out / job.name)}, " + (f"{done.seconds:.0f} s" if done.seconds else "kept")
        left = ""
        if done.seconds:
            # The first taught run, which also computes the features, tells little of the others.
            if not (builds or done.problem):
                self.seconds.append(done.seconds)
            known = self.seconds or [done.seconds]
            minutes = (self.total - self.count) * sum(known) / len(known) / self.args.jobs / 60
            left = f"; about {minutes / 60:.1f} h left" if minutes > 90 else f"; about {minutes:.0f} min left"
        print(f"[{self.count}/{self.total}] {job.name}: {told}{left}", flush=True)


def accuracy(folder: Path) -> str:
    """The student's, on the last split of its results."""
    rows = [json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines()]
    row = [row for row in rows if row["role"] == "student"][-1]
    return f"{100 * row['acc1']:.1f} % on {row['split']}"


if __name__ == "__main__":
    main()
