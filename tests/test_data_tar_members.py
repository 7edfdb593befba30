"""The listing of a tar by its headers, against tarfile's own."""

from __future__ import annotations

import io
import tarfile

import pytest

from vlkd.data.tar_members import MAX_TEXT_BYTES, read_members

MEMBERS = (
    ("a/1.png", b"picture"), ("a/1.SEG.cls", b"7"), ("readme", b"no extension"), ("2.png", b""), ("1.png", b"other"),
    ("__notes__/3.txt", b"x"),
)  # fmt: skip


@pytest.fixture
def tar(tmp_path):
    with tarfile.open(tmp_path / "x.tar", "w") as file:
        for name, content in MEMBERS:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            file.addfile(info, io.BytesIO(content))
    return tmp_path / "x.tar"


def test_members_lie_where_tarfile_finds_them(tar):
    listing = read_members(tar)
    assert [key for key, _ in listing.groups] == ["a/1", "2", "1"]
    with tarfile.open(tar) as file:
        known = {info.offset_data: info for info in file.getmembers()}
    found = [(key, member) for key, members in listing.groups for member in members]
    assert [f"{key}.{member.extension}" for key, member in found] == ["a/1.png", "a/1.seg.cls", "2.png", "1.png"]
    for key, member in found:
        info = known[member.offset]
        assert (info.name.lower(), info.size) == (f"{key}.{member.extension}", member.size)
    assert (listing.size, listing.problems) == (tar.stat().st_size, ())


def test_what_is_left_out_is_named(tar):
    with tarfile.open(tar, "a") as file:
        large = tarfile.TarInfo("4.txt")
        large.size = MAX_TEXT_BYTES + 1
        file.addfile(large, io.BytesIO(bytes(large.size)))
        link = tarfile.TarInfo("5.png")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        file.addfile(link)
        file.addfile(tarfile.TarInfo("../6.png"))
    kinds = [(problem.kind, problem.name.split()[0]) for problem in read_members(tar).problems]
    assert kinds == [("refused", "4.txt"), ("refused", "5.png"), ("refused", "../6.png")]


def test_what_is_no_tar_raises_as_tarfile_does(tmp_path):
    with pytest.raises(FileNotFoundError):
        read_members(tmp_path / "gone.tar")
    (tmp_path / "x.tar").write_bytes(b"no tar" * 200)
    with pytest.raises(tarfile.TarError):
        read_members(tmp_path / "x.tar")
