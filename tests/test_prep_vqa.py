"""The three preparations of questions on small data, read back as conversations."""

from __future__ import annotations

import io
import json
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from vlkd.data.conversations import open_conversations
from vlkd.data.prepare_vqa import text_only_accuracy
from vlkd.data.questions import Question, questions_of
from vlkd.errors import UserError

ROOT = Path(__file__).parents[1]


def script(name: str) -> Callable[[Sequence[str]], None]:
    """`main` of a file in data_prep/, which is no package."""
    # The dataclasses of a script look their module up by this name.
    scope: dict[str, Any] = {"__name__": "__main__"}
    path = ROOT / "data_prep" / f"{name}.py"
    exec(compile(path.read_text(encoding="utf-8"), str(path), "exec"), scope)
    return scope["main"]  # type: ignore[no-any-return]


easy_vqa, scene_questions, box_questions = script("easy_vqa"), script("scene_questions"), script("box_questions")


def picture(path: Path, size: tuple[int, int] = (20, 16), colour: int = 0) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, (colour, 90, 30)).save(path)


def asked(folder: Path) -> list[Question]:
    return questions_of(open_conversations([str(folder)]))


def tars(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*.tar"))}


def summary_of(capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    return json.loads(capsys.readouterr().out.splitlines()[-1])  # type: ignore[no-any-return]


def easy_lines(folder: Path, train: int = 12, test: int = 3) -> Path:
    """qa.jsonl as shared, one picture of train without questions."""
    rows = []
    for split, count in (("train", train), ("test", test)):
        for number in range(count):
            picture(folder / "images" / f"{split}-{number}.png", colour=number)
            qa = [["what shape is in the image?", "circle"], ["is there a red shape?", "no"], ["what color?", "teal"]]
            rows.append({"image": f"images/{split}-{number}.png", "qa": qa, "split": split})
    rows[0]["qa"] = []
    (folder / "qa.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def test_easy_vqa(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = easy_lines(tmp_path / "data")
    (data / "images" / "train-5.png").write_bytes(b"no picture")
    easy_vqa([str(data), "--out", str(tmp_path / "out"), "--val", "4", "--max-bad", "0.1", "--json"])
    summary = summary_of(capsys)
    pictures = {split: counts["pictures"] for split, counts in summary["splits"].items()}
    assert pictures == {"train": 6, "val": 4, "test": 3}
    assert (summary["bad"], summary["without_questions"]) == (1, 1)
    (bad,) = [json.loads(line) for line in (tmp_path / "out" / "bad_samples.jsonl").read_text().splitlines()]
    assert bad["image"].endswith("train-5.png")
    found = {split: open_conversations([str(tmp_path / "out" / split)]) for split in ("train", "val", "test")}
    keys = {talk.key for split in ("train", "val") for talk in found[split]}
    assert keys == {f"train-{number}" for number in range(12)} - {"train-0", "train-5"}
    assert [talk.key for talk in found["test"]] == ["test-0", "test-1", "test-2"]
    questions = [(one.text, one.answer, one.kind) for one in questions_of(found["test"])][:3]
    assert questions == [
        ("what shape is in the image?", "circle", "shape"),
        ("is there a red shape?", "no", "yes/no"),
        ("what color?", "teal", "colour"),
    ]
    image = found["test"][1].image
    with image.path.open("rb") as stream:
        stream.seek(image.offset)
        assert stream.read(image.size) == (data / "images" / "test-1.png").read_bytes()


def test_easy_vqa_of_the_original_layout(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for split in ("train", "test"):
        for number in range(4):
            picture(tmp_path / "data" / split / "images" / f"{number}.png", colour=number)
        rows = [["what shape?", "rectangle", n // 2] for n in range(8)]
        (tmp_path / "data" / split / "questions.json").write_text(json.dumps(rows))
    easy_vqa([str(tmp_path / "data"), "--out", str(tmp_path / "out"), "--val", "0"])
    printed = capsys.readouterr().out
    assert "train: 4 pictures, 8 questions (8 shape)" in printed
    assert f"next: vlkd train vlm data.train={tmp_path}/out/train data.val={tmp_path}/out/test" in printed
    assert not (tmp_path / "out" / "val").exists()
    assert Counter(one.key.split("#")[0] for one in asked(tmp_path / "out" / "test")) == dict.fromkeys("0123", 2)


@pytest.mark.parametrize(
    ("line", "sentence"),
    [
        ('{"image": "images/train-0.png", "qa": [["q", "maybe"]], "split": "train"}', "the answer 'maybe'"),
        ('{"image": "images/train-0.png", "qa": [["q"]], "split": "train"}', "line 1"),
        ('{"image": "images/train-0.png", "qa": [], "split": "dev"}', "expected train or test"),
        ("{", "line 1"),
    ],
)
def test_easy_vqa_refuses(line: str, sentence: str, tmp_path: Path) -> None:
    data = easy_lines(tmp_path / "data", train=2)
    text = line + "\n" + (data / "qa.jsonl").read_text()
    (data / "qa.jsonl").write_text(text)
    with pytest.raises(UserError, match=sentence):
        easy_vqa([str(data), "--out", str(tmp_path / "out"), "--val", "0"])
    assert not (tmp_path / "out").exists()
    with pytest.raises(UserError, match=r"qa\.jsonl cannot be read"):
        easy_vqa([str(tmp_path), "--out", str(tmp_path / "out")])


def test_easy_vqa_refuses_too_much(tmp_path: Path) -> None:
    data = easy_lines(tmp_path / "data", train=4)
    with pytest.raises(UserError, match="--val 3 with 3 training pictures"):
        easy_vqa([str(data), "--out", str(tmp_path / "out"), "--val", "3"])
    (data / "images" / "train-2.png").unlink()
    with pytest.raises(UserError, match=r"1 of 6 pictures are unreadable, more than --max-bad 0\.05"):
        easy_vqa([str(data), "--out", str(tmp_path / "out"), "--val", "1"])


def test_scene_questions(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--train", "60", "--val", "20", "--test", "20", "--image-size", "48"]
    scene_questions(["--out", str(tmp_path / "one"), *words])
    printed = capsys.readouterr().out
    found = {split: asked(tmp_path / "one" / split) for split in ("train", "val", "test")}
    assert f"train: 60 pictures, {len(found['train'])} questions" in printed
    assert "next: vlkd train vlm data.train=" in printed
    for questions in found.values():
        for kind in ("presence", "relation"):
            yes = Counter(one.answer for one in questions if one.kind == kind)
            assert yes.total() > 3
            assert abs(yes["yes"] - yes["no"]) <= 1
        described = [one.answer for one in questions if one.kind == "description"]
        assert len(described) == len({one.key.split("#")[0] for one in questions})
    scene_questions(["--out", str(tmp_path / "two"), *words])
    scene_questions(["--out", str(tmp_path / "three"), *words, "--seed", "1"])
    assert tars(tmp_path / "one") == tars(tmp_path / "two")
    assert list(tars(tmp_path / "one")) == [f"{split}/{split}-000000.tar" for split in ("test", "train", "val")]
    assert set(tars(tmp_path / "three").values()).isdisjoint(tars(tmp_path / "one").values())


def coco(folder: Path, count: int = 40) -> tuple[Path, Path]:
    """Each picture shows up to three of twelve animals, the first one to four times; every tenth has no box."""
    names = ["dog", "cat", "sheep", "elephant", "cow", "horse", "bear", "zebra", "giraffe", "bird", "mouse", "person"]
    images, annotations = [], []
    for number in range(count):
        picture(folder / "pictures" / f"{number:03}.jpg", (60, 40), colour=number)
        images.append({"id": number, "file_name": f"{number:03}.jpg", "width": 60, "height": 40})
        first, others = number % 3, [3 + number * 5 % 9, 3 + (number * 7 + 4) % 9]
        annotations += [
            {"image_id": number, "category_id": category, "bbox": [1, 1, 9, 9], "iscrowd": 0}
            for category in [*[first] * (1 + number // 3 % 4), *others]
            if number % 10 != 9
        ]
    categories = [{"id": number, "name": name} for number, name in enumerate(names)]
    file = folder / "instances.json"
    file.write_text(json.dumps({"images": images, "annotations": annotations, "categories": categories}))
    return file, folder / "pictures"


def test_box_questions(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file, pictures = coco(tmp_path)
    (pictures / "003.jpg").unlink()
    words = [str(file), str(pictures), "--name", "val", "--max-bad", "0.1"]
    box_questions([*words, "--out", str(tmp_path / "one"), "--json"])
    summary = summary_of(capsys)
    questions = asked(tmp_path / "one")
    keys = {one.key.split("#")[0] for one in questions}
    assert "003" not in keys
    assert summary["bad"] == 1
    assert summary["without_questions"] == 39 - len(keys)
    counts = summary["splits"]["val"]
    assert counts["kinds"] == Counter(one.kind for one in questions)
    assert counts["text_only"]["presence"] == 0.5
    assert counts["text_only"]["choice"] == 0.25
    assert all(one.choices if one.kind == "choice" else one.choices == () for one in questions)
    assert list(tars(tmp_path / "one")) == ["val-000000.tar"]
    box_questions([*words, "--out", str(tmp_path / "two")])
    assert f"next: vlkd train vlm data.train=TRAIN data.val={tmp_path}/two" in capsys.readouterr().out
    assert tars(tmp_path / "one") == tars(tmp_path / "two")
    box_questions([*words, "--out", str(tmp_path / "small"), "--short-side", "20", "--seed", "1"])
    image = open_conversations([str(tmp_path / "small")])[0].image
    with image.path.open("rb") as stream:
        stream.seek(image.offset)
        assert Image.open(io.BytesIO(stream.read(image.size))).size == (30, 20)


def test_an_output_that_holds_files_is_refused_before_any_work(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "kept").write_text("")
    calls = [
        lambda: easy_vqa([str(tmp_path / "nothing"), "--out", str(tmp_path / "out")]),
        lambda: scene_questions(["--out", str(tmp_path / "out"), "--train", "1"]),
        lambda: box_questions([str(tmp_path / "no.json"), str(tmp_path), "--out", str(tmp_path / "out")]),
    ]
    for call in calls:
        with pytest.raises(UserError, match="already holds files"):
            call()
    file, pictures = coco(tmp_path)
    with pytest.raises(UserError, match="cannot name shards"):
        box_questions([str(file), str(pictures), "--out", str(tmp_path / "new"), "--name", "../x"])
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["kept"]
    assert not (tmp_path / "new").exists()


def test_pictures_that_allow_no_balanced_question_are_refused(tmp_path: Path) -> None:
    file, pictures = coco(tmp_path / "coco", count=1)
    with pytest.raises(UserError, match="No balanced question can be made of the 1 pictures"):
        box_questions([str(file), str(pictures), "--out", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()


def test_text_only_accuracy() -> None:
    learned = Counter({("k", "a?", "yes"): 3, ("k", "a?", "no"): 1, ("k", "b?", "no"): 5, ("j", "c?", "2"): 1})
    assert text_only_accuracy(learned, learned) == {"j": 1.0, "k": 8 / 9}
    # A text that was never seen gets the kind's most common answer, here no; a kind that was not seen gets none right.
    other = Counter({("k", "a?", "no"): 1, ("k", "a?", "yes"): 1, ("k", "new?", "no"): 2, ("m", "x?", "red"): 1})
    assert text_only_accuracy(learned, other) == {"k": 0.75, "m": 0.0}
