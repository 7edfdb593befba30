"""`vlkd eval vqa` on a tiny LLaVA: rows, answers and page, against the model's own answers one by one."""

from __future__ import annotations

import io
import json
import shutil

import numpy as np
import pytest
from helpers.tiny_vlms import write_llava
from PIL import Image

from vlkd.cli.main import main
from vlkd.data.vqa_writer import QA, VqaSample, write_vqa_shards
from vlkd.metrics.answers import exact_match, parse_yes_no
from vlkd.models.via_llava import load_llava
from vlkd.suite.results import read_items, read_results

COLOURS = ("red", "blue", "green", "white")
COLOUR = "What <b>colour</b> is it?"


def png(seed):
    with io.BytesIO() as stream:
        Image.fromarray(np.random.default_rng(seed).integers(0, 256, (40, 48, 3), np.uint8)).save(stream, "PNG")
        return stream.getvalue()


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A run with a LLaVA, another model, and shards whose last picture is cut off."""
    place = tmp_path_factory.mktemp("vqa")
    write_llava(place / "run" / "student")
    (place / "run" / "config.json").write_text('{"data": {"root": ""}}')
    write_llava(place / "other", seed=1)
    # Some truths are what the model says, so that not all is wrong.
    model = load_llava(place / "run" / "student")
    samples = []
    for n in range(8):
        image = png(n) if n < 7 else png(n)[:60]
        truth = COLOURS[n % 4]
        if n % 2 and n < 7:
            truth = model.answer([Image.open(io.BytesIO(image))], [COLOUR], max_new_tokens=8)[0]
        qa = (
            QA(question=COLOUR, answer=truth, kind="colour"),
            QA(question="Is there a dog?", answer="yes" if n % 3 else "no", kind="there"),
            QA(question="Which is it?", answer="B", kind="which", choices=("a cat", "a dog")),
        )
        samples.append(VqaSample(key=f"s{n}", image=image, suffix="png", qa=qa))
    write_vqa_shards(samples, place / "data", name="test")
    return place


def evaluate(place, out, *more, model="run"):
    main(["eval", "vqa", "--model", str(place / model), "--data", str(place / "data"), "--out", str(out), *more])
    return read_results(out)[-1]


@pytest.fixture(scope="module")
def rows(place, tmp_path_factory):
    """The row and the answers at each batch size."""
    found = {}
    for size in (1, 3, 8):
        out = tmp_path_factory.mktemp("out") / "results.jsonl"
        row = evaluate(place, out, "--batch-size", str(size), "--max-new-tokens", "8")
        with open(row["answers"], encoding="utf-8") as file:
            found[size] = (row, [json.loads(line) for line in file])
    return found


def test_answers_are_the_models_own_whatever_the_batch(place, rows):
    assert rows[1][1] == rows[3][1] == rows[8][1]
    for name in ("metrics", "kinds", "data_hash", "fingerprint", "interval"):
        assert rows[1][0][name] == rows[8][0][name]
    answers = {row["key"]: row for row in rows[8][1]}
    assert list(answers) == [f"s{n}#{question}" for n in range(8) for question in (1, 2, 3)]
    model = load_llava(place / "run" / "student")
    for n in range(7):
        image = Image.open(io.BytesIO(png(n))).convert("RGB")
        for question, words in enumerate((COLOUR, "Is there a dog?"), 1):
            assert answers[f"s{n}#{question}"]["answer"] == model.answer([image], [words], max_new_tokens=8)[0]


def test_a_row_has_the_figures_of_the_saved_answers(place, rows):
    row, answers = rows[3]
    read = [one for one in answers if "answer" in one]
    assert (row["unreadable"], row["unreadable_keys"]) == (3, ["s7#1", "s7#2", "s7#3"])
    assert [one["key"] for one in answers if "unreadable" in one] == row["unreadable_keys"]
    colours = [one for one in read if one["kind"] == "colour"]
    right = [exact_match(one["answer"], one["truth"]) for one in colours]
    assert [one["right"] for one in colours] == right
    assert 3 <= sum(right) < 7
    assert row["kinds"]["colour"]["right"] == sum(right)
    said = [parse_yes_no(one["answer"]) for one in read if one["kind"] == "there"]
    assert row["metrics"]["yes_no_unparsed"] == said.count(None) / 7
    assert row["score"] == pytest.approx(sum(one["right"] for one in read) / 21)
    assert row["counts"] == {"questions": 21, "open": 7, "yes_or_no": 7, "multiple_choice": 7, "kinds": 3}
    assert row["data"]["kind"] == "vqa"
    assert row["model_ref"] == str(place / "run")


def test_the_page_shows_pictures_and_escapes_answers(place, tmp_path, capsys):
    page = tmp_path / "new" / "page.html"
    answers = tmp_path / "mine" / "answers.jsonl"
    words = ["--report", str(page), "--answers", str(answers), "--json", "--limit", "9", "--seed", "3"]
    row = evaluate(place, tmp_path, *words, "--max-new-tokens", "8")
    captured = capsys.readouterr()
    told = json.loads(captured.out.splitlines()[-1])
    assert told == {"command": "eval vqa", "results": [row]}
    assert row["answers"] == str(answers)
    saved = [json.loads(line) for line in answers.read_text().splitlines()]
    assert len(saved) == 9
    assert row["counts"]["questions"] == 9 - row["unreadable"]
    assert "all questions" in captured.out
    assert "| colour" in captured.out
    text = page.read_text()
    assert text.count("<article") == row["counts"]["questions"] <= 24
    assert text.count("data:image/jpeg") == row["counts"]["questions"]
    assert "Right answers by kind" in text
    assert "&lt;b&gt;colour" in text
    assert "<b>colour" not in text
    assert "questions" in captured.err
    for most in ("16", "1"):
        evaluate(place, tmp_path / f"most-{most}", *words, "--max-new-tokens", most)
        assert ("have true answers of more than 1 tokens" in capsys.readouterr().err) == (most == "1")
    again = evaluate(place, tmp_path / "again", *words, "--max-new-tokens", "8")
    assert again["data_hash"] == row["data_hash"]
    assert evaluate(place, tmp_path / "all", "--max-new-tokens", "8")["data_hash"] != row["data_hash"]


def test_kinds_of_two_sources_are_told_apart(place, tmp_path):
    shutil.copytree(place / "data", tmp_path / "more")
    main(["eval", "vqa", "--model", str(place / "run"), "--data", str(place / "data"), str(tmp_path / "more"),
          "--out", str(tmp_path), "--max-new-tokens", "8"])  # fmt: skip
    kinds = read_results(tmp_path)[-1]["kinds"]
    assert [name.rpartition("/")[2] for name in kinds] == ["colour", "there", "which"] * 2
    for kind in ("colour", "there", "which"):
        first, second = (own for name, own in kinds.items() if name.endswith(f"/{kind}"))
        assert first == second


def test_two_models_are_compared_question_by_question(place, tmp_path, capsys):
    rows = [evaluate(place, tmp_path, "--max-new-tokens", "8", model=model) for model in ("run", "other")]
    capsys.readouterr()
    main(["eval", "compare", str(tmp_path), "--out", str(tmp_path / "page.html"), "--json"])
    (compared,) = json.loads(capsys.readouterr().out.splitlines()[-1])["results"]
    items = [read_items(tmp_path, row)[0]["correct"] for row in rows]
    assert (compared["items"], compared["difference"]) == (21, pytest.approx(items[0].mean() - items[1].mean()))
    assert compared["wins"] == int((items[0] > items[1]).sum()) > 0
    assert {own["class"] for own in compared["classes"]} == {"colour", "there", "which"}
    main(["eval", "table", str(tmp_path)])
    assert f"{100 * rows[0]['score']:.1f}" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--batch-size", "0"], "--batch-size is 0; expected 1 or more"),
        (["--limit", "-1"], "--limit is -1; expected 0 or more"),
        (["--out", "{place}/mine.jsonl"], "expected a folder, or a file called results.jsonl"),
        (["--answers", "{place}"], "is a folder; expected a file"),
        (["--model", "{place}/none"], "Found no folder"),
        (["--model", "{place}/unfinished"], "has no student yet"),
        (["--model", "{place}/refused"], "has no student yet"),
        (["--data", "{place}/none.json"], "none.json"),
    ],
)
def test_refusals(place, tmp_path, capsys, words, sentence):
    (place / "unfinished" / "checkpoints").mkdir(parents=True, exist_ok=True)
    (place / "refused" / "start").mkdir(parents=True, exist_ok=True)
    with pytest.raises(SystemExit):
        evaluate(place, tmp_path, *(word.format(place=place) for word in words))
    assert sentence in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("option", ["--out", "--report", "--answers"])
def test_places_that_cannot_be_are_told_before_anything_is_asked(place, tmp_path, capsys, monkeypatch, option):
    (tmp_path / "file").write_text("taken")
    monkeypatch.setattr("vlkd.models.load_generative.load_generative", lambda *_, **__: pytest.fail("was loaded"))
    name = tmp_path / "file" / ("out" if option == "--out" else "x.jsonl")
    with pytest.raises(SystemExit) as stop:
        evaluate(place, tmp_path / "out", option, str(name))
    assert stop.value.code == 2
    assert f"{tmp_path / 'file'}" in capsys.readouterr().err
