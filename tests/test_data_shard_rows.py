"""The index of a shard: it comes back as it was written, stays small, and a damaged or foreign one is refused."""

from __future__ import annotations

import json
import random
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import save_file

from vlkd.data.shard_rows import (
    METADATA,
    Extent,
    Row,
    ShardHeader,
    ShardRows,
    _checksum,
    columns_of,
    read_header,
    read_rows,
    write_columns,
    write_rows,
)
from vlkd.errors import UserError


def rows(count: int, texts: tuple[str, ...] = ("json",), key: str = "photo-{:04d}é") -> list[Row]:
    """Samples as they lie in a tar: members after headers of 512 bytes, every fifth unlabelled."""
    made, place = [], 512
    for number in range(count):
        draw = random.Random(number)
        extents = {}
        image = Extent(place, draw.randrange(1, 5000), draw.getrandbits(32))
        place += image.size + 512
        for extension in texts if number % 5 != 4 else ():
            extents[extension] = Extent(place, draw.randrange(100, 900), draw.getrandbits(32))
            place += extents[extension].size + 512
        captions = draw.randrange(1, 6) if extents else 0
        made.append(Row(key=key.format(number), image=image, texts=extents, captions=captions))
    return made


def header_of(made: list[Row], **more: Any) -> ShardHeader:
    last = max((e.offset + e.size for row in made for e in (row.image, *row.texts.values())), default=0)
    values: dict[str, Any] = {
        "file": "../shards/a.tar",
        "bytes": last + 1024,
        "mtime_ns": 1_700_000_000_123_456_789,
        "sha256": "0123456789abcdef" * 4,
        "samples": len(made),
        "labelled": sum(row.captions > 0 for row in made),
        "captions": sum(row.captions for row in made),
        "most_captions": max((row.captions for row in made), default=0),
        "problems": {"no-image": 2},
        "problem_list": ("no-image: a", "no-image: b"),
    }
    return ShardHeader(**(values | more))


def as_rows(found: ShardRows) -> list[Row]:
    return [
        Row(key=found.key(i), image=found.image(i), texts=dict(found.texts(i)), captions=len(found.caption_range(i)))
        for i in range(len(found))
    ]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "a.index.safetensors"


@pytest.mark.parametrize("texts", [(), ("json",), ("txt",), ("json", "txt")])
@pytest.mark.parametrize("count", [0, 1, 23])
def test_round_trip(texts: tuple[str, ...], count: int, path: Path) -> None:
    made = rows(count, texts)
    header = header_of(made)
    write_rows(path, header, made)
    found = read_rows(path)
    assert as_rows(found) == made
    assert found.header == header == read_header(path)
    assert found.all_keys() == [row.key for row in made]
    counts = [row.captions for row in made]
    assert found.counts.dtype == np.int32
    assert found.first_caption.dtype == np.int64
    assert found.counts.tolist() == counts
    assert found.first_caption.tolist() == [sum(counts[:i]) for i in range(count)]
    assert [found.caption_range(i) for i in range(count)] == [
        range(sum(counts[:i]), sum(counts[: i + 1])) for i in range(count)
    ]
    assert [other.name for other in path.parent.iterdir()] == [path.name]


def test_texts_may_lie_before_their_image_and_beyond_4_gib(path: Path) -> None:
    made = [Row(key="a", image=Extent(2**33, 10, 1), texts={"txt": Extent(2**33 - 2**30, 5, 2)}, captions=1)]
    write_rows(path, header_of(made, bytes=2**34), made)
    assert as_rows(read_rows(path)) == made
    with pytest.raises(UserError, match="split it"):
        columns_of([replace(made[0], texts={"txt": Extent(2**33 - 2**32, 5, 2)})])


@pytest.mark.parametrize(("texts", "key"), [(("json",), "{:018d}"), (("json", "txt"), "{:015d}")])
def test_memory_per_sample(texts: tuple[str, ...], key: str, path: Path) -> None:
    made = rows(1000, texts, key)
    write_rows(path, header_of(made), made)
    found = read_rows(path)
    assert found.nbytes < 64 * len(made)
    # Counted as well from the file: what is held is what is stored, and no object per row.
    assert abs(found.nbytes - sum(column.nbytes for column in columns_of(made).values())) < 1000


@pytest.mark.parametrize(
    "change", [{"labelled": 1}, {"captions": 3}, {"most_captions": 9}, {"samples": 2}, {"bytes": 99}]
)
def test_rows_that_contradict_the_header_are_not_written(change: dict[str, int], path: Path) -> None:
    made = rows(7)
    with pytest.raises(UserError):
        write_rows(path, replace(header_of(made), **change), made)
    assert not path.exists()


def test_every_cut_and_many_flipped_bits_are_noticed(path: Path) -> None:
    """A flipped bit is refused or changes nothing; here it may change what the header says about the file alone."""
    made = rows(6, ("json", "txt"))
    write_rows(path, header_of(made), made)
    data = path.read_bytes()
    for end in range(0, len(data), 7):
        path.write_bytes(data[:end])
        with pytest.raises(UserError, match="vlkd prep scan"):
            read_rows(path)
    draw = random.Random(0)
    refused = 0
    for place in range(0, len(data), 2):
        flipped = bytearray(data)
        flipped[place] ^= 1 << draw.randrange(8)
        path.write_bytes(flipped)
        try:
            assert as_rows(read_rows(path)) == made
        except UserError:
            refused += 1
    assert refused > 0.8 * len(data) / 2


def test_missing_and_foreign_files_are_refused(path: Path) -> None:
    with pytest.raises(UserError, match=r"no index .* run `vlkd prep scan` again"):
        read_rows(path)
    path.mkdir()
    with pytest.raises(UserError, match="vlkd prep scan"):
        read_header(path)
    path.rmdir()
    for data in (b"", b"\0" * 8, b"\xff" * 100, b"PK\x03\x04" + b"\0" * 60, (2**62).to_bytes(8, "little") + b"{}"):
        path.write_bytes(data)
        with pytest.raises(UserError, match="vlkd prep scan"):
            read_rows(path)
    save_file({"weight": np.zeros(3, np.float32)}, path)
    with pytest.raises(UserError, match="another kind"):
        read_header(path)


def stored(path: Path) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    with safe_open(str(path), framework="np") as file:
        metadata = json.loads(file.metadata()[METADATA])
        return metadata, {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


DEEP = "[" * 200_000


@pytest.mark.parametrize(
    "change",
    [
        {"version": 2},
        {"format": "other"},
        {"samples": -1},
        {"samples": 2**70},
        {"samples": True},
        {"samples": 6.0},
        {"bytes": "99"},
        {"bytes": float("nan")},
        {"mtime_ns": None},
        {"sha256": "x" * 64},
        {"sha256": 5},
        {"problems": {"half": -1}},
        {"problems": ["half"]},
        {"problem_list": "half"},
        {"problem_list": [1]},
        {"problem_list": None},
        {"file": None},
        {"columns": -1},
        {"columns": 0},
        {"most_captions": 10**6, "captions": 10**6},
        {"captions": 10**12},
    ],
)
def test_hostile_headers_are_refused(change: dict[str, Any], path: Path) -> None:
    made = rows(6)
    write_rows(path, header_of(made), made)
    metadata, columns = stored(path)
    save_file(columns, path, metadata={METADATA: json.dumps(metadata)})
    assert as_rows(read_rows(path)) == made
    save_file(columns, path, metadata={METADATA: json.dumps(metadata | change)})
    with pytest.raises(UserError, match="run `vlkd prep scan` again"):
        read_rows(path)


@pytest.mark.parametrize("text", ["", "[]", "null", "{}", DEEP, '{"format": ' + "9" * 5000 + "}", '{"format": NaN}'])
def test_headers_that_are_no_headers_are_refused(text: str, path: Path) -> None:
    save_file(columns_of(rows(2)), path, metadata={METADATA: text})
    with pytest.raises(UserError, match="run `vlkd prep scan` again"):
        read_header(path)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("image_offset", np.array([-1, 0, 0])),
        ("image_offset", np.array([2**62, 0, 0])),
        ("image_offset", np.array([0, 0])),
        ("image_offset", np.array([[0, 0, 0]])),
        ("image_size", np.array([2**32 - 1, 1, 1], np.uint32)),
        ("image_size", np.array([1, 1, 1])),
        ("json_offset", np.array([-(2**31), 0, 0], np.int32)),
        ("json_offset", np.array([2**31 - 1, 0, 0], np.int32)),
        ("json_size", np.array([2_000_000, 0, 0], np.uint32)),
        ("json_crc", None),
        ("txt_crc", np.zeros(3, np.uint32)),
        ("captions", np.array([-1, 2, 2], np.int32)),
        ("key_ends", np.array([2, 1, 4], np.uint32)),
        ("key_ends", np.array([1, 1, 4], np.uint32)),
        ("key_ends", np.array([1, 2, 5], np.uint32)),
        ("keys", np.array([0xFF, 0x61, 0x61, 0x61], np.uint8)),
        ("keys", np.array([0xC3, 0xA9, 0x61, 0x61], np.uint8)),  # é, of which the first key has one half
        ("extra", np.zeros(3, np.uint8)),
    ],
)
def test_columns_that_point_elsewhere_are_refused(name: str, value: np.ndarray | None, path: Path) -> None:
    """Their checksum is that of the hostile columns here: it must be the columns themselves that are refused."""
    made = [Row(key="abcd"[i : i + 1 + (i == 2)], image=Extent(512, 9, 0), captions=1) for i in range(3)]
    made = [replace(row, texts={"json": Extent(1024, 9, 0)}) for row in made]
    header = header_of(made)
    columns = columns_of(made)
    write_columns(path, header, columns)
    assert as_rows(read_rows(path)) == made
    metadata, hostile = stored(path)
    if value is None:
        del hostile[name]
    else:
        hostile[name] = value
    metadata["columns"] = _checksum(hostile)
    save_file(hostile, path, metadata={METADATA: json.dumps(metadata)})
    with pytest.raises(UserError, match="run `vlkd prep scan` again"):
        read_rows(path)


def test_metadata_are_one_json_string_with_everything_about_the_shard(path: Path) -> None:
    made = rows(6)
    header = header_of(made)
    write_rows(path, header, made)
    metadata, columns = stored(path)
    expected = asdict(header) | {"format": "vlkd-shard-index", "version": 1, "columns": metadata["columns"]}
    assert metadata == json.loads(json.dumps(expected))
    assert {name: str(column.dtype) for name, column in columns.items()} == {
        "image_offset": "int64", "image_size": "uint32", "image_crc": "uint32", "json_offset": "int32",
        "json_size": "uint32", "json_crc": "uint32", "captions": "int32", "key_ends": "uint32", "keys": "uint8",
    }  # fmt: skip
