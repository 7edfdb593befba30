"""The labelled pool: what it holds, the proof that its sides share no image."""

from __future__ import annotations

import itertools
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from helpers.pairs import noise

from vlkd.data.labelled import CLASSES_FILE, TEMPLATES_FILE
from vlkd.data.pool import LabelledPool, PoolData, open_pool
from vlkd.errors import UserError

SHARED = Path(__file__).parents[2] / "shared/data"
TRAIN = {"ant": 6, "bee": 9, "red_cow": 12}


def write(root: Path, split: str, counts: dict[str, int], *, first: int) -> None:
    """Pictures of their own numbers, in files that are numbered from 0 in every split."""
    seeds = itertools.count(first)
    for name, count in counts.items():
        (root / split / name).mkdir(parents=True)
        for number in range(count):
            noise(next(seeds), (12, 9)).save(root / split / name / f"{number}.png")


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    root = tmp_path_factory.mktemp("pool") / "set"
    write(root, "train", TRAIN, first=0)
    write(root, "val", {"ant": 2, "red_cow": 2}, first=100)
    write(root, "test", {"ant": 3, "bee": 3, "red_cow": 3}, first=200)
    more = root.parent / "more"
    more.mkdir()
    for number in range(5):
        noise(300 + number, (12, 9)).save(more / f"{number}.png")
    return root.parent


@pytest.fixture
def root(prepared, tmp_path):
    shutil.copytree(prepared, tmp_path, dirs_exist_ok=True)
    return tmp_path / "set"


def opened(root: Path, *, seed: int = 0, **settings) -> LabelledPool:
    return open_pool(PoolData(root=str(root), **({"shots": "2"} | settings)), seed=seed)


def test_splits_and_further_sources(prepared):
    root, more = prepared / "set", str(prepared / "more")
    pool = opened(root, unlabelled=(more,))
    assert pool.classes == ("ant", "bee", "red cow")
    assert pool.pairs.keys[:27] == [
        f"train/{name}/{i}.png" for name, n in TRAIN.items() for i in sorted(range(n), key=str)
    ]
    assert pool.pairs.keys[27:] == [f"{i}.png" for i in range(5)]
    assert pool.pairs.captions == [()] * 32
    assert pool.labels.tolist() == [0] * 6 + [1] * 9 + [2] * 12 + [-1] * 5
    assert pool.labels.dtype == pool.labelled.dtype == np.int64
    assert np.bincount(pool.labels[pool.labelled]).tolist() == [2, 2, 2]
    assert pool.val.keys == ["val/ant/0.png", "val/ant/1.png", "val/red_cow/0.png", "val/red_cow/1.png"]
    assert pool.val.labels.tolist() == [0, 0, 2, 2]
    assert pool.test is not None
    assert pool.test.labels.tolist() == [0] * 3 + [1] * 3 + [2] * 3
    np.testing.assert_array_equal(np.asarray(pool.pairs.image(28)), np.asarray(noise(301, (12, 9))))
    np.testing.assert_array_equal(np.asarray(pool.test.image(4)), np.asarray(noise(204, (12, 9))))
    told = " ".join(pool.told)
    assert "32 images: 27 of the split 'train' and 5 of 1 further sources" in told
    assert "6 of them show their label, 2 to 2 of each of 3 classes (shots=2)" in told
    assert "none of 1 of 3 classes (bee)" in told


def test_a_validation_part_is_held_out_and_the_same_for_every_seed(root):
    shutil.rmtree(root / "val")
    pools = [opened(root, seed=seed, shots="3") for seed in (0, 1)]
    assert pools[0].val.keys == pools[1].val.keys
    assert pools[0].pairs.keys == pools[1].pairs.keys
    assert pools[0].labelled.tolist() != pools[1].labelled.tolist()
    fixed = [opened(root, seed=seed, shots="3", shots_seed=1) for seed in (0, 1, 2)]
    assert all(pool.labelled.tolist() == pools[1].labelled.tolist() for pool in fixed)
    pool = pools[0]
    assert sorted([*pool.pairs.keys, *pool.val.keys]) == sorted(
        f"train/{name}/{i}.png" for name, n in TRAIN.items() for i in range(n)
    )
    assert len(pool.val) == 5
    for labels, keys in ((pool.labels, pool.pairs.keys), (pool.val.labels, pool.val.keys)):
        assert [("ant", "bee", "red_cow")[label] for label in labels] == [key.split("/")[1] for key in keys]
    for key, file in zip(pool.val.keys, pool.val.files, strict=True):
        assert file.path == root / key
    assert any("5 images" in line and "no folder 'val'" in line for line in pool.told)
    assert not any("no folder" in line for line in opened(root, val="").told)


def test_copies_within_the_training_split_stay_on_one_side(root):
    before = opened(root, val="")
    shutil.copy(root / before.val.keys[0], root / "train/bee/copy.png")
    shutil.copy(root / before.val.keys[0], root / "train/bee/another.png")
    pool = opened(root, val="")
    content = (root / before.val.keys[0]).read_bytes()
    sides = [[key for key in keys if (root / key).read_bytes() == content] for keys in (pool.pairs.keys, pool.val.keys)]
    assert sorted(map(len, sides)) == [0, 3]
    assert len(pool.pairs) + len(pool.val) == 29


def test_no_split_names_and_no_test(root):
    pool = opened(root / "train", train="", val="", test="")
    assert pool.test is None
    assert len(pool.pairs) + len(pool.val) == 27
    assert all(key.count("/") == 1 for key in pool.pairs.keys)


def test_classes_that_have_fewer_are_told(root):
    told = " ".join(opened(root, shots="10").told)
    assert "25 of them show their label, 6 to 10 of each of 3 classes" in told
    assert "2 classes have no more than those" in told


def test_left_out_classes_are_in_no_split_and_ids_close_up(root):
    (root / CLASSES_FILE).write_text("Ameise\nBiene\nKuh\n")
    (root / TEMPLATES_FILE).write_text("ein Bild: {c}\n")
    pool = opened(root, leave_out=("bee",))
    assert pool.classes == pool.val.classes == pool.test.classes == ("Ameise", "Kuh")
    assert pool.templates == ("ein Bild: {c}",)
    assert pool.labels.tolist() == [0] * 6 + [1] * 12
    assert pool.test.labels.tolist() == [0] * 3 + [1] * 3
    assert not any("bee" in key for key in [*pool.pairs.keys, *pool.val.keys, *pool.test.keys])
    own = root / "templates.txt"
    own.write_text("noch ein Bild: {}\n")
    assert opened(root, templates=str(own)).templates == ("noch ein Bild: {}",)


def test_sources_with_repeated_keys_and_captions(root, prepared):
    again = root.parent / "again"
    shutil.copytree(root.parent / "more", again)
    (again / "captions.jsonl").write_text('{"image": "4.png", "caption": "a caption"}\n')
    pool = opened(root, unlabelled=(str(root.parent / "more"), str(again), str(again / "captions.jsonl")))
    assert pool.pairs.keys[27:] == [*(f"{i}.png" for i in range(5)), *(f"2:{i}.png" for i in range(5)), "4"]
    assert not pool.pairs.captioned
    assert (pool.labels[27:] == -1).all()


def copied(root: Path, source: str, place: str) -> None:
    (root / place).parent.mkdir(exist_ok=True)
    shutil.copy(root / source, root / place)


@pytest.mark.parametrize(
    ("source", "place", "words"),
    [
        (
            "test/ant/1.png",
            "train/ant/x.png",
            "1 of 28 labelled .* test images, .*'train/ant/x.png', which is 'test/ant/1",
        ),
        ("test/ant/1.png", "train/bee/x.png", "1 of 28 labelled images are byte for byte among the test images"),
        ("train/bee/0.png", "val/ant/x.png", "labelled .*'train/bee/0.png', which is 'val/ant/x.png'"),
        ("test/ant/1.png", "val/ant/x.png", "1 of 5 validation images .* test images, .*'val/ant/x.png'"),
        (
            "test/ant/1.png",
            "../more/x.png",
            "1 of 6 unlabelled images of the pool .*'x.png', which is 'test/ant/1.png'.*data.unl",
        ),
        ("val/ant/1.png", "../more/x.png", "unlabelled images of the pool .*'x.png', which is 'val/ant/1.png'"),
    ],
)
def test_an_image_on_two_sides_is_refused(root, source, place, words):
    settings = {"shots": "all", "unlabelled": (str(root.parent / "more"),)}
    opened(root, **settings)
    copied(root, source, place)
    with pytest.raises(UserError, match=words):
        opened(root, **settings)


def test_held_out_images_in_a_further_source_and_an_unlabelled_training_image_are_refused(root):
    with pytest.raises(UserError, match=r"5 of .* unlabelled images of the pool .* validation images"):
        opened(root, val="", unlabelled=(f"{root}#train",))
    copied(root, "test/ant/1.png", "train/bee/x.png")
    keys = root.parent / "keys.txt"
    keys.write_text("".join(f"train/{name}/0.png\n" for name in TRAIN))
    with pytest.raises(
        UserError, match=r"1 of 25 unlabelled images of the pool .* test images.*remove them from the tr"
    ):
        opened(root, shots=str(keys))


def test_a_split_under_another_name_is_found(root):
    os.symlink(root / "test", root / "val2")
    with pytest.raises(UserError, match="9 of 9 validation images are byte for byte among the test images"):
        opened(root, val="val2")


def test_unreadable_and_empty_files_are_equal_to_none(root):
    for split in ("train", "test"):
        (root / split / "ant/empty.png").touch()
        os.symlink("nowhere.png", root / split / "ant/gone.png")
    assert len(opened(root).pairs) == 29


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"root": ""}, "no folder ''; set data.root"),
        ({"root": "none"}, "no folder 'none'"),
        ({"train": "none"}, "no folder .*none; .* holds test, train, val"),
        ({"test": "none"}, "no folder .*none; check data.root and data.test, or set data.test=''"),
        ({"leave_out": ("cat",)}, "data.leave_out names 'cat', and no split has"),
        ({"leave_out": ("ant", "bee")}, "data.leave_out leaves 1 of 3 classes"),
        ({"shots": "many"}, "shots is 'many'; expected"),
        ({"templates": "none.txt"}, "none.txt cannot be read"),
        ({"unlabelled": ("none.tar",)}, "nothing at none.tar"),
    ],
)
def test_what_cannot_be_opened_is_refused(root, settings, words):
    with pytest.raises(UserError, match=words):
        open_pool(PoolData(**({"root": str(root)} | settings)), seed=0)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"val": "test"}, "data.val and data.test are both the split 'test'"),
        ({"val": "train/"}, "data.train and data.val are both the split 'train/'"),
        ({"test": "./train"}, "data.train and data.test are both"),
        ({"val_share": 0.0}, "data.val_share=0.0: expected more than 0 and below 1"),
        ({"val_share": 1.0}, "data.val_share=1.0"),
        ({"val_share": float("nan")}, "data.val_share=nan"),
        ({"workers": -1}, "data.workers=-1: expected 0 or more"),
        ({"keep_short_side": -1}, "data.keep_short_side=-1"),
        ({"shots_seed": -2}, "data.shots_seed=-2: expected -1 or more"),
    ],
)
def test_settings_out_of_range_are_refused(settings, words):
    with pytest.raises(UserError, match=words):
        PoolData(**settings)


def test_a_class_that_only_the_test_has_is_named(root):
    write(root, "test", {"yak": 2}, first=400)
    with pytest.raises(UserError, match="1 of 4 classes have no labelled image with shots=2: 'yak'"):
        opened(root)


def test_splits_of_other_classes_are_refused(root):
    shutil.rmtree(root / "val")
    write(root, "val", {"x": 1, "y": 1, "z": 1}, first=500)
    with pytest.raises(UserError, match="'train' and 'val' have 3 and 3 classes that do not match"):
        opened(root)
    (root / CLASSES_FILE).write_text("a\nb\nc\n")
    with pytest.raises(UserError, match="'train' and 'val' have 3 and 3 classes that do not match"):
        opened(root)


@pytest.mark.parametrize(("split", "word"), [("test", "test"), ("val", "validation")])
def test_a_listed_key_of_another_split_is_refused(root, split, word):
    keys = [f"train/{name}/{i}.png" for name in TRAIN for i in range(2)]
    file = root.parent / "keys.txt"
    file.write_text("\n".join(keys))
    pool = opened(root, shots=str(file))
    assert [pool.pairs.keys[row] for row in pool.labelled] == sorted(keys)
    file.write_text("\n".join([*keys, f"{split}/ant/0.png"]))
    with pytest.raises(UserError, match=f"1 of 7 keys that are in the {word} split, first '{split}/ant/0.png'"):
        opened(root, shots=str(file))


@pytest.mark.skipif(not (SHARED / "grocery").is_dir(), reason="the real photos are not here")
def test_real_photos():
    pool = open_pool(PoolData(root=str(SHARED / "grocery"), shots="16"), seed=0)
    assert (len(pool.pairs), len(pool.labelled), len(pool.val), len(pool.test or [])) == (1882, 1296, 296, 969)
    assert any("none of 21 of 81 classes" in line for line in pool.told)
    caltech = PoolData(root=str(SHARED / "caltech101"), shots="16", leave_out=("Faces_easy",))
    pool = open_pool(caltech, seed=0)
    assert (len(pool.classes), len(pool.labelled), len(pool.test or [])) == (100, 1600, 1192)
    assert np.bincount(pool.val.labels).min() >= 1


def test_a_class_whose_labelled_images_cannot_be_read_is_refused(root):
    for path in (root / "train" / "bee").iterdir():
        path.write_bytes(b"no picture" + path.name.encode())
    with pytest.raises(UserError, match=r"None of the 2 labelled images of the class 'bee' can be read"):
        opened(root)
