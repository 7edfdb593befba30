"""What a dry run says of data that are there, missing, or not whole."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path

import pytest

from vlkd.suite.declaration import DataEntry, Suite
from vlkd.suite.presence import as_json, presence, presence_table, size_text, with_broken_tars


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
        "dataset": "one", "state": "present", "path": str(tmp_path / "shared"), "bytes": 1500, "images": 10,
        "problem": None,
    }  # fmt: skip
    assert told[3]["path"] is None


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0 B"), (999, "999 B"), (1000, "1.0 kB"), (999_949, "999.9 kB"), (999_950, "1.0 MB"),
     (3_400_000_000, "3.4 GB"), (10**16, "10000.0 TB")],
)  # fmt: skip
def test_sizes_in_words(count: int, text: str) -> None:
    assert size_text(count) == text


def tar(path: Path, keys: range) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as out:
        for key in keys:
            member = tarfile.TarInfo(f"{key}.png")
            member.size = 700
            out.addfile(member, io.BytesIO(bytes(700)))


@pytest.mark.parametrize("kept", [0, 100, 512 + 300, 512 + 1024, 3 * 1536, 3 * 1536 + 512])
def test_a_cut_tar_is_broken_wherever_it_is_cut(tmp_path: Path, kept: int) -> None:
    for name in ("whole", "cut"):
        tar(tmp_path / name / "test" / "0.tar", range(2))
        tar(tmp_path / name / "test" / "1.tar", range(3))
        (tmp_path / name / "test" / "nshards.txt").write_text("2")
    # Of the training part that nothing is declared of nobody asks.
    (tmp_path / "whole" / "train").mkdir()
    (tmp_path / "whole" / "train" / "0.tar").write_bytes(b"")
    place = tmp_path / "cut" / "test" / "1.tar"
    place.write_bytes(place.read_bytes()[:kept])
    declared = suite(entry("whole"), entry("cut"), entry("gone"))
    found = presence(declared, tmp_path)
    assert [one.state for one in found] == ["present", "present", "missing"]
    found = with_broken_tars(found)
    assert [one.state for one in found] == ["present", "broken", "missing"]
    assert found[1].problem.startswith(f"One tar is cut or damaged: {place} (")
    lines = presence_table(declared, found, tmp_path).splitlines()
    assert lines[3].split()[:2] == ["cut", "broken"]
    assert lines[-1].endswith("; 1 missing, 0 incomplete, 1 broken")
    assert as_json(found)[1]["state"] == "broken"


def test_plain_shards_and_single_tars_are_followed_too(tmp_path: Path) -> None:
    tar(tmp_path / "a" / "000000.tar", range(2))
    tar(tmp_path / "b", range(2))
    tar(tmp_path / "c.tar", range(2))
    for place in (tmp_path / "a" / "000000.tar", tmp_path / "c.tar"):
        place.write_bytes(place.read_bytes()[:1000])
    declared = suite(entry("a"), entry("b"), DataEntry(name="c", paths=("c.tar",)))
    assert [one.state for one in with_broken_tars(presence(declared, tmp_path))] == ["broken", "present", "broken"]


def test_no_data_are_read_between_the_headers(tmp_path: Path) -> None:
    """A sparse tar of a hundred gigabytes is followed at once."""
    place = tmp_path / "a" / "000000.tar"
    place.parent.mkdir()
    member = tarfile.TarInfo("0.npy")
    member.size = 100_000_000_000
    with place.open("wb") as out:
        out.write(member.tobuf(tarfile.GNU_FORMAT))
        out.truncate(512 + member.size + 1024)
    (found,) = with_broken_tars(presence(suite(entry("a")), tmp_path))
    assert found.state == "present"
