"""Who may have an output folder, and which settings a recipe refuses."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from vlkd import recipes
from vlkd.config import override
from vlkd.engine.run import claim_folder
from vlkd.engine.settings import Run, Train
from vlkd.errors import UserError


def test_a_corrected_command_may_have_the_folder_of_one_that_never_began(tmp_path):
    first = Run(out=str(tmp_path / "run"))
    claim_folder(first)
    corrected = replace(first, train=Train(lr=0.5))
    claim_folder(corrected)
    assert json.loads((tmp_path / "run" / "config.json").read_text())["train"]["lr"] == 0.5


def test_a_folder_where_training_began_keeps_its_settings(tmp_path):
    first = Run(out=str(tmp_path / "run"))
    claim_folder(first)
    (tmp_path / "run" / "metrics.jsonl").write_text("")
    claim_folder(first)
    with pytest.raises(UserError, match=r"train\.lr: 0\.001 -> 0\.5"):
        claim_folder(replace(first, train=Train(lr=0.5)))


def test_a_folder_of_something_else_is_refused(tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(UserError, match="files that are no run's"):
        claim_folder(Run(out=str(tmp_path)))


@pytest.mark.parametrize(
    ("assignments", "sentence"),
    [
        (["method.matching=1"], "name one with teachers.refs"),
        (["teachers.refs=somewhere"], "matched by no term"),
    ],
)
def test_weights_and_teachers_go_together(assignments, sentence):
    recipe = recipes.load(recipes.find("tasks", "retriever"))
    with pytest.raises(UserError, match=sentence):
        recipe.terms(override(recipe.config(), assignments))
