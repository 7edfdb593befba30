"""Runs of classifiers: gradients, the mix, streams, resume, and that no test image chooses anything."""

from __future__ import annotations

import itertools
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.class_ranks import MODES, WHOLE, class_step, run_class_rank
from helpers.classes import CLASSES, KnownTeacher, known_vectors, tiny_classifier
from helpers.tiny_models import tiny_composite, tiny_images
from PIL import Image
from safetensors.torch import load_file, save_file
from test_distill_class import BATCHES, LABELS, ZETA, distiller

from vlkd.cli.main import main
from vlkd.data.labelled import open_labelled
from vlkd.distill.class_distiller import ClassDistiller
from vlkd.distill.class_teacher import ClassTeacher
from vlkd.engine.classify import loop
from vlkd.engine.classify.compute import forward_flop
from vlkd.engine.classify.embedded import embedded
from vlkd.engine.classify.mix import ALPHAS, BETAS, choose_mix
from vlkd.engine.classify.smoke import draw_classes
from vlkd.engine.classify.step import backward_step, group_gradients
from vlkd.engine.smoke import untrained_teacher
from vlkd.models.classifier import load_classifier

VARIANTS = {
    "labels": ["method.distillation=0"],
    "teacher": ["teacher.ref=x", "method.supervised=0"],
    "one-head": ["teacher.ref=x", "model.heads=one"],
    "features": ["teacher.ref=x", "model.heads=one", "method.match=features"],
    "pcgrad": ["teacher.ref=x", "model.heads=one", "method.surgery=true", "train.conflicts=true"],
    "auxiliary": ["teacher.ref=x", "method.match=binary", "mix.tune=false", "mix.alpha=1"],
    "online": ["teacher.ref=x", "teacher.views=0", "teacher.few_shot=true"],
    "language": ["teacher.ref=x", "model.start=y", "model.language_init=true", "model.align=true"],
}


@pytest.fixture(autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


class Alone:
    """Stands in for an accelerator on one process without autocast."""

    def autocast(self):
        return torch.autocast("cpu", enabled=False)


def flat(gradients: dict, parameters: list) -> np.ndarray:
    found = [gradients.get(one, torch.zeros_like(one)).double().flatten() for one in parameters]
    return torch.cat(found).numpy()


def steps_of(folder: Path) -> list[dict]:
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [row for row in rows if "loss" in row]


def results_of(folder: Path, split: str, role: str = "student") -> dict:
    rows = [json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines()]
    return next(row for row in rows if (row["split"], row["role"]) == (split, role))


@pytest.mark.parametrize("heads", ["one", "two"])
def test_the_conflict_is_the_cosine_of_the_two_gradients(heads):
    found = distiller(heads=heads).eval()
    step = backward_step(found, BATCHES, Alone(), conflicts=True)
    gradients = group_gradients(found, found.sums(found(BATCHES)))
    student = found.student
    places = {
        "trunk": list(student.trunk_parameters()),
        "heads": list({*student.head_parameters("label"), *student.head_parameters("teacher")}),
    }
    for place, parameters in places.items():
        first, second = (flat(gradients[group], parameters) for group in ("supervised", "distillation"))
        expected = first @ second / np.linalg.norm(first) / np.linalg.norm(second)
        assert step.figures[f"conflict/{place}"] == pytest.approx(expected, abs=1e-5)
    assert (step.figures["conflict/heads"] == 0) == (heads == "two")


def test_surgery_is_pcgrad_of_the_whole_gradients():
    found = distiller("method.supervised=4", heads="one").eval()
    found.teacher = ClassTeacher(KnownTeacher(), -known_vectors(), ZETA / 5)
    gradients = group_gradients(found, found.sums(found(BATCHES)))
    every = list(found.parameters())
    first, second = (flat(gradients[group], every) for group in ("supervised", "distillation"))
    dot = min(first @ second, 0.0)
    expected = first - dot / (second @ second) * second + second - dot / (first @ first) * first
    found.zero_grad()
    backward_step(found, BATCHES, Alone(), surgery=True)
    got = flat({one: one.grad for one in every if one.grad is not None}, every)
    np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-7)


def test_the_mix_is_the_best_of_the_whole_grid():
    generator = torch.Generator().manual_seed(3)
    label, teacher = (2 * torch.randn(60, len(CLASSES), generator=generator) for _ in range(2))
    labels = torch.randint(0, len(CLASSES), (60,), generator=generator)
    label[torch.arange(60), labels] += 1
    teacher[torch.arange(60), labels] += 1.5
    alpha, beta, accuracy = choose_mix(label, teacher, labels)

    def softmax(x):
        e = np.exp(x - x.max(1, keepdims=True))
        return e / e.sum(1, keepdims=True)

    table = {
        (a, b): (a * softmax(label.double().numpy()) + (1 - a) * softmax(teacher.double().numpy() / b)).argmax(1)
        for a in ALPHAS
        for b in BETAS
    }
    scores = {constants: float((found == labels.numpy()).mean()) for constants, found in table.items()}
    assert accuracy == max(scores.values()) == scores[alpha, beta]
    assert accuracy > max(scores[0.0, 1.0], scores[1.0, 1.0])


@pytest.mark.parametrize("name", VARIANTS)
def test_every_variant_runs_and_leaves_a_classifier_and_a_report(name, tmp_path):
    folder = tmp_path / "run"
    main(["train", "dho", "smoke=true", f"out={folder}", *VARIANTS[name]])
    assert [row["step"] for row in steps_of(folder)] == [1, 2, 3]
    student = load_classifier(folder / "student")
    pixels = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
    torch.testing.assert_close(student(pixels).sum(1), torch.ones(2))
    row = results_of(folder, "test")
    assert 0 <= row["acc1"] <= 1
    assert row["notes"]["alpha"] == student.alpha
    assert (row["compute"]["teacher_tflop"] > 0) == ("teacher.ref=x" in VARIANTS[name])
    # PCGrad has a backward pass, twice a forward one, for each of two groups.
    passes = 5 if name == "pcgrad" else 3
    forward = forward_flop(student, student, student.preprocessing.image_size)
    assert row["compute"]["student_tflop"] == pytest.approx(passes * row["samples"] * forward / 1e12, rel=1e-3)
    assert (folder / "report.html").read_text(encoding="utf-8").rstrip().endswith("</html>")
    if name in ("labels", "teacher"):
        assert (student.teacher_head, student.alpha) == (None, 1)
    if name == "language":
        assert student.teacher_head.zeta == pytest.approx(results_of(folder, "test", "teacher")["notes"]["zeta"])
    if name != "labels":
        assert set(results_of(folder, "test", "teacher")["per_class"]) == set(student.classes)
    if name == "pcgrad":
        assert all(-1 <= row["conflict/trunk"] <= 1 for row in steps_of(folder))


def test_one_shot_never_shortens_the_pool(tmp_path):
    folder = tmp_path / "run"
    main(["train", "dho", "smoke=true", f"out={folder}", "teacher.ref=x"])
    text = (folder / "report.html").read_text(encoding="utf-8")
    assert "labelled: 8 of 8 images were drawn, in 3.00 passes." in text
    assert "pool: 24 of 60 images were drawn, in 0.40 passes." in text


def test_stored_and_live_teachers_give_the_same_losses(tmp_path):
    """While no labelled image has come a third time: two views are stored of each."""
    logged = {}
    for name, words in {"live": ["teacher.views=0"], "stored": ["teacher.views=2", "teacher.dtype=float32"]}.items():
        main(["train", "dho", "smoke=true", f"out={tmp_path / name}", "teacher.ref=x", *words])
        logged[name] = steps_of(tmp_path / name)
    for live, stored in zip(logged["live"][:2], logged["stored"][:2], strict=True):
        assert live["loss/teacher/pool"] == pytest.approx(stored["loss/teacher/pool"], rel=1e-3)
        assert live["loss/labels"] == pytest.approx(stored["loss/labels"], rel=1e-3)


def test_a_killed_run_goes_on_bit_for_bit(tmp_path, monkeypatch):
    words = ["train", "dho", "smoke=true", "teacher.ref=x", "train.save_steps=1", "train.validations=3"]
    main([*words, f"out={tmp_path / 'whole'}"])
    taken = loop.backward_step
    calls = []

    def third(*args, **kwargs):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return taken(*args, **kwargs)

    monkeypatch.setattr(loop, "backward_step", third)
    with pytest.raises((KeyboardInterrupt, SystemExit)):
        main([*words, f"out={tmp_path / 'killed'}"])
    monkeypatch.setattr(loop, "backward_step", taken)
    main([*words, f"out={tmp_path / 'killed'}"])
    whole, killed = (load_file(tmp_path / name / "student" / "model.safetensors") for name in ("whole", "killed"))
    assert all(torch.equal(whole[key], killed[key]) for key in whole)
    first, second = (results_of(tmp_path / name, "test") for name in ("whole", "killed"))
    assert first["best"] == second["best"]
    assert first["acc1"] == second["acc1"]
    assert [row["step"] for row in steps_of(tmp_path / "killed")] == [1, 2, 3]


def test_no_test_image_chooses_anything(tmp_path):
    """The chosen student and its mix stay the same when every test picture is another one."""
    words = ["train", "dho", "smoke=true", "teacher.ref=x", "train.validations=3"]
    main([*words, f"out={tmp_path / 'first'}"])
    shutil.copytree(tmp_path / "first-smoke-data", tmp_path / "second-smoke-data")
    for number, path in enumerate(sorted((tmp_path / "second-smoke-data" / "images" / "test").rglob("*.jpg"))):
        Image.new("RGB", (48, 48), (number * 3 % 256, number, 255 - number)).save(path)
    main([*words, f"out={tmp_path / 'second'}"])
    first, second = (load_file(tmp_path / name / "student" / "model.safetensors") for name in ("first", "second"))
    assert all(torch.equal(first[key], second[key]) for key in first)
    best = [load_classifier(tmp_path / name / "student").notes["chosen"] for name in ("first", "second")]
    assert best[0] == best[1]
    calibration = [results_of(tmp_path / name, "test")["metrics"]["ece"] for name in ("first", "second")]
    assert calibration[0] != calibration[1]


def test_other_settings_never_take_over_a_folder(tmp_path, capsys):
    main(["train", "dho", "smoke=true", f"out={tmp_path / 'run'}", "method.distillation=0"])
    with pytest.raises(SystemExit):
        main(["train", "dho", "smoke=true", f"out={tmp_path / 'run'}", "method.distillation=0", "seed=1"])
    assert "belongs to a run with other settings" in capsys.readouterr().err


def test_a_distiller_without_a_teacher_reads_labels_alone():
    found = ClassDistiller(tiny_classifier(), distiller().terms[:1], LABELS)
    assert set(found({"labelled": BATCHES["labelled"]})) == {"labels"}


def test_kept_embeddings_are_those_of_these_weights_and_bytes(tmp_path, monkeypatch):
    for number, image in enumerate(tiny_images(4)):
        folder = tmp_path / "data" / CLASSES[number % 2]
        folder.mkdir(parents=True, exist_ok=True)
        image.save(folder / f"{number}.png")
    model, kept = tiny_composite(), tmp_path / "kept"
    passed = []
    encode = type(model).encode_image
    monkeypatch.setattr(
        type(model), "encode_image", lambda self, images, **words: passed.append(1) or encode(self, images, **words)
    )
    first, labels = embedded(model, open_labelled(str(tmp_path / "data")), kept)
    again, same = embedded(model, open_labelled(str(tmp_path / "data")), kept)
    assert torch.equal(first, again)
    assert torch.equal(labels, same)
    assert len(passed) == 1
    tiny_images(1, seed=5)[0].save(tmp_path / "data" / CLASSES[0] / "0.png")
    changed, _ = embedded(model, open_labelled(str(tmp_path / "data")), kept)
    assert not torch.equal(first, changed)
    with torch.no_grad():
        model.image_projection[0].weight.mul_(2)
    assert not torch.equal(embedded(model, open_labelled(str(tmp_path / "data")), kept)[0], changed)
    assert len(passed) == 3
    (tmp_path / "data" / CLASSES[0] / "0.png").write_bytes(b"no picture")
    for passes in (4, 5):
        assert len(embedded(model, open_labelled(str(tmp_path / "data")), kept)[0]) == 3
        assert len(passed) == passes


def test_a_run_that_goes_on_knows_which_student_it_kept(tmp_path):
    """A look behind the newest checkpoint may have kept another one; a kill between two renames leaves none."""
    older = {"score": 0.5, "step": 1, "alpha": 0.5, "beta": 1.0}
    assert loop._kept(tmp_path, older) == {"score": -1.0}
    newer = {"score": 0.7, "step": 2, "alpha": 0.25, "beta": 2.0}
    loop._keep(tiny_classifier(), newer, tmp_path)
    assert loop._kept(tmp_path, older) == newer
    found = load_classifier(tmp_path / "student")
    assert (found.alpha, found.beta) == (0.25, 2.0)


def test_two_ranks_are_one_and_one_without_labels_keeps_step(tmp_path):
    """Logged figures and gradients of two ranks are those of the whole batch, however its images are divided."""
    torch.multiprocessing.spawn(run_class_rank, args=(tmp_path,), nprocs=2)
    ranks = [load_file(str(tmp_path / f"rank-{rank}.safetensors")) for rank in range(2)]
    for mode in MODES:
        whole = class_step(WHOLE, mode)
        for rank, split in itertools.product(ranks, (f"{mode}/", f"{mode}, uneven/")):
            own = {name.removeprefix(split): value for name, value in rank.items() if name.startswith(split)}
            assert own.keys() == whole.keys()
            for name, value in whole.items():
                torch.testing.assert_close(own[name], value, rtol=1e-3, atol=1e-5, msg=f"{split}{name}")
        for name in (name for name in ranks[0] if name.startswith(f"{mode}, one empty/")):
            assert torch.equal(ranks[0][name], ranks[1][name])
        assert ranks[0][f"{mode}, one empty/loss/labels"] > 0


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["method.match=features", "method.supervised=0"], "train no head that names classes"),
        (["report.compare=/nowhere"], "Found no model.json in /nowhere"),
        (["method.supervised=-1"], "has the weight -1.0"),
    ],
)
def test_what_cannot_come_to_an_end_is_refused_before_the_teacher_is_loaded(words, sentence, tmp_path, capsys):
    draw_classes(tmp_path / "images")
    with pytest.raises(SystemExit):
        main(["train", "dho", f"data.root={tmp_path}/images", "teacher.ref=/none", f"out={tmp_path}/x", *words])
    assert sentence in capsys.readouterr().err


def test_a_run_can_be_compared_with_a_run(tmp_path):
    first = tmp_path / "first"
    main(["train", "dho", "smoke=true", f"out={first}", "method.distillation=0"])
    words = [f"data.root={tmp_path}/first-smoke-data/images", "data.shots=1", "model.image=test_resnet"]
    words += ["model.image_size=32", "train.samples=16", "train.batch_size=8", "train.device=cpu"]
    main(["train", "dho", *words, "method.distillation=0", f"report.compare={first}", f"out={tmp_path}/second"])
    rows = [json.loads(line) for line in (tmp_path / "second" / "results.jsonl").read_text().splitlines()]
    other = next(row for row in rows if row["name"] == str(first) and row["split"] == "test")
    assert other["acc1"] == results_of(first, "test")["acc1"]


def test_a_teacher_of_no_numbers_and_unreadable_pictures_are_told(tmp_path, capsys):
    draw_classes(tmp_path / "images")
    next(iter(sorted((tmp_path / "images" / "test").rglob("*.jpg")))).write_bytes(b"no picture")
    words = [f"data.root={tmp_path}/images", "model.image=test_resnet", "model.image_size=32", "train.samples=16"]
    words += ["train.batch_size=8", "train.device=cpu"]
    main(["train", "dho", *words, "method.distillation=0", f"out={tmp_path}/run"])
    assert "Test images that cannot be read, and are in no figure: 1." in capsys.readouterr().out
    folder = Path(untrained_teacher(tmp_path / "teacher", 0))
    weights = load_file(folder / "model.safetensors")
    nothing = {name: value * (torch.nan if "image" in name else 1) for name, value in weights.items()}
    save_file(nothing, folder / "model.safetensors")
    with pytest.raises(SystemExit):
        main(["train", "dho", *words, f"teacher.ref={folder}", f"out={tmp_path}/x"])
    assert "not finite" in capsys.readouterr().err


def test_arithmetic_is_that_of_a_layer_counted_by_hand():
    layer = torch.nn.Conv2d(3, 5, 3, padding=1, bias=False)
    assert forward_flop(layer, layer, (8, 6)) == 2 * 5 * 3 * 9 * 8 * 6
