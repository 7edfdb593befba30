"""LLaVA's JSON: what is read, and what is refused with the sample's id."""

from __future__ import annotations

import json

import pytest
from helpers.tiny_models import tiny_images

from vlkd.data.conversations import read_llava
from vlkd.errors import UserError
from vlkd.features import Turn


def human(text):
    return {"from": "human", "value": text}


def gpt(text):
    return {"from": "gpt", "value": text}


def sample(**changes):
    talk = [human("<image>\nIs there a dog?"), gpt("no"), human("A cat?"), gpt(" yes\n")]
    return {"id": "a7", "image": "pictures/one.png", "conversations": talk} | changes


@pytest.fixture
def write(tmp_path):
    (tmp_path / "pictures").mkdir()
    tiny_images(1)[0].save(tmp_path / "pictures" / "one.png")

    def write(*samples, name="llava.json"):
        lines = name.endswith(".jsonl")
        text = "\n".join(json.dumps(one) for one in samples) if lines else json.dumps(samples)
        (tmp_path / name).write_text(text)
        return tmp_path / name

    return write


@pytest.mark.parametrize("name", ["llava.json", "llava.jsonl"])
def test_reads_turns_and_pictures(write, tmp_path, name):
    found = read_llava(write(sample(), sample(id=12, image=["pictures/one.png"]), name=name))
    assert [one.key for one in found] == ["a7", "12"]
    assert found[0].turns == (
        Turn("user", "<image>\nIs there a dog?"),
        Turn("assistant", "no"),
        Turn("user", "A cat?"),
        Turn("assistant", "yes"),
    )
    assert found[0].image.read() == (tmp_path / "pictures" / "one.png").read_bytes()


def test_pictures_may_lie_elsewhere_but_not_outside(write, tmp_path):
    file = write(sample(image="one.png"))
    assert read_llava(file, tmp_path / "pictures")[0].image.path == tmp_path / "pictures" / "one.png"
    with pytest.raises(UserError, match=r"sample 'a7': the picture '\.\./secret\.png' lies outside"):
        read_llava(write(sample(image="../secret.png")))


def test_repeated_ids_get_numbers(write):
    found = read_llava(write(sample(), sample(), sample(id="a7-2"), sample()))
    assert [one.key for one in found] == ["a7", "a7-2", "a7-2-2", "a7-3"]


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"image": None}, "sample 'a7': 0 pictures, expected one"),
        ({"image": ["a.png", "b.png"]}, "sample 'a7': 2 pictures, expected one"),
        ({"conversations": [human("<image>\na?"), gpt(" \n")]}, "sample 'a7': an answer without words"),
        ({"conversations": [human("Is there?"), gpt("no")]}, "sample 'a7': 0 times <image>"),
        ({"conversations": [human("<image> or <image>?"), gpt("no")]}, "sample 'a7': 2 times <image>"),
        ({"conversations": [human("<image>?"), gpt("<image>")]}, "sample 'a7': <image> in an answer"),
        ({"conversations": [human("<image>?")]}, "sample 'a7': the turns are user; expected"),
        ({"conversations": [gpt("no"), human("<image>?")]}, "sample 'a7': the turns are assistant, user"),
        ({"conversations": []}, "sample 'a7': the turns are none"),
        ({"conversations": [{"from": "system", "value": "x"}]}, "sample 'a7': expected conversations as in"),
        ({"conversations": [human("<image>?"), gpt("\ud800")]}, "sample 'a7': a turn that is no UTF-8"),
        ({"id": ""}, "sample 1: no id"),
        ({"image": "pictures/two.png"}, "1 of 1 samples are missing, first .*two.png of 'a7'"),
    ],
)
def test_what_cannot_be_used_is_refused_with_its_id(write, changes, sentence):
    with pytest.raises(UserError, match=sentence):
        read_llava(write(sample(**changes)))


def test_other_files_are_refused(write, tmp_path):
    with pytest.raises(UserError, match="There is no file"):
        read_llava(tmp_path / "none.json")
    (tmp_path / "no.json").write_text("{")
    with pytest.raises(UserError, match="is no JSON"):
        read_llava(tmp_path / "no.json")
    (tmp_path / "no.json").write_text("{}")
    with pytest.raises(UserError, match="is no list"):
        read_llava(tmp_path / "no.json")
