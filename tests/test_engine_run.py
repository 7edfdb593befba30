"""Who may have an output folder, and which settings a recipe refuses."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from helpers.distilling import TEXTS, tiny_teachers
from helpers.pairs import picture_pairs

from vlkd import recipes
from vlkd.config import override
from vlkd.data.sources import open_pairs
from vlkd.engine.folder import claim_folder
from vlkd.engine.run import build_student, check_names, planned, weighting_of
from vlkd.engine.settings import Data, Run, Train
from vlkd.engine.smoke import shrink_to_smoke
from vlkd.engine.teaching import check_teacher, frozen_towers
from vlkd.errors import UserError
from vlkd.weighting import Fixed, GradientBalanced, LossRelative


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
    (tmp_path / "run" / "metrics.jsonl").write_text('{"step": 1}\n')
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


def _nan(model):
    model.image_projection[0].weight[0, 0] = float("nan")


def _zero(model):
    model.text_projection[0].weight.zero_()


def _constant(model):
    # Every image's pooled vector is the same: the last normalisation has no gain, only a shift.
    for module in model.image_tower.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.weight.zero_()
            module.bias.fill_(0.1)


@pytest.mark.parametrize(
    ("break_it", "sentence"), [(_nan, "NaN"), (_zero, "length zero"), (_constant, "same for differing inputs")]
)
def test_a_broken_teacher_is_refused_before_the_first_step(break_it, sentence, tmp_path):
    model = tiny_teachers()["one"]
    with torch.no_grad():
        break_it(model)
    with pytest.raises(UserError, match=sentence):
        check_teacher("one", model, picture_pairs(tmp_path, TEXTS))


@pytest.mark.parametrize(
    ("assignments", "rule", "alpha"),
    [
        ([], GradientBalanced, None),
        (["method.weighting=relative"], LossRelative, [0.5, 0.5]),
        (["method.weighting=fixed"], Fixed, [0.5, 0.5]),
        (["method.weighting=fixed", "teachers.weights=1,3"], Fixed, [0.25, 0.75]),
    ],
)
def test_the_recipe_chooses_the_weighting(assignments, rule, alpha):
    recipe = recipes.load(recipes.find("tasks", "ammkd"))
    weighting = weighting_of(recipe, override(recipe.config(), ["teachers.refs=a,b", *assignments]))
    assert type(weighting) is rule
    if alpha:
        assert list(weighting.weigh("image", [1.0, 2.0], None)) == alpha


def test_a_bound_below_the_mean_is_the_mean():
    recipe = recipes.load(recipes.find("tasks", "ammkd"))
    weighting = weighting_of(recipe, override(recipe.config(), ["teachers.refs=a,b", "method.bound=0.3"]))
    assert list(weighting.weigh("image", [1.0, 2.0], np.diag([1.0, 9.0]))) == [0.5, 0.5]


def test_an_unreadable_picture_does_not_end_the_check_of_a_teacher(tmp_path, capsys):
    check_teacher("one", tiny_teachers()["one"], picture_pairs(tmp_path, TEXTS, broken=(0, 3)))
    assert "on 3 pairs" in capsys.readouterr().out
    with pytest.raises(UserError, match="no readable training image"):
        check_teacher("one", tiny_teachers()["one"], picture_pairs(tmp_path / "all", TEXTS, broken=range(8)))


def test_sources_of_one_short_name_are_refused(tmp_path):
    config = Run(data=Data(train=("a/coco/train", "b/coco/train")))
    with pytest.raises(UserError, match=r"data\.train: a/coco/train and b/coco/train have the same"):
        check_names(config)


def test_weights_that_would_not_be_used_are_refused():
    recipe = recipes.load(recipes.find("tasks", "ammkd"))
    config = override(recipe.config(), ["teachers.refs=a,b", "teachers.weights=1,2"])
    with pytest.raises(UserError, match=r"method\.weighting=fixed, found balanced"):
        weighting_of(recipe, config)


@pytest.mark.parametrize("words", [[], ["method.fusion=1"]])
def test_frozen_towers_do_not_depend_on_their_projections(words, tmp_path):
    """A second run with other projections reads what the first stored; other features are stored beside it."""
    recipe = recipes.load(recipes.find("tasks", "prepare_teacher"))
    config = shrink_to_smoke(override(recipe.config(), [f"out={tmp_path / 'run'}"]))
    sources = {ref: open_pairs(ref) for ref in config.data.train}
    accelerator = Accelerator(cpu=True)
    table = next(iter(sources.values()))
    student = build_student(config, table, planned(config, [table]), tmp_path / "run")
    frozen_towers(config, student, recipe.terms(config), sources, accelerator)
    with torch.no_grad():
        student.image_projection[0].linear.weight.add_(1)
    again = override(config, words)
    towers = frozen_towers(again, student, recipe.terms(again), sources, accelerator)
    folders = list((tmp_path / "run-smoke-data" / "features").iterdir())
    assert len(folders) == 1 + bool(words)
    assert ("image.tokens" in towers.provides) == bool(words)
    with torch.no_grad():
        next(student.image_tower.parameters()).add_(1)
    frozen_towers(again, student, recipe.terms(again), sources, accelerator)
    assert len(list((tmp_path / "run-smoke-data" / "features").iterdir())) == 2 + bool(words)
