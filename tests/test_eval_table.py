from __future__ import annotations

import csv
import json

import pytest
from helpers.result_rows import error_row, result_row

from vlkd import recipes
from vlkd.errors import UserError
from vlkd.suite.results import append_row


def run(*words: str) -> None:
    recipes.load(recipes.find("eval", "table")).main(words)


@pytest.fixture
def results(tmp_path):
    folder = tmp_path / "results"
    for row in (result_row("large", "pets", 0.8), result_row("small", "pets", 0.4), error_row("small", "cars", "gone")):
        append_row(folder, row)
    return folder


def test_all_outputs(results, tmp_path, capsys):
    suite = tmp_path / "own.toml"
    suite.write_text(
        'title = "Own"\n[[data]]\nname = "pets"\n[[data]]\nname = "cars"\n'
        '[[aggregate]]\nname = "all"\ncount = 2\n[[aggregate]]\nname = "animals"\nnames = ["pets"]\ncount = 1\n'
    )
    files = {name: tmp_path / f"out/table.{name}" for name in ("csv", "markdown")}
    page = tmp_path / "page.html"
    run(
        str(results), "--suite", str(suite), "--teacher", "large", "--csv", str(files["csv"]),
        "--markdown", str(files["markdown"]), "--html", str(page), "--json",
    )  # fmt: skip
    printed = capsys.readouterr().out
    last = json.loads(printed.splitlines()[-1])
    assert last["models"] == ["large", "small"]
    assert last["results"][0]["scores"] == {"large": 0.8, "small": 0.4}
    assert last["results"][1]["scores"] == {"large": None, "small": None}
    assert last["aggregates_percent"]["animals"] == {"large": "80.0", "small": "40.0"}
    assert last["aggregates_percent"]["all"]["large"] == "1 of 2 data sets"
    assert files["markdown"].read_text() in printed
    with files["csv"].open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["dataset"], row["model_fullname"], row["acc1"]) for row in rows] == [
        ("pets", "large ", "0.8"), ("pets", "small ", "0.4"), ("cars", "small ", ""),
    ]  # fmt: skip
    assert "50.0" in page.read_text()


def test_results_of_several_folders_are_joined(results, tmp_path, capsys):
    append_row(tmp_path / "more", result_row("third", "pets", 0.3))
    run(str(results), str(tmp_path / "more" / "results.jsonl"), "--json")
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["models"] == ["large", "small", "third"]


def test_an_unknown_teacher_is_refused(results):
    with pytest.raises(UserError, match="no single model 'huge'; name one of large, small"):
        run(str(results), "--teacher", "huge")
