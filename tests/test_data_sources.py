"""Every form of data gives the same table; what cannot be used is refused in a sentence."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from helpers.pairs import noise, picture_pairs

from vlkd.data.prepare import encode_picture
from vlkd.data.records import read_captions_file, read_karpathy, record_keys
from vlkd.data.shard_writer import RawSample, is_safe_key, write_shards
from vlkd.data.sources import Pairs, open_pairs, open_sources, open_union, source_name, union
from vlkd.errors import UserError

LISTED = {"a": (("one", "two"), "train"), "b": (("three",), "val"), "c": ((), "train")}
SHARED = Path(__file__).parents[2] / "shared"


def pictures(folder: Path, names: tuple[str, ...] = ("a", "b", "c")) -> None:
    for number, name in enumerate(names):
        path = folder / f"{name}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        noise(number).save(path)


def jsonl(folder: Path) -> Path:
    rows = [{"image": f"{k}.png", "captions": list(texts), "split": split} for k, (texts, split) in LISTED.items()]
    (folder / "list.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder / "list.jsonl"


def table(folder: Path) -> Path:
    lines = ["image,caption,split"]
    for key, (texts, split) in LISTED.items():
        lines += [f"{key}.png,{text},{split}" for text in texts or ("",)]
    (folder / "list.csv").write_text("\n".join(lines) + "\n")
    return folder / "list.csv"


def karpathy(folder: Path) -> Path:
    images = [
        {"filename": f"{key}.png", "split": split, "sentences": [{"raw": text} for text in texts]}
        for key, (texts, split) in LISTED.items()
    ]
    (folder / "list.json").write_text(json.dumps({"images": images}))
    return folder / "list.json"


@pytest.mark.parametrize("write", [jsonl, table, karpathy])
def test_listed_pictures_are_read_directly(write, tmp_path):
    pictures(tmp_path)
    path = write(tmp_path)
    whole = open_pairs(str(path))
    assert whole.keys == ["a", "b", "c"]
    assert whole.captions == [("one", "two"), ("three",), ()]
    assert whole.texts() == ["one", "two", "three"]
    np.testing.assert_array_equal(np.asarray(whole.image(1)), np.asarray(noise(1)))
    train = open_pairs(f"{path}#train")
    assert (train.keys, train.captions) == (["a", "c"], [("one", "two"), ()])
    assert open_pairs(f"{path}#val").keys == ["b"]
    with pytest.raises(UserError, match=r"no record of the split 'test'; it has train, val"):
        open_pairs(f"{path}#test")


def test_shards_folder_tar_and_glob_are_one_table(tmp_path):
    pictures(tmp_path / "p")
    samples = [
        RawSample(key=key, image=encode_picture(tmp_path / "p" / f"{key}.png")[0], extension="png", captions=texts)
        for key, (texts, _) in LISTED.items()
    ]
    write_shards(samples, tmp_path / "data" / "train", samples_per_shard=2)
    direct = open_pairs(str(jsonl(tmp_path / "p")))
    for ref in ("data/train", "data#train", "data/train/*.tar"):
        found = open_pairs(str(tmp_path / ref))
        assert (found.keys, found.captions) == (direct.keys, direct.captions)
        for i in range(3):
            np.testing.assert_array_equal(np.asarray(found.image(i)), np.asarray(direct.image(i)))
    assert open_pairs(str(tmp_path / "data/train/000001.tar")).keys == ["c"]
    with pytest.raises(UserError, match=r"splits train; name one, for instance .*data#train"):
        open_pairs(str(tmp_path / "data"))
    with pytest.raises(UserError, match="no folder 'val'"):
        open_pairs(str(tmp_path / "data#val"))
    with pytest.raises(UserError, match="without #SPLIT"):
        open_pairs(str(tmp_path / "data/train/000000.tar#train"))


def test_image_folder_is_unlabelled_and_keyed_by_path(tmp_path):
    pictures(tmp_path, ("x/a", "y/a", "b"))
    found = open_pairs(str(tmp_path))
    assert found.keys == ["b.png", "x/a.png", "y/a.png"]
    assert found.captions == [(), (), ()]


@pytest.mark.parametrize(
    ("names", "keys"),
    [
        (["x/a.jpg", "y/b.png"], ["a", "b"]),
        (["x/a.jpg", "y/a.jpg"], ["00000000", "00000001"]),
        (["a.v1.jpg", "b.jpg"], ["00000000", "00000001"]),
    ],
)
def test_record_keys_are_unique_and_safe(names, keys):
    found = record_keys([Path(name) for name in names])
    assert found == keys
    assert all(is_safe_key(key) for key in found)


def test_numbered_keys_do_not_depend_on_the_split(tmp_path):
    pictures(tmp_path, ("x/a", "y/a"))
    rows = [{"image": "x/a.png", "split": "train"}, {"image": "y/a.png", "split": "val"}]
    (tmp_path / "l.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    both = [open_pairs(f"{tmp_path}/l.jsonl#{split}").keys for split in ("train", "val")]
    assert both == [["00000000"], ["00000001"]]


def test_restval_joins_train_and_pictures_lie_in_filepath(tmp_path):
    pictures(tmp_path, ("val2014/a", "train2014/b"))
    images = [
        {"filepath": folder, "filename": name, "split": split, "sentences": [{"raw": name}]}
        for folder, name, split in (("val2014", "a.png", "restval"), ("train2014", "b.png", "train"))
    ]
    path = tmp_path / "d.json"
    path.write_text(json.dumps({"images": images}))
    found = open_pairs(f"{path}#train")
    assert found.keys == ["a", "b"]
    assert [file.path for file in found.files] == [tmp_path / "val2014" / "a.png", tmp_path / "train2014" / "b.png"]
    assert [record.split for record in read_karpathy(path, restval="own")] == ["restval", "train"]
    assert [record.split for record in read_karpathy(path, restval="drop")] == ["train"]


def test_captions_are_stripped_once_each_and_sound_text(tmp_path):
    pictures(tmp_path)
    path = tmp_path / "l.jsonl"
    path.write_text(json.dumps({"image": "a.png", "captions": [" x ", "y", "x", ""]}))
    assert read_captions_file(path)[0].captions == ("x", "y")
    path.write_text('{"image": "a.png", "caption": "half \\ud800"}')
    with pytest.raises(UserError, match="line 1: a caption that is no UTF-8"):
        read_captions_file(path)


def test_missing_pictures_are_reported_and_many_refused(tmp_path):
    names = tuple(f"n{i}" for i in range(40))
    pictures(tmp_path, names)
    path = tmp_path / "l.jsonl"
    path.write_text("".join(json.dumps({"image": f"{name}.png"}) + "\n" for name in names))
    for name in names[:2]:
        (tmp_path / f"{name}.png").unlink()
    found = open_pairs(str(path))
    assert found.keys == list(names[2:])
    assert [problem.partition(":")[0] for problem in found.problems] == ["missing", "missing"]
    (tmp_path / "n2.png").unlink()
    with pytest.raises(UserError, match=r"3 of 40 pictures .* are missing, first .*n0.png"):
        open_pairs(str(path))


def test_union_keeps_order_and_renames_only_clashing_keys(tmp_path):
    pictures(tmp_path / "one", ("a", "b"))
    pictures(tmp_path / "two", ("c",))
    pictures(tmp_path / "three", ("a",))
    one, two, three = (str(tmp_path / name) for name in ("one", "two", "three"))
    assert open_union([one, two]).keys == ["a.png", "b.png", "c.png"]
    clash = open_union([one, three])
    assert clash.keys == ["0:a.png", "0:b.png", "1:a.png"]
    assert [file.path.parent.name for file in clash.files] == ["one", "one", "three"]
    with pytest.raises(UserError, match=r"data\.train"):
        open_union([])


def test_a_union_is_of_opened_sources(tmp_path):
    pictures(tmp_path / "one", ("a", "b"))
    pictures(tmp_path / "two", ("a",))
    refs = [str(tmp_path / name) for name in ("one", "two")]
    sources = open_sources(refs)
    assert [source.keys for source in sources] == [["a.png", "b.png"], ["a.png"]]
    assert union(sources) == open_union(refs)
    assert union(sources[:1]) == sources[0]


@pytest.mark.parametrize(
    ("ref", "name"),
    [
        ("data/coco/train", "coco-train"),
        ("data/coco#train", "data-coco-train"),
        ("emoji/captions.jsonl#train", "emoji-captions-train"),
        ("data/coco/train/*.tar", "coco-train"),
        ("data/coco/train-*.tar", "coco-train"),
        ("data/coco/00000[0-4].tar", "coco-00000"),
        ("data/coco/000001.tar", "coco-000001"),
        ("data/a b/photos.v2", "a-b-photos-v2"),
        ("../data/coco/", "data-coco"),
        ("/", "data"),
    ],
)
def test_a_source_has_a_short_name(ref, name):
    assert source_name(ref) == name


def test_the_name_does_not_depend_on_the_folder_from_which_one_looks(tmp_path, monkeypatch):
    (tmp_path / "coco" / "train").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "coco")
    assert source_name("train") == source_name(str(tmp_path / "coco" / "train")) == "coco-train"


def states(pairs: Pairs) -> list[str]:
    return [pairs.row_state(row) for row in range(len(pairs))]


def test_rows_have_states_of_their_own(tmp_path):
    first = picture_pairs(tmp_path / "a", [["x"], ["y"], ["y"]])
    found = states(first)
    assert len(set(found)) == 3
    assert states(picture_pairs(tmp_path / "b", [["x"], ["y"], ["z"]]))[:2] == found[:2]
    assert states(picture_pairs(tmp_path / "b", [["x"], ["y"], ["z"]]))[2] != found[2]
    (tmp_path / "a" / "p1.png").write_bytes(b"other")
    assert [old == new for old, new in zip(found, states(first), strict=True)] == [True, False, True]


def test_a_table_counts_its_captions(tmp_path):
    pairs = picture_pairs(tmp_path, [["x", "y"], [], ["z"], ["u", "v", "w"]])
    assert (pairs.captioned, pairs.caption_total, pairs.most_captions, pairs.sizes()) == (3, 6, 3, [4])
    assert [pairs.texts()[pairs.first_text(row)] for row in (0, 2, 3)] == ["x", "z", "u"]
    assert [(part.name, part.rows, part.captions, part.sha256) for part in pairs.parts()] == [("", 4, 6, "")]


def test_fingerprint_follows_captions_keys_and_bytes(tmp_path):
    first = picture_pairs(tmp_path / "a", [["x"], ["y"]])
    same = picture_pairs(tmp_path / "b", [["x"], ["y"]])
    assert first.fingerprint() == same.fingerprint()
    assert picture_pairs(tmp_path / "c", [["x"], ["z"]]).fingerprint() != first.fingerprint()
    (tmp_path / "b" / "p1.png").write_bytes(b"longer" * 9999)
    assert same.fingerprint() != first.fingerprint()
    (tmp_path / "b" / "p1.png").unlink()
    with pytest.raises(UserError, match="cannot be read"):
        same.fingerprint()


def test_what_is_no_data_is_refused(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "notes.md").write_text("text")
    (tmp_path / "twice.jsonl").write_text('{"image": "a.png"}\n{"image": "./a.png"}\n')
    for ref, message in (
        ("empty", "no usable image"),
        ("none.jsonl", "There is nothing at"),
        ("notes.md", "no known data file"),
        ("twice.jsonl", "named more than once"),
    ):
        with pytest.raises(UserError, match=message):
            open_pairs(str(tmp_path / ref))


def test_one_key_in_two_shards_is_refused(tmp_path):
    pictures(tmp_path, ("a",))
    sample = RawSample(key="a", image=(tmp_path / "a.png").read_bytes(), extension="png")
    write_shards([sample], tmp_path / "x")
    write_shards([sample], tmp_path / "y", name="other")
    (tmp_path / "y" / "other-000000.tar").rename(tmp_path / "x" / "000001.tar")
    with pytest.raises(UserError, match="'a' stands for two images"):
        open_pairs(str(tmp_path / "x"))


@pytest.mark.skipif(not (SHARED / "data" / "coco").is_dir(), reason="the shared COCO photos are absent")
def test_real_karpathy_file_agrees_with_the_json():
    source = SHARED / "data" / "coco" / "dataset_coco.json"
    entries = [entry for entry in json.loads(source.read_bytes())["images"] if entry["split"] == "test"]
    found = open_pairs(f"{source}#test")
    assert found.keys == [Path(entry["filename"]).stem for entry in entries]
    assert len(found.texts()) == sum(
        len({sentence["raw"].strip() for sentence in entry["sentences"]} - {""}) for entry in entries
    )
    assert found.image(0).mode == "RGB"
