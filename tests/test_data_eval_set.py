"""One opener for all forms: class folders over splits, captions, and a hash that knows every label."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from helpers.pairs import noise

from vlkd.data.eval_set import Choice, EvalSet, open_eval_set
from vlkd.data.shards import RawSample, write_shards
from vlkd.data.sources import ImageFile
from vlkd.errors import UserError

SHARED = Path(__file__).parents[2] / "shared/data"


def pictures(folder: Path, count: int = 1) -> None:
    folder.mkdir(parents=True)
    for number in range(count):
        noise(number).save(folder / f"{number}.png")


@pytest.fixture
def splits(tmp_path):
    """`val` lacks two classes of `train`, `test` one; `docs` is no split."""
    root = tmp_path / "set"
    for split, names in {"train": "abcd", "val": "bd", "test": "bce", "docs": "x"}.items():
        for name in names:
            pictures(root / split / f"{name}_{name}", 2)
    return root


def test_class_ids_agree_over_splits(splits):
    names = ("a a", "b b", "c c", "d d", "e e")
    for split, ids in {"train": [0, 1, 2, 3], "val": [1, 3], "test": [1, 2, 4]}.items():
        data = open_eval_set(splits, split=split)
        assert data.kind == "classification"
        assert data.classes == names
        assert data.labels is not None
        assert data.labels.tolist() == np.repeat(ids, 2).tolist()
        assert all(names[i][0] == key[0] for key, i in zip(data.keys, data.labels, strict=True))
        assert open_eval_set(f"{splits}#{split}").label_hash() == data.label_hash()


def test_a_folder_without_splits_stands_alone(splits):
    data = open_eval_set(splits / "val")
    assert data.classes == ("b b", "d d")


def test_a_split_of_one_class_among_several(splits):
    pictures(splits / "one" / "c_c")
    data = open_eval_set(splits, split="one")
    assert data.labels is not None
    assert data.labels.tolist() == [2]


def test_names_templates_and_prompts_beside_the_splits(splits):
    (splits / "classnames.txt").write_text("A\nB\nC\nD\nE\n")
    (splits / "zeroshot_classification_templates.txt").write_text("a {}.\na {c}\n")
    (splits / "prompts.json").write_text(json.dumps({name: [f"{name}!", f"{name}?"] for name in "ABCDE"}))
    data = open_eval_set(splits, split="val")
    assert data.classes == ("A", "B", "C", "D", "E")
    assert data.templates == ("a {}.", "a {c}")
    assert data.prompts is not None
    assert data.prompts["D"] == ("D!", "D?")
    (splits / "classnames.txt").write_text("A\nB\n")
    with pytest.raises(UserError, match="has 2 names, expected 5"):
        open_eval_set(splits, split="val")


@pytest.mark.parametrize("content", ["[]", "{", '{"b b": "text"}', '{"a a": [""]}', "{}"])
def test_bad_prompts(splits, content):
    (splits / "prompts.json").write_text(content)
    with pytest.raises(UserError, match=r"prompts\.json"):
        open_eval_set(splits, split="val")


def test_retrieval_from_captions_shards_and_karpathy(tmp_path):
    pictures(tmp_path / "in", 3)
    captions = [("one", "uno"), ("two",), ("three",)]
    lines = [{"image": f"{i}.png", "captions": own, "split": "test"} for i, own in enumerate(captions)]
    (tmp_path / "in/c.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    images = [
        {"filename": f"{i}.png", "split": "test", "sentences": [{"raw": text} for text in own]}
        for i, own in enumerate(captions)
    ]
    (tmp_path / "in/k.json").write_text(json.dumps({"images": images}))
    raw = [
        RawSample(key=str(i), image=(tmp_path / f"in/{i}.png").read_bytes(), extension="png", captions=own)
        for i, own in enumerate(captions)
    ]
    write_shards(raw, tmp_path / "s" / "test")
    for ref in ("in/c.jsonl#test", "in/k.json#test", "s#test"):
        data = open_eval_set(f"{tmp_path}/{ref}")
        assert data.kind == "retrieval"
        assert data.keys == ["0", "1", "2"]
        assert data.captions == captions
        np.testing.assert_array_equal(np.asarray(data.image(2)), np.asarray(noise(2)))


def test_splits_of_shards_are_named_where_none_is_given(tmp_path):
    (tmp_path / "test").mkdir()
    (tmp_path / "test" / "000.tar").write_bytes(b"")
    with pytest.raises(UserError, match="holds the splits test; name one"):
        open_eval_set(tmp_path)


def test_a_picture_without_caption_is_no_query(tmp_path):
    pictures(tmp_path / "in", 2)
    (tmp_path / "in/c.jsonl").write_text('{"image": "0.png", "caption": "a"}\n{"image": "1.png"}\n')
    with pytest.raises(UserError, match=r"1 of 2 pictures .* have no caption, first '1'"):
        open_eval_set(tmp_path / "in/c.jsonl")


def test_what_is_not_there(splits):
    with pytest.raises(UserError, match=r"There is no folder .*docs, test, train, val"):
        open_eval_set(splits, split="dev")
    with pytest.raises(UserError, match="There is nothing at"):
        open_eval_set(splits / "nothing.json")
    with pytest.raises(UserError, match="kind 'speech' is unknown"):
        open_eval_set(splits / "nothing", kind="speech")  # type: ignore[arg-type]
    with pytest.raises(UserError, match="for classification, expected multilabel"):
        open_eval_set(splits, split="val", kind="multilabel")


def test_the_hash_knows_every_label_and_no_place():
    files = [ImageFile(Path("a")), ImageFile(Path("b"))]
    base = EvalSet(kind="classification", keys=["a", "b"], files=files, classes=("x", "y"), labels=np.array([0, 1]))
    hashes = {
        base.label_hash(),
        replace(base, kind="multilabel").label_hash(),
        replace(base, keys=["a", "c"]).label_hash(),
        replace(base, classes=("y", "x")).label_hash(),
        replace(base, labels=np.array([1, 0])).label_hash(),
        replace(base, templates=("{c}",)).label_hash(),
        replace(base, prompts={"x": ("p",), "y": ("q",)}).label_hash(),
        replace(base, captions=[("a",), ("b",)]).label_hash(),
        replace(base, captions=[("a", "b"), ()]).label_hash(),
        replace(base, choices=(Choice(images=(0,), captions=("a", "b")),)).label_hash(),
        replace(base, groups={"g": np.array([0, 1])}).label_hash(),
    }
    assert len(hashes) == 11
    assert all(len(value) == 16 for value in hashes)
    assert replace(base, files=files[::-1]).label_hash() == base.label_hash()


@pytest.mark.skipif(not (SHARED / "grocery").is_dir(), reason="shared/data/grocery is absent")
def test_grocery_val_has_the_classes_of_all_splits():
    names = [open_eval_set(SHARED / "grocery", split=split).classes for split in ("train", "val", "test")]
    assert names[0] == names[1] == names[2]
    assert len(names[0]) == 81
    val = open_eval_set(SHARED / "grocery", split="val")
    assert val.labels is not None
    assert len(set(val.labels.tolist())) == 60
