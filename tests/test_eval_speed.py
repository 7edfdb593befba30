"""The `eval speed` command on tiny models; no figure of time is judged."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest
import timm
import torch
from helpers.tiny_models import tiny_composite
from safetensors.torch import save_file

from vlkd.errors import UserError
from vlkd.models.fingerprint import model_fingerprint
from vlkd.models.load import load
from vlkd.suite.results import read_results

SCRIPT = Path(__file__).parents[1] / "eval" / "speed.py"


@pytest.fixture
def command():
    spec = importlib.util.spec_from_file_location("eval_speed_under_test", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def refs(tmp_path):
    """A dual encoder and an image tower."""
    tiny_composite().save(tmp_path / "student")
    tower = timm.create_model("test_resnet")
    save_file(tower.state_dict(), str(tmp_path / "w.safetensors"))
    return [str(tmp_path / "student"), f"timm:test_resnet@{tmp_path / 'w.safetensors'}"]


def test_rows_can_be_read_as_results(command, refs, tmp_path, capsys):
    words = ["--model", *refs, "--batch-size", "2", "--seconds", "0.001", "--rounds", "2", "--json"]
    command.main([*words, "--out", str(tmp_path / "out")])
    command.main([*words, "--out", str(tmp_path / "out" / "results.jsonl")])
    printed = capsys.readouterr().out.splitlines()
    assert len((tmp_path / "out" / "results.jsonl").read_text().splitlines()) == 4
    rows = read_results(tmp_path / "out")
    assert rows == json.loads(printed[-1], parse_constant=pytest.fail)["results"]
    assert [row["model_ref"] for row in rows] == refs
    assert {(row["dataset"], row["protocol"], row["status"]) for row in rows} == {("speed", "speed", "ok")}
    student, tower = rows
    model = load(refs[0])
    assert student["fingerprint"] == model_fingerprint(model)
    assert student["parameters"] == sum(model.parameter_counts().values()) == student["metrics"]["parameters"]
    assert student["score"] == student["metrics"]["latency_ms_p50_1_thread"] > 0
    assert student["notes"]["throughput_batch"] == 2
    assert "flops_text" not in tower["metrics"]
    assert printed[-2].startswith(refs[1])
    assert " - " in printed[-2]
    assert torch.get_num_threads() == student["counts"]["threads"]


@pytest.mark.parametrize("seconds", ["0", "nan", "inf"])
def test_senseless_lengths_end_with_a_sentence(command, seconds):
    with pytest.raises(UserError, match=f"--seconds is {float(seconds)}; expected a number above 0"):
        command.main(["--model", "x", "--seconds", seconds])


def test_a_wrong_reference_is_refused_before_anything_is_loaded(command, refs, monkeypatch):
    monkeypatch.setattr("vlkd.models.load.load_image_encoder", lambda *_, **__: pytest.fail("loaded"))
    with pytest.raises(UserError, match="Found no model 'gone'"):
        command.main(["--model", refs[0], "gone"])
