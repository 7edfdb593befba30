"""The wheel, built from the source distribution, claims one name, holds everything, and works from an empty folder."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from collections import Counter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SHIPPED = ("tasks", "data_prep", "eval")
FOLDERS = (*SHIPPED, "vlkd", "tests", "scripts", "docs")
FILES = ("pyproject.toml", "README.md", "LICENSE", "MANIFEST.in", "Makefile")
BUILD = "import sys; from setuptools import build_meta; getattr(build_meta, sys.argv[1])(sys.argv[2])"


def python(*words: str | Path, cwd: Path, **environment: str) -> str:
    done = subprocess.run(
        [sys.executable, *map(str, words)],
        cwd=cwd, env=os.environ | environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout


@pytest.fixture(scope="module")
def sdist(tmp_path_factory):
    """Built in a copy, so that the checkout stays clean."""
    copy = tmp_path_factory.mktemp("checkout")
    for folder in FOLDERS:
        shutil.copytree(ROOT / folder, copy / folder, ignore=shutil.ignore_patterns("__pycache__"))
    for file in FILES:
        shutil.copy(ROOT / file, copy / file)
    # What an editor or a user may leave beside the recipes is not shipped.
    (copy / "tasks" / "notes.txt").write_text("a stray note")
    out = tmp_path_factory.mktemp("sdist")
    python("-c", BUILD, "build_sdist", out, cwd=copy)
    (archive,) = out.iterdir()
    with tarfile.open(archive) as tar:
        tar.extractall(out / "unpacked", filter="data")
    (folder,) = (out / "unpacked").iterdir()
    return folder


@pytest.fixture(scope="module")
def wheel(sdist, tmp_path_factory):
    out = tmp_path_factory.mktemp("wheel")
    python("-c", BUILD, "build_wheel", out, cwd=sdist)
    (archive,) = out.glob("*.whl")
    return archive


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory):
    folder = tmp_path_factory.mktemp("site-packages")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder)
    return folder


def files_of(folder: Path, pattern: str = "*") -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob(pattern)
        if path.is_file() and "__pycache__" not in path.parts
    }


def test_the_wheel_claims_one_name(installed):
    import vlkd

    assert {path.name for path in installed.iterdir()} == {"vlkd", f"vlkd-{vlkd.__version__}.dist-info"}


def test_the_wheel_holds_the_whole_library(installed):
    found = {name: data for name, data in files_of(installed / "vlkd").items() if not name.startswith("_shipped/")}
    assert found == files_of(ROOT / "vlkd")


def test_the_wheel_holds_every_run_file_once_and_nothing_else(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = Counter(name for name in archive.namelist() if "/_shipped/" in name)
        wanted = Counter(
            f"vlkd/_shipped/{folder}/{path.name}" for folder in SHIPPED for path in (ROOT / folder).glob("*.py")
        )
        wanted.update(f"vlkd/_shipped/eval/suites/{path.name}" for path in (ROOT / "eval" / "suites").glob("*.toml"))
        assert names == wanted
        for name in names:
            assert archive.read(name) == (ROOT / name.removeprefix("vlkd/_shipped/")).read_bytes()


def test_the_source_distribution_can_run_its_tests(sdist):
    found = files_of(sdist)
    for folder in ("tests", "scripts"):
        assert {name for name in found if name.startswith(f"{folder}/")} >= {
            f"{folder}/{name}" for name in files_of(ROOT / folder, "*.py")
        }
    assert set(FILES) <= set(found)


def test_it_runs_from_an_empty_folder(installed, tmp_path):
    def vlkd(*words: str) -> str:
        return python("-m", "vlkd.cli.main", *words, cwd=tmp_path, PYTHONPATH=str(installed))

    where = python("-c", "import vlkd; print(vlkd.__file__)", cwd=tmp_path, PYTHONPATH=str(installed))
    assert Path(where.strip()).is_relative_to(installed)
    assert vlkd("ls") == python("-m", "vlkd.cli.main", "ls", cwd=ROOT)
    assert "method.contrastive=1.0" in vlkd("train", "retriever", "--settings").splitlines()
    assert "usage: vlkd eval retrieval" in vlkd("eval", "retrieval", "--help")
    vlkd("cp", "retriever", "mine.py")
    assert (tmp_path / "mine.py").read_bytes() == (ROOT / "tasks" / "retriever.py").read_bytes()
    assert vlkd("train", "mine.py", "--settings") == vlkd("train", "retriever", "--settings")


def test_a_command_is_installed(installed):
    (info,) = installed.glob("*.dist-info")
    assert "vlkd = vlkd.cli.main:main" in (info / "entry_points.txt").read_text()
    assert (info / "licenses" / "LICENSE").read_bytes() == (ROOT / "LICENSE").read_bytes()
