"""Hurt streamed pretraining in every way that we could think of, and count what must never happen.

    python scripts/torture_stream.py
    python scripts/torture_stream.py --only kill files --kills 20 --seed 1 --out runs/torture

`vlkd train pretrain` runs as it is, on drawn scenes with a tiny student: killed at random moments and at each kind of
change of a file, on full disks, on 1, 2 and 4 ranks; with damaged, vanished and exchanged shards and from a server that
drops, stalls and lies (`torture_shards.py`, which this one calls). Each batch that is drawn is logged. Relative to the
checkpoint that was loaded, keys continue without a repeat or a gap; what cannot be used is named and counted; a run
ends well, or in one sentence and exit code 2; the same command then ends with the weights, bit for bit, of a run to
which nothing was done. Exit code 1 where one of these is broken.

So that a hundred kills take minutes, a run is a process forked from this one, which has imported everything; in `kill`
the run to which nothing is done is a command of its own, so that forking is shown to change nothing.
"""

from __future__ import annotations

import itertools
import json
import math
import multiprocessing
import os
import resource
import shutil
import signal
import statistics
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from random import Random

import vlkd.models  # noqa: F401 - before anything imports torchvision
from vlkd.cli.main import main as vlkd_main
from vlkd.data.shard_table import open_shards

# The tools of fault tests live with the tests.
sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from helpers.stage import BATCH, SHARDS, Row, Stage, perform, same
from helpers.trace import on_file_events
from helpers.trial import Attempt, Child, TrialRun


def kill(stage: Stage) -> Iterator[Row]:
    """`kill -9` of all processes of a run at random moments, uniform over an attempt's life; 0 to 2 workers in each."""
    rng, steps = Random(f"{stage.seed}/kill"), max(12, 10 * stage.kills)
    run, twin = (
        stage.run(name, steps=steps, data=("drawn", "more"), weights=(3, 1)) for name in ("killed", "unkilled")
    )
    command = [sys.executable, "-m", "vlkd.cli.main", "train", *twin.words, f"out={twin.out}"]
    subprocess.run(command, check=True, capture_output=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    phases: Counter[str] = Counter()
    while (left := stage.kills - phases.total()) and len(run.attempts) < 3 * stage.kills:
        workers = f"data.workers={rng.randrange(3)}"
        attempt = run.go(workers, kill_after=rng.uniform(0, life(run, steps, left, stage.kills)))
        if attempt.killed:
            phases[phase(run, attempt)] += 1
            if left % 10 == 1:
                print(f"         {phases.total()} kills, {run.position()} of {steps * BATCH} samples", flush=True)
        elif attempt.code:
            break
    run.go()
    problems = [*same(run, twin), *epochs(run)]
    if phases.total() < stage.kills:
        problems.append(f"only {phases.total()} kills")
    resumed = sum(attempt.start > 0 for attempt in run.attempts)
    found = ", ".join(f"{count} {name}" for name, count in phases.most_common())
    yield Row(case="kill", what=f"{phases.total()} kills in {steps} steps", found=found, problems=problems)
    names = [{path.name for path in one.out.iterdir()} for one in (run, twin)]
    found = f"{resumed} resumes; left in the folder: {', '.join(sorted(names[0] - names[1])[:3]) or 'nothing'}"
    yield Row(case="kill", what="resumes, and what they leave", found=found)
    yield worker_dies(stage)


def worker_dies(stage: Stage) -> Row:
    """A worker is killed, as when memory ends."""
    run = stage.run("worker-dies", "data.workers=2")
    died = run.go(act=lambda start: start == 7 * BATCH and multiprocessing.active_children()[0].kill())
    problems = [] if died.code == 2 else [f"exit code {died.code}, expected 2"]
    after = run.go()
    found = f"{short(died.sentence)}; continued from {after.start}"
    return Row(case="kill", what="a worker is killed", found=found, problems=problems + same(run, stage.twin()))


def life(run: TrialRun, steps: int, left: int, kills: int) -> float:
    """Seconds over which a kill is spread, so that those left take about the steps left, and the last ones the end."""
    drawing = [attempt for attempt in run.attempts if attempt.drawn]
    first = statistics.median([attempt.drawn[0].at - attempt.began for attempt in drawing] or [1.5])
    gaps = [after.at - before.at for attempt in drawing for before, after in itertools.pairwise(attempt.drawn)]
    rest = (steps - run.position() / BATCH) * (statistics.mean(gaps) if gaps else 0.05)
    if left <= kills // 10:
        return 2 * first + rest
    gain = rest / left
    return first + gain + math.sqrt(gain**2 + 2 * first * gain)


def phase(run: TrialRun, attempt: Attempt) -> str:
    """When an attempt was killed."""
    if any((run.out / "checkpoints").glob(".step-*")):
        return "writing a checkpoint"
    if run.position() == len(run.planned):
        return "at the end"
    return "between steps" if attempt.drawn else "starting"


def epochs(run: TrialRun) -> list[str]:
    """Sources of which an epoch is not every sample once, told by their keys alone, without asking the plan."""
    drawn = [key for part in run.survived() for key in part.keys]
    problems = []
    for number, name in enumerate(("drawn", "more")):
        own = [key for key in drawn if f"shapes-train-{number}-" in key]
        rows = math.prod(SHARDS[name])
        passes = [own[begin : begin + rows] for begin in range(0, len(own), rows)]
        if not own or any(len(set(part)) < len(part) for part in passes):
            problems.append(f"an epoch of {name} repeats a sample")
    return problems


def files(stage: Stage) -> Iterator[Row]:
    """`kill -9` at each kind of change of a file, and right after each kind of opening for writing, twice in a run."""
    rng, twin = Random(f"{stage.seed}/files"), stage.run("watched", steps=9)
    log = stage.folder / "events.txt"
    twin.go(prepare=partial(on_file_events, twin.out, log))
    kinds = Counter(log.read_text().splitlines())
    chosen = list(kinds)[:: max(1, -(-len(kinds) // stage.kills))]
    problems = []
    for number, kind in enumerate(chosen):
        run = stage.run(f"files-{number}", steps=9)
        first, second = (
            run.go(prepare=partial(on_file_events, run.out, log, kind, when))
            for when in (rng.randint(1, kinds[kind]), 1)
        )
        run.go()
        if first.code != -signal.SIGKILL:
            problems.append(f"{kind}: it was never reached")
        # What is written once is not written again.
        problems += [f"killed at {kind}: exit code {second.code}"] * (second.code not in (0, -signal.SIGKILL))
        problems += [f"killed at {kind}: {text}" for text in same(run, twin)]
    found = f"{len(chosen)} of {len(kinds)} kinds, first and again at once"
    yield Row(case="files", what="killed at each kind of change of a file", found=found, problems=problems)


def full(stage: Stage) -> Iterator[Row]:
    """No room: for a checkpoint, at the start, on a small disk of its own, and for a scan."""
    rng, twin = Random(f"{stage.seed}/full"), stage.twin()
    for number, (least, most) in enumerate([(2**12, 2**20), (2**20, 2**21), (2**21, 5 * 2**19)]):
        room, moment = rng.randrange(least, most), rng.randrange(7, 25) * BATCH
        run = stage.run(f"full-{number}")
        refused = run.go(act=lambda start, room=room, moment=moment: start == moment and limit_files(room))
        yield continued(run, twin, refused, f"files of at most {room >> 10} KiB at step {moment // BATCH}")
    run = stage.run("full-start")
    yield continued(run, twin, run.go(prepare=partial(limit_files, 1024)), "files of at most 1 KiB at the start")
    run = stage.run("full-disk")
    with small_disk(run.out, 2**20 * 13) as resize:
        if resize is None:
            yield Row(case="full", what="a small disk", found="skipped: mounting is not permitted here")
        else:
            refused = run.go()
            again = run.go()
            resize(2**26)
            yield continued(run, twin, refused, "a disk of 13 MB, tried twice", again)
    yield full_scan(stage)


def continued(run: TrialRun, twin: TrialRun, *refused: Attempt | str) -> Row:
    """Go on where there is room again, and compare."""
    what = next(one for one in refused if isinstance(one, str))
    attempts = [one for one in refused if isinstance(one, Attempt)]
    problems = [f"exit code {one.code}, expected 2: {one.output[-200:]}" for one in attempts if one.code != 2]
    start = run.position()
    run.go()
    found = f"{short(attempts[0].sentence)}; continued from {start}"
    return Row(case="full", what=what, found=found, problems=problems + same(run, twin))


def short(sentence: str) -> str:
    """A sentence without its paths' folders."""
    return " ".join(word.rpartition("/")[2] for word in sentence.split())[:70]


def limit_files(room: int) -> None:
    """From now on a file cannot grow beyond so many bytes: writing fails as on a full disk."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, resource.RLIM_INFINITY))


@contextmanager
def small_disk(place: Path, room: int) -> Iterator[Callable[[int], object] | None]:
    """Mount a file system of so many bytes in memory, where that is permitted; gives what changes its size."""

    def mount(size: int, *options: str) -> int:
        words = ["mount", "-t", "tmpfs", "-o", ",".join([*options, f"size={size}"]), "tmpfs", str(place)]
        return subprocess.run(words, check=False, capture_output=True).returncode

    place.mkdir(parents=True)
    if not shutil.which("mount") or mount(room):
        yield None
        return
    try:
        yield lambda size: mount(size, "remount")
    finally:
        subprocess.run(["umount", "-l", str(place)], check=False)


def full_scan(stage: Stage) -> Row:
    """A scan that cannot write its indexes, then one that can."""
    out = stage.folder / "scan"

    def scan(room: int) -> tuple[int | None, str]:
        words = ["prep", "scan", str(stage.folder / "drawn"), "--out", str(out), "--workers", "1"]
        child = Child(lambda: (limit_files(room), stage.command(words)))
        code = child.wait(60)
        child.kill()
        return code, child.output()

    code, said = scan(256)
    problems = [] if code == 2 and said.count("vlkd: ") == 1 else [f"exit code {code}: {said[-200:]}"]
    if (out / "scan.json").exists():
        problems.append("a scan without indexes is there")
    code, said = scan(2**30)
    wanted = open_shards(str(stage.folder / "drawn")).fingerprint()
    if code or open_shards(str(out)).fingerprint() != wanted:
        problems.append(f"the second scan is not the whole one: {said[-200:]}")
    return Row(case="full", what="no room for a scan", found="scanned at last", problems=problems)


def ranks(stage: Stage) -> Iterator[Row]:
    """1, 2 and 4 ranks under gloo with 0, 1 and 3 workers on two shards; runs continued by other numbers of ranks."""
    weights: dict[int, bytes] = {}
    for count, workers in ((1, 0), (1, 1), (1, 3), (2, 0), (2, 3), (4, 0), (4, 1)):
        run = stage.run(f"ranks-{count}-{workers}", f"data.workers={workers}", steps=12, data=("few",))
        run.go(ranks=count)
        problems = run.problems()
        if run.weights() != weights.setdefault(count, run.weights()):
            problems.append("other weights than with other workers")
        drawn = {(part.start, key) for part in run.survived() for key in part.keys}
        if len(drawn) != len(run.planned):
            problems.append(f"{len(drawn)} samples, expected {len(run.planned)}")
        what = f"{count} ranks, {workers} workers each, 2 shards"
        yield Row(case="ranks", what=what, found=f"{len(drawn)} samples as planned", problems=problems)
    for later in (1, 2, 4):
        yield resumed_on(stage, later, weights[2])
    yield one_rank_dies(stage, weights[2])


def resumed_on(stage: Stage, later: int, whole: bytes) -> Row:
    """A run of two ranks, killed, continued by others."""
    run = stage.run(f"resumed-{later}", "data.workers=0", steps=12, data=("few",))
    killed = run.go(ranks=2, act=lambda start: start == 7 * BATCH and die())
    after = run.go(ranks=later)
    problems = run.problems()
    if killed.code != -signal.SIGKILL or not after.start:
        problems.append("it was not killed, or not continued")
    if later == 2 and run.weights() != whole:
        problems.append("other weights than an unkilled run of two ranks")
    found = f"continued from {after.start}"
    return Row(case="ranks", what=f"begun on 2 ranks, resumed on {later}", found=found, problems=problems)


def one_rank_dies(stage: Stage, whole: bytes) -> Row:
    """Of two ranks the second is killed: the launcher ends the first, and both begin again."""
    run = stage.run("rank-dies", "data.workers=0", steps=12, data=("few",))
    died = run.go(ranks=2, act=lambda start: start == 7 * BATCH and os.environ["RANK"] == "1" and die())
    after = run.go(ranks=2)
    problems = run.problems() + ([] if run.weights() == whole else ["other weights than an unkilled run"])
    found = f"exit code {died.code}, continued from {after.start}"
    return Row(case="ranks", what="one of 2 ranks dies", found=found, problems=problems)


def die() -> None:
    """`kill -9` of this process alone."""
    os.kill(os.getpid(), signal.SIGKILL)


def elsewhere(name: str) -> Callable[[Stage], Iterator[Row]]:
    """A case of `torture_shards.py`, run as a command."""

    def case(stage: Stage) -> Iterator[Row]:
        script = Path(__file__).with_name("torture_shards.py")
        words = [sys.executable, str(script), "--only", name, "--json", "--seed", str(stage.seed)]
        done = subprocess.run(
            [*words, "--out", str(stage.folder / name)], check=False, stdout=subprocess.PIPE, text=True
        )
        lines = done.stdout.splitlines()
        try:
            yield from (Row(**row) for row in json.loads(lines[-1])["rows"])
        except (ValueError, IndexError):
            yield Row(
                case=name, what="the whole case", found=f"exit code {done.returncode}", problems=lines[-3:] or ["?"]
            )

    return case


CASES = {"kill": kill, "files": files, "full": full, "ranks": ranks} | {
    one: elsewhere(one) for one in ("tars", "remote")
}

if __name__ == "__main__":
    perform(CASES, vlkd_main, __doc__)
