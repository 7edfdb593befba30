"""Names of teachers, ranges of settings, and what the command line says of them."""

from __future__ import annotations

import pytest

from vlkd import recipes
from vlkd.cli.train import described
from vlkd.config import override
from vlkd.engine.settings import Run, Teachers, Train, teacher_names
from vlkd.errors import UserError


@pytest.mark.parametrize(
    ("refs", "names"),
    [
        (["runs/lite0/student", "runs/lite2/student"], ("lite0", "lite2")),
        (["open_clip:ViT-B-16@datacomp_xl", "hf:google/siglip-base"], ("open_clip-ViT-B-16", "siglip-base")),
        (["x/ta/student", "y/ta/student", "z/other"], ("x-ta", "y-ta", "other")),
        (["/r/one/x/ta", "/r/two/x/ta"], ("one-x-ta", "two-x-ta")),
        (["a/ta-2", "a/ta", "b/ta"], ("ta-2", "a-ta", "b-ta")),
        (["same", "same"], ("same", "same-1")),
        (["models/v1.5"], ("v1-5",)),
        (["student", "runs/a/student"], ("student-1", "a")),
    ],
)
def test_names_are_short_and_unique_and_do_not_depend_on_the_order(refs, names):
    assert teacher_names(refs) == names
    if len(set(refs)) == len(refs):
        assert teacher_names(refs[::-1]) == names[::-1]


@pytest.mark.parametrize(
    ("assignment", "sentence"),
    [
        ("train.samples=0", "expected 1 or more"),
        ("train.batch_size=0", "expected 1 or more"),
        ("train.accumulate=-1", "expected 1 or more"),
        ("train.log_steps=0", "expected 1 or more"),
        ("train.lr=0", "expected 1e-12 or more"),
        ("train.ema=1", "expected 0 to 0.999999"),
        ("train.warmup=2", "expected 0 to 1"),
        ("teachers.bank=-1", "expected 0 or more"),
        ("teachers.views=-1", "expected 0 or more"),
    ],
)
def test_values_outside_their_range_are_refused_by_name(assignment, sentence):
    with pytest.raises(UserError, match=f"{assignment.partition('=')[0]}=.*: {sentence}"):
        override(Run(), [assignment])


@pytest.mark.parametrize("name", recipes.names("tasks"))
def test_every_setting_of_a_recipe_is_described(name):
    config = recipes.load(recipes.find("tasks", name)).config()
    sections = [config, *(value for value in vars(config).values() if hasattr(value, "__dataclass_fields__"))]
    for section in sections:
        fields = {key for key, value in vars(section).items() if not hasattr(value, "__dataclass_fields__")}
        meanings = described(section)
        assert fields <= meanings.keys(), f"{type(section).__name__}: {fields - meanings.keys()}"
        assert all(meanings[field] for field in fields)


def test_a_description_of_several_lines_is_one():
    assert described(Train())["accumulate"].startswith("parts in which each rank's batch passes the towers")
    assert described(Train())["accumulate"].endswith("(BatchNorm sees the parts).")
    assert "views=4" not in described(Teachers())["views"]
