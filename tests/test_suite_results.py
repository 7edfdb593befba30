"""Result lines: strict, appended whole, the latest counts, and values per item that belong to them."""

from __future__ import annotations

import json

import numpy as np
import pytest
from safetensors.numpy import save_file

from vlkd.errors import UserError
from vlkd.protocols.measured import Measured
from vlkd.suite.results import (
    append_row,
    error_columns,
    measured_columns,
    model_columns,
    read_items,
    read_results,
    write_items,
)


def measured(score: float = 0.5) -> Measured:
    return Measured(
        protocol="zero_shot",
        task="zeroshot_classification",
        metrics={"acc1": score, "ece": 0.1},
        main_metric="acc1",
        interval=(0.4, 0.6),
        random_score=0.1,
        counts={"images": 2},
        per_item={"correct": np.array([1.0, 0.0])},
        per_class={"dog": 1.0},
    )


def row(model: str = "m", dataset: str = "d", score: float = 0.5) -> dict:
    about = {"dataset": dataset, "model_ref": model, "language": "en", "data_hash": "h", "fingerprint": "f"}
    return {**model_columns(model), **about, **measured_columns(measured(score)), "items": None}


def test_a_row_is_a_superset_of_clip_benchmarks():
    found = json.loads(json.dumps(row("open_clip:ViT-B-32@openai"), allow_nan=False))
    assert {key: found[key] for key in ("model", "pretrained", "task", "language", "dataset")} == {
        "model": "ViT-B-32",
        "pretrained": "openai",
        "task": "zeroshot_classification",
        "language": "en",
        "dataset": "d",
    }
    assert found["metrics"] == {"acc1": 0.5, "ece": 0.1}
    assert found["score"] == 0.5
    assert model_columns("runs/a/student") == {"model": "runs/a/student", "pretrained": ""}


def test_a_figure_that_is_not_finite_never_reaches_a_row():
    with pytest.raises(AssertionError, match=r"\['acc1'\] are not finite"):
        measured(float("nan"))


def test_the_latest_line_counts_in_the_order_of_first_sight(tmp_path):
    for line in (row("a"), row("b"), row("a", score=0.75), row("a", "e")):
        append_row(tmp_path, line)
    found = read_results(tmp_path)
    assert [(one["model_ref"], one["dataset"], one["score"]) for one in found] == [
        ("a", "d", 0.75), ("b", "d", 0.5), ("a", "e", 0.5),
    ]  # fmt: skip
    assert read_results(tmp_path / "results.jsonl") == found


def test_half_a_line_of_a_killed_run_is_passed_over_and_cut_off(tmp_path):
    append_row(tmp_path, row("a"))
    file = tmp_path / "results.jsonl"
    whole = file.read_bytes()
    file.write_bytes(whole + whole[:40])
    assert [one["model_ref"] for one in read_results(tmp_path)] == ["a"]
    append_row(tmp_path, row("b"))
    assert [one["model_ref"] for one in read_results(tmp_path)] == ["a", "b"]
    assert len(file.read_bytes().splitlines()) == 2


@pytest.mark.parametrize("line", ["{", "[1]", '{"dataset": "d", "score": NaN}', '{"score": 1}'])
def test_lines_that_are_no_results_are_refused(tmp_path, line):
    (tmp_path / "results.jsonl").write_text(f"{line}\n")
    with pytest.raises(UserError, match=r"line 1 is no result"):
        read_results(tmp_path)
    with pytest.raises(UserError, match=r"no results at"):
        read_results(tmp_path / "nothing")


def test_an_error_row_has_empty_metrics_so_that_clip_benchmarks_build_can_read_it(tmp_path):
    columns = error_columns("zero_shot", "zeroshot_classification", "No folder.")
    append_row(tmp_path, row() | columns)
    (found,) = read_results(tmp_path)
    flat: dict = {}
    flat.update(found["metrics"])
    assert flat == {}
    assert (found["status"], found["error"], found["score"]) == ("error", "No folder.", None)


def test_items_come_back_and_refuse_another_run(tmp_path):
    line = row()
    line["items"] = write_items(tmp_path, line, measured().per_item, ["x", "y"])
    tensors, keys = read_items(tmp_path, line)
    assert tensors["correct"].tolist() == [1.0, 0.0]
    assert keys == ["x", "y"]
    with pytest.raises(UserError, match="another version of the model or of the data"):
        read_items(tmp_path, line | {"data_hash": "other"})
    with pytest.raises(UserError, match="no stored items"):
        read_items(tmp_path, line | {"items": None})
    # A row may come from anywhere: its path never leaves the folder of items.
    save_file({"correct": np.ones(1)}, str(tmp_path / "outside.safetensors"))
    with pytest.raises(UserError, match="no stored items"):
        read_items(tmp_path, line | {"items": "../outside.safetensors"})
