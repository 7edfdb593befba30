"""The tree keeps its own rules: imports point one way, files stay small, the README lists what there is."""

from __future__ import annotations

import ast
import graphlib
import re
import subprocess
import sys
import tomllib
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from vlkd.cli.main import VERBS

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "vlkd"
RUN_FOLDERS = ("tasks", "data_prep", "eval", "scripts")
SHIPPED_FOLDERS = RUN_FOLDERS[:3]

LAW: dict[str, set[str]] = {
    "__init__": {"models"},
    "errors": set(),
    "compat": set(),
    "config": {"errors"},
    "recipes": {"errors"},
    "features": {"errors"},
    "weighting": {"features", "errors"},
    "objectives": {"features", "errors"},
    "models": {"features", "errors", "compat"},
    "data": {"features", "errors"},
    "metrics": {"features", "errors"},
    "active": {"errors"},
    "retrieval": {"metrics", "features", "errors"},
    "lmms_eval": {"models", "features", "errors"},
    "protocols": {"retrieval", "metrics", "features", "errors"},
    "report": {"features", "errors"},
    "suite": {"protocols", "models", "data", "retrieval", "metrics", "report", "features", "errors", "recipes"},
    "distill": {"objectives", "weighting", "models", "data", "features", "errors"},
    "engine": {
        "__init__", "distill", "objectives", "weighting", "models", "data", "features", "errors",
        "config", "recipes", "metrics", "retrieval", "report", "protocols",
    },
    "cli": {
        "__init__", "engine", "distill", "models", "data", "features", "errors",
        "config", "recipes", "metrics", "retrieval", "report", "active",
    },
}  # fmt: skip
"""What each room, a folder or a file of vlkd/, may import of the others; `__init__` holds the version and `load`."""

MAX_FILE, MAX_FUNCTION, MAX_LOOP = 350, 80, 120
LOOPS = ("vlkd/engine/loop.py", "vlkd/engine/classify/loop.py", "vlkd/engine/vlm/loop.py")


def room_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def rooms() -> set[str]:
    return {room_of(path) for path in PACKAGE.rglob("*.py")}


def run_files() -> list[Path]:
    return sorted(path for folder in RUN_FOLDERS for path in (ROOT / folder).rglob("*.py"))


def source_files() -> list[Path]:
    return sorted(PACKAGE.rglob("*.py")) + run_files()


def imported(path: Path) -> Iterator[str]:
    """Every imported name in full, also of imports inside functions and for type checkers."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} imports relatively; a room is named in full"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def imported_rooms(path: Path) -> set[str]:
    inside = [name.split(".") for name in imported(path) if name.split(".")[0] == "vlkd"]
    return {parts[1] if len(parts) > 1 and parts[1] in rooms() else "__init__" for parts in inside}


def shown(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def test_every_room_stands_in_the_law():
    assert rooms() == set(LAW)


def test_the_law_has_one_direction():
    # `__init__` is left out: its `load` is imported on first use only.
    graph = {room: {other for other in allowed if other != "__init__"} for room, allowed in LAW.items()}
    del graph["__init__"]
    order = list(graphlib.TopologicalSorter(graph).static_order())
    chain = ["errors", "features", "objectives", "distill", "engine", "cli"]
    assert [room for room in order if room in chain] == chain
    for room in ("retrieval", "metrics", "report"):
        assert not LAW[room] & {"cli", "engine", "distill", "objectives", "weighting", "models", "data"}
    for room in ("protocols", "suite"):
        assert not LAW[room] & {"cli", "engine", "distill", "objectives", "weighting"}


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=shown)
def test_imports_keep_the_law(path):
    room = room_of(path)
    assert imported_rooms(path) - {room} <= LAW[room]


@pytest.mark.parametrize("path", run_files(), ids=shown)
def test_run_files_import_the_library_and_never_each_other(path):
    neighbours = {*RUN_FOLDERS, *(other.stem for other in path.parent.glob("*.py"))}
    outside = {name.split(".")[0] for name in imported(path)} - set(sys.stdlib_module_names)
    assert not neighbours & outside


def test_run_folders_are_no_packages_and_the_library_never_imports_them():
    for folder in RUN_FOLDERS:
        assert not (ROOT / folder / "__init__.py").exists()
    for path in PACKAGE.rglob("*.py"):
        assert not {name.split(".")[0] for name in imported(path)} & set(RUN_FOLDERS)


@pytest.mark.parametrize("path", source_files(), ids=shown)
def test_sizes(path):
    source = path.read_text(encoding="utf-8")
    assert source.count("\n") <= MAX_FILE
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            lines = (node.end_lineno or 0) - node.lineno + 1
            loop = shown(path) in LOOPS and node.name == "train"
            assert lines <= (MAX_LOOP if loop else MAX_FUNCTION), f"{node.name} has {lines} lines"


@pytest.mark.parametrize("path", source_files(), ids=shown)
def test_nothing_branches_on_the_name_of_a_method(path):
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Compare) and isinstance(node.ops[0], ast.Eq | ast.In):
            left = node.left
            name = left.attr if isinstance(left, ast.Attribute) else getattr(left, "id", "")
            assert name not in ("method", "method_name"), f"line {node.lineno}: a method is data, its terms"


@pytest.mark.parametrize("path", source_files(), ids=shown)
def test_nothing_is_unpickled(path):
    """Any file may be hostile: no pickle, no `torch.load`, and `numpy.load` without objects."""
    names = set(imported(path))
    assert not {name for name in names if name.split(".")[0] in ("pickle", "dill", "joblib", "shelve", "marshal")}
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "load":
            owner = getattr(node.func.value, "id", "")
            assert owner != "torch"
            if owner in ("np", "numpy"):
                allowed = {key.arg: getattr(key.value, "value", None) for key in node.keywords}
                assert allowed.get("allow_pickle") is False


def test_the_readme_lists_every_file():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    blocks = re.findall(r"^## Files\n.*?^```\w*\n(.*?)^```", text, flags=re.DOTALL | re.MULTILINE)
    assert len(blocks) == 1, "the README has a section `Files` with a fenced tree"
    listed = Counter(re.findall(r"(?<![\w.])(\w+\.py)\b", blocks[0]))
    there = Counter(path.name for path in source_files() if path.name != "__init__.py")
    listed.pop("__init__.py", None)
    assert listed == there


HELP = """
import contextlib, io, sys
from vlkd.cli.main import main
out = io.StringIO()
with contextlib.redirect_stdout(out), contextlib.suppress(SystemExit):
    main(sys.argv[1:])
assert "examples:\\n  " in out.getvalue(), out.getvalue()
assert out.getvalue().split("examples:\\n")[1].count("\\n  ") >= 1, "two examples"
heavy = {"torch", "torchvision", "transformers", "timm", "open_clip", "faiss", "accelerate"} & set(sys.modules)
sys.exit(f"imports {heavy}" if heavy else 0)
"""


def help_calls() -> list[list[str]]:
    calls = [["--help"], *([verb, "--help"] for verb in VERBS)]
    for folder, verb in (("data_prep", "prep"), ("eval", "eval")):
        calls += [[verb, path.stem, "--help"] for path in sorted((ROOT / folder).glob("*.py"))]
    return calls


@pytest.mark.parametrize("words", help_calls(), ids=" ".join)
def test_help_never_imports_torch_and_ends_with_examples(words):
    done = subprocess.run([sys.executable, "-c", HELP, *words], capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr


def test_ls_reads_docstrings_without_importing():
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "vlkd.cli.main", "ls"],
        capture_output=True, text=True, cwd=ROOT, check=True,
    )  # fmt: skip
    assert not re.search(r"\| +torch\b", done.stderr)
    for folder in SHIPPED_FOLDERS:
        for path in (ROOT / folder).glob("*.py"):
            summary = (ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or "").partition("\n")[0]
            assert re.search(rf"^  {path.stem} +{re.escape(summary)}$", done.stdout, flags=re.MULTILINE)
            assert summary


def test_every_folder_of_the_library_is_packaged():
    claimed = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]["packages"]
    folders = {".".join(path.parent.relative_to(ROOT).parts) for path in PACKAGE.rglob("__init__.py")}
    assert folders == {name for name in claimed if not name.startswith("vlkd._shipped.")}
