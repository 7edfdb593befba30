"""Selections in five forms, and what is refused in a sentence."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np
import pytest
from helpers.pairs import noise

from vlkd.data.eval_set import Choice, open_eval_set
from vlkd.data.selection import is_selection
from vlkd.errors import UserError


def pictures(folder: Path, *names: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for number, name in enumerate(names):
        noise(number).save(folder / name)


def jsonl(path: Path, *rows: object) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def crepe(*names: str) -> dict[str, dict[str, str]]:
    return {
        str(i): {"filename": name, "caption": f"true {i}", "negative_caption": f"false {i}"}
        for i, name in enumerate(names)
    }


def test_sugar_crepe_drops_no_item_and_reads_each_picture_once(tmp_path):
    pictures(tmp_path / "images", "a.png", "b.png")
    content = dict(sorted(crepe(*["a.png", "b.png"] * 6).items()))  # as texts: 0, 1, 10, 11, 2, ...
    (tmp_path / "add_att.json").write_text(json.dumps(content))
    data = open_eval_set(tmp_path / "add_att.json")
    assert data.kind == "selection"
    assert data.keys == ["images/a.png", "images/b.png"]
    assert data.choices == tuple(Choice(images=(i % 2,), captions=(f"true {i}", f"false {i}")) for i in range(12))
    np.testing.assert_array_equal(np.asarray(data.image(1)), np.asarray(noise(1)))


def test_a_folder_of_subsets(tmp_path):
    pictures(tmp_path, "a.png", "b.png")
    (tmp_path / "swap_obj.json").write_text(json.dumps(crepe("a.png")))
    (tmp_path / "add_att.json").write_text(json.dumps(crepe("b.png", "a.png")))
    data = open_eval_set(tmp_path)
    assert [(choice.group, data.keys[choice.images[0]]) for choice in data.choices] == [
        ("add_att", "b.png"),
        ("add_att", "a.png"),
        ("swap_obj", "a.png"),
    ]
    assert [choice.group for choice in open_eval_set(tmp_path, split="swap_obj").choices] == ["swap_obj"]
    with pytest.raises(UserError, match="no selection replace_rel"):
        open_eval_set(tmp_path, split="replace_rel", kind="selection")


def test_winoground_with_names_without_ending(tmp_path):
    pictures(tmp_path / "images", "ex_0_img_0.png", "ex_0_img_1.png")
    row = {
        "id": 0, "image_0": "ex_0_img_0", "image_1": "ex_0_img_1", "caption_0": "a b", "caption_1": "b a",
        "collapsed_tag": "Object",
    }  # fmt: skip
    data = open_eval_set(jsonl(tmp_path / "examples.jsonl", row))
    assert data.choices == (Choice(images=(0, 1), captions=("a b", "b a"), group="Object"),)


def test_aro_with_one_and_with_several_false_captions(tmp_path):
    pictures(tmp_path, "1.jpg")
    rows = [
        {"image_path": "1.jpg", "true_caption": "t", "false_caption": "f", "relation_name": "on"},
        {"image_path": "1.jpg", "true_caption": "t", "false_caption": ["f", "g", "h"]},
    ]
    (tmp_path / "aro.json").write_text(json.dumps(rows))
    data = open_eval_set(tmp_path / "aro.json")
    assert data.choices == (
        Choice(images=(0,), captions=("t", "f"), group="on"),
        Choice(images=(0,), captions=("t", "f", "g", "h")),
    )


def boxed(x: object, y: object, w: object, h: object) -> dict[str, object]:
    box = {"bbox_x": x, "bbox_y": y, "bbox_w": w, "bbox_h": h}
    return {"image_path": "1.png", "true_caption": "t", "false_caption": "f", **box}


def test_aros_boxes_are_cut_out(tmp_path):
    """Two boxes of a picture, one over its edge, and the whole picture are three rows with keys of their own."""
    pictures(tmp_path, "1.png")
    whole = {"image_path": "1.png", "true_caption": "t", "false_caption": "f"}
    rows = [boxed(3, 4, 20, 10), boxed(40.4, -2, 16, 12), whole, boxed(3, 4, 20, 10)]
    data = open_eval_set(jsonl(tmp_path / "relation.jsonl", *rows))
    assert [choice.images for choice in data.choices] == [(0,), (1,), (2,), (0,)]
    assert data.keys == ["1.png@3,4,23,14", "1.png@40,-2,56,10", "1.png"]
    pixels = np.asarray(noise(0))
    assert pixels.shape == (36, 48, 3)
    np.testing.assert_array_equal(np.asarray(data.image(0)), pixels[4:14, 3:23])
    over = np.zeros((12, 16, 3), np.uint8)
    over[2:, :8] = pixels[:10, 40:]
    np.testing.assert_array_equal(np.asarray(data.image(1)), over)
    np.testing.assert_array_equal(np.asarray(data.image(2)), pixels)


@pytest.mark.parametrize(
    ("row", "sentence"),
    [
        (boxed(0, 0, 0, 5), "is 0 x 5 pixels"),
        (boxed(0, 0, 10_000, 10_000), "is 10000 x 10000 pixels; expected 1 to 50000000"),
        (boxed(0, "1", 5, 5), "bbox_x, bbox_y, bbox_w or bbox_h is missing or of another type"),
        (boxed(0, True, 5, 5), "of another type"),
        (boxed(1e99, 0, 5, 5), "of another type"),
        ({key: value for key, value in boxed(0, 0, 5, 5).items() if key != "bbox_h"}, "'bbox_h' is missing"),
    ],
)
def test_boxes_that_cannot_be_cut_out(tmp_path, row, sentence):
    pictures(tmp_path, "1.png")
    with pytest.raises(UserError, match=sentence):
        open_eval_set(jsonl(tmp_path / "x.jsonl", row))


def test_winogavil_as_lines_and_as_the_hub_has_it(tmp_path):
    pictures(tmp_path / "a" / "images", "bison.png", "shelter.jpg", "beard.png")
    pictures(tmp_path / "b" / "winogavil_images", "bison.png", "shelter.jpg", "beard.png")
    rows = [
        {"cue": "Owl", "candidates": ["bison", "shelter", "beard"], "associations": ["beard", "bison"]},
        {"cue": "pogonophile", "candidates": ["beard", "shelter"], "associations": ["beard"]},
    ]
    lines = open_eval_set(jsonl(tmp_path / "a" / "winogavil.jsonl", *rows))
    with (tmp_path / "b" / "winogavil_dataset.csv").open("w", newline="") as stream:
        writer = csv.writer(stream)
        writer.writerow(["cue", "num_associations", "associations", "candidates", "ID"])
        writer.writerows(
            [row["cue"], len(row["associations"]), json.dumps(row["associations"]), json.dumps(row["candidates"]), i]
            for i, row in enumerate(rows)
        )
    hub = open_eval_set(tmp_path / "b", kind="selection")
    assert hub.choices == (
        Choice(images=(0, 1, 2), captions=("An owl",), group="winogavil_dataset", gold=(0, 2)),
        Choice(images=(2, 1), captions=("A pogonophile",), group="winogavil_dataset", gold=(0,)),
    )
    assert [(choice.images, choice.captions, choice.gold) for choice in lines.choices] == [
        (choice.images, choice.captions, choice.gold) for choice in hub.choices
    ]
    assert [Path(key).stem for key in hub.keys] == [Path(key).stem for key in lines.keys]
    other = jsonl(tmp_path / "a" / "other.jsonl", rows[0] | {"associations": ["beard"]}, rows[1])
    assert open_eval_set(other).label_hash() != lines.label_hash()


@pytest.mark.parametrize(
    "text",
    ["cue,candidates\nx,[]\n", "cue,candidates,associations\nx,\"['a']\",[]\n", "cue,associations,candidates\nx\n"],
)
def test_a_winogavil_csv_of_another_form(tmp_path, text):
    (tmp_path / "winogavil_dataset.csv").write_text(text)
    with pytest.raises(UserError, match="expected the columns cue, candidates and associations"):
        open_eval_set(tmp_path)


def test_associations_do_not_mix_with_other_items(tmp_path):
    pictures(tmp_path, "a.png", "b.png")
    rows = [{"cue": "c", "candidates": ["a", "b"], "associations": ["a"]}, {"images": ["a"], "captions": ["x", "y"]}]
    with pytest.raises(UserError, match="mixes items of associations with others"):
        open_eval_set(jsonl(tmp_path / "x.jsonl", *rows), kind="selection")


def test_the_general_form(tmp_path):
    pictures(tmp_path, "a.png", "b.png", "c.png")
    file = jsonl(
        tmp_path / "items.jsonl",
        {"images": ["a.png", "b.png"], "captions": ["x", "y", "z"], "group": "g"},
        {"images": ["c.png", "a.png"], "captions": ["x"]},
    )
    assert open_eval_set(file).choices == (
        Choice(images=(0, 1), captions=("x", "y", "z"), group="g"),
        Choice(images=(2, 0), captions=("x",)),
    )


def test_captions_and_karpathy_files_are_no_selections(tmp_path):
    pictures(tmp_path, "a.png")
    captions = jsonl(tmp_path / "captions.jsonl", {"image": "a.png", "captions": ["x"]})
    karpathy = tmp_path / "dataset.json"
    karpathy.write_text('{"images": [{"filename": "a.png", "split": "test", "sentences": [{"raw": "x"}]}]}')
    assert not is_selection(captions)
    assert not is_selection(karpathy)
    assert open_eval_set(karpathy).kind == open_eval_set(captions).kind == "retrieval"


def test_a_few_missing_pictures_are_left_out_and_named(tmp_path):
    pictures(tmp_path, "a.png")
    file = tmp_path / "add_att.json"
    file.write_text(json.dumps(crepe(*["a.png"] * 39, "gone.png")))
    data = open_eval_set(file)
    assert len(data.choices) == 39
    assert data.problems == ("missing: gone.png",)
    file.write_text(json.dumps(crepe("a.png", "gone.png", "gone2.png")))
    with pytest.raises(UserError, match=r"2 of 3 items .* lack a picture, first gone\.png"):
        open_eval_set(file)


@pytest.mark.parametrize(
    ("row", "sentence"),
    [
        ({"images": ["../a.png"], "captions": ["x", "y"]}, "lies outside"),
        ({"images": ["a.png"], "captions": ["x"]}, "1 images and 1 captions leave no choice"),
        ({"images": [], "captions": ["x", "y"]}, "0 images"),
        ({"images": ["a.png"], "captions": "xy"}, "of another type"),
        ({"images": ["a.png"], "captions": ["x", 3]}, "is no text"),
        ({"images": ["a.png"], "captions": ["x", " "]}, "or empty"),
        ({"images": ["a.png"], "captions": ["x", "\ud800"]}, "is no text"),
        ({"images": ["a.png"]}, "'captions' is missing"),
        ({"filename": "a.png", "negative_caption": "x"}, "'caption' is missing"),
        ({"image_0": "a.png", "image_1": "a.png", "caption_0": "x"}, "'caption_1' is missing"),
        ({"cue": "c", "candidates": ["a.png", "b"], "associations": ["c"]}, "are not all candidates"),
        ({"cue": "c", "candidates": ["a.png", "b"], "associations": []}, "are not all candidates"),
        ({"cue": "c", "candidates": ["a.png", "b"], "associations": "a.png"}, "candidates or associations is missing"),
        ({"cue": " ", "candidates": ["a.png", "b"], "associations": ["b"]}, "cue is missing"),
        ({"candidates": ["a.png", "b"], "associations": ["b"]}, "'cue' is missing"),
        (["a.png"], "a list; expected an object"),
        (None, "a NoneType; expected an object"),
    ],
)
def test_refusals(tmp_path, row, sentence):
    pictures(tmp_path, "a.png")
    with pytest.raises(UserError, match=sentence):
        open_eval_set(jsonl(tmp_path / "x.jsonl", row), kind="selection")


@pytest.mark.parametrize("text", ["{", '{"0": NaN}', "[" * 100_000, "\x00", "3", '{"0": 3}'])
def test_what_is_no_selection_json(tmp_path, text):
    (tmp_path / "x.json").write_text(text)
    with pytest.raises(UserError, match=r"is no JSON|expected an object"):
        open_eval_set(tmp_path / "x.json", kind="selection")
