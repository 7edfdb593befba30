"""Finding, describing and running the shipped files by name and the user's own by path."""

from __future__ import annotations

import ast
import sys
from pathlib import Path

import pytest

from vlkd import recipes
from vlkd.errors import UserError

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize("kind", recipes.KINDS)
def test_names_are_the_checkouts_files(kind):
    assert recipes.folder(kind) == ROOT / kind
    assert recipes.names(kind) == sorted(path.name[:-3] for path in (ROOT / kind).iterdir() if path.suffix == ".py")
    assert recipes.names(kind)


def test_an_installed_package_uses_its_own_copy(monkeypatch, tmp_path):
    monkeypatch.setattr(recipes, "_PACKAGE", tmp_path / "site-packages" / "vlkd")
    assert recipes.folder("tasks") == tmp_path / "site-packages" / "vlkd" / "_shipped" / "tasks"
    # A stranger's folder of the same name beside the package is not ours.
    (tmp_path / "site-packages" / "tasks").mkdir(parents=True)
    assert recipes.folder("tasks").parent.name == "_shipped"


def test_find_by_name_and_by_path(tmp_path):
    assert recipes.find("data_prep", "captions") == ROOT / "data_prep" / "captions.py"
    own = tmp_path / "mine.py"
    own.write_text("x = 1\n")
    assert recipes.find("tasks", str(own)) == own


def test_what_is_not_there_is_refused_with_a_hint(tmp_path):
    with pytest.raises(UserError, match=r"called 'caption'; there are .*Did you mean 'captions'"):
        recipes.find("data_prep", "caption")
    with pytest.raises(UserError, match=r"There is no file .*gone.py; `vlkd cp"):
        recipes.find("tasks", str(tmp_path / "gone.py"))


@pytest.mark.parametrize("kind", recipes.KINDS)
def test_every_shipped_file_has_a_one_sentence_summary_that_needs_no_import(kind):
    for name in recipes.names(kind):
        path = recipes.find(kind, name)
        found = recipes.summary(path)
        assert found.endswith("."), name
        assert found == (ast.get_docstring(ast.parse(path.read_text())) or "").splitlines()[0]


def test_summary_does_not_run_the_file(tmp_path):
    own = tmp_path / "mine.py"
    own.write_text('"""First line.\n\nMore."""\nraise RuntimeError\n')
    assert recipes.summary(own) == "First line."
    own.write_text("raise RuntimeError\n")
    assert recipes.summary(own) == ""


def test_load_runs_a_file_under_a_private_name(tmp_path):
    own = tmp_path / "json.py"
    own.write_text(
        "from __future__ import annotations\nfrom dataclasses import dataclass\n"
        "@dataclass(frozen=True)\nclass Settings:\n    value: int = 3\n"
    )
    import json

    module = recipes.load(own)
    assert module.Settings().value == 3
    assert module.__name__ == "_vlkd_run_json"
    assert sys.modules["json"] is json
