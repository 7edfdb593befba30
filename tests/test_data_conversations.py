"""Conversations of LLaVA's JSON and of shards: what is read, and what is refused with the sample's id."""

from __future__ import annotations

import io
import json
import tarfile

import pytest
from helpers.tiny_models import tiny_images

from vlkd.data.conversations import open_conversations, read_llava, read_vqa_shards
from vlkd.data.questions import questions_of
from vlkd.errors import UserError
from vlkd.features import CHOICE_REQUEST, Turn
from vlkd.protocols.vqa import prompt_of


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
        ({"kinds": ["animal"]}, "sample 'a7': 1 kinds for 2 answers"),
        ({"choices": [["yes", "no"]] * 3}, "sample 'a7': 3 choices for 2 answers"),
        ({"kinds": "xy"}, "sample 'a7': expected \"kinds\" as"),
        ({"choices": ["yes", "no"]}, "sample 'a7': expected \"kinds\" as"),
        ({"alone": "yes"}, "sample 'a7': found \"alone\": 'yes'; expected true or false"),
        ({"kinds": ["a", "\ud800"]}, "sample 'a7': expected \"kinds\" as"),
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


def test_kinds_and_choices_belong_to_answers(write):
    more = {"kinds": ["animal", ""], "choices": [[], ["yes", "no"]], "alone": True}
    plain, detailed = read_llava(write(sample(), sample(id="b", **more)))
    assert (plain.kinds, plain.choices, plain.alone) == ((), (), False)
    assert (detailed.kinds, detailed.choices) == (("animal", ""), ((), ("yes", "no")))
    assert detailed.alone
    # What is learned is what is asked: options that the words lack stand behind them, once.
    assert detailed.turns[0] == plain.turns[0]
    assert detailed.turns[2].text == f"{plain.turns[2].text}\nA. yes\nB. no\n{CHOICE_REQUEST}"
    question = questions_of([detailed])[1]
    assert prompt_of(question) == question.text == detailed.turns[2].text


def write_tar(path, members):
    with tarfile.open(path, "w") as tar:
        for name, content in members.items():
            data = content if isinstance(content, bytes) else json.dumps(content).encode()
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def png(number=0):
    with io.BytesIO() as stream:
        tiny_images(number + 1)[number].save(stream, "PNG")
        return stream.getvalue()


ASKED = {"question": "A cat?", "answer": "yes", "kind": "animal", "choices": ["yes", "no"]}


def test_reads_shards_of_every_form(tmp_path):
    talk = {"conversations": [human("Is there a dog?"), gpt("no")], "kinds": ["animal"], "captions": []}
    place = write_tar(
        tmp_path / "x.tar",
        {
            "a.png": png(0),
            "a.json": talk,
            "b.png": png(1),
            "b.json": {"qa": [["How many <image>?", " two "], ASKED]},
            "c.json": {"qa": [["Which?", "this"]]},
            "c.jpg": png(2),
        },
    )
    first, second, third = read_vqa_shards([place])
    assert [one.key for one in (first, second, third)] == ["a", "b", "c"]
    assert [one.image.read() for one in (first, second, third)] == [png(0), png(1), png(2)]
    assert first.turns == (Turn("user", "<image>\nIs there a dog?"), Turn("assistant", "no"))
    assert (first.kinds, first.choices, first.alone) == (("animal",), (), False)
    options = f"A. yes\nB. no\n{CHOICE_REQUEST}"
    assert [turn.text for turn in second.turns] == ["How many <image>?", "two", f"A cat?\n{options}", "yes"]
    assert (second.kinds, second.choices) == (("", "animal"), ((), ("yes", "no")))
    assert (third.kinds, third.choices) == ((), ())
    assert second.alone
    assert third.alone


@pytest.mark.parametrize(
    ("entry", "sentence"),
    [
        ({"captions": ["x"]}, "sample 'a': expected {\"qa\""),
        ([], "sample 'a': expected {\"qa\""),
        ({"qa": [], "conversations": []}, "sample 'a': expected {\"qa\""),
        ({"qa": []}, "sample 'a': no questions"),
        ({"qa": [["only"]]}, "sample 'a': a question that is not"),
        ({"qa": [["What?", 3]]}, "sample 'a': a question that is not"),
        ({"qa": [["What?", " "]]}, "sample 'a': an answer without words"),
        ({"qa": [["<image>?", "a"], ["<image>", "b"]]}, "sample 'a': 2 times <image>"),
        ({"qa": [ASKED], "alone": False}, 'sample \'a\': "alone" beside "qa", whose questions are'),
        ({"qa": [ASKED | {"kind": 3}]}, "sample 'a': expected \"kinds\" as"),
        ({"qa": [ASKED | {"choices": "yes"}]}, "sample 'a': expected \"kinds\" as"),
        ({"conversations": [human("What?")]}, "sample 'a': the turns are user"),
        ({"conversations": [human("What?"), gpt("x")], "kinds": ["a", "b"]}, "sample 'a': 2 kinds for 1 answers"),
        (b"{", "sample 'a': no UTF-8 JSON"),
        (b"\xff", "sample 'a': no UTF-8 JSON"),
        (b"[" * 100_000, "sample 'a': no UTF-8 JSON"),
        (b" " * 1_000_001, "has 1 problems, first refused: a.json has 1000001 bytes"),
    ],
)
def test_what_a_shard_holds_wrong_is_refused_with_its_key(tmp_path, entry, sentence):
    place = write_tar(tmp_path / "x.tar", {"a.png": png(), "a.json": entry})
    with pytest.raises(UserError, match=sentence):
        read_vqa_shards([place])


def test_samples_without_json_and_shards_with_faults_are_refused(tmp_path):
    with pytest.raises(UserError, match="sample 'a': no JSON member"):
        read_vqa_shards([write_tar(tmp_path / "x.tar", {"a.png": png(), "a.txt": b"hello"})])
    whole = write_tar(tmp_path / "y.tar", {"a.png": png(), "a.json": {"qa": [["What?", "this"]]}})
    with pytest.raises(UserError, match=r"sample 'a': the key stands for two"):
        read_vqa_shards([whole, whole])
    whole.write_bytes(whole.read_bytes()[:700])
    with pytest.raises(UserError, match=r"y.tar has \d problems, first truncated"):
        read_vqa_shards([whole])


def test_opens_sources_in_order_and_numbers_repeated_keys(write, tmp_path):
    file = write(sample(image="one.png"))
    for name in ("s-0.tar", "s-1.tar"):
        key = {"s-0.tar": "a7", "s-1.tar": "z"}[name]
        write_tar(tmp_path / name, {f"{key}.png": png(), f"{key}.json": {"qa": [["What?", name]]}})
    found = open_conversations([f"{file}@{tmp_path / 'pictures'}", str(tmp_path / "s-{0..1}.tar"), str(tmp_path)])
    assert [one.key for one in found] == ["a7", "1:a7", "1:z", "2:a7", "2:z"]
    assert found[0].image.path == tmp_path / "pictures" / "one.png"
    assert [one.turns[-1].text for one in found[1:3]] == ["s-0.tar", "s-1.tar"]
    assert open_conversations([str(tmp_path / "s-1.tar"), str(write(sample()))])[1].key == "a7"


@pytest.mark.parametrize(
    ("ref", "sentence"),
    [
        (None, "No conversations are named"),
        ("none.json", "There is no file"),
        ("none.tar", "There is no .tar at"),
        ("nowhere", "There is nothing at"),
        ("talk.csv", "holds no conversations; expected a LLaVA"),
        ("empty.tar", "holds no sample"),
        ("https://example.org/x.tar", "is not on this machine"),
    ],
)
def test_refs_that_lead_nowhere_are_refused(tmp_path, ref, sentence):
    (tmp_path / "talk.csv").write_text("a,b")
    write_tar(tmp_path / "empty.tar", {})
    refs = [] if ref is None else [ref if "://" in ref else str(tmp_path / ref)]
    with pytest.raises(UserError, match=sentence):
        open_conversations(refs)
