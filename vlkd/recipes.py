"""Where the files that are run lie (`tasks/`, `data_prep/`, `eval/`), and how one is loaded by path."""

from __future__ import annotations

import ast
import difflib
import importlib.util
import sys
from pathlib import Path
from types import ModuleType

from vlkd.errors import UserError

KINDS = ("tasks", "data_prep", "eval")
_PACKAGE = Path(__file__).resolve().parent


def folder(kind: str) -> Path:
    """The checkout's folder if vlkd runs from one, else the copy inside the installed package."""
    checkout = _PACKAGE.parent / kind
    return (
        checkout
        if checkout.is_dir() and (_PACKAGE.parent / "pyproject.toml").is_file()
        else _PACKAGE / "_shipped" / kind
    )


def names(kind: str) -> list[str]:
    """What can be run, by file name."""
    return sorted(path.stem for path in folder(kind).glob("*.py"))


def find(kind: str, name: str) -> Path:
    """The file of a shipped name, or the user's own file.

    Raises:
        UserError: there is neither; the sentence lists the names.
    """
    own = Path(name)
    if own.suffix == ".py":
        if own.is_file():
            return own
        raise UserError(f"There is no file {name}; `vlkd cp {names(kind)[0]} {name}` makes one to edit.")
    path = folder(kind) / f"{name}.py"
    if not path.is_file():
        close = difflib.get_close_matches(name, names(kind), n=1)
        hint = f" Did you mean {close[0]!r}?" if close else ""
        raise UserError(f"Nothing in {kind} is called {name!r}; there are {', '.join(names(kind))}.{hint}")
    return path


def summary(path: Path) -> str:
    """The first line of a file's docstring, read without importing it."""
    docstring = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
    return docstring.partition("\n")[0]


def load(path: Path) -> ModuleType:
    """Run a file as a module under a private name, so that no top-level name is claimed."""
    name = f"_vlkd_run_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    # Dataclasses look their module up by name while they are made.
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module
