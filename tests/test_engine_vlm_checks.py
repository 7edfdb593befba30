"""What a run of a generative model says before its first step, and what it shows when it has ended."""

from __future__ import annotations

import json

import pytest
import torch
from helpers.vlm_runs import lines, refused
from PIL import Image

from vlkd.cli.main import main
from vlkd.engine.vlm.smoke import MODEL
from vlkd.models.load_generative import load_generative

SIZES = (
    "image_size", "patch_size", "vision_width", "vision_layers", "vision_heads", "language_width", "language_layers",
    "language_heads", "context_length", "vocab_size",
)  # fmt: skip
COLOURS = {"red": (220, 30, 30), "blue": (30, 30, 220), "green": (20, 180, 40)}


@pytest.fixture(autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def sample(key: object, image: str, question: str, answer: str, **more: object) -> dict:
    turns = [{"from": "human", "value": f"<image>\n{question}"}, {"from": "gpt", "value": answer}]
    return {"id": str(key), "image": image, "conversations": turns, **more}


@pytest.fixture
def words(tmp_path):
    """Assignments of a tiny run on 18 pictures of three colours."""
    samples = []
    for number in range(18):
        name = list(COLOURS)[number % 3]
        Image.new("RGB", (32, 32), COLOURS[name]).save(tmp_path / f"{name}.png")
        samples.append(sample(number, f"{name}.png", "What colour is it?", name, kinds=["colour"]))
    (tmp_path / "train.json").write_text(json.dumps(samples))
    model = [f"model.{name}={getattr(MODEL, name)}" for name in SIZES]
    return [
        "train", "vlm", f"data.train={tmp_path / 'train.json'}", f"data.val={tmp_path / 'train.json'}", *model,
        "supervised.samples=32", "supervised.batch_size=16", "train.log_steps=1", f"out={tmp_path / 'run'}",
    ]  # fmt: skip


VAL = {
    "choice": (sample("k", "red.png", "Which?", "mouse", choices=[["cat", "dog"]]), "one of its 2 options"),
    "long": (sample("k", "red.png", "word " * 400, "x"), "'k#1'"),
    "picture": (sample("k", "broken.jpg", "What?", "x"), "None of the pictures of 1 questions can be read"),
}


@pytest.mark.parametrize("case", VAL)
def test_questions_that_cannot_be_asked_are_told_before_the_first_step(tmp_path, capsys, words, case):
    own, expected = VAL[case]
    (tmp_path / "broken.jpg").write_bytes(b"\xff\xd8\xff garbage")
    (tmp_path / "val.json").write_text(json.dumps([own]))
    assert expected in refused(capsys, *words, f"data.val={tmp_path / 'val.json'}")
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


@pytest.mark.parametrize(
    ("more", "expected"),
    [
        (["supervised.samples=64", "supervised.batch_size=32"], "set supervised.batch_size lower"),
        (["report.compare=nowhere"], "nowhere"),
    ],
)
def test_what_fails_at_the_end_is_told_at_the_start(tmp_path, capsys, words, more, expected):
    assert expected in refused(capsys, *words, *more)
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_a_corrected_command_may_have_the_folder_of_one_that_made_no_step(tmp_path, capsys, words):
    wider = [*words, "model.vision_width=32", "model.language_width=32"]
    (tmp_path / "val.json").write_text(json.dumps([VAL["long"][0]]))
    refused(capsys, *wider, f"data.val={tmp_path / 'val.json'}")
    assert (tmp_path / "run" / "start").is_dir()
    main(words)
    assert load_generative(tmp_path / "run" / "start").visual_width == MODEL.vision_width
    assert "belongs to a run with other settings" in refused(capsys, *wider)


def test_a_loss_that_is_no_number_is_told_on_a_line_of_its_own(capsys, words):
    assert "not finite" in refused(capsys, *words, "supervised.lr=1e30", "train.clip=0", "supervised.samples=160")


def test_switch_kd_smokes_without_a_teacher_of_its_own(tmp_path):
    main(["train", "switch_kd", "smoke=true", f"out={tmp_path / 'run'}"])
    assert [row["role"] for row in lines(tmp_path / "run" / "results.jsonl")] == ["student", "teacher"]


def test_the_report_shows_answers_kinds_and_the_blind_guess(tmp_path, words):
    main(words)
    page = (tmp_path / "run" / "report.html").read_text()
    row = lines(tmp_path / "run" / "results.jsonl")[0]
    wrong = sum(not own["right"] for own in lines(tmp_path / "run" / "answers-val.jsonl"))
    right = row["counts"]["questions"] - wrong
    for title, count in (("Wrong", wrong), ("Right", right)):
        assert (f"{min(12, count)} of {count}, taken evenly" in page) == bool(count), title
    assert page.count("data:image/jpeg") == min(12, wrong) + min(12, right)
    assert "always the commonest answer of each kind" in page
    watched = [own for own in lines(tmp_path / "run" / "metrics.jsonl") if "val/accuracy" in own]
    assert all(own["val/kinds/colour"] == own["val/accuracy"] for own in watched)
    assert watched
    steps = [own for own in lines(tmp_path / "run" / "metrics.jsonl") if "loss" in own]
    assert all(own["time/data"] + own["time/models"] == pytest.approx(1) for own in steps)
