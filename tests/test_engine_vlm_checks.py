"""What a run of a generative model says before its first step, and what it shows when it has ended."""

from __future__ import annotations

import json

import pytest
import torch
from helpers.vlm_runs import config_of, lines, refused
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


REFUSALS = {
    "vision": (["distilled.parts=projector,language"], "teaches the vision tower alone"),
    "part": (["distilled.parts=eyes"], "expected some of vision, projector, language"),
    "norms": (["distilled.freeze_batch_norm=true"], "the student has no batch norms"),
    "still": (["projector.samples=32", "projector.vision_lr=1e-4"], "the vision tower does not learn in this stage"),
    "short": (["distilled.samples=8"], "is less than a batch of 16"),
    "none": (["distilled.samples=0"], "Every stage has no samples"),
    "untaught": (["teacher.ref="], "reads a teacher and none is named"),
    "stored": (["teacher.stored=somewhere"], "reads switch.logits, and teacher.stored holds answers alone"),
    "width": (["model.vision_width=32"], "the switch needs equal widths"),
    "tokens": (["model.image_size=64"], "the switch needs equal numbers"),
    "bridge": (["teacher.bridge=true"], "leave the bridge out"),
    "blind": (["teacher.see=16"], "does not look at pictures"),
    "weights": (["method.align=-1"], "expected 0 or more"),
    "k": (["projector.samples=64", "method.k=1", "teacher.see=0"], "one logit has no pair"),
    "tau": (["supervised.samples=64", "method.tau=0", "teacher.see=0"], "the temperature tau 0.0"),
    "share": (["method.match=taid", "method.taid_start=2", "teacher.see=0"], "teacher's share t 2.0"),
    "eyes": (
        ["method.switch=0", "method.align=0", "method.visual=1", "model.vision_width=32", "teacher.see=0"],
        "expected one shape (B, N, C)",
    ),
    "nothing": (["method.supervised=0", "method.align=0", "method.switch=0"], "has no term with a weight"),
    "data": (["data.train=nowhere.json"], "nowhere.json"),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_what_cannot_be_is_refused_in_a_sentence(tmp_path, capsys, case):
    words, expected = REFUSALS[case]
    given = config_of(tmp_path, *words)
    if case == "blind":
        teacher = load_generative(next(word.partition("=")[2] for word in given if word.startswith("teacher.ref=")))
        with torch.no_grad():
            for value in teacher.part_parameters("projector"):
                value.zero_()
        teacher.save(tmp_path / "blind")
        given = [*given, f"teacher.ref={tmp_path / 'blind'}"]
    sentence = refused(capsys, *given)
    assert expected in sentence
    assert sentence.endswith((".", "?"))
    assert not (tmp_path / "run" / "metrics.jsonl").exists(), "a stage was trained before"


def test_true_answers_longer_than_answers_may_be_are_told(tmp_path, capsys, words):
    own = sample("k", "red.png", "What is it?", "a plain red square and nothing else in it")
    (tmp_path / "val.json").write_text(json.dumps([own, sample("l", "red.png", "Is it red?", "yes")]))
    given = [*words, f"data.val={tmp_path / 'val.json'}", "train.max_new_tokens=4"]
    main(given)
    told = capsys.readouterr().out
    assert "1 of 2 questions have true answers of more than 4 tokens" in told
    assert "'k#1'" in told
    assert "Set train.max_new_tokens." in told


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
