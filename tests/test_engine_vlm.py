"""Runs of generative models: one loss whatever the ranks and micro batches, stages, resume, refusals."""

from __future__ import annotations

import json

import pytest
import torch
from helpers.tiny_conversations import colour_batch
from helpers.tiny_vlms import write_timm_vlm
from helpers.vlm_ranks import NAMES, opened, run_vlm_rank, vlm_step, write_models
from helpers.vlm_runs import TAUGHT, config_of, lines, refused
from safetensors.torch import load_file

from vlkd import recipes
from vlkd.cli.main import main
from vlkd.config import override
from vlkd.data.conversation_sequence import ConversationBatch
from vlkd.engine.vlm import loop, run
from vlkd.engine.vlm.settings import StageSettings
from vlkd.engine.vlm.stages import wanted_stages
from vlkd.engine.vlm.step import parts_of
from vlkd.errors import UserError
from vlkd.models.label_masks import answer_positions
from vlkd.models.llava_spec import LlavaSpec
from vlkd.models.load_generative import build_vlm, load_generative
from vlkd.models.via_llava import load_llava

VARIANTS = {
    "stages": ("vlm", "projector.samples=1"),
    "alone": ("switch_kd", TAUGHT, "method.align=0", "method.switch=0"),
    "kl": ("switch_kd", TAUGHT, "method.switch=0", "method.match=kl", "train.checkpointing=true"),
    "reverse": ("switch_kd", TAUGHT, "method.switch=0", "method.match=reverse_kl", "train.micro_batch=5"),
    "taid": ("switch_kd", TAUGHT, "method.switch=0", "method.match=taid", "data.window=0"),
    "visual": ("switch_kd", TAUGHT, "method.align=0", "method.switch=0", "method.visual=1", "method.relation=1"),
    "three": ("switch_kd", TAUGHT, "projector.samples=1", "supervised.samples=1"),
}


@pytest.fixture(autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    write_models(folder)
    return folder


@pytest.mark.parametrize("micro_batch", [1, 4, 6])
def test_micro_batches_make_the_gradient_of_the_whole_batch(models, micro_batch):
    distiller = opened(models).eval()
    whole = vlm_step(distiller, NAMES)
    parts = vlm_step(distiller, NAMES, micro_batch=micro_batch)
    assert whole.keys() == parts.keys()
    for name, value in whole.items():
        torch.testing.assert_close(parts[name], value, rtol=1e-4, atol=1e-6, msg=name)


def test_two_ranks_make_the_gradient_of_one(models):
    torch.multiprocessing.spawn(run_vlm_rank, (models,), nprocs=2)
    alone = vlm_step(opened(models).eval(), NAMES)
    for rank in range(2):
        found = load_file(models / f"rank-{rank}.safetensors")
        for mode in ("split", "one empty"):
            for name, value in alone.items():
                torch.testing.assert_close(found[f"{mode}/{name}"], value, rtol=1e-4, atol=1e-6, msg=f"{mode} {name}")


@pytest.mark.parametrize("alone", [False, True])
def test_parts_keep_each_conversations_own_answers(models, alone):
    student = load_generative(models / "student")
    whole = colour_batch(NAMES, alone=alone, student=student)
    labels = whole.inputs["student"]["labels"]
    answers = answer_positions(labels).sum(dim=1)
    stored = torch.arange(len(NAMES)).repeat_interleave(answers)
    batch = ConversationBatch(**(vars(whole) | {"stored": {"values": stored}}))
    seen = []
    for part in parts_of(batch, 4):
        own = part.inputs["student"]
        assert own["mask"].any(dim=0).all(), "nothing but padding is left in a column"
        assert (own["labels"] != -100).sum() == answers[len(seen) : len(seen) + len(part.keys)].sum()
        rows = answer_positions(own["labels"]).nonzero()[:, 0] + len(seen)
        assert part.stored["values"].tolist() == rows.tolist()
        seen += part.keys
    assert seen == batch.keys


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_variant_runs_and_leaves_a_student(tmp_path, variant):
    recipe, *words = VARIANTS[variant]
    out = tmp_path / "run"
    main(["train", recipe, "smoke=true", *words, f"out={out}"])
    steps = [row for row in lines(out / "metrics.jsonl") if "loss" in row]
    stages = sum("samples=1" in word for word in words) + 1
    assert [row["step"] for row in steps] == list(range(1, 3 * stages + 1))
    terms = {name.removeprefix("loss/") for row in steps[-1:] for name in row if name.startswith("loss/")}
    expected = {"alone": set(), "stages": set(), "visual": {"visual", "relation"}, "three": {"align", "switch"}}
    assert terms == {"answers"} | expected.get(variant, {"align"})
    rows = lines(out / "results.jsonl")
    assert [row["role"] for row in rows] == (["student"] if recipe == "vlm" else ["student", "teacher"])
    assert rows[0]["tflop"] > 0
    assert len(rows[0]["stages"]) == stages
    assert len(lines(out / "answers-val.jsonl")) == rows[0]["counts"]["questions"]
    assert (out / "report.html").read_text().rstrip().endswith("</html>")
    load_llava(out / "student")


def test_a_projector_stage_moves_nothing_else(tmp_path):
    out = tmp_path / "run"
    main(["train", "vlm", "smoke=true", "projector.samples=1", "supervised.samples=0", f"out={out}"])
    before, after = (load_file(out / name / "model.safetensors") for name in ("start", "student"))
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved == {name for name in before if "multi_modal_projector" in name}


def test_the_vision_tower_may_learn_at_a_rate_of_its_own(tmp_path):
    """Its steps are so small that nothing moves, beside a language model that does."""
    out = tmp_path / "run"
    main(["train", "vlm", "smoke=true", "supervised.vision_lr=1e-30", f"out={out}"])
    before, after = (load_file(out / name / "model.safetensors") for name in ("start", "student"))
    still = {name for name in before if (before[name] - after[name]).abs().max() < 1e-20}
    assert still == {name for name in before if "vision_tower" in name}
    lr = json.loads((out / "config.json").read_text())["supervised"]["lr"]
    told = [(row["lr"], row["lr/vision"]) for row in lines(out / "metrics.jsonl") if "lr" in row]
    assert told
    assert all(seeing * lr == pytest.approx(rate * 1e-30, rel=1e-9, abs=0) for rate, seeing in told)


@pytest.mark.parametrize(("vision_lr", "share"), [(0.0, 1.0), (2e-4, 0.2), (2e-3, 2.0)])
def test_groups_of_the_optimiser(models, vision_lr, share):
    distiller = opened(models)
    groups = loop.rated_groups(distiller, StageSettings(lr=1e-3, vision_lr=vision_lr), 0.05)
    vision = {id(value) for value in distiller.student.part_parameters("vision")}
    found = {id(value): group for group in groups for value in group["params"]}
    trained = [value for value in distiller.parameters() if value.requires_grad]
    assert len(found) == sum(len(group["params"]) for group in groups) == len(trained)
    for value in trained:
        group = found[id(value)]
        assert group["share"] == pytest.approx(share if id(value) in vision else 1.0)
        assert group["weight_decay"] == (0.05 if value.ndim > 1 else 0.0)


def test_the_layout_of_convolutions_changes_no_loss(tmp_path, monkeypatch):
    """Both towers are in it, and the losses of a run are those of the plain layout."""
    layouts = []

    def noting(distiller, *rest):
        weights = [value for model in (distiller.student, distiller.teacher) for value in model.parameters()]
        layouts.append([one.is_contiguous(memory_format=torch.channels_last) for one in weights if one.ndim == 4])
        return loop.train(distiller, *rest)

    monkeypatch.setattr(run, "train", noting)
    losses = {}
    for last in ("true", "false"):
        main(["train", "switch_kd", "smoke=true", TAUGHT, f"train.channels_last={last}", f"out={tmp_path / last}"])
        losses[last] = [row["loss"] for row in lines(tmp_path / last / "metrics.jsonl") if "loss" in row]
    assert layouts == [[True, True], [False, False]]
    assert losses["true"] == pytest.approx(losses["false"], rel=1e-4)


def test_a_killed_run_goes_on_bit_for_bit(tmp_path, monkeypatch):
    words = ["train", "switch_kd", "smoke=true", TAUGHT, "supervised.samples=1", "train.save_steps=1"]
    words += ["distilled.vision_lr=3e-4"]
    main([*words, f"out={tmp_path / 'whole'}"])

    class Killed(Exception):
        pass

    calls = 0
    plain = loop.backward_step

    def dying(*args, **kwargs):
        nonlocal calls
        calls += 1
        if calls in (3, 7):
            raise Killed
        return plain(*args, **kwargs)

    monkeypatch.setattr(loop, "backward_step", dying)
    for _ in range(2):
        with pytest.raises(Killed):
            main([*words, f"out={tmp_path / 'killed'}"])
    main([*words, f"out={tmp_path / 'killed'}"])
    whole, killed = (load_file(tmp_path / name / "student" / "model.safetensors") for name in ("whole", "killed"))
    assert all(torch.equal(whole[key], killed[key]) for key in whole)
    steps = [[row["loss"] for row in lines(tmp_path / name / "metrics.jsonl") if "loss" in row]
             for name in ("whole", "killed")]  # fmt: skip
    assert steps[0] == steps[1]
    first, second = (lines(tmp_path / name / "results.jsonl")[0] for name in ("whole", "killed"))
    assert first["stages"].keys() == second["stages"].keys()
    assert first["tflop"] == second["tflop"]


def test_a_student_takes_the_teachers_tokenizer(tmp_path):
    out = tmp_path / "run"
    main(["train", "switch_kd", "smoke=true", TAUGHT, f"out={out}"])
    student, teacher = (load_generative(place) for place in (out / "student", tmp_path / "run-smoke-data" / "teacher"))
    assert student.tokenizer.get_vocab() == teacher.tokenizer.get_vocab()


@pytest.mark.parametrize("match", ["dbild", "kl"])
def test_a_stored_teacher_teaches_what_a_running_one_does(tmp_path, capsys, match):
    """All its tokens are stored, in float32; with fewer, it is said at the start what that changes."""
    given = config_of(
        tmp_path, "method.switch=0", f"method.match={match}", "train.log_steps=1", "teacher.see=0", "seed=3"
    )
    data, teacher = (next(word.partition("=")[2] for word in given if word.startswith(name))
                     for name in ("data.train=", "teacher.ref="))  # fmt: skip
    size = load_generative(teacher).vocabulary
    main(["cache", "answers", "--teacher", teacher, "--data", data, "--out", str(tmp_path / "stored"),
          "--top", str(size), "--dtype", "float32"])  # fmt: skip
    main([*given, f"out={tmp_path / 'running'}"])
    capsys.readouterr()
    main([*given, f"teacher.stored={tmp_path / 'stored'}"])
    told = capsys.readouterr().out
    assert f"its answers were stored as {size} of {size} tokens, which changes dbild by 0." in told
    assert "token_kl at tau 1 by 0.0%" in told
    running, stored = (lines(tmp_path / name / "metrics.jsonl") for name in ("running", "run"))
    losses = [[row["loss/align"] for row in rows if "loss/align" in row] for rows in (running, stored)]
    assert len(losses[0]) == 2
    assert losses[1] == pytest.approx(losses[0], rel=1e-2)
    assert min(losses[0]) > 1e-5
    seeing = ["teacher.see=16", f"teacher.stored={tmp_path / 'stored'}", f"out={tmp_path / 'blind'}"]
    assert "does not look at pictures" in refused(capsys, *given, *seeing)


def test_a_bridge_maps_another_width_and_stays_behind(tmp_path):
    given = config_of(tmp_path, "model.vision_width=32", "teacher.bridge=true", "teacher.see=0", "train.log_steps=1")
    main(given)
    state = load_file(next((tmp_path / "run" / "checkpoints" / "1-distilled").glob("step-*")) / "bridge.safetensors")
    assert state["weight"].shape == (16, 32)
    load_llava(tmp_path / "run" / "student")


def test_a_student_of_a_timm_vision_learns_from_a_teacher_of_one(tmp_path):
    sizes = {"language_width": 16, "language_layers": 1, "language_heads": 2, "context_length": 256, "image_size": 64}
    given = config_of(tmp_path, "model.vision=timm:test_efficientnet", "model.image_size=64", "teacher.see=0")
    texts = ["What is it?", "a red circle", "yes", "no"]
    torch.manual_seed(0)
    build_vlm(LlavaSpec(vision="timm:test_efficientnet", **sizes), tmp_path / "teacher", texts=texts)
    main([*given, f"teacher.ref={tmp_path / 'teacher'}"])
    student = load_generative(tmp_path / "run")
    assert student.visual_width == load_generative(tmp_path / "teacher").visual_width


@pytest.mark.parametrize("frozen", [False, True])
def test_batch_norms_may_keep_their_statistics(tmp_path, frozen):
    """While their weights learn, and after a look at validation questions too."""
    words = ["model.vision=timm:test_efficientnet", "model.image_size=64", "method.align=0", "method.switch=0"]
    given = config_of(tmp_path, *words, "teacher.see=0", f"distilled.freeze_batch_norm={frozen}")
    shown = next(word.partition("=")[2] for word in given if word.startswith("data.train="))
    main([*given, f"data.val={shown}", "train.validations=2", "train.val_questions=4"])
    before, after = (load_file(tmp_path / "run" / name / "model.safetensors") for name in ("start", "student"))
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    norms = {name.removesuffix("running_mean") for name in before if name.endswith("running_mean")}
    assert norms
    for name in norms:
        assert name + "weight" in moved
        assert (name + "running_mean" in moved, name + "running_var" in moved) == (not frozen, not frozen)


def test_parts_of_a_batch_are_the_whole_where_batch_norms_are_frozen(tmp_path):
    write_timm_vlm(tmp_path / "teacher", seed=1)
    write_timm_vlm(tmp_path / "student", seed=2, tokenizer=str(tmp_path / "teacher"))
    distiller = opened(tmp_path).train()

    def gap() -> float:
        whole, parts = (vlm_step(distiller, NAMES, micro_batch=size) for size in (0, 2))
        return max(float((whole[name] - value).abs().max()) for name, value in parts.items())

    assert gap() > 1e-3
    loop.freeze_batch_norm(distiller.student)
    assert distiller.student.training
    assert gap() < 1e-5


def test_stages_are_those_with_samples():
    recipe = recipes.load(recipes.find("tasks", "switch_kd"))
    config = override(recipe.config(), ["projector.samples=64"])
    assert [stage.name for stage in wanted_stages(recipe.stages(config), teacher="x", stored="")] == [
        "projector",
        "distilled",
    ]
    with pytest.raises(UserError, match="expected 0 or more"):
        recipe.stages(override(config, ["method.switch=-1"]))
