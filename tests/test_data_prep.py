"""The preparation scripts on tiny real files, read back by webdataset and by the index."""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import webdataset
from PIL import Image

from vlkd.data.shards import index_shard, read_captions
from vlkd.errors import UserError

ROOT = Path(__file__).parents[1]
SHARED = Path(__file__).parents[2] / "shared"
Main = Callable[[Sequence[str]], None]


def script(name: str) -> Main:
    """`main` of a file in data_prep/, which is no package."""
    scope: dict[str, Any] = {"__name__": name}
    path = ROOT / "data_prep" / f"{name}.py"
    exec(compile(path.read_text(encoding="utf-8"), str(path), "exec"), scope)
    return scope["main"]  # type: ignore[no-any-return]


captions, karpathy, scenes = script("captions"), script("karpathy"), script("scenes")


def picture(path: Path, size: tuple[int, int] = (40, 30), seed: int = 0) -> bytes:
    path.parent.mkdir(parents=True, exist_ok=True)
    noise = np.random.default_rng(seed).integers(0, 256, (*size[::-1], 3), dtype=np.uint8)
    Image.fromarray(noise).save(path)
    return path.read_bytes()


def write_jsonl(path: Path, rows: Sequence[object]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def read(folder: Path) -> dict[str, dict[str, Any]]:
    """Samples by key, as webdataset sees them."""
    shards = [str(path) for path in sorted(folder.glob("*.tar"))]
    return {item["__key__"]: item for item in webdataset.WebDataset(shards, shardshuffle=False)}


def test_captions_jsonl_by_split(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    stored = {name: picture(tmp_path / "img" / f"{name}.jpg", seed=n) for n, name in enumerate("abc")}
    file = write_jsonl(
        tmp_path / "captions.jsonl",
        [
            {"image": "img/a.jpg", "captions": ["one", " two "], "split": "train"},
            {"image": "img/b.jpg", "caption": "three", "split": "test"},
            {"image": "img/c.jpg"},
        ],
    )
    captions([str(file), "--out", str(tmp_path / "out"), "--json"])
    summary = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert summary["splits"] == {
        "train": {"samples": 2, "labelled": 1, "captions": 2, "shards": 1},
        "test": {"samples": 1, "labelled": 1, "captions": 1, "shards": 1},
    }
    train, test = read(tmp_path / "out" / "train"), read(tmp_path / "out" / "test")
    assert train["a"]["jpg"] == stored["a"]
    assert json.loads(train["a"]["json"]) == {"captions": ["one", "two"]}
    assert "json" not in train["c"]
    assert json.loads(test["b"]["json"])["captions"] == ["three"]


@pytest.mark.parametrize("delimiter", [",", "\t", ";", "|"])
def test_captions_csv_joins_the_rows_of_a_picture(delimiter: str, tmp_path: Path) -> None:
    picture(tmp_path / "pics" / "a.png")
    picture(tmp_path / "pics" / "b.png", seed=1)
    rows = [("filepath", "title"), ("a.png", '"one, or two; three"'), ("b.png", "b"), ("a.png", "again")]
    file = tmp_path / "table.csv"
    file.write_text("\ufeff" + "\r\n".join(delimiter.join(row) for row in rows), encoding="utf-8")
    captions([str(file), "--image-root", str(tmp_path / "pics"), "--out", str(tmp_path / "out"), "--split", "val"])
    found = read(tmp_path / "out" / "val")
    assert json.loads(found["a"]["json"])["captions"] == ["one, or two; three", "again"]
    assert json.loads(found["b"]["json"])["captions"] == ["b"]


def test_unsafe_or_repeated_names_become_numbers(tmp_path: Path) -> None:
    for name in ("x/a.jpg", "y/a.jpg", "c.v1.jpg"):
        picture(tmp_path / name)
    rows = [{"image": name, "caption": name} for name in ("x/a.jpg", "y/a.jpg", "c.v1.jpg")]
    captions([str(write_jsonl(tmp_path / "c.jsonl", rows)), "--out", str(tmp_path / "out")])
    assert list(read(tmp_path / "out" / "train")) == ["00000000", "00000001", "00000002"]


def test_short_side_shrinks_large_pictures_only(tmp_path: Path) -> None:
    small = picture(tmp_path / "small.png", (20, 50))
    picture(tmp_path / "large.png", (120, 60))
    bitmap = Image.new("RGB", (10, 10), (1, 2, 3))
    bitmap.save(tmp_path / "odd.bmp")
    rows = [{"image": name} for name in ("small.png", "large.png", "odd.bmp")]
    file = write_jsonl(tmp_path / "c.jsonl", rows)
    captions([str(file), "--out", str(tmp_path / "out"), "--short-side", "30"])
    found = read(tmp_path / "out" / "train")
    assert found["small"]["png"] == small
    assert Image.open(io.BytesIO(found["large"]["jpg"])).size == (60, 30)
    assert Image.open(io.BytesIO(found["odd"]["png"])).getpixel((0, 0)) == (1, 2, 3)


def bad_data(tmp_path: Path) -> Path:
    """Eight sound pictures, one cut short, one missing."""
    for number in range(9):
        picture(tmp_path / f"{number}.jpg", seed=number)
    (tmp_path / "8.jpg").write_bytes((tmp_path / "8.jpg").read_bytes()[:300])
    return write_jsonl(tmp_path / "c.jsonl", [{"image": f"{number}.jpg", "caption": "x"} for number in range(10)])


def test_bad_pictures_are_listed_and_counted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    captions([str(bad_data(tmp_path)), "--out", str(tmp_path / "out"), "--max-bad", "0.2", "--json"])
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["bad"] == 2
    rows = [json.loads(line) for line in (tmp_path / "out" / "bad_samples.jsonl").read_text().splitlines()]
    assert [Path(row["image"]).name for row in rows] == ["8.jpg", "9.jpg"]
    assert list(read(tmp_path / "out" / "train")) == [str(number) for number in range(8)]


def test_too_many_bad_pictures_are_refused_with_their_list(tmp_path: Path) -> None:
    file = bad_data(tmp_path)
    with pytest.raises(UserError, match=r"2 of 10 pictures .* --max-bad 0.1 .*out-bad_samples.jsonl"):
        captions([str(file), "--out", str(tmp_path / "out"), "--max-bad", "0.1"])
    assert not (tmp_path / "out").exists()
    assert not list(tmp_path.glob(".*"))
    assert len((tmp_path / "out-bad_samples.jsonl").read_text().splitlines()) == 2


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([], "empty"),
        ([{"caption": "no picture"}], "line 1: captions without an image"),
        ([{"image": "a.jpg"}, {"image": "a.jpg"}], "more than once"),
        ([{"image": "a.jpg"}, {"image": "./a.jpg"}], "more than once"),
        ([{"image": "../a.jpg"}], "outside"),
        ([{"image": "/etc/hostname"}], "outside"),
        ([{"image": "a.jpg", "captions": "text"}], "line 1: .*list of strings"),
        ([{"image": "a.jpg", "split": "a/b"}], "cannot name a folder"),
        ([{"image": "a.jpg", "split": 3}], "no name"),
        (["text"], "line 1: a JSON str"),
    ],
)
def test_bad_jsonl_is_refused(rows: list[object], message: str, tmp_path: Path) -> None:
    picture(tmp_path / "a.jpg")
    with pytest.raises(UserError, match=message):
        captions([str(write_jsonl(tmp_path / "c.jsonl", rows)), "--out", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"a,b\n1,2\n", "columns a, b; expected one of image, filepath"),
        (b"image,text\n1,2\n", "expected one of caption, title"),
        (b"", "columns none"),
        (b"image,caption\n,lonely\n", "line 2: captions without an image"),
        (b"image,caption,split\na.jpg,x,train\na.jpg,y,test\n", "one split"),
        (b"image,caption\n\xff,x\n", "UTF-8"),
    ],
)
def test_bad_csv_is_refused(text: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / "c.csv").write_bytes(text)
    with pytest.raises(UserError, match=message):
        captions([str(tmp_path / "c.csv"), "--out", str(tmp_path / "out")])


def test_missing_file_and_used_folder_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no captions file"):
        captions([str(tmp_path / "none.jsonl"), "--out", str(tmp_path / "out")])
    picture(tmp_path / "a.jpg")
    file = write_jsonl(tmp_path / "c.jsonl", [{"image": "a.jpg"}])
    with pytest.raises(UserError, match="already holds files"):
        captions([str(file), "--out", str(tmp_path)])


def karpathy_file(tmp_path: Path) -> Path:
    images = []
    for number, (split, folder) in enumerate([("train", "train2014"), ("restval", "val2014"), ("test", "val2014")]):
        name = f"COCO_{folder}_{number:012d}.jpg"
        picture(tmp_path / folder / name, seed=number)
        sentences = [{"raw": f"caption {k} of {number}", "tokens": [], "sentid": k} for k in range(5 + number)]
        images.append({"filepath": folder, "filename": name, "split": split, "cocoid": number, "sentences": sentences})
    file = tmp_path / "dataset_coco.json"
    file.write_text(json.dumps({"dataset": "coco", "images": images}))
    return file


@pytest.mark.parametrize(
    ("restval", "expected"),
    [
        (None, {"train": 2, "test": 1}),
        ("own", {"train": 1, "restval": 1, "test": 1}),
        ("drop", {"train": 1, "test": 1}),
    ],
)
def test_karpathy_splits(restval: str | None, expected: dict[str, int], tmp_path: Path) -> None:
    options = ["--restval", restval] if restval else []
    karpathy([str(karpathy_file(tmp_path)), "--out", str(tmp_path / "out"), *options])
    found = {folder.name: read(folder) for folder in (tmp_path / "out").iterdir()}
    assert {split: len(items) for split, items in found.items()} == expected
    item = json.loads(found["test"]["COCO_val2014_000000000002"]["json"])
    assert item == {"captions": [f"caption {k} of 2" for k in range(7)], "cocoid": 2}


def test_karpathy_chooses_and_refuses(tmp_path: Path) -> None:
    file = karpathy_file(tmp_path)
    karpathy([str(file), "--out", str(tmp_path / "one"), "--splits", "test"])
    assert [p.name for p in (tmp_path / "one").iterdir()] == ["test"]
    with pytest.raises(UserError, match="no split val; it has test, train"):
        karpathy([str(file), "--out", str(tmp_path / "two"), "--splits", "val"])
    for text, message in (
        ("{", "no JSON"),
        ("[]", "no list `images`"),
        ('{"images": [{"filename": "a.jpg"}]}', "image 0: 'sentences'"),
        ('{"images": [{"filename": "../../a.jpg", "split": "train", "sentences": []}]}', "outside"),
        ('{"images": []}', "empty"),
    ):
        file.write_text(text)
        with pytest.raises(UserError, match=message):
            karpathy([str(file), "--out", str(tmp_path / "two")])
    with pytest.raises(UserError, match="There is no file"):
        karpathy([str(tmp_path / "none.json"), "--out", str(tmp_path / "two")])


def test_scenes_by_split(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [
        "--train",
        "12",
        "--val",
        "0",
        "--samples-per-shard",
        "5",
        "--limit",
        "8",
        "--image-size",
        "48",
        "--json",
    ]
    scenes([*arguments, "--out", str(tmp_path / "a")])
    summary = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert {split: counts["samples"] for split, counts in summary["splits"].items()} == dict.fromkeys(
        ("train", "test", "test_combination", "test_noun"), 8
    )
    assert summary["splits"]["train"]["shards"] == 2
    index = index_shard(tmp_path / "a" / "train" / "000001.tar")
    assert [sample.key for sample in index.samples] == [f"shapes-train-0-{n:06d}" for n in (5, 6, 7)]
    assert all(2 <= len(read_captions(index.path, sample)) <= 3 for sample in index.samples)
    with pytest.raises(UserError, match="already holds files"):
        scenes([*arguments, "--out", str(tmp_path / "a")])
    with pytest.raises(UserError, match="0 scenes"):
        scenes(["--limit", "0", "--out", str(tmp_path / "b")])
    with pytest.raises(UserError, match="always ten"):
        scenes(["--vocabulary", "9", "--out", str(tmp_path / "b")])


@pytest.mark.parametrize("main", [captions, karpathy, scenes])
def test_help_ends_with_two_examples(main: Main, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["--help"])
    assert stopped.value.code == 0
    assert capsys.readouterr().out.partition("examples:")[2].count("vlkd prep") == 2


@pytest.mark.skipif(not (SHARED / "data" / "coco").is_dir(), reason="the shared COCO photos are absent")
def test_real_coco_photos(tmp_path: Path) -> None:
    source = SHARED / "data" / "coco" / "dataset_coco.json"
    out = tmp_path / "out"
    karpathy([str(source), "--out", str(out), "--splits", "val", "test", "--limit", "20", "--short-side", "64"])
    truth = {Path(entry["filename"]).stem: entry for entry in json.loads(source.read_bytes())["images"]}
    for split in ("val", "test"):
        index = index_shard(out / split / "000000.tar")
        assert index.problems == ()
        assert len(index.samples) == 20
        for sample in index.samples:
            entry = truth[sample.key]
            assert entry["split"] == split
            wanted = tuple(dict.fromkeys(sentence["raw"].strip() for sentence in entry["sentences"]))
            assert read_captions(index.path, sample) == wanted
        first = read(out / split)[index.samples[0].key]
        assert min(Image.open(io.BytesIO(first["jpg"])).size) == 64
