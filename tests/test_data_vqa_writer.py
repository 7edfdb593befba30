"""Shards of questions: read back, whole or never."""

from __future__ import annotations

import io
import json
from dataclasses import replace

import pytest
import webdataset
from helpers.tiny_models import tiny_images

from vlkd.data.conversations import open_conversations
from vlkd.data.questions import questions_of
from vlkd.data.vqa_writer import QA, VqaSample, write_vqa_shards
from vlkd.errors import UserError
from vlkd.features import CHOICE_REQUEST


def encoded(number):
    with io.BytesIO() as stream:
        tiny_images(number + 1)[number].save(stream, "PNG")
        return stream.getvalue()


def samples(count=3):
    for number in range(count):
        qa = (QA(question="Is there a dog?", answer="no", kind="dog", choices=("yes", "no")),
              QA(question=f" How many?\n{number}", answer=f"{number} Tassen für dich"))  # fmt: skip
        yield VqaSample(key=f"p{number}", image=encoded(number), suffix=".PNG" if number else "png", qa=qa)


def test_what_is_written_is_read_back(tmp_path):
    manifest = write_vqa_shards(samples(), tmp_path / "out", name="train", shard_size=2)
    assert (manifest["samples"], manifest["questions"]) == (3, 6)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "manifest.json", "train-000000.tar", "train-000001.tar",
    ]  # fmt: skip
    found = questions_of(open_conversations([str(tmp_path / "out")]))
    assert [(one.key, one.text, one.answer, one.kind, one.choices) for one in found[2:4]] == [
        ("p1#1", f"Is there a dog?\nA. yes\nB. no\n{CHOICE_REQUEST}", "no", "dog", ("yes", "no")),
        ("p1#2", "How many?\n1", "1 Tassen für dich", "", ()),
    ]
    assert [one.image.read() for one in found[::2]] == [encoded(number) for number in range(3)]


def test_another_reader_sees_ordinary_members(tmp_path):
    write_vqa_shards(samples(1), tmp_path / "out", name="x")
    (found,) = webdataset.WebDataset(str(tmp_path / "out" / "x-000000.tar"), shardshuffle=False)
    assert found["png"] == encoded(0)
    assert json.loads(found["json"])["qa"][1] == {"question": "How many?\n0", "answer": "0 Tassen für dich"}


def test_equal_samples_give_equal_bytes(tmp_path):
    for name in ("a", "b"):
        write_vqa_shards(samples(), tmp_path / name, name="x")
    assert (tmp_path / "a" / "x-000000.tar").read_bytes() == (tmp_path / "b" / "x-000000.tar").read_bytes()


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"qa": ()}, "p1: no question"),
        ({"qa": (QA(question="What?", answer=" "),)}, "p1: the question 'What\\?' with the answer ' '"),
        ({"qa": (QA(question="", answer="x"),)}, "p1: the question ''"),
        ({"qa": (QA(question="<image> What?", answer="x"),)}, "p1: <image> in the question"),
        ({"suffix": "gif"}, "p1: extension 'gif'"),
        ({"key": "p0"}, "The key 'p0' occurs twice"),
        ({"key": "a/b"}, "The key 'a/b' is not safe"),
    ],
)
def test_whole_or_never(tmp_path, changes, sentence):
    first, second, third = samples()
    with pytest.raises(UserError, match=sentence):
        write_vqa_shards([first, replace(second, **changes), third], tmp_path / "out", name="x", shard_size=1)
    assert not list(tmp_path.iterdir())
