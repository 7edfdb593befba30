"""Hostile files beyond test_data_shards and test_data_images: refused or handled, never run, never believed."""

from __future__ import annotations

import io
import json
import pickle
import random
import struct
import tarfile
import tracemalloc
import zlib
from pathlib import Path

import pytest
from PIL import Image, ImageFile

from vlkd.data.images import BadImage, open_image
from vlkd.data.scan import BadShard, scan_shards
from vlkd.data.scan_shard import scan_shard
from vlkd.data.shard_rows import ShardRows, read_rows
from vlkd.data.shards import index_shard
from vlkd.data.sources import open_pairs

END = b"\0" * 1024


def padded(data: bytes) -> bytes:
    return data + b"\0" * (-len(data) % 512)


def member(name: str, data: bytes = b"", kind: bytes = tarfile.REGTYPE, size: int | None = None) -> bytes:
    """A header that is whatever it is told to be, and data."""
    info = tarfile.TarInfo(name)
    info.type, info.size = kind, len(data) if size is None else size
    return info.tobuf(tarfile.GNU_FORMAT, "utf-8", "surrogateescape") + padded(data)


def pax(**records: bytes | str) -> bytes:
    """An extended header for the member after it; `__` in a name stands for a dot."""
    body = b""
    for name, value in records.items():
        rest = b" " + name.replace("__", ".").encode() + b"=" + (value if isinstance(value, bytes) else value.encode())
        length = len(rest) + 1
        while length != len(rest) + 1 + len(str(length)):
            length = len(rest) + 1 + len(str(length))
        body += str(length).encode() + rest + b"\n"
    return member("./PaxHeaders/x", body, tarfile.XHDTYPE)


GOOD = member("good.jpg", b"picture") + member("good.json", b'{"caption": "a"}')
AFTER = member("after.jpg", b"another") + member("after.json", b'{"caption": "b"}')


def scanned(path: Path, content: bytes) -> ShardRows:
    path.write_bytes(content)
    sidecar = path.with_suffix(".index.safetensors")
    scan_shard(path, sidecar, name=path.name)
    return read_rows(sidecar)


@pytest.mark.parametrize(
    "hostile",
    [
        pytest.param(pax(path="../../evil.jpg") + member("x.jpg", b"x"), id="pax traversal"),
        pytest.param(pax(path="/evil.jpg") + member("x.jpg", b"x"), id="pax absolute"),
        pytest.param(
            member("././@LongLink", b"../" * 50 + b"evil.jpg\0", tarfile.GNUTYPE_LONGNAME) + member("x.jpg", b"x"),
            id="long traversal",
        ),
        pytest.param(pax(linkpath="/etc/passwd") + member("evil.jpg", kind=tarfile.SYMTYPE), id="pax link"),
        pytest.param(member("evil.jpg", kind=tarfile.LNKTYPE, size=5), id="hard link with a size"),
        pytest.param(member("evil.jpg", kind=tarfile.BLKTYPE), id="block device"),
        pytest.param(member("evil.jpg", kind=tarfile.FIFOTYPE), id="pipe"),
        pytest.param(member("evil.jpg", b"x" * 512, tarfile.GNUTYPE_SPARSE), id="GNU sparse"),
        pytest.param(
            pax(GNU__sparse__map="0,1,1000000000000,2", GNU__sparse__name="evil.jpg", GNU__sparse__size="9" * 15)
            + member("x.jpg", b"x"),
            id="pax sparse 0.1",
        ),
        pytest.param(
            pax(GNU__sparse__major="1", GNU__sparse__minor="0", GNU__sparse__name="evil.jpg",
                GNU__sparse__realsize="1000000000000")
            + member("x.jpg", padded(b"1\n0\n1\n") + b"x"),
            id="pax sparse 1.0",
        ),
        pytest.param(member("evil\udcff.jpg", b"x"), id="name that is no UTF-8"),
        pytest.param(pax(path=b"evil\xff.jpg") + member("x.jpg", b"x"), id="pax name that is no UTF-8"),
        pytest.param(
            member("././@LongLink", b"evil" * 2000 + b".jpg\0", tarfile.GNUTYPE_LONGNAME) + member("x.jpg", b"x"),
            id="name of 8000 bytes",
        ),
    ],
)  # fmt: skip
def test_members_that_are_refused_leave_the_others_alone(hostile: bytes, tmp_path: Path) -> None:
    rows = scanned(tmp_path / "a.tar", GOOD + hostile + AFTER + END)
    assert rows.all_keys() == ["good", "after"]
    assert rows.header.problems == {"refused": 1}
    (told,) = rows.header.problem_list
    assert told.isascii()
    assert len(told) <= 200


@pytest.mark.parametrize(
    "hostile",
    [
        pytest.param(pax(size="-512") + member("x.jpg", b"x"), id="negative size"),
        pytest.param(pax(size="9" * 20) + member("x.jpg", b"x"), id="size of exabytes"),
        pytest.param(pax(size=str(2**33)) + member("x.jpg", b"x"), id="size of gigabytes"),
        pytest.param(pax(GNU__sparse__size="x") + member("x.jpg", b"x"), id="sparse size that is no number"),
        pytest.param(pax(GNU__sparse__map="1,2,x") + member("x.jpg", b"x"), id="sparse map of words"),
        pytest.param(
            member("././@LongLink", b"name\0", tarfile.GNUTYPE_LONGNAME) * 3000 + member("x.jpg", b"x"),
            id="three thousand long names for one member",
        ),
        pytest.param(pax(comment="x") * 3000 + member("x.jpg", b"x"), id="three thousand extended headers for one"),
    ],
)
def test_headers_that_end_the_shard_keep_what_came_before(hostile: bytes, tmp_path: Path) -> None:
    rows = scanned(tmp_path / "a.tar", GOOD + member("b.jpg", b"b") + member("b.json", b"{}") + hostile + AFTER + END)
    assert rows.all_keys()[:1] == ["good"]
    assert set(rows.all_keys()) <= {"good", "b"}
    assert {"damaged", "truncated"} & set(rows.header.problems)


def test_a_sparse_map_of_millions_of_numbers_is_not_read(tmp_path: Path) -> None:
    """Small reads, but many: tarfile alone would hold all numbers of the file."""
    head = pax(GNU__sparse__major="1", GNU__sparse__minor="0", GNU__sparse__name="x.jpg", GNU__sparse__realsize="1")
    path = tmp_path / "a.tar"
    path.write_bytes(GOOD + head + member("x.jpg", b"9000000\n" + b"1\n" * 8_000_000) + END)
    tracemalloc.start()
    index = index_shard(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert [sample.key for sample in index.samples] == ["good"]
    assert index.problem_counts == {"damaged": 1}
    assert peak < 32_000_000


def test_harmless_oddities_of_headers_are_read_as_webdataset_would(tmp_path: Path) -> None:
    odd = [
        pax(mtime="nan", uid="9" * 5000, hdrcharset="BINARY") + member("a.jpg", b"1"),
        pax(path="./b.jpg") + member("zzz", b"2"),
        member("c.jpg/", kind=tarfile.DIRTYPE),
        member("d.jpg", b"3", tarfile.CONTTYPE),
        member("e.jpg", b"4", tarfile.AREGTYPE),
        member("control\x1b\n.jpg", b"5"),
    ]
    path = tmp_path / "a.tar"
    rows = scanned(path, b"".join(odd) + END)
    data = path.read_bytes()
    images = {rows.key(i): data[rows.image(i).offset :][: rows.image(i).size] for i in range(len(rows))}
    assert images == {"a": b"1", "./b": b"2", "d": b"3", "e": b"4", "control\x1b\n": b"5"}
    assert rows.header.problems == {}


class Evil:
    """Unpickled, it makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[str, str]]:
        return open, (str(self.path), "w")


@pytest.mark.parametrize("extension", ["pkl", "pyd", "pickle", "pth", "npy", "mp", "jpg.pyd", "json.pkl"])
def test_pickles_in_shards_are_never_loaded(extension: str, tmp_path: Path) -> None:
    made = tmp_path / "made"
    payload = pickle.dumps(Evil(made))
    pickle.loads(payload).close()
    made.unlink()  # so the payload works
    picture = io.BytesIO()
    Image.new("RGB", (4, 4), "red").save(picture, "PNG")
    content = b"".join(
        member(f"a.{kind}", data)
        for kind, data in ((extension, payload), ("png", picture.getvalue()), ("json", b'{"caption": "red"}'))
    )
    rows = scanned(tmp_path / "a.tar", content + END)
    assert rows.all_keys() == ["a"]
    assert [name for name, _ in rows.texts(0)] == ["json"]
    pairs = open_pairs(str(tmp_path / "a.tar"))
    assert pairs.image(0).getpixel((0, 0)) == (255, 0, 0)
    assert pairs.captions == [("red",)]
    # Under the name of a picture or of captions it is one of those, and damaged.
    with pytest.raises(BadImage):
        open_image(payload)
    disguised = scanned(tmp_path / "b.tar", GOOD + member("a.jpg", payload) + member("a.txt", payload) + END)
    assert disguised.header.problems in ({}, {"captions": 1})
    assert not made.exists()


ABSURD = {
    "deep list": b"[" * 400_000,
    "deep object": b'{"captions": ' * 60_000 + b"1" + b"}" * 60_000,
    "deep extra": b'{"captions": ["a"], "x": ' + b"[" * 200_000 + b"]" * 200_000 + b"}",
    "number of 300000 digits": b'{"captions": ["a"], "x": ' + b"9" * 300_000 + b"}",
    "NaN for a caption": b'{"captions": [NaN]}',
    "flag for a caption": b'{"caption": true}',
    "half a surrogate pair": b'{"caption": "a\\udc00"}',
    "encoded surrogate": b'{"caption": "\xed\xa0\x80"}',
    "UTF-16": '{"caption": "a"}'.encode("utf-16"),
    "byte order mark": b'\xef\xbb\xbf{"caption": "a"}',
    "two objects": b'{"caption": "a"}{"caption": "b"}',
    "NUL": b"\0" * 100,
    "1001 captions": json.dumps({"captions": [str(n) for n in range(1001)]}).encode(),
}


@pytest.mark.parametrize("name", ABSURD)
def test_samples_with_absurd_json_are_dropped_and_told(name: str, tmp_path: Path) -> None:
    bad = member("bad.jpg", b"x") + member("bad.json", ABSURD[name])
    rows = scanned(tmp_path / "a.tar", GOOD + bad + AFTER + END)
    assert rows.all_keys() == ["good", "after"]
    assert rows.header.problems == {"captions": 1}
    assert rows.header.problem_list[0].startswith("captions: bad: ")


@pytest.mark.parametrize(
    ("data", "captions"),
    [
        (b'{"caption": "a", "x": NaN, "y": 1e999, "z": -Infinity}', 1),
        (b'{"captions": ["a"], "captions": ["b", "c"]}', 2),
        (b'{"caption": "\\u0000 \\ud83d\\ude00"}', 1),
        (json.dumps({"captions": [" "] * 5000}).encode(), 0),
        (json.dumps({"captions": ["same"] * 5000}).encode(), 1),
    ],
)
def test_harmless_absurdities_of_json_are_read(data: bytes, captions: int, tmp_path: Path) -> None:
    rows = scanned(tmp_path / "a.tar", member("a.jpg", b"x") + member("a.json", data) + END)
    assert rows.counts.tolist() == [captions]


def png(width: int, height: int, *chunks: tuple[bytes, bytes]) -> bytes:
    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head + b"".join(chunk(*item) for item in chunks) + chunk(b"IEND", b"")


def gif(screen: tuple[int, int], frame: tuple[int, int]) -> bytes:
    head = b"GIF89a" + struct.pack("<HHBBB", *screen, 0x80, 0, 0) + b"\0\0\0\xff\xff\xff"
    return head + b"," + struct.pack("<HHHHB", 0, 0, *frame, 0) + b"\x02\x02\x44\x01\x00;"


def bmp(width: int, height: int) -> bytes:
    return b"BM" + struct.pack("<IHHIIiiHHIIiiII", 1 << 20, 0, 0, 54, 40, width, height, 1, 24, 0, 0, 0, 0, 0, 0)


def tiff(width: int, height: int) -> bytes:
    values = {256: width, 257: height, 258: 8, 259: 1, 262: 1, 273: 8, 277: 1, 278: height, 279: 100}
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in values.items())
    return b"II*\0" + struct.pack("<IH", 8, len(values)) + entries + b"\0" * 4


def jpeg(width: int, height: int) -> bytes:
    frame = struct.pack(">BHHB", 8, height, width, 3) + b"\x01\x11\0\x02\x11\0\x03\x11\0"
    return b"\xff\xd8\xff\xc0" + struct.pack(">H", len(frame) + 2) + frame + b"\xff\xda\0\x0c\x03\1\0\2\0\3\0\0\x3f\0"


def webp(width: int, height: int) -> bytes:
    bits = struct.pack("<I", (width - 1) | (height - 1) << 14)
    body = b"WEBPVP8L" + struct.pack("<I", 100) + b"\x2f" + bits + b"\0" * 95
    return b"RIFF" + struct.pack("<I", len(body)) + body


@pytest.mark.parametrize(
    "data",
    [
        pytest.param(png(10_000, 10_001), id="PNG"),
        pytest.param(jpeg(10_000, 10_001), id="JPEG"),
        pytest.param(jpeg(65_535, 65_535), id="JPEG of 4 gigapixels"),
        pytest.param(gif((10_000, 10_001), (1, 1)), id="GIF"),
        pytest.param(gif((1, 1), (65_535, 65_535)), id="GIF whose frame is larger than its screen"),
        pytest.param(bmp(10_000, 10_001), id="BMP"),
        pytest.param(bmp(10_000, -10_001), id="BMP upside down"),
        pytest.param(tiff(10_000, 10_001), id="TIFF"),
        pytest.param(tiff(2**32 - 1, 2**32 - 1), id="TIFF of exapixels"),
        pytest.param(webp(16_383, 16_383), id="WebP"),
    ],
)
@pytest.mark.parametrize("size_hint", [None, 224])
def test_headers_of_a_hundred_megapixels_are_refused_before_decoding(
    data: bytes, size_hint: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    decoded: list[object] = []
    monkeypatch.setattr(ImageFile.ImageFile, "load", decoded.append)
    with pytest.raises(BadImage, match=r"declares \d+ x \d+ pixels|exceeds limit of \d+ pixels"):
        open_image(data, size_hint=size_hint)
    assert decoded == []


@pytest.mark.parametrize("kind", [b"zTXt", b"iTXt", b"iCCP"])
def test_compressed_text_that_grows_a_thousandfold_is_not_unpacked(kind: bytes) -> None:
    large = zlib.compress(b"\0" * 200_000_000, 9)
    body = {b"zTXt": b"a\0\0", b"iTXt": b"a\0\1\0\0\0", b"iCCP": b"a\0\0"}[kind] + large
    rows = zlib.compress((b"\0" + b"\x80" * 12) * 4)
    tracemalloc.start()
    try:
        image = open_image(png(4, 4, (kind, body), (b"IDAT", rows)))
        assert image.getpixel((3, 3)) == (128, 128, 128)
    except BadImage:
        pass
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert peak < 20_000_000


def test_pixels_that_go_on_after_the_last_row_are_not_unpacked() -> None:
    rows = zlib.compress((b"\0" + b"\x80" * 12) * 4 + b"\0" * 200_000_000, 9)
    tracemalloc.start()
    try:
        assert open_image(png(4, 4, (b"IDAT", rows))).size == (4, 4)
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert peak < 20_000_000


@pytest.mark.parametrize("kind", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT])
def test_any_damage_ends_in_a_sentence_or_in_rows_that_are_true(kind: int, tmp_path: Path) -> None:
    """Bytes of headers at random: what is indexed lies in the file, with the CRC-32 of what is there."""
    draw = random.Random(kind)
    path, sidecar = tmp_path / "a.tar", tmp_path / "a.index.safetensors"
    with tarfile.open(path, "w", format=kind) as tar:
        for n in range(4):
            for extension, data in (("jpg", draw.randbytes(600)), ("json", b'{"caption": "a"}'), ("txt", b"b")):
                info = tarfile.TarInfo(f"{'long' * 40 * (n == 2)}é{n}.{extension}")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    whole = path.read_bytes()
    outcomes = {"rows": 0, "refused": 0}
    for _ in range(400):
        damaged = bytearray(whole)
        for _ in range(draw.choice((1, 1, 2, 20))):
            block = 512 * draw.randrange(len(whole) // 512)
            damaged[block + draw.choice((0, 100, 124, 130, 135, 148, 156, 157, 257, 345))] = draw.randrange(256)
        path.write_bytes(damaged)
        try:
            scan_shard(path, sidecar, name="a.tar")
        except BadShard:
            outcomes["refused"] += 1
            continue
        rows = read_rows(sidecar)
        for i in range(len(rows)):
            for extent in (rows.image(i), *dict(rows.texts(i)).values()):
                assert zlib.crc32(damaged[extent.offset : extent.offset + extent.size]) == extent.crc
        outcomes["rows"] += 1
    assert min(outcomes.values()) > 10


def test_nothing_is_written_but_the_indexes(tmp_path: Path) -> None:
    """A folder of hostile shards, scanned as a whole: no member becomes a file anywhere."""
    data = tmp_path / "deep" / "data"
    data.mkdir(parents=True)
    for n, name in enumerate(("../../evil.jpg", "/tmp/evil.jpg", "evil/../../../x.jpg", "dir/ok.jpg")):
        (data / f"{n}.tar").write_bytes(GOOD + member(name, b"x") + END)
    scan = scan_shards([str(data)], None, workers=1)
    assert [entry.problems for entry in scan.shards] == [{"refused": 1}] * 3 + [{}]
    written = {path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*") if path.is_file()}
    names = [
        "scan.json",
        ".scan.lock",
        *(f"{n}{suffix}" for n in range(4) for suffix in (".tar", ".index.safetensors")),
    ]
    assert written == {f"deep/data/{name}" for name in names}
