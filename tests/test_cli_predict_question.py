"""`vlkd predict --question`: tables of a generative model's own answers, and who is refused."""

from __future__ import annotations

import csv
import json

import pytest
from helpers.classes import tiny_classifier
from helpers.pairs import noise
from helpers.tiny_models import tiny_composite
from helpers.tiny_vlms import write_llava

from vlkd.cli.predict import main as predict
from vlkd.errors import UserError
from vlkd.models.via_llava import load_llava

QUESTION = 'What colour is the "circle", please?'


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    place = tmp_path_factory.mktemp("models")
    write_llava(place / "vlm/student")
    (place / "vlm/config.json").write_text('{"data": {"root": ""}}')
    (place / "vlm/checkpoints").mkdir()
    (place / "half/checkpoints").mkdir(parents=True)
    tiny_classifier().save(place / "run/student")
    tiny_composite().save(place / "dual")
    return place


@pytest.fixture
def photos(tmp_path):
    for number in range(7):
        path = tmp_path / "photos" / f"{number}.png"
        path.parent.mkdir(exist_ok=True)
        noise(number).save(path)
    (tmp_path / "photos/5.png").write_bytes(b"no picture")
    return tmp_path / "photos"


@pytest.mark.parametrize(("run", "size"), [("vlm", "3"), ("vlm/student", "1")])
def test_answers_are_the_models_own(models, photos, tmp_path, capsys, run, size):
    out = tmp_path / "new" / "answers.csv"
    words = [str(models / run), str(photos), "--question", QUESTION, "--max-new-tokens", "6", "--batch-size", size]
    predict([*words, "--out", str(out), "--json"])
    told = json.loads(capsys.readouterr().out.splitlines()[-1])
    with out.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    model = load_llava(models / "vlm/student")
    kept = [n for n in range(7) if n != 5]
    wanted = [model.answer([noise(n)], [QUESTION], max_new_tokens=6)[0] for n in kept]
    assert [row["answer"] for row in rows] == wanted
    assert [(row["key"], row["path"]) for row in rows] == [(f"{n}.png", str(photos / f"{n}.png")) for n in kept]
    assert told["answers"] == len(set(wanted)) > 1
    assert (told["images"], told["predicted"], told["unreadable"]) == (7, 6, 1)
    assert told["model"] == str(models / "vlm/student")
    assert told["bad_list"] == str(tmp_path / "new/answers.bad.csv")
    assert (tmp_path / "new/answers.bad.csv").read_text().splitlines()[1].startswith("5.png,")
    (photos / "5.png").unlink()
    predict([*words, "--out", str(tmp_path / "new/answers.jsonl")])
    lines = [json.loads(line) for line in (tmp_path / "new/answers.jsonl").read_text().splitlines()]
    assert lines == [row | {"question": QUESTION} for row in rows]
    assert not (tmp_path / "new/answers.bad.csv").exists()


@pytest.mark.parametrize(
    ("run", "words", "message"),
    [
        ("vlm", [], "vlm is a generative model, which names no classes; give --question"),
        ("vlm/student", ["--classes", "a,b"], "is a generative model"),
        ("run", ["--question", "What?"], "run/student holds no generative model, which --question needs"),
        ("dual", ["--question", "What?"], "dual holds no generative model"),
        ("half", ["--question", "What?"], "has no student yet"),
        ("none", ["--question", "What?"], "Found no folder"),
        ("vlm", ["--question", " "], "--question is empty"),
        ("vlm", ["--question", "What?", "--classes", "a,b"], "--classes is for class probabilities"),
        ("vlm", ["--question", "What?", "--save-probabilities", "p"], "--save-probabilities is for class"),
        ("vlm", ["--question", "What?", "--max-new-tokens", "0"], "--max-new-tokens is 0"),
        ("vlm", ["--question", "word " * 200], "takes 128"),
    ],
)
def test_refusals(models, photos, tmp_path, run, words, message):
    with pytest.raises(UserError, match=message):
        predict([str(models / run), str(photos), "--out", str(tmp_path / "p.csv"), *words])
    assert not (tmp_path / "p.csv").exists()


def test_no_readable_picture_is_refused(models, photos, tmp_path):
    words = ["--question", "What?", "--out", str(tmp_path / "p.csv")]
    with pytest.raises(UserError, match=r"None of the 1 images can be read; the first: .*5.png: "):
        predict([str(models / "vlm"), str(photos / "5.png"), *words])
