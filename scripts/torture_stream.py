"""Hurt streamed pretraining in every way that we could think of, and count what must never happen.

    python scripts/torture_stream.py
    python scripts/torture_stream.py --only kill --kills 20 --seed 1 --out runs/torture

`vlkd train pretrain` runs as it is, on drawn scenes with a tiny student: killed at random moments and at each kind of
change of a file, with damaged, vanished and exchanged shards, on full disks, from a server that drops, stalls and lies,
on 1, 2 and 4 ranks. Each batch that is drawn is logged. Relative to the checkpoint that was loaded, keys continue
without a repeat or a gap; what cannot be used is named and counted; a run ends well, or in one sentence and exit code 2;
the same command ends with the weights, bit for bit, of a run that nothing happened to. Exit code 1 where one of these
is broken.

So that a hundred kills take minutes, a run is a process forked from this one, which has imported everything; the runs
that nothing happens to in `kill` are commands of their own. The weights of both are compared.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import os
import re
import resource
import shutil
import statistics
import subprocess
import sys
import tarfile
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from random import Random

import torch

import vlkd.models  # noqa: F401 - before anything imports torchvision
from vlkd.cli.main import main as vlkd_main
from vlkd.data.download import download
from vlkd.data.local_copies import LocalCopies
from vlkd.data.plan import Plan
from vlkd.data.scan import scan_shards
from vlkd.data.scenes import generate_scenes
from vlkd.data.shard_table import ShardTable, open_shards
from vlkd.data.shards import write_shards
from vlkd.engine.run import run_recipe  # noqa: F401 - so that children have it
from vlkd.engine.trace import on_file_events
from vlkd.engine.trial import Attempt, Child, TrialRun

BATCH = 16
SHARDS = {"drawn": (40, 8), "more": (10, 8), "few": (2, 40)}
"""How many shards of how many samples each."""
STUDENT = (
    "model.image=test_vit", "model.image_size=32", 'model.image_kwargs={"img_size":32}', "model.text_width=32",
    "model.text_layers=1", "model.text_heads=2", "model.width=16", "model.image_projection=mlp",
    "model.text_projection=mlp", "model.projection_dropout=0.3", "student.vocab_size=300", "train.ema=0.9",
    "train.device=cpu", "train.log_steps=1", "train.save_steps=3", "data.shuffle_shards=4",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Row:
    """One line of the table."""

    case: str
    what: str
    found: str
    problems: list[str] = field(default_factory=list)


class Stage:
    """Shards of drawn scenes, and runs on them."""

    def __init__(self, folder: Path, seed: int, kills: int) -> None:
        self.folder, self.seed, self.kills = folder, seed, kills
        for number, (name, (shards, samples)) in enumerate(SHARDS.items()):
            scenes = generate_scenes("shapes", count=shards * samples, seed=number, split="train", image_size=32)
            write_shards(scenes, folder / name, samples_per_shard=samples)
            scan_shards([str(folder / name)], None, workers=1)
        write_shards(generate_scenes("shapes", count=24, seed=9, split="val", image_size=32), folder / "val")
        self._twins: dict[tuple[str, ...], TrialRun] = {}

    def run(self, name: str, *words: str, steps: int = 30, train: str = "", data: Sequence[str] = ("drawn",)) -> TrialRun:
        """A run of so many steps on the shards `data`, or on a copy of them elsewhere."""
        tables = [open_shards(str(self.folder / one)) for one in data]
        weights = next(([float(part) for part in word[13:].split(",")] for word in words if "data.weights=" in word), ())
        plan = Plan([table.sizes() for table in tables], seed=0, weights=weights, together=4)
        table = ShardTable([shard for one in tables for shard in one.shards])
        train = train or ",".join(str(self.folder / one) for one in data)
        shared = ("pretrain", f"data.train={train}", f"data.val={self.folder / 'val'}", f"train.samples={steps * BATCH}")
        return TrialRun(
            out=self.folder / "runs" / name,
            command=vlkd_main,
            words=(*shared, f"train.batch_size={BATCH}", *STUDENT, *words),
            planned=[table.key(plan.row(position)[0]) for position in range(steps * BATCH)],
            batch_size=BATCH,
        )

    def twin(self, *words: str, ranks: int = 1, **options: object) -> TrialRun:
        """The same run, finished, with nothing done to it."""
        key = (*words, str(ranks), repr(options))
        if key not in self._twins:
            twin = self.run(f"twin-{len(self._twins)}", *words, **options)
            twin.go(ranks=ranks)
            self._twins[key] = twin
        return self._twins[key]

    def copy(self, name: str) -> Path:
        """Shards that may be damaged."""
        return shutil.copytree(self.folder / "drawn", self.folder / "copies" / name / "drawn", copy_function=shutil.copy2)


def same(run: TrialRun, twin: TrialRun) -> list[str]:
    """What differs between two finished runs, beside what went wrong in them."""
    found = [*run.problems(), *(f"twin: {text}" for text in twin.problems() if twin.attempts)]
    if not run.weights() or run.weights() != twin.weights():
        found.append("its weights are not those of the twin")
    if not found and run.losses() != twin.losses():
        found.append("its losses are not those of the twin")
    if not found and (run.out / "coverage.jsonl").read_bytes() != (twin.out / "coverage.jsonl").read_bytes():
        found.append("its coverage is not that of the twin")
    return found


def kill(stage: Stage) -> Iterator[Row]:
    """`kill -9` at random moments, uniform over the life of each attempt."""
    rng, steps = Random(f"{stage.seed}/kill"), max(12, 6 * stage.kills)
    words = ("data.weights=3,1", "data.workers=1")
    run = stage.run("killed", *words, steps=steps, data=("drawn", "more"))
    twin = stage.run("unkilled", *words, steps=steps, data=("drawn", "more"))
    command = [sys.executable, "-m", "vlkd.cli.main", "train", *twin.words, f"out={twin.out}"]
    subprocess.run(command, check=True, capture_output=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    phases: Counter[str] = Counter()
    while (killed := phases.total()) < stage.kills and len(run.attempts) < 3 * stage.kills:
        attempt = run.go(kill_after=rng.uniform(0, life(run, steps, stage.kills - killed, stage.kills)))
        if attempt.killed:
            phases[phase(run, attempt)] += 1
            if phases.total() % 10 == 0:
                print(f"  {phases.total()} kills, {run.position()} of {steps * BATCH} samples", flush=True)
        elif attempt.code:
            break
    run.go()
    problems = [*same(run, twin), *epochs(run, {f"shapes-train-{i}": math.prod(SHARDS[name]) for i, name in
                                                enumerate(("drawn", "more"))})]  # fmt: skip
    if phases.total() < stage.kills:
        problems.append(f"only {phases.total()} kills")
    loaded = sum(attempt.start > 0 for attempt in run.attempts)
    found = f"{phases.total()} kills ({', '.join(f'{n} {name}' for name, n in phases.most_common())}), {loaded} resumes"
    left = {path.name for path in run.out.iterdir()} - {path.name for path in twin.out.iterdir()}
    yield Row(case="kill", what=f"{steps} steps, 2 sources, a worker", found=found, problems=problems)
    yield Row(case="kill", what="left in the folder", found=", ".join(sorted(left)[:4]) or "nothing")


def life(run: TrialRun, steps: int, kills: int, total: int) -> float:
    """Seconds over which a kill is spread, so that those left take about the steps left; the last ones the end."""
    drawing = [attempt for attempt in run.attempts if attempt.drawn]
    first = statistics.median([attempt.drawn[0].at - attempt.began for attempt in drawing] or [1.5])
    gaps = [b.at - a.at for attempt in drawing for a, b in itertools.pairwise(attempt.drawn)]
    rest = (steps - run.position() / BATCH) * (sum(gaps) / len(gaps) if gaps else 0.05)
    if kills <= total // 10:
        return 2 * first + rest
    gain = rest / kills
    return first + gain + math.sqrt(gain**2 + 2 * first * gain)


def phase(run: TrialRun, attempt: Attempt) -> str:
    """When an attempt was killed."""
    if any((run.out / "checkpoints").glob(".step-*")):
        return "writing a checkpoint"
    if run.position() == len(run.planned):
        return "at the end"
    return "between steps" if attempt.drawn else "starting"


def epochs(run: TrialRun, rows: dict[str, int]) -> list[str]:
    """Sources, by the beginning of their keys, of which an epoch is not every sample once: without asking the plan."""
    drawn = [key for part in run.survived() for key in part.keys]
    problems = []
    for prefix, count in rows.items():
        own = [key for key in drawn if key.startswith(f"{prefix}-")]
        parts = [own[i : i + count] for i in range(0, len(own), count)]
        if not own or any(len(set(part)) < len(part) for part in parts):
            problems.append(f"an epoch of {prefix} repeats a sample")
    return problems


def files(stage: Stage) -> Iterator[Row]:
    """`kill -9` at each kind of change of a file, and right after each opening of one for writing."""
    rng, twin = Random(f"{stage.seed}/files"), stage.run("watched", steps=9)
    log = stage.folder / "events.txt"
    twin.go(prepare=partial(on_file_events, twin.out, log))
    kinds = Counter(log.read_text().splitlines())
    chosen = [kind for i, kind in enumerate(kinds) if i * stage.kills // len(kinds) != (i - 1) * stage.kills // len(kinds)]
    problems = twin.problems()
    for number, kind in enumerate(chosen):
        run = stage.run(f"files-{number}", steps=9)
        died = run.go(prepare=partial(on_file_events, run.out, log, kind, rng.randint(1, kinds[kind])))
        run.go()
        if died.code != -9:
            problems.append(f"{kind}: never reached")
        problems += [f"{kind}: {text}" for text in same(run, twin)]
    yield Row(case="files", what="killed at each kind", found=f"{len(chosen)} of {len(kinds)} kinds", problems=problems)


def members(shard: Path) -> list[tuple[str, str, int, int, int]]:
    """Key, extension, place of the header, place of the data and size of each member."""
    with tarfile.open(shard) as tar:
        return [(*found.name.split("."), found.offset, found.offset_data, found.size) for found in tar]


def flip(shard: Path, part: str, rng: Random) -> set[str]:
    """Flip a bit in a member, or in a header; the keys that it makes unusable."""
    key, extension, header, data, size = rng.choice([one for one in members(shard) if part in (one[1], "header")])
    place = header + rng.randrange(512) if part == "header" else data + rng.randrange(size)
    content = bytearray(shard.read_bytes())
    content[place] ^= 1 << rng.randrange(8)
    shard.write_bytes(content)
    return set() if part == "header" else {key}


def cut(shard: Path, rng: Random) -> set[str]:
    """Truncate it in place; the keys that it makes unusable."""
    found = members(shard)
    end = rng.randrange(512, found[-1][3])
    os.truncate(shard, end)
    return {key for key, _, _, data, size in found if data + size > end}


def remove(shard: Path, _: Random) -> set[str]:
    """Remove it."""
    keys = {one[0] for one in members(shard)}
    shard.unlink()
    return keys


def exchange(shard: Path, _: Random) -> set[str]:
    """Put another shard in its place, bytes in reverse."""
    keys = {one[0] for one in members(shard)}
    other = shard.with_name("other")
    other.write_bytes(shard.read_bytes()[::-1])
    other.replace(shard)
    return keys


def check_bad(run: TrialRun, expected: set[str]) -> list[str]:
    """Whether exactly these keys were left out, named in the checkpoint and counted in the output."""
    seen = {key for attempt in run.attempts for part in attempt.drawn for key in part.bad}
    state = json.loads(max((run.out / "checkpoints").glob("step-*/state.json")).read_text())
    told = re.search(r"cannot be used: (\d+) samples", run.attempts[-1].output)
    found = {"left out": seen, "stored": set(state["stream"]["bad"])}
    problems = [f"{name}: {sorted(keys)}, expected {sorted(expected)}" for name, keys in found.items() if keys != expected]
    if int(told[1] if told else 0) != len(expected):
        problems.append(f"{told and told[1]} samples are counted, expected {len(expected)}")
    return [*run.problems(), *problems]


def tars(stage: Stage) -> Iterator[Row]:
    """Shards that are damaged before a run, in the middle of it, and beyond what it takes."""
    rng, twin = Random(f"{stage.seed}/tars"), stage.twin()
    for part in ("header", "jpg", "json"):
        folder = stage.copy(part)
        run = stage.run(f"flipped-{part}", train=str(folder))
        bad = set().union(*(flip(shard, part, rng) for shard in rng.sample(sorted(folder.glob("*.tar")), 6)))
        run.go()
        problems = check_bad(run, bad) + (same(run, twin) if part == "header" else [])
        yield Row(case="tars", what=f"6 bits flipped: {part}", found=f"{len(bad)} samples left out", problems=problems)
    for harm, shards in itertools.product((cut, remove, exchange), (1, 4)):
        yield harmed_while_running(stage, harm, shards, rng)
    folder = stage.copy("before")
    run, shard = stage.run("cut-before", train=str(folder)), rng.choice(sorted(folder.glob("*.tar")))
    whole = shard.read_bytes()
    cut(shard, rng)
    refused = run.go()
    shard.write_bytes(whole)
    run.go()
    problems = same(run, twin) + ([] if refused.code == 2 else ["it was not refused"])
    yield Row(case="tars", what="cut before the start", found=refused.sentence[-60:], problems=problems)


def harmed_while_running(stage: Stage, harm: Callable[[Path, Random], set[str]], shards: int, rng: Random) -> Row:
    """Some shards, not yet opened, are harmed after the sixth batch; four of them are more than a run takes."""
    name = f"{harm.__name__}-{shards}"
    folder = stage.copy(name)
    run, moment = stage.run(name, train=str(folder)), 5 * BATCH
    of_key = {key: shard for shard in sorted(folder.glob("*.tar")) for key, *_ in members(shard)}
    opened = {of_key[key] for key in run.planned[: moment + BATCH]}
    chosen = rng.sample(sorted(set(of_key.values()) - opened), shards)
    kept = {shard: shard.read_bytes() for shard in chosen}
    seed = rng.random()
    attempt = run.go(act=lambda start: [harm(shard, Random(seed)) for shard in chosen] if start == moment else None)
    found = attempt.sentence[:60] or f"{len(set(k for part in attempt.drawn for k in part.bad))} samples left out"
    for shard, content in kept.items():
        shard.write_bytes(content)
    expected = set().union(*(harm(shard, Random(seed)) for shard in chosen))
    for shard, content in kept.items():
        shard.write_bytes(content)
    if shards == 1:
        return Row(case="tars", what=f"while running: {name}", found=found, problems=check_bad(run, expected))
    wrong = [] if attempt.code == 2 else [f"exit code {attempt.code}, expected 2"]
    run.go()
    return Row(case="tars", what=f"while running: {name}", found=found, problems=wrong + run.problems())
