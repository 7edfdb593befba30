"""What a dry run says of data that are there, missing, or not whole."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from vlkd.suite.declaration import DataEntry, Suite
from vlkd.suite.presence import as_json, presence, presence_table, size_text


def suite(*entries: DataEntry) -> Suite:
    return Suite(name="mine", title="Mine", entries=entries)


def entry(name: str, **more: object) -> DataEntry:
    return DataEntry(name=name, paths=(f"wds_{name}", name), **more)  # type: ignore[arg-type]


def shards(folder: Path, count: int, there: int) -> None:
    folder.mkdir(parents=True)
    (folder / "nshards.txt").write_text(f"{count}\n")
    for number in range(there):
        (folder / f"{number}.tar").write_bytes(bytes(1000))


def test_the_first_path_that_exists_counts_with_all_its_files(tmp_path: Path) -> None:
    shards(tmp_path / "wds_a" / "test", 2, 2)
    shards(tmp_path / "a" / "test", 1, 1)
    shards(tmp_path / "b" / "test", 1, 1)
    first, second, third = presence(suite(entry("a", images=5), entry("b"), entry("c", images=7)), tmp_path)
    assert (first.path, first.bytes, first.images, first.problem) == (tmp_path / "wds_a", 2002, 5, "")
    assert (second.path, second.bytes) == (tmp_path / "b", 1002)
    assert (third.path, third.bytes, third.images) == (None, 0, 7)
    assert "wds_c or c below" in third.problem


def test_a_single_file_has_its_own_size(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(bytes(123))
    (found,) = presence(suite(entry("a")), tmp_path)
    assert (found.bytes, found.problem) == (123, "")


def test_links_count_once_though_they_loop(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "x").write_bytes(bytes(50))
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "images").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "a" / "loop").symlink_to(tmp_path / "a")
    (tmp_path / "a" / "broken").symlink_to(tmp_path / "nowhere")
    (found,) = presence(suite(entry("a")), tmp_path)
    assert found.bytes == 50


@pytest.mark.parametrize(
    ("count", "there", "sentence"),
    [
        ("3", 1, "lacks 2 of 3 tars, first 1.tar"),
        ("many", 1, "says 'many'; expected the number of tars"),
        ("0", 1, "says '0'; expected the number"),
        ("9999999999", 1, "says '9999999999'; expected the number"),
        ("²", 1, "expected the number of tars"),
    ],
)
def test_an_interrupted_download_is_seen(tmp_path: Path, count: str, there: int, sentence: str) -> None:
    shards(tmp_path / "a" / "test", 1, there)
    (tmp_path / "a" / "test" / "nshards.txt").write_text(count, encoding="utf-8")
    (found,) = presence(suite(entry("a")), tmp_path)
    assert found.path == tmp_path / "a"
    assert sentence in found.problem


def test_a_split_that_is_not_there_is_seen(tmp_path: Path) -> None:
    shards(tmp_path / "a" / "test", 1, 1)
    (tmp_path / "b").mkdir()
    tested, trained, empty = presence(suite(entry("a"), entry("a", train="train"), entry("b")), tmp_path)
    assert tested.problem == ""
    assert "train has no nshards.txt" in trained.problem
    assert "is empty" in empty.problem


def test_other_folders_are_taken_as_they_are(tmp_path: Path) -> None:
    (tmp_path / "a" / "test" / "cat").mkdir(parents=True)
    (tmp_path / "a" / "test" / "cat" / "0.jpg").write_bytes(b"x")
    (tmp_path / "b" / "test").mkdir(parents=True)
    (tmp_path / "b" / "test" / "000000.tar").write_bytes(b"x")
    assert [one.problem for one in presence(suite(entry("a"), entry("b")), tmp_path)] == ["", ""]


def test_the_table_counts_a_shared_folder_once(tmp_path: Path) -> None:
    (tmp_path / "shared").mkdir()
    (tmp_path / "shared" / "x").write_bytes(bytes(1500))
    shards(tmp_path / "half" / "test", 2, 1)
    declared = suite(
        DataEntry(name="one", paths=("shared",), images=10),
        DataEntry(name="two", paths=("shared",), images=20),
        entry("half"),
        entry("gone", images=40, bytes=2_000_000),
    )
    found = presence(declared, tmp_path)
    lines = presence_table(declared, found, tmp_path).splitlines()
    assert lines[0].startswith("mine: Mine")
    assert lines[2].split() == ["one", "present", "1.5", "kB", "10", "shared"]
    assert lines[4].split()[:2] == ["half", "incomplete"]
    assert lines[5].split()[:5] == ["gone", "missing", "(2.0", "MB)", "40"]
    assert lines[5].endswith("no wds_gone or gone")
    # 1,500 once, and 1,000 + 2 of the half one.
    assert lines[6] == "3 of 4 data sets are there: 2.5 kB, 30 images as declared; 1 missing, 1 incomplete"
    told = json.loads(json.dumps(as_json(found), allow_nan=False))
    assert [row["dataset"] for row in told] == ["one", "two", "half", "gone"]
    assert told[0] == {
        "dataset": "one", "path": str(tmp_path / "shared"), "bytes": 1500, "images": 10, "problem": None,
    }  # fmt: skip
    assert told[3]["path"] is None


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0 B"), (999, "999 B"), (1000, "1.0 kB"), (999_949, "999.9 kB"), (999_950, "1.0 MB"),
     (3_400_000_000, "3.4 GB"), (10**16, "10000.0 TB")],
)  # fmt: skip
def test_sizes_in_words(count: int, text: str) -> None:
    assert size_text(count) == text
