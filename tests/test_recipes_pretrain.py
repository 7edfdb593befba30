"""Streaming pretraining as users run it: mixtures, sigmoid loss, teachers online and cached, skipped updates."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from vlkd import recipes
from vlkd.cli.main import main
from vlkd.config import override
from vlkd.data.scenes import generate_scenes
from vlkd.data.shards import write_shards
from vlkd.errors import UserError
from vlkd.models.load import load
from vlkd.objectives import info_nce, siglip

SMALL = [
    "model.image=test_vit", 'model.image_kwargs={"img_size":32}', "model.image_size=32", "model.text_width=32",
    "model.text_layers=1", "model.text_heads=2", "model.width=16", "train.device=cpu", "train.batch_size=16",
    "train.samples=96", "train.log_steps=1", "train.ema=0", "report.teachers=false",
]  # fmt: skip
SIGLIP = ["method.loss=siglip", "model.logit_bias=-10", "model.logit_scale=10"]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Two sources of shards, a held-out one, a teacher, a folder of classes."""
    root = tmp_path_factory.mktemp("pretrain")
    for name, split, count in (("one", "train", 34), ("two", "train", 22), ("val", "val", 12)):
        seed = 1 if name == "two" else 0
        scenes = generate_scenes("shapes", count=count, seed=seed, split=split, image_size=48)
        write_shards(scenes, root / name, samples_per_shard=9)
    main(["train", "retriever", "smoke=true", f"out={root / 'teacher'}"])
    for number, name in enumerate(("red", "blue")):
        (root / "classes" / name).mkdir(parents=True)
        for copy in range(2):
            Image.new("RGB", (40, 40), (255 - 250 * number, 0, 250 * number + copy)).save(
                root / "classes" / name / f"{copy}.png"
            )
    return root


def words(place: Path, out: str, *more: str) -> list[str]:
    sources = f"data.train={place}/one,{place}/two"
    return ["train", "pretrain", sources, f"data.val={place}/val", f"out={place / out}", *SMALL, *more]


def logged(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def terms(*assignments: str):
    recipe = recipes.load(recipes.find("tasks", "pretrain"))
    return recipe.terms(override(recipe.config(), assignments))


def test_the_loss_is_chosen_by_name():
    (clip,) = terms()
    (sigmoid,) = terms(*SIGLIP)
    assert (clip.objective, sigmoid.objective) == (info_nce, siglip)
    assert set(sigmoid.features) - set(clip.features) == {"student.logit_bias"}
    assert clip.by_rows
    assert sigmoid.by_rows
    names = [term.name for term in terms("teachers.refs=a,b", "method.matching=2", "method.relational=1")]
    assert names == [
        "contrastive",
        *(f"{t}/{part}" for t in "ab" for part in ("match_image", "match_text", "relational")),
    ]


@pytest.mark.parametrize(
    ("assignments", "message"),
    [
        (["method.matching=1"], "name one with teachers.refs"),
        (["teachers.refs=a"], "matched by no term"),
        (["method.loss=siglip"], "add model.logit_bias=-10 model.logit_scale=10"),
    ],
)
def test_what_does_not_fit_is_refused(assignments, message):
    with pytest.raises(UserError, match=message):
        terms(*assignments)


def test_a_weighted_mixture_is_watched_and_told(place, capsys):
    main(words(place, "mixed", "data.weights=1,3", f"data.zero_shot={place}/classes", *SIGLIP, "train.accumulate=2"))
    told = capsys.readouterr().out
    coverage = [json.loads(line) for line in (place / "mixed" / "coverage.jsonl").read_text().splitlines()]
    assert [part["rows"] for part in coverage] == [34, 22]
    assert sum(part["drawn"] for part in coverage) == 96
    assert coverage[1]["drawn"] > coverage[0]["drawn"]
    assert f"of 22 samples were drawn, {coverage[1]['epochs']:.2f} times" in told
    rows = logged(place / "mixed")
    assert len([row for row in rows if "loss" in row]) == 6
    for row in rows:
        if "loss" in row:
            assert sum(value for name, value in row.items() if name.startswith("time/")) == pytest.approx(1)
    assert 0 <= rows[-1]["val/zero-shot/pretrain0-classes/acc1"] <= 1
    model = load(str(place / "mixed" / "student"))
    assert "logit_bias" in model.provides
    assert float(model.scale_features()["logit_bias"].detach()) != -10


def test_streamed_teachers_give_the_same_beside_the_student_and_from_a_cache(place):
    taught = [f"teachers.refs={place / 'teacher' / 'student'}", "method.matching=2", "teachers.dtype=float32"]
    taught += ["views.flip=0", f"teachers.folder={place / 'cache'}", "train.samples=48"]
    main(words(place, "online", *taught, "teachers.views=0"))
    main(words(place, "cached", *taught, "teachers.views=2", "data.workers=1"))
    online, cached = (logged(place / name) for name in ("online", "cached"))
    assert len(online) == len(cached) == 4
    for expected, found in zip(online, cached, strict=True):
        for name in expected:
            if name.startswith("loss"):
                assert found[name] == pytest.approx(expected[name], abs=1e-4), name


SPIKING = """
import torch
from dataclasses import replace
from vlkd import recipes
pretrain = recipes.load(recipes.find("tasks", "pretrain"))
config = pretrain.config
calls = []

def terms(cfg):
    (term,) = pretrain.terms(cfg)
    def spiking(*features, **options):
        calls.append(0)
        return term.objective(*features, **options) * (torch.nan if len(calls) in (2, 5) else 1.0)
    return (replace(term, objective=spiking),)
"""


def test_a_loss_that_is_not_finite_is_skipped_with_a_guard_and_ends_the_run_without(place, capsys):
    recipe = place / "spiking.py"
    recipe.write_text(SPIKING)
    command = words(place, "spikes", "train.spike_factor=8")
    command[1] = str(recipe)
    main(command)
    rows = [json.loads(line) for line in (place / "spikes" / "spikes.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [2, 5]
    assert len(rows[0]["keys"]) == 16
    assert "Skipped updates: 2" in capsys.readouterr().out
    weights = load_file(str(place / "spikes" / "student" / "model.safetensors"))
    assert all(torch.isfinite(value).all() for value in weights.values())
    command = words(place, "ended")
    command[1] = str(recipe)
    with pytest.raises(SystemExit):
        main(command)
    assert "a loss that is not finite (contrastive = nan)" in capsys.readouterr().err


def test_checkpoints_come_by_steps(place):
    main(words(place, "steps", "train.save_steps=4", "train.save_minutes=1000"))
    found = [path.name for path in sorted((place / "steps" / "checkpoints").iterdir())]
    assert found == ["step-00000004", "step-00000006"]
    state = json.loads((place / "steps" / "checkpoints" / found[0] / "state.json").read_text())
    assert state["stream"]["samples"] == 64
    assert state["stream"]["epoch"] == 64 // 56
    assert {"seed", "plan", "data"} <= state["stream"].keys()
