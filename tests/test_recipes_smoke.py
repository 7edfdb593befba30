"""Every file that is run, runs: recipes found in tasks/ in their smoke form, copies, refusals, and a killed run."""

from __future__ import annotations

import ast
import inspect
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from vlkd import recipes
from vlkd.cli.main import main
from vlkd.config import differences, override, to_json
from vlkd.engine.checkpoint import whole_checkpoints
from vlkd.engine.settings import Run
from vlkd.engine.smoke import shrink_to_smoke
from vlkd.errors import UserError
from vlkd.models.load import load

ALL_OBJECTIVES = (
    "teachers.refs=first,second", "teachers.weights=1,3", "method.matching=1", "method.distance=cosine",
    "method.relational=1", "method.interactive=1",
)  # fmt: skip
VARIANTS = {
    "ammkd": ("ammkd", ("teachers.refs=first,second", "report.asymmetric=true")),
    "ammkd-one": ("ammkd", ("teachers.refs=first", "teachers.bank=20", "train.accumulate=2")),
    "ammkd-relative": ("ammkd", ("teachers.refs=a,b,c", "method.weighting=relative", "teachers.dtype=int8")),
    "ammkd-online": ("ammkd", ("teachers.refs=a,b", "teachers.views=0", "teachers.bank=20", "method.normalised=true")),
    "prepare-fused": ("prepare_teacher", ("method.fusion=1",)),
    "prepare-fused-whole": ("prepare_teacher", ("method.fusion=1", "student.frozen_towers=false")),
    "retriever-online": ("retriever", (*ALL_OBJECTIVES, "teachers.views=0")),
    "retriever-held": ("retriever", (*ALL_OBJECTIVES, "teachers.views=2", "report.asymmetric=true", "train.ema=0.9")),
}

DUAL_ENCODERS = [
    name for name in recipes.names("tasks") if isinstance(recipes.load(recipes.find("tasks", name)).config(), Run)
]
"""The recipes of classifiers are run in test_engine_classify.py."""


@pytest.fixture(autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def refused(capsys, *words: str) -> str:
    with pytest.raises(SystemExit) as stop:
        main(words)
    assert stop.value.code == 2
    (sentence,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("vlkd: ")]
    assert sentence.endswith((".", "?"))
    return sentence


def check_finished(folder: Path) -> None:
    """A run leaves its settings, a loadable student, finite figures and a report."""
    assert (folder / "report.html").read_text(encoding="utf-8").rstrip().endswith("</html>")
    assert load(str(folder / "student")).encode_text(["a red square"]).isfinite().all()
    rows = [json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines()]
    assert rows[0]["role"] == "student"
    assert all(0 <= row["mean_hit@1"] <= 1 for row in rows)
    steps = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in steps if "loss" in row] == [1, 2, 3]


@pytest.mark.parametrize("name", recipes.names("tasks"))
def test_settings_round_trip(name):
    """The JSON of a recipe's settings, given back as assignments, makes the same settings."""
    config = recipes.load(recipes.find("tasks", name)).config()
    stored = json.loads(json.dumps(to_json(config), allow_nan=False))
    again = override(recipes.load(recipes.find("tasks", name)).config(), list(assignments(stored)))
    assert not differences(stored, json.loads(json.dumps(to_json(again))))


def assignments(settings: dict, prefix: str = ""):
    for key, value in settings.items():
        if isinstance(value, dict):
            yield from assignments(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}={','.join(map(str, value)) if isinstance(value, list) else value}"


@pytest.mark.parametrize("name", dict.fromkeys([*DUAL_ENCODERS, *VARIANTS]))
def test_smoke(name, tmp_path):
    recipe, words = VARIANTS.get(name, (name, ()))
    main(["train", recipe, "smoke=true", f"out={tmp_path / 'run'}", *words])
    check_finished(tmp_path / "run")
    if "report.asymmetric=true" in words:
        for teacher in ("teacher0", "teacher1"):
            mixed = load(str(tmp_path / "run" / f"student-with-text-of-{teacher}"))
            lender = load(str(tmp_path / "run-smoke-data" / teacher))
            torch.testing.assert_close(mixed.encode_text(["a dog"]), lender.encode_text(["a dog"]))
        with torch.no_grad():
            lender.text_projection[0].weight.mul_(-1)
        lender.save(tmp_path / "run-smoke-data" / "teacher1")
        with pytest.raises(UserError, match=r"text\.embed"):
            load(str(tmp_path / "run" / "student-with-text-of-teacher1"))


@pytest.mark.parametrize("bank", [0, 20])
def test_cached_and_online_teachers_give_the_same_losses(bank, tmp_path):
    """Three steps on the same views: to 1e-4 from what is stored in single precision, to a thousandth in half.

    Weights are quotients of differences of gradients, so rounding shows in them several times as much.
    """
    logged = {}
    for name, words in {
        "online": ["teachers.views=0"],
        "float32": ["teachers.views=2", "teachers.dtype=float32"],
        "float16": ["teachers.views=2"],
    }.items():
        command = ["train", "ammkd", "smoke=true", "teachers.refs=first,second", "method.bound=1"]
        main([*command, *words, f"teachers.bank={bank}", f"out={tmp_path / name}"])
        rows = [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        logged[name] = [row for row in rows if "loss" in row]
    for online, single, half in zip(*logged.values(), strict=True):
        names = [name for name in online if name.startswith(("loss", "weight/"))]
        assert len(names) == 10
        for name in names:
            assert single[name] == pytest.approx(online[name], abs=1e-4), name
            rel = 5e-3 if name.startswith("weight/") else 1e-3
            assert half[name] == pytest.approx(online[name], rel=rel, abs=1e-4), name


def test_two_ranks_train_as_one(tmp_path):
    """The whole command under torchrun, cache and all, logs the losses and teacher weights of one process."""
    main(["train", "ammkd", "smoke=true", "teachers.refs=first,second", f"out={tmp_path / 'run'}"])
    place = tmp_path / "run-smoke-data"
    words = [
        "train", "ammkd", f"data.train={place}/train", f"data.val={place}/val", "teachers.views=2",
        f"teachers.refs={place}/teacher0,{place}/teacher1", "model.image=test_vit", "model.image_size=32",
        'model.image_kwargs={"img_size":32}', "model.text_width=32", "model.text_layers=1", "model.text_heads=2",
        "model.width=16", "train.samples=96", "train.batch_size=16", "train.device=cpu", "train.log_steps=1",
        "method.bound=1", "report.teachers=false",
    ]  # fmt: skip
    main([*words, f"teachers.folder={tmp_path / 'c1'}", f"out={tmp_path / 'one'}"])
    launch = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node=2",
        "-m",
        "vlkd.cli.main",
    ]
    again = [*words, f"teachers.folder={tmp_path / 'c2'}", f"out={tmp_path / 'two'}"]
    done = subprocess.run(
        [*launch, *again], capture_output=True, check=False, env=os.environ | {"OMP_NUM_THREADS": "1"}
    )
    assert done.returncode == 0, done.stderr.decode()[-2000:]
    one, two = (
        [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        for name in ("one", "two")
    )
    assert len(one) == len(two) == 7
    for expected, found in zip(one, two, strict=True):
        for name in {name for name in expected if name != "samples_per_second" and not name.startswith("time/")}:
            assert found[name] == pytest.approx(expected[name], rel=1e-3, abs=1e-4), name
    weights = [row["weight/image/teacher0"] for row in one if "loss" in row]
    assert max(weights) - min(weights) > 0.05


def test_an_exported_teacher_holds_nothing_of_the_fusion_network(tmp_path):
    main(["train", "prepare_teacher", "smoke=true", "method.fusion=1", f"out={tmp_path / 'run'}"])
    exported = load_file(str(tmp_path / "run" / "student" / "model.safetensors"))
    trained = load_file(str(whole_checkpoints(tmp_path / "run" / "checkpoints")[-1] / "distiller.safetensors"))
    assert any(name.startswith("objectives.fusion.") for name in trained)
    assert {name.removeprefix("student.") for name in trained if name.startswith("student.")} == exported.keys()


def test_a_copy_runs_and_ending_twice_changes_nothing(tmp_path, capsys):
    copy = tmp_path / "mine.py"
    main(["cp", "retriever", str(copy)])
    assert "exists" in refused(capsys, "cp", "retriever", str(copy))
    command = ["train", str(copy), "smoke=true", f"out={tmp_path / 'run'}"]
    main(command)
    check_finished(tmp_path / "run")
    weights = (tmp_path / "run" / "student" / "model.safetensors").read_bytes()
    main(command)
    check_finished(tmp_path / "run")
    assert (tmp_path / "run" / "student" / "model.safetensors").read_bytes() == weights
    assert "seed: 0 -> 1" in refused(capsys, *command, "seed=1")


def test_an_output_folder_with_other_files_is_refused(tmp_path, capsys):
    (tmp_path / "thesis.txt").write_text("a year of work")
    assert "no run's" in refused(capsys, "train", "retriever", "smoke=true", f"out={tmp_path}")
    assert [path.name for path in tmp_path.iterdir() if path.is_file()] == ["thesis.txt"]


@pytest.mark.parametrize(
    ("words", "part"),
    [
        (["fly"], "no verb 'fly'"),
        (["train", "retreiver"], "Did you mean 'retriever'?"),
        (["train", "gone.py"], "There is no file gone.py"),
        (["train", "retriever", "train.learning_rate=1"], "No setting is called"),
        (["train", "retriever", "train.samples=many"], "expected a whole number"),
        (["train", "retriever", "method.distance=far"], "expected one of mse, cosine"),
        (["train", "retriever", "smoke"], "expected key=value"),
        (["train", "ammkd", "smoke=true"], "needs teachers"),
        (["train", "ammkd", "smoke=true", "teachers.refs=a,b", "method.bound=1.5"], "bound 1.5"),
        (["prep", "nothing"], "Nothing in data_prep is called 'nothing'"),
        (["eval", "nothing"], "Nothing in eval is called 'nothing'"),
    ],
)
def test_a_wrong_word_is_one_sentence(words, part, capsys):
    assert part in refused(capsys, *words)


def test_progress_in_a_file_is_a_line_each_ten_seconds():
    """A bar writes at its first step and at its end; without this it would write all hundred."""
    script = (
        "import time; clock = iter(range(10**6)); time.time = lambda: next(clock) / 5\n"
        "from vlkd.cli.main import main; main(['ls']); from tqdm import tqdm\n"
        "for _ in tqdm(range(100), miniters=1): pass"
    )
    own = {name: value for name, value in os.environ.items() if not name.startswith("TQDM_")}

    def bars(**more: str) -> int:
        command = [sys.executable, "-c", script]
        done = subprocess.run(command, env=own | more, capture_output=True, text=True, check=True)
        return done.stderr.count("it/s")

    assert bars() < 10 < 50 < bars(TQDM_MININTERVAL="0.1")


def test_data_that_do_not_exist_are_one_sentence(tmp_path, capsys):
    words = ["train", "retriever", f"out={tmp_path / 'run'}", "train.device=cpu"]
    assert "data.train" in refused(capsys, *words)
    assert "nothing at" in refused(capsys, *words, f"data.train={tmp_path / 'gone'}", f"out={tmp_path / 'other'}")


@pytest.mark.parametrize("kind", ["data_prep", "eval"])
def test_run_files_have_their_contract(kind, capsys):
    for name in recipes.names(kind):
        path = recipes.find(kind, name)
        docstring = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
        assert recipes.summary(path).endswith(".")
        verb = "prep" if kind == "data_prep" else "eval"
        assert f"vlkd {verb} {name} " in docstring
        assert list(inspect.signature(recipes.load(path).main).parameters) == ["argv"]
        with pytest.raises(SystemExit) as stop:
            main([verb, name, "--help"])
        assert stop.value.code == 0
        text = capsys.readouterr().out
        assert text.partition("examples:")[2].count(f"  vlkd {verb} {name} ") == 2


KILLED = """
import os, signal, sys
import torch
from vlkd.engine import checkpoint
torch.set_num_threads(1)
writes, real = 0, checkpoint.save_file
def save_file(tensors, path, *words, **more):
    global writes
    writes += 1
    real(tensors, path, *words, **more)
    if writes == int(sys.argv[1]):
        with open(path, "rb+") as file:
            file.truncate(os.path.getsize(path) // 2)
        os.kill(os.getpid(), signal.SIGKILL)
checkpoint.save_file = save_file
from vlkd.cli.main import main
main(sys.argv[2:])
"""
"""Runs a command and dies in the middle of writing the file of that number."""


@pytest.fixture(scope="module")
def long_run(tmp_path_factory):
    """Settings of twelve steps with dropout, augmentation, averaged weights and a held teacher; where they ended."""
    place = tmp_path_factory.mktemp("long")
    task = recipes.load(recipes.find("tasks", "retriever"))
    words = ["teachers.refs=first", "method.matching=1", "method.relational=1", "train.ema=0.9"]
    small = shrink_to_smoke(override(task.config(), [*words, f"out={place / 'whole'}"]))
    settings = [
        *(word for word in assignments(to_json(small)) if not word.startswith(("out=", "smoke=", "train."))),
        "model.image_projection=mlp", "model.text_projection=mlp", "model.projection_dropout=0.3",
        "train.samples=192", "train.batch_size=16", "train.device=cpu", "train.save_minutes=0", "train.ema=0.9",
        "train.log_steps=1", "train.lr=0.01",
    ]  # fmt: skip
    torch.set_num_threads(1)
    main(["train", "retriever", *settings, f"out={place / 'whole'}"])
    return settings, place / "whole"


@pytest.mark.parametrize("write", [9, 12])
def test_a_killed_run_ends_with_the_same_weights(write, long_run, tmp_path, capfd):
    """Killed while its third checkpoint is half-written, it continues from the second, bit for bit."""
    settings, whole = long_run
    command = ["train", "retriever", *settings, f"out={tmp_path / 'run'}"]
    dead = subprocess.run([sys.executable, "-c", KILLED, str(write), *command], capture_output=True, check=False)
    assert dead.returncode == -signal.SIGKILL, dead.stderr.decode()[-2000:]
    checkpoints = tmp_path / "run" / "checkpoints"
    assert [path.name for path in whole_checkpoints(checkpoints)] == ["step-00000001", "step-00000002"]
    assert not (tmp_path / "run" / "student").exists()

    main(command)
    assert "continuing from" in capfd.readouterr().out
    last, wanted = whole_checkpoints(checkpoints)[-1], whole_checkpoints(whole / "checkpoints")[-1]
    assert last.name == wanted.name == "step-00000012"
    for name in ("distiller", "averaged", "optimizer", "rng-0"):
        found, expected = (load_file(str(folder / f"{name}.safetensors")) for folder in (last, wanted))
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[key], expected[key]) for key in expected)
    student = "student/model.safetensors"
    assert (tmp_path / "run" / student).read_bytes() == (whole / student).read_bytes()
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    losses = {row["step"]: row["loss"] for row in rows if "loss" in row}
    rows = [json.loads(line) for line in (whole / "metrics.jsonl").read_text().splitlines()]
    assert losses == {row["step"]: row["loss"] for row in rows if "loss" in row}


def test_a_damaged_checkpoint_is_one_sentence(long_run, tmp_path, capsys):
    settings, _ = long_run
    command = ["train", "retriever", *settings, f"out={tmp_path / 'run'}"]
    main(command)
    weights = whole_checkpoints(tmp_path / "run" / "checkpoints")[-1] / "distiller.safetensors"
    weights.write_bytes(weights.read_bytes()[:100])
    capsys.readouterr()
    assert "remove that folder" in refused(capsys, *command)
