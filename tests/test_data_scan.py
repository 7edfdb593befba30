"""Scanning: what the indexes say equals what tarfile, zlib, hashlib and webdataset find; stopped scans go on."""

from __future__ import annotations

import errno
import hashlib
import io
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tarfile
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import webdataset

from vlkd import recipes
from vlkd.data import files, scan_shard, scan_work
from vlkd.data.scan import LOCK, SCAN_FILE, BadShard, Scan, entry_place, expand_shards, read_scan, scan_shards
from vlkd.data.shard_rows import ShardRows, read_header, read_rows
from vlkd.data.shards import RawSample, index_shard, read_captions, write_shards
from vlkd.errors import UserError

Members = Iterable[tuple[str, bytes]]


def make_tar(path: Path, members: Members) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def pairs(count: int, prefix: str = "") -> list[tuple[str, bytes]]:
    """Pictures (noise) and captions of every kind: JSON, text, both, none."""
    members = []
    for n in range(count):
        members.append((f"{prefix}{n:03d}.jpg", random.Random(f"{prefix}{n}").randbytes(300 + 97 * n)))
        if n % 4 in (0, 2):
            record = {"captions": [f"{prefix} thing {n}", "naïve"], "width": n}
            members.append((f"{prefix}{n:03d}.json", json.dumps(record).encode()))
        if n % 4 in (1, 2):
            members.append((f"{prefix}{n:03d}.txt", "naïve\nanother line\n".encode()))
        if n % 3 == 0:
            members.append((f"{prefix}{n:03d}.cls", b"5"))
    return members


def folder_of(path: Path, shards: int = 3, count: int = 8) -> Path:
    for n in range(shards):
        make_tar(path / f"{n:03d}.tar", pairs(count, f"s{n}-"))
    return path


def by_webdataset(path: Path) -> list[dict[str, Any]]:
    return list(webdataset.WebDataset(str(path), shardshuffle=False, empty_check=False))


def bytes_at(path: Path, rows: ShardRows) -> list[dict[str, Any]]:
    """What a reader of the index takes from the shard, with the CRC-32 of what it takes."""
    data = path.read_bytes()
    found = []
    for i in range(len(rows)):
        extents = {"image": rows.image(i), **dict(rows.texts(i))}
        members = {name: data[e.offset : e.offset + e.size] for name, e in extents.items()}
        assert all(zlib.crc32(members[name]) == e.crc for name, e in extents.items())
        found.append({"key": rows.key(i), **members})
    return found


def index_of(shard: Path, sidecar: Path) -> ShardRows:
    header = scan_shard.scan_shard(shard, sidecar, name=shard.name)
    rows = read_rows(sidecar)
    assert rows.header == header
    return rows


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of shards that are read; for scans in this process (one worker)."""
    seen: list[str] = []
    scan_one = scan_work.scan_shard

    def counted(shard: Path, sidecar: Path, *, name: str) -> object:
        seen.append(name)
        return scan_one(shard, sidecar, name=name)

    monkeypatch.setattr(scan_work, "scan_shard", counted)
    return seen


def leftovers(folder: Path) -> list[str]:
    return [path.name for path in folder.iterdir() if path.name.startswith(".") and path.name != LOCK]


@pytest.mark.parametrize("chunk", [1, 7, 512, 1000, 1 << 20])
def test_an_index_says_what_webdataset_zlib_and_hashlib_say(
    chunk: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scan_shard, "CHUNK", chunk)
    shard = make_tar(tmp_path / "a.tar", pairs(9))
    rows = index_of(shard, tmp_path / "a.index.safetensors")
    theirs = by_webdataset(shard)
    for mine, other in zip(bytes_at(shard, rows), theirs, strict=True):
        assert mine["key"] == other["__key__"]
        assert mine["image"] == other["jpg"]
        assert {name: mine[name] for name in mine if name in ("json", "txt")} == {
            name: other[name] for name in other if name in ("json", "txt")
        }
    counts = [len(read_captions(shard, sample)) for sample in index_shard(shard).samples]
    assert rows.counts.tolist() == counts == [2, 2, 3, 0, 2, 2, 3, 0, 2]
    header = rows.header
    assert (header.samples, header.labelled, header.captions, header.most_captions) == (9, 7, sum(counts), 3)
    assert header.sha256 == hashlib.sha256(shard.read_bytes()).hexdigest()
    assert (header.bytes, header.mtime_ns) == (shard.stat().st_size, shard.stat().st_mtime_ns)
    assert header.problems == {}


def test_an_index_of_what_write_shards_writes(tmp_path: Path) -> None:
    samples = [
        RawSample(key=f"é {n}", image=random.Random(n).randbytes(999), extension="webp", captions=("x",) * (n % 2))
        for n in range(7)
    ]
    manifest = write_shards(samples, tmp_path / "out", samples_per_shard=5)
    scan = scan_shards([str(tmp_path / "out")], None, workers=1)
    for entry, listed in zip(scan.shards, manifest["shards"], strict=True):
        found = {"file": entry.place} | {
            name: getattr(entry, name) for name in ("samples", "labelled", "captions", "bytes", "sha256")
        }
        assert found == listed


@pytest.mark.parametrize("cut", [*range(512, 13 * 512, 256), 13 * 512 + 1, 14 * 512 - 1])
def test_a_cut_shard_offers_whole_samples_alone(cut: int, tmp_path: Path) -> None:
    """Four samples of an image of two blocks and a JSON of one, each after a header: cut at every half block."""
    body = [
        (f"{n}.{kind}", data)
        for n in range(2)
        for kind, data in (("jpg", bytes([n]) * 700), ("json", b'{"caption": "a"}'))
    ]
    whole = make_tar(tmp_path / "whole.tar", body)
    expected = bytes_at(whole, index_of(whole, tmp_path / "whole.index.safetensors"))
    cut_tar = tmp_path / "cut.tar"
    cut_tar.write_bytes(whole.read_bytes()[:cut])
    rows = index_of(cut_tar, tmp_path / "cut.index.safetensors")
    found = bytes_at(cut_tar, rows)
    # The first sample needs 4 whole blocks and 16 bytes of the fifth; the second as much again.
    certain = (cut >= 4 * 512 + 16) + (cut >= 9 * 512 + 16)
    assert found in (expected[:certain], expected[: certain - 1])
    assert bool(set(rows.header.problems) & {"truncated", "no-end"}) == (cut < 12 * 512)
    if found != expected[:certain]:
        assert "half" in rows.header.problems


def test_oddities_are_told_and_left_out_and_the_rest_stays(tmp_path: Path) -> None:
    shard = make_tar(
        tmp_path / "odd.tar",
        [
            ("good.jpg", b"1"),
            ("good.txt", b""),
            ("only.json", b"{}"),
            ("twice.jpg", b"1"),
            ("twice.jpg", b"2"),
            ("latin.jpg", b"1"),
            ("latin.txt", b"caf\xe9"),
            ("a.jpg", b"1"),
            ("b.jpg", b"22"),
            ("a.json", b"{}"),
            ("dots.v1.jpg", b"1"),
            ("dots.v2.jpg", b"2"),
            ("dir.v1/x.JPG", b"333"),
            ("broken.jpg", b"1"),
            ("broken.json", b'{"captions": ["x"'),
            ("many.jpg", b"1"),
            ("many.txt", b"\n".join(b"%d" % n for n in range(1001))),
            ("last.png", b"4"),
            ("last.json", b""),
        ],
    )
    rows = index_of(shard, tmp_path / "odd.index.safetensors")
    assert rows.all_keys() == ["good", "b", "dir.v1/x"]
    assert [rows.image(i).size for i in range(3)] == [1, 2, 3]
    assert rows.texts(0) == ()
    assert rows.header.problems == {"no-image": 2, "duplicate": 2, "captions": 4}
    told = rows.header.problem_list
    assert {text.partition(":")[0] for text in told} == {"no-image", "duplicate", "captions"}
    assert [text.split(": ")[1] for text in told if text.startswith("captions")] == ["latin", "broken", "many", "last"]


def test_problems_of_a_shard_are_listed_up_to_a_hundred_without_control_characters(tmp_path: Path) -> None:
    names = [f"\x1b[31m{n}\n" + "k" * 400 for n in range(150)]
    shard = make_tar(tmp_path / "odd.tar", [("good.jpg", b"1"), *((f"{name}.json", b"{}") for name in names)])
    header = index_of(shard, tmp_path / "odd.index.safetensors").header
    assert header.problems == {"no-image": 150}
    assert len(header.problem_list) == 100
    assert header.problem_list[7].startswith("no-image: \\x1b[31m7\\nkkk")
    assert all(len(text) <= 200 for text in header.problem_list)


@pytest.mark.parametrize("workers", [1, 2])
def test_a_folder_of_shards(workers: int, tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "data")
    scan = scan_shards([str(folder)], None, workers=workers)
    assert read_scan(folder) == scan
    assert [entry.place for entry in scan.shards] == ["000.tar", "001.tar", "002.tar"]
    assert [entry_place(scan, entry) for entry in scan.shards] == [str(folder / f"00{n}.tar") for n in range(3)]
    for entry in scan.shards:
        header = read_header(folder / entry.index)
        shared = ("bytes", "sha256", "samples", "labelled", "captions", "most_captions", "problems")
        assert {name: getattr(entry, name) for name in shared} == {name: getattr(header, name) for name in shared}
        assert header.file == entry.place
    assert scan.total("samples") == 24
    assert scan.unique_keys
    assert leftovers(folder) == []


def test_a_second_scan_reads_nothing_and_writes_the_same(tmp_path: Path, reads: list[str]) -> None:
    folder = folder_of(tmp_path)
    first = scan_shards([str(folder)], None, workers=1)
    assert reads == ["000.tar", "001.tar", "002.tar"]
    written = {path.name: path.read_bytes() for path in folder.iterdir()}
    reads.clear()
    assert scan_shards([str(folder)], None, workers=1) == first
    assert reads == []
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == written
    assert scan_shards([str(folder)], None, workers=1, again=True) == first
    assert len(reads) == 3


def test_what_changed_or_is_damaged_is_read_again(tmp_path: Path, reads: list[str]) -> None:
    folder = folder_of(tmp_path)
    scan_shards([str(folder)], None, workers=1)
    reads.clear()
    make_tar(folder / "001.tar", pairs(5, "new-"))
    sidecar = folder / "002.index.safetensors"
    data = bytearray(sidecar.read_bytes())
    data[-1] ^= 4
    sidecar.write_bytes(data)
    scan = scan_shards([str(folder)], None, workers=1)
    assert reads == ["001.tar", "002.tar"]
    assert [entry.samples for entry in scan.shards] == [8, 5, 8]
    assert read_rows(folder / "001.index.safetensors").key(0) == "new-000"
    # Same size, other time of change.
    reads.clear()
    stamp = (folder / "000.tar").stat().st_mtime_ns
    os.utime(folder / "000.tar", ns=(stamp + 1, stamp + 1))
    scan_shards([str(folder)], None, workers=1)
    assert reads == ["000.tar"]


def test_an_index_of_another_shard_of_that_name_is_not_taken(tmp_path: Path, reads: list[str]) -> None:
    """Equal in name, size and time of change, in another folder, indexed at the same place."""
    for name in ("a", "b"):
        shard = make_tar(tmp_path / name / "0.tar", [("x.jpg", name.encode())])
        os.utime(shard, ns=(10**18, 10**18))
    scan_shards([str(tmp_path / "a")], tmp_path / "out", workers=1)
    scan = scan_shards([str(tmp_path / "b")], tmp_path / "out", workers=1)
    assert reads == ["../a/0.tar", "../b/0.tar"]
    assert scan.shards[0].sha256 == hashlib.sha256((tmp_path / "b" / "0.tar").read_bytes()).hexdigest()


KILLED = """
import os, signal, sys
from pathlib import Path
from vlkd.data import files
from vlkd.data.scan import scan_shards
rename, renamed = os.replace, []
def replace(source, target):
    renamed.append(target)
    if len(renamed) > int(sys.argv[2]):
        os.kill(os.getpid(), signal.SIGKILL)
    rename(source, target)
files.os.replace = replace
scan_shards([sys.argv[1]], None, workers=1)
"""


@pytest.mark.parametrize("whole", [0, 2, 3])
def test_a_killed_scan_goes_on_where_it_was(whole: int, tmp_path: Path, reads: list[str]) -> None:
    """Killed in the middle of writing an index, or scan.json."""
    folder = folder_of(tmp_path / "data")
    done = subprocess.run(
        [sys.executable, "-c", KILLED, str(folder), str(whole)], check=False, capture_output=True, text=True
    )
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert not (folder / SCAN_FILE).exists()
    with pytest.raises(UserError, match="run `vlkd prep scan`"):
        read_scan(folder)
    assert len(leftovers(folder)) == 1
    scan = scan_shards([str(folder)], None, workers=1)
    assert reads == [f"{n:03d}.tar" for n in range(whole, 3)]
    assert scan == scan_shards([str(folder)], None, workers=1, again=True)
    assert leftovers(folder) == []


ORPHANS = """
import os, signal, multiprocessing
from concurrent.futures import ProcessPoolExecutor
from vlkd.data.scan_work import _follow_parent
if __name__ == "__main__":
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(2, mp_context=context, initializer=_follow_parent)
    print(pool.submit(os.getpid).result(), flush=True)
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_processes_end_with_their_parent(tmp_path: Path) -> None:
    """They hold the pipe that is read here to its end; a process left behind would hold it for ever."""
    script = tmp_path / "orphans.py"
    script.write_text(ORPHANS)
    done = subprocess.run([sys.executable, str(script)], check=False, capture_output=True, text=True, timeout=120)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert int(done.stdout) > 0


def test_a_full_disk_ends_in_a_sentence_and_tears_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = folder_of(tmp_path)
    scan_shards([str(folder)], None, workers=1)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    make_tar(folder / "003.tar", pairs(4, "more"))
    before["003.tar"] = (folder / "003.tar").read_bytes()

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(files.os, "fsync", full)
    with pytest.raises(UserError, match=r"003\.index.*No space left on device.*free some space") as caught:
        scan_shards([str(folder)], None, workers=1)
    assert not isinstance(caught.value, BadShard)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_natural_order_patterns_and_no_repeats(tmp_path: Path) -> None:
    for name in ("1.tar", "2.tar", "10.tar", "a-09.tar", "a-10.tar", "other.txt"):
        make_tar(tmp_path / name, [("x.jpg", b"1")])
    (tmp_path / "link").symlink_to(tmp_path)

    def names(*refs: str) -> list[str]:
        places = expand_shards([str(tmp_path / ref) for ref in refs])
        assert all(Path(place).parent == tmp_path.resolve() for place in places)
        return [Path(place).name for place in places]

    assert names(".") == ["1.tar", "2.tar", "10.tar", "a-09.tar", "a-10.tar"]
    assert names("[12].tar", "1.tar", "link/1.tar") == ["1.tar", "2.tar"]
    assert names("{2,10}.tar") == ["2.tar", "10.tar"]
    assert names("a-{08..10}.tar") == ["a-08.tar", "a-09.tar", "a-10.tar"]
    assert names("{1,a}*.tar") == ["1.tar", "10.tar", "a-09.tar", "a-10.tar"]
    assert names("*") == names(".")
    assert expand_shards([f"file://{tmp_path}/1.tar"]) == expand_shards([f"{tmp_path}/1.tar"])


@pytest.mark.parametrize("ref", ["none.tar", "none-*.tar", "{1,2", "{0..99999999999}.tar", "empty", "{3..4}.tar"])
def test_references_that_name_nothing_are_refused(ref: str, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"check|give|expected"):
        expand_shards([str(tmp_path / ref)])
    with pytest.raises(UserError, match="No shards are named"):
        expand_shards([])


@pytest.mark.parametrize("ref", ["pipe:cat x.tar", "nothing://host/a.tar", "https://me:secret@host/a.tar"])
def test_commands_unknown_protocols_and_passwords_are_refused(ref: str) -> None:
    with pytest.raises(UserError) as caught:
        expand_shards([ref])
    assert "secret" not in str(caught.value)


def test_indexes_in_a_folder_of_their_own_and_one_name_twice(tmp_path: Path) -> None:
    """Two shards of one name in two folders; the scan stays right when all is moved together."""
    for name in ("a", "b"):
        make_tar(tmp_path / "all" / name / "000.tar", pairs(3, name))
    out = tmp_path / "all" / "scans" / "ab"
    scan = scan_shards([str(tmp_path / "all" / name) for name in ("b", "a")], out, workers=1)
    assert [entry.place for entry in scan.shards] == ["../../a/000.tar", "../../b/000.tar"]
    assert len({entry.index for entry in scan.shards}) == 2
    assert sorted(path.name for path in out.iterdir()) == sorted([LOCK, SCAN_FILE, *(e.index for e in scan.shards)])
    with pytest.raises(UserError, match="--out"):
        scan_shards([str(tmp_path / "all" / name) for name in ("b", "a")], None, workers=1)
    shutil.move(tmp_path / "all", tmp_path / "moved")
    (tmp_path / "by-link").symlink_to(tmp_path / "moved" / "scans")
    moved = read_scan(tmp_path / "by-link" / "ab")
    for entry, name in zip(moved.shards, "ab", strict=True):
        assert Path(entry_place(moved, entry)).read_bytes() == (tmp_path / "moved" / name / "000.tar").read_bytes()
        assert read_rows(moved.folder / entry.index).key(0) == f"{name}000"


def test_keys_of_several_shards_are_told(tmp_path: Path) -> None:
    make_tar(tmp_path / "0.tar", pairs(3, "x"))
    make_tar(tmp_path / "1.tar", [*pairs(3, "y"), ("x001.jpg", b"1")])
    scan = scan_shards([str(tmp_path)], None, workers=1)
    assert not scan.unique_keys
    assert scan.repeated == "the key 'x001' is in 0.tar and in 1.tar"
    assert read_scan(tmp_path) == scan


def test_shards_that_cannot_be_used_are_listed_up_to_a_limit(tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "data", shards=20, count=2)
    (folder / "003.tar").write_bytes(b"no tar" * 500)
    scan = scan_shards([str(folder)], None, workers=1)
    assert [row.place for row in scan.left_out] == ["003.tar"]
    assert "not an uncompressed tar" in scan.left_out[0].reason
    assert len(scan.shards) == 19
    assert read_scan(folder) == scan
    make_tar(folder / "007.tar", [("only.json", b"{}")])
    with pytest.raises(UserError, match=r"2 of 20 shards cannot be used, 1 may be left out"):
        scan_shards([str(folder)], None, workers=1)


@pytest.mark.parametrize("kind", ["no tar", "empty", "gzip", "empty tar", "folder", "fifo", "gone", "no sample"])
def test_every_kind_of_shard_that_cannot_be_used(kind: str, tmp_path: Path) -> None:
    good, bad = make_tar(tmp_path / "0.tar", pairs(2)), tmp_path / "1.tar"
    match kind:
        case "no tar":
            bad.write_bytes(os.urandom(3000))
        case "empty":
            bad.touch()
        case "gzip":
            with tarfile.open(bad, "w:gz") as tar:
                tar.add(good, "x.jpg")
        case "empty tar":
            make_tar(bad, [])
        case "folder":
            bad.mkdir()
        case "fifo":
            os.mkfifo(bad)
        case "gone":
            bad.symlink_to(tmp_path / "nowhere")
        case "no sample":
            make_tar(bad, [("a.txt", b"x"), ("b.json", b"{}")])
    scan = scan_shards([str(tmp_path / "{0,1}.tar")], None, workers=1)
    assert [row.place for row in scan.left_out] == ["1.tar"]
    assert [entry.place for entry in scan.shards] == ["0.tar"]
    good.unlink()
    with pytest.raises(UserError, match=r"No shard can be used|no \.tar"):
        scan_shards([str(tmp_path / "1.tar")], tmp_path / "out", workers=1)


def test_a_shard_that_changes_while_it_is_read_is_not_indexed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shard = make_tar(tmp_path / "a.tar", pairs(4))

    def index_then_grow(path: Path) -> object:
        index = index_shard(path)
        with path.open("ab") as stream:
            stream.write(b"\0" * 512)
        return index

    monkeypatch.setattr(scan_shard, "index_shard", index_then_grow)
    with pytest.raises(BadShard, match="changed while it was read"):
        scan_shard.scan_shard(shard, tmp_path / "a.index.safetensors", name="a.tar")
    assert [path.name for path in tmp_path.iterdir()] == ["a.tar"]


def test_shards_of_a_store(tmp_path: Path, reads: list[str]) -> None:
    """fsspec's store in memory stands for any other."""
    fsspec = pytest.importorskip("fsspec")
    store = fsspec.filesystem("memory")
    for n in range(3):
        local = make_tar(tmp_path / f"{n}.tar", pairs(4, f"m{n}-"))
        store.pipe(f"/bucket/{n}.tar", local.read_bytes())
    out = tmp_path / "out"
    with pytest.raises(UserError, match="--out"):
        scan_shards(["memory://bucket/{0..2}.tar"], None, workers=1)
    scan = scan_shards(["memory://bucket/{0..2}.tar"], out, workers=1)
    assert [entry_place(scan, entry) for entry in scan.shards] == [f"memory://bucket/{n}.tar" for n in range(3)]
    assert read_scan(out) == scan
    local = scan_shards([str(tmp_path / "{0..2}.tar")], tmp_path / "local", workers=1)
    for mine, other in zip(scan.shards, local.shards, strict=True):
        assert (mine.sha256, mine.bytes, mine.captions) == (other.sha256, other.bytes, other.captions)
        assert read_header(out / mine.index).mtime_ns == 0
    indexes = [entry.index for entry in scan.shards]
    assert sorted(path.name for path in out.iterdir()) == sorted([LOCK, SCAN_FILE, *indexes])
    reads.clear()
    assert scan_shards(["memory://bucket/{0..2}.tar"], out, workers=1) == scan
    assert reads == []
    store.rm("/bucket/1.tar")
    scan = scan_shards(["memory://bucket/{0..2}.tar"], out, workers=1, again=True)
    assert [row.place for row in scan.left_out] == ["memory://bucket/1.tar"]


@pytest.fixture
def written(tmp_path: Path) -> tuple[Path, dict[str, Any]]:
    """A folder with a scan of two shards, and what its scan.json says."""
    folder_of(tmp_path, shards=2)
    scan_shards([str(tmp_path)], None, workers=1)
    content = json.loads((tmp_path / SCAN_FILE).read_text())
    (tmp_path / SCAN_FILE).write_text(json.dumps(content))
    read_scan(tmp_path)
    return tmp_path, content


def refused(folder: Path, text: str) -> None:
    (folder / SCAN_FILE).write_text(text)
    with pytest.raises(UserError, match=r"run `vlkd prep scan` again"):
        read_scan(folder)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("index", "../000.index.safetensors"),
        ("index", "/etc/000.index.safetensors"),
        ("index", "a\\000.index.safetensors"),
        ("index", "a\0.index.safetensors"),
        ("index", "\ud800.index.safetensors"),
        ("index", "000.tar"),
        ("index", "001.index.safetensors"),
        ("index", "001.INDEX.safetensors"),
        ("index", 5),
        ("place", ""),
        ("place", "/etc/passwd"),
        ("place", "a\0.tar"),
        ("place", "\udc00.tar"),
        ("place", "001.tar"),
        ("place", None),
        ("samples", -1),
        ("samples", 0),
        ("samples", 10**12),
        ("samples", 2**70),
        ("samples", 8.0),
        ("samples", True),
        ("samples", "8"),
        ("bytes", 1),
        ("labelled", 9),
        ("captions", 10**15),
        ("most_captions", 10**6),
        ("most_captions", 0),
        ("sha256", "0" * 63),
        ("sha256", ["0" * 64]),
        ("problems", {"half": -1}),
        ("problems", {"half": "1"}),
        ("problems", []),
        ("extra", 1),
    ],
)
def test_hostile_entries_are_refused(written: tuple[Path, dict[str, Any]], name: str, value: object) -> None:
    folder, content = written
    first = content["shards"][0]
    if isinstance(value, int) and name in content:
        content[name] += value - first[name]
    first[name] = value
    refused(folder, json.dumps(content))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("version", 2),
        ("format", None),
        ("samples", 5),
        ("samples", 16.0),
        ("captions", -1),
        ("shards", {}),
        ("shards", None),
        ("shards", []),
        ("shards", [5]),
        ("shards", [[]]),
        ("left_out", {}),
        ("left_out", [{"place": 1, "reason": "x"}]),
        ("left_out", [{"place": "x"}]),
        ("unique_keys", 1),
        ("unique_keys", "false"),
        ("repeated", None),
    ],
)
def test_hostile_scans_are_refused(written: tuple[Path, dict[str, Any]], name: str, value: object) -> None:
    folder, content = written
    refused(folder, json.dumps(content | {name: value}))
    del content[name]
    refused(folder, json.dumps(content))


def test_what_is_no_strict_json_is_refused(written: tuple[Path, dict[str, Any]]) -> None:
    folder, content = written
    text = json.dumps(content)
    for hostile in (
        "", "[]", "5", '"x"', text[:-1], "[" * 10**6, '{"a":' * 10**6, "9" * 10**5, text.replace("16", "NaN", 1),
        text.replace("16", "9" * 5000, 1), text.replace("16", "1e999", 1),
    ):  # fmt: skip
        refused(folder, hostile)
    (folder / SCAN_FILE).write_bytes(text.encode("utf-16"))
    with pytest.raises(UserError, match="run `vlkd prep scan` again"):
        read_scan(folder)
    (folder / SCAN_FILE).unlink()
    (folder / SCAN_FILE).mkdir()
    with pytest.raises(UserError, match="run `vlkd prep scan` again"):
        read_scan(folder)


def test_a_place_may_leave_the_folder_but_never_be_absolute(tmp_path: Path) -> None:
    entry = scan_shards([str(folder_of(tmp_path / "a", 1))], tmp_path / "b" / "c", workers=1).shards[0]
    assert entry_place(Scan(tmp_path / "b" / "c", (entry,), True), entry) == str((tmp_path / "a/000.tar").resolve())


def command(*words: str) -> None:
    recipes.load(recipes.find("data_prep", "scan")).main(list(words))


def test_the_command_reports_what_was_found(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    samples = [RawSample(key=f"k{n}", image=b"x" * 90, extension="jpg", captions=("a",) * (n > 1)) for n in range(12)]
    write_shards(samples, tmp_path / "data", samples_per_shard=3)
    folder = tmp_path / "data"
    (folder / "000001.tar").unlink()
    make_tar(folder / "000002.tar", [("k6.jpg", b"1"), ("k7.json", b"{}"), ("k0.jpg", b"2")])
    (folder / "more.tar").write_bytes((folder / "000003.tar").read_bytes()[: 12 * 512])
    command(str(folder), "--workers", "1", "--json")
    found = json.loads(capsys.readouterr().out)
    assert (found["shards"], found["samples"], found["labelled"], found["captions"]) == (4, 11, 7, 7)
    assert found["problems"] == {"no-image": 1, "no-end": 1}
    assert not found["unique_keys"]
    assert [text.split(" ")[0] for text in found["manifest"]] == [str(folder / "manifest.json"), "000002.tar"]
    command(str(folder), "--workers", "1")
    table = capsys.readouterr().out
    for words in ("samples                   11  4 unlabelled", "no-image: 1;", "000002.tar: k7", "no-end: 1;",
                  "names 000001.tar, which is not there", "warning: the key 'k"):  # fmt: skip
        assert words in table
    (folder / "manifest.json").write_text("[" * 10**5)
    command(str(folder), "--workers", "1", "--json")
    assert "is passed over" in json.loads(capsys.readouterr().out)["manifest"][0]
