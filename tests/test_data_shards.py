"""Shards: webdataset reads what is written, the index groups as webdataset does, and hostile tars are told."""

from __future__ import annotations

import io
import json
import random
import tarfile
from collections.abc import Iterable
from pathlib import Path

import pytest
import webdataset

from vlkd.data.shard_writer import new_folder
from vlkd.data.shards import (
    RawSample,
    ShardIndex,
    index_shard,
    parse_captions,
    read_captions,
    read_member,
    write_shards,
)
from vlkd.errors import UserError


def samples(count: int) -> list[RawSample]:
    """Pictures need not be pictures here; keys, captions and extras are of every kind."""
    return [
        RawSample(
            key=f"photo {index:03d}é",
            image=random.Random(index).randbytes(100 + 7 * index),
            extension=("jpg", "png", "webp")[index % 3],
            captions=() if index % 5 == 4 else (f"a thing, number {index}", "naïve “quotes”"),
            extra={"source": index} if index % 2 else {},
        )
        for index in range(count)
    ]


def make_tar(path: Path, members: Iterable[tuple[str, bytes]]) -> Path:
    with tarfile.open(path, "w") as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def by_webdataset(path: Path) -> list[dict[str, bytes]]:
    """webdataset's own grouping: sample dictionaries without its private entries, but with the key."""
    reader = webdataset.WebDataset(str(path), shardshuffle=False, empty_check=False)
    return [{k: v for k, v in item.items() if not k.startswith("__") or k == "__key__"} for item in reader]


def kinds(index: ShardIndex) -> list[str]:
    return [problem.kind for problem in index.problems]


def test_webdataset_reads_back_what_is_written(tmp_path: Path) -> None:
    written = samples(25)
    manifest = write_shards(written, tmp_path / "out", samples_per_shard=10, name="train")
    shards = sorted((tmp_path / "out").glob("*.tar"))
    assert [shard.name for shard in shards] == [f"train-{n:06d}.tar" for n in range(3)]
    read = [item for shard in shards for item in by_webdataset(shard)]
    assert [item["__key__"] for item in read] == [sample.key for sample in written]
    for item, sample in zip(read, written, strict=True):
        assert item[sample.extension] == sample.image
        if sample.captions or sample.extra:
            assert json.loads(item["json"]) == {"captions": list(sample.captions), **sample.extra}
        else:
            assert "json" not in item
    assert (manifest["samples"], manifest["labelled"], manifest["captions"]) == (25, 20, 40)
    assert json.loads((tmp_path / "out" / "manifest.json").read_text()) == manifest


def test_index_gives_the_same_bytes_as_webdataset(tmp_path: Path) -> None:
    write_shards(samples(12), tmp_path / "out")
    shard = tmp_path / "out" / "000000.tar"
    index = index_shard(shard)
    assert index.problems == ()
    assert index.size == shard.stat().st_size
    for mine, theirs, sample in zip(index.samples, by_webdataset(shard), samples(12), strict=True):
        assert mine.key == theirs["__key__"]
        assert read_member(shard, mine.image.offset, mine.image.size) == theirs[mine.image.extension]
        assert {m.extension for m in mine.texts} == set(theirs) & {"json", "txt"}
        assert read_captions(shard, mine) == sample.captions


def test_bytes_are_reproducible(tmp_path: Path) -> None:
    first = write_shards(samples(9), tmp_path / "a", samples_per_shard=4)
    second = write_shards(iter(samples(9)), tmp_path / "b", samples_per_shard=4)
    assert first == second
    assert (tmp_path / "a" / "000001.tar").read_bytes() == (tmp_path / "b" / "000001.tar").read_bytes()


@pytest.mark.parametrize("key", ["a.b", "a/b", "..", "", "__meta__", "x" * 81, "new\nline", "a\\b"])
def test_unsafe_keys_are_refused(key: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="not safe"):
        write_shards([RawSample(key=key, image=b"x", extension="jpg")], tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_repeated_keys_other_extensions_and_nothing_are_refused(tmp_path: Path) -> None:
    one = RawSample(key="one", image=b"x", extension="jpg")
    with pytest.raises(UserError, match="occurs twice"):
        write_shards([one, one], tmp_path / "out", samples_per_shard=1)
    with pytest.raises(UserError, match="extension 'gif'"):
        write_shards([RawSample(key="one", image=b"x", extension="gif")], tmp_path / "out")
    with pytest.raises(UserError, match="No sample"):
        write_shards([], tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_holds_files_is_refused_and_left_alone(tmp_path: Path) -> None:
    (tmp_path / "other.tar").write_bytes(b"mine")
    with pytest.raises(UserError, match="already holds files"):
        write_shards(samples(2), tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["other.tar"]


def test_an_interrupted_run_leaves_nothing_and_can_be_repeated(tmp_path: Path) -> None:
    def cut() -> Iterable[RawSample]:
        yield from samples(5)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_shards(cut(), tmp_path / "out", samples_per_shard=2)
    assert list(tmp_path.iterdir()) == []
    # What a killed run leaves: the folder under its temporary name.
    (tmp_path / ".out.partial").mkdir()
    (tmp_path / ".out.partial" / "000007.tar").write_bytes(b"half")
    write_shards(samples(5), tmp_path / "out", samples_per_shard=2)
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
    assert len(list((tmp_path / "out").iterdir())) == 4


def test_new_folder_takes_the_place_of_an_empty_one(tmp_path: Path) -> None:
    with new_folder(tmp_path) as partial:
        (partial / "file").write_text("x")
    assert (tmp_path / "file").read_text() == "x"


def test_foreign_shards_group_as_in_webdataset(tmp_path: Path) -> None:
    """Folders, dots after the first, capitals, unlabelled pictures, captions as txt, names without extension."""
    path = make_tar(
        tmp_path / "foreign.tar",
        [
            ("__meta__", b"{}"),
            ("__meta__/a.jpg", b"x"),
            ("./dir.v1/0001.JPG", b"1"),
            ("./dir.v1/0001.txt", b"one\n two \n\n"),
            ("dir/0001.jpeg", b"22"),
            ("dir/0001.seg.png", b"mask"),
            ("README", b"no extension"),
            ("dir/0002.png", b"333"),
            ("dir/0002.json", json.dumps({"caption": "three", "captions": ["four", "three"]}).encode()),
            ("dir/0002.txt", b"four\nfive"),
            ("._dir", b"x"),
            ("z.webp", b"4444"),
        ],
    )
    index = index_shard(path)
    theirs = by_webdataset(path)
    assert index.problems == ()
    assert [s.key for s in index.samples] == [t["__key__"] for t in theirs]
    for mine, other in zip(index.samples, theirs, strict=True):
        assert read_member(path, mine.image.offset, mine.image.size) == other[mine.image.extension]
    captions = [read_captions(path, sample) for sample in index.samples]
    assert captions == [("one", "two"), (), ("three", "four", "five"), ()]


def test_keys_with_dots_merge_and_are_told(tmp_path: Path) -> None:
    """img.v1.1.jpg and img.v1.2.jpg are one webdataset sample `img` with no image member."""
    path = make_tar(tmp_path / "dots.tar", [("img.v1.1.jpg", b"1"), ("img.v1.2.jpg", b"2"), ("b.jpg", b"3")])
    assert [t["__key__"] for t in by_webdataset(path)] == ["img", "b"]
    index = index_shard(path)
    assert [s.key for s in index.samples] == ["b"]
    assert kinds(index) == ["no-image"]


def test_half_samples_duplicates_and_interleaved_keys_are_dropped_and_told(tmp_path: Path) -> None:
    path = make_tar(
        tmp_path / "odd.tar",
        [
            ("text.json", b"{}"),
            ("two.jpg", b"1"),
            ("two.png", b"1"),
            ("twice.jpg", b"1"),
            ("twice.jpg", b"2"),
            ("a.jpg", b"1"),
            ("b.jpg", b"2"),
            ("a.json", b"{}"),
            ("good.jpg", b"3"),
        ],
    )
    index = index_shard(path)
    assert [s.key for s in index.samples] == ["b", "good"]
    assert [(p.kind, p.name) for p in index.problems] == [
        ("no-image", "text"),
        ("images", "two"),
        ("duplicate", "twice"),
        ("duplicate", "a"),
    ]
    assert index.problem_counts == {"no-image": 1, "images": 1, "duplicate": 2}


@pytest.fixture
def sound(tmp_path: Path) -> Path:
    """Four samples of a 700-byte image (2 blocks) and a JSON (1 block): each member starts with a header block."""
    body = [(f"{n}.{ext}", data) for n in range(4) for ext, data in (("jpg", b"i" * 700), ("json", b"{}"))]
    return make_tar(tmp_path / "sound.tar", body)


@pytest.mark.parametrize(
    ("blocks", "kept", "told"),
    [
        (15, ["0", "1", "2"], ["no-end"]),  # between samples
        (18, ["0", "1", "2"], ["no-end", "half"]),  # between the last image and its JSON
        (19, ["0", "1", "2"], ["truncated", "half"]),  # between the JSON's header and data: its 2 bytes are missing
        (17, ["0", "1", "2"], ["truncated"]),  # inside an image; the sample before is whole
        (16.5, ["0", "1", "2"], ["truncated"]),
        (15.5, ["0", "1", "2"], ["truncated"]),  # inside a header
        (21, ["0", "1", "2", "3"], ["no-end"]),  # one of the two end blocks
    ],
)
def test_cut_tars(sound: Path, blocks: float, kept: list[str], told: list[str]) -> None:
    cut = sound.with_name("cut.tar")
    cut.write_bytes(sound.read_bytes()[: int(512 * blocks)])
    index = index_shard(cut)
    assert [s.key for s in index.samples] == kept
    assert kinds(index) == told


def test_a_damaged_header_in_the_middle_is_told(sound: Path) -> None:
    data = bytearray(sound.read_bytes())
    data[5 * 512 : 5 * 512 + 20] = b"\xff" * 20  # the header of 1.jpg
    sound.write_bytes(data)
    index = index_shard(sound)
    assert [s.key for s in index.samples] == ["0"]
    assert kinds(index) == ["damaged"]


def test_data_after_the_end_are_told(sound: Path) -> None:
    sound.write_bytes(sound.read_bytes() + sound.read_bytes())
    index = index_shard(sound)
    assert len(index.samples) == 4
    assert kinds(index) == ["trailing"]


def test_links_devices_and_paths_outside_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "hostile.tar"
    with tarfile.open(path, "w") as tar:
        for name, kind in (("a.jpg", tarfile.SYMTYPE), ("b.jpg", tarfile.LNKTYPE), ("c.jpg", tarfile.CHRTYPE)):
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, "/etc/passwd"
            tar.addfile(info)
        for name in ("../d.jpg", "/e.jpg", "x/../../f.jpg", "good.jpg"):
            info = tarfile.TarInfo(name)
            info.size = 3
            tar.addfile(info, io.BytesIO(b"jpg"))
    index = index_shard(path)
    assert [s.key for s in index.samples] == ["good"]
    assert kinds(index) == ["refused"] * 6


def test_oversized_members_are_refused(tmp_path: Path) -> None:
    path = make_tar(tmp_path / "large.tar", [("a.jpg", b"1"), ("a.json", b" " * 1_000_001), ("b.jpg", b"2")])
    index = index_shard(path)
    assert [(s.key, s.texts) for s in index.samples] == [("a", ()), ("b", ())]
    assert kinds(index) == ["refused"]


def header(name: str, size: int, kind: bytes = tarfile.REGTYPE) -> bytes:
    """A header that claims any size, in base 256 where octal digits do not reach."""
    info = tarfile.TarInfo(name)
    info.type = kind
    block = bytearray(info.tobuf(tarfile.GNU_FORMAT))
    octal = 0 <= size < 8**11
    field = b"%011o\0" % size if octal else size.to_bytes(12, "big", signed=True)
    if not octal and size > 0:
        field = b"\x80" + field[1:]
    block[124:136] = field
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block[:512])
    return bytes(block)


@pytest.mark.parametrize("kind", [tarfile.REGTYPE, tarfile.XHDTYPE, tarfile.GNUTYPE_LONGNAME])
@pytest.mark.parametrize("size", [-512, -1024, 8**11 - 1, 2**60])
def test_headers_that_claim_absurd_sizes_end_the_scan(kind: bytes, size: int, tmp_path: Path) -> None:
    path = make_tar(tmp_path / "claim.tar", [("a.jpg", b"1")])
    path.write_bytes(path.read_bytes()[:1024] + header("b.jpg", size, kind) + b"\0" * 4096)
    index = index_shard(path)
    assert [s.key for s in index.samples] in (["a"], [])
    assert len(index.problems) >= 1
    assert {"truncated", "damaged", "refused"} & set(kinds(index))


@pytest.mark.parametrize("data", [b"", b"x" * 2000, b"\x1f\x8b\x08" + b"\0" * 600])
def test_what_is_no_tar_is_refused(data: bytes, tmp_path: Path) -> None:
    path = tmp_path / "no.tar"
    path.write_bytes(data)
    with pytest.raises(UserError, match="not an uncompressed tar"):
        index_shard(path)
    with pytest.raises(UserError, match="There is no shard"):
        index_shard(tmp_path / "missing.tar")


def test_member_beyond_the_end_is_refused(sound: Path) -> None:
    with pytest.raises(UserError, match="changed since"):
        read_member(sound, sound.stat().st_size - 2, 5)


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (b'{"captions": ["a", " b ", ""]}', ("a", "b")),
        (b'{"caption": "a"}', ("a",)),
        (b'{"caption": null, "url": "x"}', ()),
        (b'{"captions": null}', ()),
    ],
)
def test_captions_of_json(data: bytes, expected: tuple[str, ...]) -> None:
    assert parse_captions(data, "json") == expected


@pytest.mark.parametrize(
    "data",
    [
        b"[]",
        b'{"captions": "abc"}',
        b'{"captions": [1]}',
        b'{"captions": {"a": 1}}',
        b'{"caption": ["a"]}',
        b"\xff\xfe",
        b"{",
        b'{"captions": ["\\ud800"]}',
        b"[" * 200_000,
        b'{"captions": ["' + b"a" * 1_000_001 + b'"]}',
    ],
)
def test_absurd_captions_are_refused(data: bytes) -> None:
    with pytest.raises(UserError):
        parse_captions(data, "json")
