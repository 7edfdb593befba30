"""What is refused before a suite begins, and what only loading can tell."""

from __future__ import annotations

import pytest

from vlkd.errors import UserError
from vlkd.suite.job import check_references


@pytest.fixture(autouse=True)
def place(tmp_path, monkeypatch):
    (tmp_path / "run" / "student").mkdir(parents=True)
    (tmp_path / "run" / "student" / "model.json").write_text("{")
    (tmp_path / "empty").mkdir()
    (tmp_path / "w.safetensors").write_bytes(b"")
    monkeypatch.chdir(tmp_path)


def test_what_may_be_a_model_is_left_to_loading():
    check_references([
        "run/student", "open_clip:ViT-B-32@openai", "open_clip:ViT-B-32@w.safetensors", "hf:openai/clip-vit-base",
        "hf:./run", "timm:resnet18", "timm:resnet18@w.safetensors",
        "run/student + open_clip:ViT-B-32@openai",
    ])  # fmt: skip


@pytest.mark.parametrize(
    ("ref", "sentence"),
    [
        ("nowhere", "Found no model 'nowhere'; expected a folder"),
        ("", "Found no model ''; expected a folder"),
        ("run/student + nowhere", "Found no model 'nowhere'; expected a folder"),
        ("open_clip:", "Found no model 'open_clip:'"),
        ("open_clip:ViT-B-32@gone.safetensors", "There is no file gone.safetensors for open_clip:"),
        ("timm:resnet18@gone.safetensors", "There is no file gone.safetensors for timm:"),
        ("hf:/nowhere/clip", "There is no folder /nowhere/clip"),
        ("run", "is a run's folder, expected a model; its model is 'run/student'"),
        ("empty", "holds none of model.json"),
    ],
)
def test_what_cannot_be_one_is_refused(ref, sentence):
    with pytest.raises(UserError, match=sentence):
        check_references(["run/student", ref])


def test_all_that_is_wrong_is_named():
    with pytest.raises(UserError, match=r"^2 of the 3 models cannot be loaded: .*'a'.*'b'"):
        check_references(["a", "run/student", "b"])
