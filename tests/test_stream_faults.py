"""Some faults of `scripts/torture_stream.py` at chosen moments: kills, a full disk, a lost shard, a bad server."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from helpers.trace import Drawn, check_order

from vlkd import recipes

SCRIPTS = Path(__file__).parents[1] / "scripts"

# A process of its own: what other tests leave in this one, threads and gradients, does not survive a fork.
DRIVER = """
import json, sys
from functools import partial
from pathlib import Path
from random import Random
import torch
from vlkd import recipes
from vlkd.cli.main import main
from helpers.stage import BATCH, Row, Stage, same
from helpers.trace import on_file_events

torch.set_num_threads(1)
scripts = Path(sys.argv[1])
stream, shards = (recipes.load(scripts / f"torture_{name}.py") for name in ("stream", "shards"))
stage = Stage(Path(sys.argv[2]), main, seed=0, kills=0)
twin = stage.twin()
rows = {}

moments = [
    ("opened .config.json.#", 1), ("os.rename tokenizer.json", 1), ("os.mkdir checkpoints/.step-#.#", 2),
    ("opened metrics.jsonl", 1), ("os.rename checkpoints/step-#", 2), ("os.rename student", 1),
]
run = stage.run("killed")
codes = [
    run.go(prepare=partial(on_file_events, run.out, stage.folder / "events", *moment)).code for moment in moments
]
run.go()
rows["kills"] = {"codes": codes, "problems": same(run, twin), "starts": [one.start for one in run.attempts]}

run = stage.run("full")
refused = run.go(act=lambda start: start == 7 * BATCH and stream.limit_files(2**20))
kept = [path.name for path in sorted((run.out / "checkpoints").iterdir())]
rows["full"] = {"code": refused.code, "sentence": refused.sentence, "kept": kept}
rows["full"]["problems"] = stream.continued(run, twin, refused, "").problems

rows["lost"] = {"problems": shards.harmed_while_running(stage, shards.remove, 1, Random(1)).problems}

with shards.serving(stage) as (port, _):
    problems = shards.scan(stage, port, "scan")
kinds = ["drop", "longer", "shorter", "garbage", "503", "shifted", "flip", "stall"]
plans = {name: [kind] for name, kind in zip(shards.shard_names(stage), kinds)}
with shards.serving(stage, plans, port):
    run = stage.run("remote", f"data.copies={stage.folder / 'copies-of'}", train=str(stage.folder / "scan"))
    run.go(prepare=shards.impatient)
rows["server"] = {"problems": problems + same(run, twin)}
print(json.dumps(rows))
"""


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    folder = tmp_path_factory.mktemp("faults")
    command = [sys.executable, "-c", DRIVER, str(SCRIPTS), str(folder)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parent)}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment, cwd=SCRIPTS.parent)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_a_run_killed_six_times_ends_with_the_same_weights(rows):
    """At a file just opened or about to be renamed, the log of a resumed one included: keys, losses, coverage, weights.

    The third kill leaves a whole and a half checkpoint, the fifth two whole ones, the sixth finds training ended.
    """
    assert rows["kills"]["codes"] == [-9] * 6
    assert rows["kills"]["problems"] == []
    assert rows["kills"]["starts"] == [0, 0, 0, 48, 48, 96, 480]


def test_a_full_disk_keeps_the_older_checkpoint(rows):
    assert rows["full"]["code"] == 2
    assert "step-00000009 cannot be written" in rows["full"]["sentence"]
    assert rows["full"]["kept"] == ["step-00000003", "step-00000006"]
    assert rows["full"]["problems"] == []


def test_a_lost_shard_is_left_out_named_and_counted(rows):
    assert rows["lost"]["problems"] == []


def test_a_server_that_lies_changes_nothing(rows):
    assert rows["server"]["problems"] == []


def test_repeats_gaps_and_strangers_are_seen():
    """The check itself, on two ranks with a batch of four."""
    planned = list("abcdefgh")

    def drawn(*parts: tuple[int, int, str, str]) -> list[Drawn]:
        return [Drawn(start=s, rank=r, keys=tuple(keys), bad=tuple(bad), at=0.0) for s, r, keys, bad in parts]

    def problems(*parts: tuple[int, int, str, str]) -> int:
        return len(check_order(drawn(*parts), planned, start=0, batch_size=4, ranks=2))

    whole = [(0, 0, "ab", ""), (0, 1, "cd", ""), (4, 0, "ef", ""), (4, 1, "gh", "")]
    assert problems(*whole) == 0
    assert problems(whole[0], whole[1], (4, 0, "f", "e")) == 0
    assert problems(whole[0], whole[0]) == 1
    assert problems(whole[2]) == 1
    assert problems((0, 0, "ba", "")) == 1
    assert problems((0, 0, "a", "")) == 1
    assert problems((0, 0, "ab", "x")) == 1


@pytest.mark.parametrize("name", ["torture_stream", "torture_shards"])
def test_the_scripts_say_what_they_do(name):
    assert recipes.summary(SCRIPTS / f"{name}.py").endswith(".")
