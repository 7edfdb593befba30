from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

from vlkd import recipes
from vlkd.data.sources import open_pairs
from vlkd.errors import UserError
from vlkd.suite.duplicates import difference_hash, find_duplicates, find_similar, look_at, thumbnail_distance
from vlkd.suite.duplicates_page import duplicates_page


def picture(seed: int, size: tuple[int, int] = (160, 120)) -> Image.Image:
    """Soft coloured blobs, another arrangement for each seed."""
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 256, (6, 8, 3)).astype(np.uint8)
    return Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC)


def saved(image: Image.Image, kind: str = "PNG", **options: int) -> bytes:
    out = io.BytesIO()
    image.save(out, kind, **options)
    return out.getvalue()


@pytest.fixture
def folders(tmp_path: Path) -> tuple[Path, Path]:
    """Training pictures 0 to 9 and evaluation pictures, some of them copies."""
    train, data = tmp_path / "train", tmp_path / "data"
    train.mkdir()
    data.mkdir()
    for seed in range(10):
        (train / f"{seed}.png").write_bytes(saved(picture(seed)))
    copies = {
        "same.png": saved(picture(0)),
        "jpeg.jpg": saved(picture(1), "JPEG", quality=30),
        "small.jpg": saved(picture(2).resize((70, 52), Image.Resampling.LANCZOS), "JPEG", quality=80),
        "wide.webp": saved(picture(3).resize((300, 200)), "WEBP", quality=60),
        "mirrored.jpg": saved(ImageOps.mirror(picture(4)), "JPEG", quality=85),
        "upside_down.png": saved(ImageOps.flip(picture(5))),
    }
    for name, content in copies.items():
        (data / name).write_bytes(content)
    for seed in range(20, 60):
        (data / f"{seed}.png").write_bytes(saved(picture(seed)))
    return train, data


def test_copies_are_found_and_nothing_else(folders):
    train, data = (open_pairs(str(folder)) for folder in folders)
    found = find_duplicates(train, data, progress=False)
    pairs = {(train.keys[pair.train], data.keys[pair.data]): pair.kind for pair in found.duplicates}
    assert pairs == {
        ("0.png", "same.png"): "same file", ("1.png", "jpeg.jpg"): "near", ("2.png", "small.jpg"): "near",
        ("3.png", "wide.webp"): "near", ("4.png", "mirrored.jpg"): "mirrored",
    }  # fmt: skip
    assert [found.images(kind) for kind in ("same file", "near", "mirrored", "similar")] == [1, 3, 1, 0]
    strict = find_duplicates(train, data, threshold=0.0, progress=False)
    assert {pair.kind for pair in strict.duplicates} == {"same file"}


def test_the_result_does_not_depend_on_threads_or_blocks(folders, monkeypatch):
    train, data = (open_pairs(str(folder)) for folder in folders)
    whole = find_duplicates(train, data, workers=1, progress=False)
    for name, size in (("_BLOCK", 3), ("_WIDE", 7), ("_CONFIRMED", 2)):
        monkeypatch.setattr(f"vlkd.suite.duplicates.{name}", size)
    assert find_duplicates(train, data, workers=4, progress=False) == whole


def test_drawings_on_white_and_plain_pictures_are_told_apart(tmp_path):
    """Plain areas have no gradient: the thumbnails decide, and a codec's noise there counts for nothing."""
    for side in ("train", "data"):
        (tmp_path / side).mkdir()
    dot, bar = Image.new("RGB", (96, 96), "white"), Image.new("RGB", (96, 96), "white")
    dot.paste("red", (30, 30, 60, 60))
    bar.paste("red", (10, 40, 86, 52))
    for name, image in (("dot", dot), ("grey", Image.new("RGB", (96, 96), (128, 128, 128)))):
        (tmp_path / "train" / f"{name}.png").write_bytes(saved(image))
    for name, image in (("dot", dot), ("bar", bar), ("black", Image.new("RGB", (96, 96), "black"))):
        (tmp_path / "data" / f"{name}.jpg").write_bytes(saved(image, "JPEG", quality=40))
    train, data = open_pairs(str(tmp_path / "train")), open_pairs(str(tmp_path / "data"))
    found = find_duplicates(train, data, progress=False)
    assert [(train.keys[pair.train], data.keys[pair.data]) for pair in found.duplicates] == [("dot.png", "dot.jpg")]


def test_difference_hash_by_hand():
    falling = np.tile(np.arange(90, 0, -10, dtype=np.int16), (8, 1))
    assert difference_hash(falling) == 2**64 - 1
    assert difference_hash(falling[:, ::-1]) == 0
    assert difference_hash(falling // 10) == 0
    one = np.zeros((8, 9), np.int16)
    one[0, 0] = 50
    assert difference_hash(one) == 2**63


def test_mirror_hash_is_the_hash_of_the_mirrored_picture():
    look, mirrored = look_at(saved(picture(7))), look_at(saved(ImageOps.mirror(picture(7))))
    assert (look.mirrored, look.hash) == (mirrored.hash, mirrored.mirrored)
    assert np.array_equal(look.thumbnail[:, ::-1], mirrored.thumbnail)


def test_thumbnail_distance_follows_its_formula():
    rng = np.random.default_rng(0)
    a, b = rng.integers(0, 256, (2, 5, 16, 16, 3)).astype(np.uint8)
    expected = []
    for x, y in zip(a.astype(float), b.astype(float), strict=True):
        variance = np.mean([part[..., channel].var() for part in (x, y) for channel in range(3)])
        expected.append(np.sqrt(((x - y) ** 2).mean()) / np.sqrt(variance))
    assert thumbnail_distance(a, b) == pytest.approx(np.array(expected))
    assert thumbnail_distance(a, b).min() > 1.3
    flat = np.full((1, 16, 16, 3), 100, np.uint8)
    assert thumbnail_distance(flat, flat + 1) == pytest.approx([0.25])


def test_unreadable_pictures_are_counted(folders):
    train, data = folders
    (train / "broken.png").write_bytes(b"no picture")
    found = find_duplicates(open_pairs(str(train)), open_pairs(str(data)), progress=False)
    assert (found.unreadable_train, found.unreadable_data) == (("broken.png",), ())
    assert len(found.duplicates) == 5
    for path in data.iterdir():
        path.write_bytes(b"no picture")
    with pytest.raises(UserError, match="None of the 46 evaluation pictures can be read"):
        find_duplicates(open_pairs(str(train)), open_pairs(str(data)), progress=False)


class MeanColours:
    """Encodes a picture as the colours of its quarters, so that a crop stays close."""

    def encode_image(self, images, *, batch_size=64):
        small = [np.asarray(image.resize((2, 2), Image.Resampling.BOX), np.float32).ravel() for image in images]
        return torch.from_numpy(np.stack(small)) - 128


def test_a_model_adds_pairs_that_are_not_known(folders):
    train, data = folders
    picture(9).crop((2, 2, 150, 112)).save(data / "crop.png")
    sides = open_pairs(str(train)), open_pairs(str(data))
    known = find_duplicates(*sides, progress=False).duplicates
    more = find_similar(MeanColours(), *sides, known, similarity=0.95)
    pairs = {(pair.train, pair.data) for pair in known}
    assert all(pair.kind == "similar" and (pair.train, pair.data) not in pairs for pair in more)
    assert (sides[0].keys.index("9.png"), sides[1].keys.index("crop.png")) in {(p.train, p.data) for p in more} | pairs
    assert all(pair.similarity >= 0.95 for pair in more)
    assert len(find_similar(MeanColours(), *sides, (), similarity=0.95)) > len(more)


def test_page_shows_the_pairs(folders):
    train, data = (open_pairs(str(folder)) for folder in folders)
    html = duplicates_page(find_duplicates(train, data, progress=False), train, data, "a<b", "c").html()
    assert html.count("<img ") == 10
    for part in ("Equal bytes", "Mirrored", "mirrored.jpg", "a&lt;b", "3 of 3 pairs"):
        assert part in html
    none = duplicates_page(find_duplicates(train, data, threshold=0.0, progress=False), train, data, "a", "c").html()
    assert none.count("<img ") == 2


def test_command(folders, tmp_path, capsys):
    main = recipes.load(recipes.find("eval", "duplicates")).main
    page = tmp_path / "new" / "page.html"
    main(["--train", str(folders[0]), "--data", str(folders[1]), "--out", str(page), "--json"])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("5 of 46 evaluation pictures are among the 10 training pictures (1 same file, 3 near,")
    printed = json.loads(lines[-1])
    assert printed["data_images_by_kind"] == {"same file": 1, "near": 3, "mirrored": 1, "similar": 0}
    assert {"0.png"} == {pair["train"] for pair in printed["pairs"] if pair["kind"] == "same file"}
    assert "<img " in page.read_text()
    with pytest.raises(UserError, match=r"--threshold is 2\.0"):
        main(["--train", "a", "--data", "b", "--threshold", "2"])
