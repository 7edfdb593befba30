"""Compare what `vlkd doctor --plan` predicts with the run itself: images per second, peak memory, building the cache.

    python scripts/check_plan.py --data shards/train --teachers runs/a/student runs/b/student --seconds 40

Each row is one setting of `vlkd train retriever`: no teacher, two teachers beside the student, two stored ones; without
workers and with two. The plan is made first. Then the run is started and killed after so many seconds of training; its
rate is that of the logged steps, the first ones and those fed by what workers had prepared before left out, and its
memory the most that the process that trains ever held. The last column is measured over predicted; the target is within
25 %. Everything is written to a temporary folder; features that one row stored serve the next one.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

VLKD = [sys.executable, "-m", "vlkd.cli.main"]
TARGET = 0.25
ROWS = ("alone", "online", "cached")


def main() -> None:
    """Plan, run, compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, metavar="PATH", help="captioned training images")
    parser.add_argument(
        "--teachers", nargs="+", default=[], metavar="REF", help="without any, rows with teachers fall out"
    )
    parser.add_argument("--seconds", type=float, default=40.0, help="of training in each run, default %(default)s")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--views", type=int, default=1, help="stored per image, default %(default)s")
    parser.add_argument("--workers", type=int, nargs="+", default=[0, 2])
    parser.add_argument(
        "--rows", nargs="+", choices=("alone", "online", "cached"), default=("alone", "online", "cached")
    )
    parser.add_argument("--set", nargs="*", default=[], metavar="key=value", help="further settings of the recipe")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    # Otherwise the run that is measured would go on when this script is ended.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    found = []
    with tempfile.TemporaryDirectory() as temporary:
        for kind in args.rows:
            for workers in args.workers if args.teachers or kind == "alone" else ():
                row = compare(
                    f"{kind}, {workers} workers", settings(args, kind, workers, temporary), workers, args.seconds
                )
                found += row
                print("\n".join(map(words, row)), flush=True)
    worst = max(abs(row["ratio"] - 1) for row in found)
    print(f"largest distance from 1: {worst:.2f} (target {TARGET})")
    if args.json:
        print(json.dumps({"rows": found, "worst": worst}, allow_nan=False))


def settings(args: argparse.Namespace, kind: str, workers: int, folder: str) -> list[str]:
    """Of one row."""
    found = [f"data.train={args.data}", f"data.workers={workers}", f"train.batch_size={args.batch_size}"]
    found += ["train.samples=10000000", "train.log_steps=1", f"teachers.folder={folder}/cache", *args.set]
    if kind == "alone":
        return found
    views = args.views if kind == "cached" else 0
    return [*found, f"teachers.refs={','.join(args.teachers)}", f"teachers.views={views}", "method.matching=1"]


def compare(name: str, words: list[str], workers: int, seconds: float) -> list[dict]:
    """Predicted and measured figures of one setting."""
    done = subprocess.run([*VLKD, "doctor", "--plan", "retriever", *words, "--json"], capture_output=True, text=True)
    if done.returncode:
        sys.exit(done.stderr)
    plan = json.loads(done.stdout.splitlines()[-1])["plan"]
    (place,) = [place for place in plan["memory"] if place["where"] == "the machine"]
    peak = place["total"] - place["parts"].get("workers", 0.0)
    rate, most, build = run(words, workers, seconds)
    rows = [
        row(name, "images/s", plan["images_per_second"]["run"], rate),
        row(name, "peak GiB", peak / 2**30, most / 2**30),
    ]
    predicted = plan["cache"]["build_seconds"] if plan["cache"] else 0.0
    if build and predicted:
        rows.append(row(name, "cache s", predicted, build))
    return rows


def run(words: list[str], workers: int, seconds: float) -> tuple[float, int, float]:
    """Images per second, the most bytes of the process, and the seconds in which it built caches."""
    with tempfile.TemporaryDirectory() as out:
        metrics = Path(out) / "run" / "metrics.jsonl"
        (caches,) = [Path(word.partition("=")[2]) for word in words if word.startswith("teachers.folder=")]
        known = set(caches.rglob("manifest.json"))
        with open(f"{out}/log", "w") as log:
            command = [*VLKD, "train", "retriever", *words, f"out={out}/run"]
            process = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)
            started, most = None, 0
            try:
                while started is None or time.monotonic() - started < seconds:
                    if process.poll() is not None:
                        sys.exit(Path(f"{out}/log").read_text()[-2000:])
                    if started is None and metrics.is_file() and metrics.stat().st_size:
                        started = time.monotonic()
                    most = max(most, high_water(process.pid))
                    time.sleep(0.2)
            finally:
                # Workers are of the same session, which this script began.
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        rows = [json.loads(line) for line in metrics.read_text().splitlines() if line.endswith("}")]
        rows = [row for row in rows if "samples_per_second" in row]
        skipped = min(2 + 4 * workers, len(rows) - 1)
        steady = rows[skipped:]
        spent = sum(1 / row["samples_per_second"] for row in steady)
        new = [json.loads(path.read_text()) for path in set(caches.rglob("manifest.json")) - known]
        return len(steady) / spent, most, sum(manifest["seconds"] for manifest in new)


def high_water(pid: int) -> int:
    """The most bytes that a process held so far; 0 where the system does not tell."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:")), 0)


def row(name: str, figure: str, predicted: float, measured: float) -> dict:
    """One comparison."""
    return {
        "setting": name, "figure": figure, "predicted": predicted, "measured": measured, "ratio": measured / predicted
    }  # fmt: skip


def words(found: dict) -> str:
    """One line of the table."""
    close = "" if abs(found["ratio"] - 1) <= TARGET else "  <- off"
    return (
        f"{found['setting']:<20} {found['figure']:<10} predicted {found['predicted']:8.2f}  "
        f"measured {found['measured']:8.2f}  ratio {found['ratio']:5.2f}{close}"
    )


if __name__ == "__main__":
    main()
