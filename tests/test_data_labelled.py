"""A labelled image folder: what it holds, and what is refused in a sentence."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
from helpers.pairs import noise

from vlkd.data.labelled import CLASSES_FILE, TEMPLATES_FILE, open_labelled
from vlkd.errors import UserError

CALTECH = Path(__file__).parents[2] / "shared/data/caltech101/test"


def class_folders(folder: Path, **counts: int) -> Path:
    """Folders of so many pictures, written in reverse order."""
    for name, count in reversed(counts.items()):
        (folder / name).mkdir(parents=True)
        for number in reversed(range(count)):
            noise(number + len(name)).save(folder / name / f"{number}.png")
    return folder


@pytest.fixture
def folder(tmp_path):
    return class_folders(tmp_path / "set" / "test", barn=2, red_fox=3, zebra=1)


def test_classes_labels_and_files(folder):
    (folder / ".cache").mkdir()
    (folder / "notes.txt").write_text("no image")
    (folder / "barn" / "notes.txt").write_text("no image")
    os.rename(folder / "zebra" / "0.png", folder / "zebra" / "0.PNG")
    labelled = open_labelled(str(folder))
    assert labelled.classes == ("barn", "red fox", "zebra")
    assert labelled.labels.tolist() == [0, 0, 1, 1, 1, 2]
    assert labelled.labels.dtype == np.int64
    places = ["barn/0.png", "barn/1.png", "red_fox/0.png", "red_fox/1.png", "red_fox/2.png", "zebra/0.PNG"]
    assert [file.path for file in labelled.files] == [folder / place for place in places]
    assert labelled.keys == places
    assert labelled.captions == [()] * len(labelled)
    assert labelled.templates == ()
    np.testing.assert_array_equal(np.asarray(labelled.image(3)), np.asarray(noise(1 + len("red_fox"))))


@pytest.mark.parametrize("place", [".", ".."])
def test_names_and_templates_from_clip_benchmarks_files(folder, place):
    (folder / place / CLASSES_FILE).write_bytes("\ufeffGranero\r\nzorro rojo \r\ncebra\r\n\r\n".encode())
    (folder / place / TEMPLATES_FILE).write_text("una foto de {c}.\n{c}, {c}\n")
    labelled = open_labelled(str(folder))
    assert labelled.classes == ("Granero", "zorro rojo", "cebra")
    assert labelled.templates == ("una foto de {c}.", "{c}, {c}")


def test_the_file_inside_comes_before_the_one_beside_it(folder):
    (folder / CLASSES_FILE).write_text("a\nb\nc\n")
    (folder / ".." / CLASSES_FILE).write_text("too\nfew\n")
    assert open_labelled(str(folder)).classes == ("a", "b", "c")


@pytest.mark.parametrize("there", ["inside", "beside"])
def test_a_relative_reference_has_the_same_neighbours(folder, there, monkeypatch):
    monkeypatch.chdir(folder if there == "inside" else folder.parent)
    (folder.parent / CLASSES_FILE).write_text("a\nb\nc\n")
    assert open_labelled("." if there == "inside" else "test").classes == ("a", "b", "c")


def test_broken_links_stay_and_other_things_of_an_images_name_go(folder):
    (folder / "zebra" / "1.jpg").symlink_to("nowhere.jpg")
    (folder / "zebra" / "2.jpg").mkdir()
    os.mkfifo(folder / "zebra" / "3.jpg")
    labelled = open_labelled(str(folder))
    assert labelled.keys[-2:] == ["zebra/0.png", "zebra/1.jpg"]
    with pytest.raises(UserError, match=r"1\.jpg cannot be read"):
        labelled.image(6)


def test_no_such_folder(tmp_path):
    (tmp_path / "file").write_text("")
    for ref in (tmp_path / "nothing", tmp_path / "file"):
        with pytest.raises(UserError, match="There is no folder"):
            open_labelled(str(ref))


def test_no_class_folder(tmp_path):
    noise(0).save(tmp_path / "a.png")
    with pytest.raises(UserError, match="holds no class folder"):
        open_labelled(str(tmp_path))


def test_one_class_only(tmp_path):
    with pytest.raises(UserError, match="one class, 'only'"):
        open_labelled(str(class_folders(tmp_path, only=2)))


def test_empty_classes_are_listed(tmp_path):
    class_folders(tmp_path, a=1, b=0, c=2, d=0)
    with pytest.raises(UserError, match=r"2 of 4 class folders .* hold no image: 'b', 'd'; expected"):
        open_labelled(str(tmp_path))
    class_folders(tmp_path / "many", **{f"n{i:02}": 0 for i in range(12)})
    with pytest.raises(UserError, match=r"12 of 12 .*'n00', .*'n09', \.\.\.; expected"):
        open_labelled(str(tmp_path / "many"))


def test_the_folder_above_the_splits_is_no_set_of_two_classes(folder):
    class_folders(folder.parent / "train", barn=2, zebra=1)
    with pytest.raises(UserError, match=r"'test', 'train'.* or name one split"):
        open_labelled(str(folder.parent))


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (b"one\ntwo\n", "has 2 names, expected 3"),
        (b"", "has 0 names, expected 3"),
        (b"one\n\nthree\n", "class 1 has the name ''"),
        (b"\xff\xfe\x00", "cannot be read as UTF-8"),
    ],
)
def test_bad_class_names(folder, content, sentence):
    (folder / CLASSES_FILE).write_bytes(content)
    with pytest.raises(UserError, match=sentence):
        open_labelled(str(folder))


@pytest.mark.parametrize("name", [b"\xff\xfe", b"__"])
def test_folder_names_that_are_no_words(folder, name):
    place = os.fsencode(folder) + b"/" + name
    os.mkdir(place)
    noise(0).save(Path(os.fsdecode(place)) / "0.png")
    with pytest.raises(UserError, match="has the name"):
        open_labelled(str(folder))


@pytest.mark.parametrize(
    ("content", "sentence"),
    [("a photo of a {c}\na photo of a {}\n", r"line 2 is 'a photo of a \{\}'"), ("\n", "is empty")],
)
def test_bad_templates(folder, content, sentence):
    (folder / TEMPLATES_FILE).write_text(content)
    with pytest.raises(UserError, match=sentence):
        open_labelled(str(folder))


def test_a_folder_that_cannot_be_listed(folder, monkeypatch):
    listed = Path.iterdir

    def refuse(path):
        if path.name == "zebra":
            raise PermissionError(13, "Permission denied")
        return listed(path)

    monkeypatch.setattr(Path, "iterdir", refuse)
    with pytest.raises(UserError, match=r"zebra cannot be listed \(Permission denied\)"):
        open_labelled(str(folder))


@pytest.mark.skipif(not CALTECH.is_dir(), reason="shared/data/caltech101 is absent")
def test_caltech101():
    labelled = open_labelled(str(CALTECH))
    counts = {path.name: len(list(path.glob("*.jpg"))) for path in CALTECH.iterdir()}
    assert len(labelled.classes) == len(counts)
    assert dict(zip(sorted(counts), np.bincount(labelled.labels).tolist(), strict=True)) == counts
    assert all(
        key.split("/")[0].replace("_", " ") == labelled.classes[i]
        for key, i in zip(labelled.keys, labelled.labels, strict=True)
    )
    assert labelled.image(0).mode == "RGB"
