"""A suite from end to end on offline data: equal to the protocols called by hand, resumable, not stopped by one set."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.tiny_models import tiny_composite

from vlkd import recipes
from vlkd.cli.main import main
from vlkd.data.eval_set import open_eval_set
from vlkd.errors import UserError
from vlkd.models.load import load
from vlkd.protocols.retrieval import retrieval
from vlkd.protocols.zero_shot import zero_shot
from vlkd.retrieval.encode import encode_images, encode_texts
from vlkd.retrieval.zero_shot import class_vectors
from vlkd.suite.declaration import load_suite
from vlkd.suite.job import Job
from vlkd.suite.results import read_items, read_results
from vlkd.suite.run import restrict, run_suite
from vlkd.suite.subject import Encoding

CELLS = {
    ("shapes_retrieval", "retrieval"), ("shapes_classes", "zero_shot"), ("shapes_classes", "linear_probe"),
    ("shapes_classes", "knn"), ("shapes_multilabel", "multilabel"), ("shapes_choices", "selection"),
}  # fmt: skip


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """The data of tier0, a quarter of them."""
    place = tmp_path_factory.mktemp("tier0") / "data"
    tier0 = recipes.load(recipes.find("data_prep", "tier0"))
    for name in ("RETRIEVAL", "TRAIN", "TEST", "MULTILABEL", "CHOICES"):
        setattr(tier0, name, 40)
    tier0.main(["--out", str(place), "--image-size", "32"])
    return place


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    place = tmp_path_factory.mktemp("models")
    for number, name in enumerate(("teacher", "student")):
        tiny_composite(seed=number).save(place / name)
    return place


def job(root: Path, models: Path, out: Path, *names: str, **changes: object) -> Job:
    made = Job(
        suite=restrict(load_suite("tier0"), names),
        root=root,
        refs=(str(models / "student"),),
        out=out,
        store=out / "embeddings",
        encoding=Encoding(batch_size=16),
    )
    return replace(made, **changes)  # type: ignore[arg-type]


def run(one: Job):
    return run_suite(one, progress=False)


def cells(out: Path, ref: Path) -> dict:
    return {(row["dataset"], row["protocol"]): row for row in read_results(out) if row["model_ref"] == str(ref)}


@pytest.fixture(scope="module")
def done(root, models, tmp_path_factory):
    out = tmp_path_factory.mktemp("out")
    summary = run(job(root, models, out, teacher=str(models / "teacher")))
    return out, summary


def test_every_protocol_of_every_data_set_has_a_row(done, models):
    out, summary = done
    assert (summary.made, summary.kept, summary.failed) == (14, 0, 0)
    assert set(cells(out, models / "teacher")) == CELLS
    compared = {(name, "agreement") for name in ("shapes_retrieval", "shapes_classes")}
    found = cells(out, models / "student")
    assert set(found) == CELLS | compared
    for row in found.values():
        assert {"dataset", "model", "pretrained", "task", "metrics", "language"} <= set(row)
        assert row["score"] == row["metrics"][row["main_metric"]]
        tensors, keys = read_items(out, row)
        assert len(keys) == len(tensors["correct"])
        assert row["versions"]["torch"] == torch.__version__ or row["versions"]["torch"] in torch.__version__
    teacher, student = (cells(out, models / name)["shapes_classes", "zero_shot"] for name in ("teacher", "student"))
    retention = found["shapes_classes", "agreement"]["metrics"]["retention"]
    assert retention == pytest.approx(student["score"] / teacher["score"])


def test_rows_equal_the_protocols_called_by_hand(done, root, models):
    out, _ = done
    found = cells(out, models / "student")
    model = load(str(models / "student"))
    data = open_eval_set(root / "shapes_classes", split="test")
    images = encode_images(model, data, batch_size=16, progress=False)
    vectors = class_vectors(model.encode_text, data.classes, data.templates)
    with torch.no_grad():
        scale = float(model.encode({}, ("logit_scale",))["logit_scale"])
    wanted = zero_shot(
        images.embed, vectors, data.labels, classes=data.classes, logit_scale=scale, groups=data.groups
    )  # fmt: skip
    assert found["shapes_classes", "zero_shot"]["metrics"] == dict(wanted.metrics)
    pairs = open_eval_set(root / "shapes_retrieval", split="test")
    texts = [caption for own in pairs.captions for caption in own]
    owner = np.repeat(np.arange(len(pairs)), [len(own) for own in pairs.captions])
    embed = encode_images(model, pairs, batch_size=16, progress=False).embed
    measured = retrieval(embed, encode_texts(model, texts, batch_size=64, progress=False), owner, texts)
    assert found["shapes_retrieval", "retrieval"]["metrics"] == dict(measured.metrics)


def test_the_second_run_keeps_everything_and_encodes_nothing(done, root, models, monkeypatch):
    out, _ = done
    before = (out / "results.jsonl").read_bytes()
    monkeypatch.setattr("vlkd.suite.subject.encode_images", lambda *_, **__: pytest.fail("encoded again"))
    summary = run(job(root, models, out, teacher=str(models / "teacher")))
    assert (summary.made, summary.kept, summary.failed) == (0, 14, 0)
    assert (out / "results.jsonl").read_bytes() == before


def test_lost_results_come_back_from_stored_embeddings(done, root, models, tmp_path, monkeypatch):
    out, _ = done
    shutil.copytree(out / "embeddings", tmp_path / "embeddings")
    monkeypatch.setattr("vlkd.suite.subject.encode_images", lambda *_, **__: pytest.fail("encoded again"))
    run(job(root, models, tmp_path))
    was, now = cells(out, models / "student"), cells(tmp_path, models / "student")
    assert {cell: row["metrics"] for cell, row in now.items()} == {cell: was[cell]["metrics"] for cell in now}


def test_a_killed_run_goes_on_behind_the_last_whole_data_set(done, root, models, tmp_path, monkeypatch):
    from vlkd.suite import subject

    real, calls = subject.encode_images, []

    def dying(*args, **words):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return real(*args, **words)

    monkeypatch.setattr(subject, "encode_images", dying)
    with pytest.raises(KeyboardInterrupt):
        run(job(root, models, tmp_path))
    monkeypatch.setattr(subject, "encode_images", lambda *args, **words: calls.append(2) or real(*args, **words))
    before = set(cells(tmp_path, models / "student"))
    assert ("shapes_retrieval", "retrieval") in before
    summary = run(job(root, models, tmp_path))
    assert summary.kept == len(before)
    assert calls == [1, 1, 1, 2, 2, 2]
    was, now = cells(done[0], models / "student"), cells(tmp_path, models / "student")
    assert {cell: row["metrics"] for cell, row in now.items()} == {cell: was[cell]["metrics"] for cell in now}
    assert set(now) == CELLS


def test_a_missing_and_a_broken_data_set_are_error_rows_and_the_rest_goes_on(root, models, tmp_path, capsys):
    broken = tmp_path / "root"
    shutil.copytree(root, broken)
    shutil.rmtree(broken / "shapes_choices")
    tar = broken / "shapes_multilabel" / "test" / "0.tar"
    tar.write_bytes(tar.read_bytes()[:3000])
    summary = run(job(broken, models, tmp_path / "out"))
    found = cells(tmp_path / "out", models / "student")
    failed = {cell[0]: row["error"] for cell, row in found.items() if row["status"] == "error"}
    assert set(failed) == {"shapes_choices", "shapes_multilabel"}
    assert summary.failed == 2
    assert summary.made == 4
    assert "shapes_choices" in capsys.readouterr().err
    assert all(row["metrics"] == {} for row in found.values() if row["status"] == "error")
    shutil.rmtree(broken)
    shutil.copytree(root, broken)
    assert run(job(broken, models, tmp_path / "out")).failed == 0
    mended = cells(tmp_path / "out", models / "student")
    assert not [row for row in mended.values() if row["status"] == "error" and row["protocol"] != "data"]


def test_a_changed_label_picture_or_weight_is_measured_again(root, models, tmp_path):
    place, own = tmp_path / "root", tmp_path / "models"
    shutil.copytree(root, place)
    shutil.copytree(models, own)
    one = job(place, own, tmp_path / "out", "shapes_retrieval")
    assert run(one).made == 1
    assert run(one).kept == 1
    tiny_composite(seed=5).save(own / "student2")
    shutil.rmtree(own / "student")
    (own / "student2").rename(own / "student")
    assert run(one).made == 1
    assert run(replace(one, encoding=Encoding(batch_size=16, precision="bf16"))).made == 1
    assert len(read_results(tmp_path / "out")) == 1


@pytest.mark.parametrize("encoding", [Encoding(batch_size=16, workers=1), Encoding(batch_size=16, workers=5)])
def test_figures_do_not_depend_on_workers(done, root, models, tmp_path, encoding):
    run(job(root, models, tmp_path, "shapes_classes", encoding=encoding))
    was, now = cells(done[0], models / "student"), cells(tmp_path, models / "student")
    assert {cell: row["metrics"] for cell, row in now.items()} == {cell: was[cell]["metrics"] for cell in now}


def test_embeddings_of_other_batch_sizes_agree(root, models):
    model = load(str(models / "student"))
    data = open_eval_set(root / "shapes_classes", split="test")
    one, other = (encode_images(model, data, batch_size=size, progress=False).embed for size in (1, 17))
    unit = [torch.nn.functional.normalize(embed, dim=-1) for embed in (one, other)]
    assert (unit[0] - unit[1]).abs().max() <= 1e-5


def test_a_tower_without_texts_is_probed_only(root, tmp_path, monkeypatch):
    import timm
    from safetensors.torch import save_file

    torch.manual_seed(0)
    tower = timm.create_model("resnet10t", pretrained=False)
    save_file(tower.state_dict(), str(tmp_path / "r.safetensors"))
    ref = f"timm:resnet10t@{tmp_path / 'r.safetensors'}"
    run(job(root, tmp_path, tmp_path / "out", "shapes_classes", "shapes_retrieval", refs=(ref,)))
    found = {(row["dataset"], row["protocol"]) for row in read_results(tmp_path / "out")}
    assert found == {("shapes_classes", "linear_probe"), ("shapes_classes", "knn")}


def test_the_command_line_runs_lists_and_refuses(root, models, tmp_path, capsys):
    words = ["eval", "suite", "--suite", "tier0", "--data", str(root), "--out", str(tmp_path / "out")]
    main([*words, "--dry-run"])
    assert "4 of 4 data sets are there" in capsys.readouterr().out
    main([*words, "--model", str(models / "student"), "--only", "shapes_classes", "--json"])
    out = capsys.readouterr().out
    last = json.loads(out.strip().splitlines()[-1])
    assert (last["made"], last["failed"]) == (3, 0)
    assert "shapes\\_classes" in out or "shapes_classes" in out
    with pytest.raises(UserError, match="has no data set 'cars'"):
        restrict(load_suite("tier0"), ["cars"])


@pytest.mark.parametrize(
    ("protocol", "data"),
    [("zero_shot", "shapes_classes"), ("knn", "shapes_classes"), ("linear_probe", "shapes_classes"),
     ("multilabel", "shapes_multilabel"), ("selection", "shapes_choices")],
)  # fmt: skip
def test_one_protocol_on_one_data_set(done, root, models, tmp_path, capsys, protocol, data):
    place = next((root / data).glob("*.jsonl"), root / data)
    main([
        "eval", protocol, "--model", str(models / "student"), "--data", str(place), "--out", str(tmp_path), "--json",
        "--batch-size", "16",
    ])  # fmt: skip
    (row,) = json.loads(capsys.readouterr().out.strip().splitlines()[-1])["results"]
    assert row["metrics"] == cells(done[0], models / "student")[data, protocol]["metrics"]


def test_an_old_failure_of_one_model_does_not_hide_its_result_where_another_fails_now(root, models, tmp_path, capsys):
    """The model could not be loaded once; what was measured before is kept by the run in which another one fails."""
    own = tmp_path / "models"
    shutil.copytree(models, own)
    words = ["eval", "knn", "--data", str(root / "shapes_classes"), "--out", str(tmp_path / "out"), "--json", "--model"]
    student, teacher = str(own / "student"), str(own / "teacher")
    main([*words, student])
    whole = (own / "student" / "model.json").read_text()
    (own / "student" / "model.json").write_text("{")
    with pytest.raises(SystemExit):
        main([*words, student])
    (own / "student" / "model.json").write_text(whole)
    (own / "teacher" / "model.json").write_text("{")
    capsys.readouterr()
    with pytest.raises(SystemExit):
        main([*words, student, teacher])
    rows = json.loads(capsys.readouterr().out.strip().splitlines()[-1])["results"]
    assert [(row["model_ref"], row["status"]) for row in rows] == [(student, "ok"), (teacher, "error")]
    stored = {(row["model_ref"], row["protocol"]) for row in read_results(tmp_path / "out")}
    assert stored == {(student, "knn"), (teacher, "data")}


def test_data_of_another_kind_are_refused_before_anything_is_encoded(root, models, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("vlkd.suite.subject.encode_images", lambda *_, **__: pytest.fail("encoded"))
    words = ["--data", str(root / "shapes_classes"), "--out", str(tmp_path), "--model", str(models / "student")]
    with pytest.raises(SystemExit):
        main(["eval", "retrieval", *words])
    assert "is a set for classification, but retrieval needs one for retrieval" in capsys.readouterr().err


def test_another_teacher_is_compared_anew(root, models, tmp_path):
    one = job(root, models, tmp_path, "shapes_classes", teacher=str(models / "teacher"))
    run(one)
    first = cells(tmp_path, models / "student")["shapes_classes", "agreement"]
    tiny_composite(seed=9).save(tmp_path / "teacher2")
    summary = run(replace(one, teacher=str(tmp_path / "teacher2")))
    second = cells(tmp_path, models / "student")["shapes_classes", "agreement"]
    assert summary.kept == 3
    assert first["metrics"] != second["metrics"]
    assert second["settings"]["teacher"] == str(tmp_path / "teacher2")


def test_lost_embeddings_of_a_kept_teacher_are_made_again(root, models, tmp_path):
    one = job(root, models, tmp_path, "shapes_classes", refs=(), teacher=str(models / "teacher"))
    run(one)
    shutil.rmtree(tmp_path / "embeddings")
    summary = run(replace(one, refs=(str(models / "student"),)))
    assert (summary.made, summary.kept, summary.failed) == (4, 3, 0)


def test_a_probe_is_never_tested_on_what_it_learned(root, models, tmp_path):
    one = job(root, models, tmp_path, "shapes_classes")
    entries = tuple(replace(entry, split="train") for entry in one.suite.entries)
    run(replace(one, suite=replace(one.suite, entries=entries)))
    (row,) = read_results(tmp_path)
    assert "tested on what it learned" in row["error"]


def test_a_mostly_unreadable_data_set_has_no_score(root, models, tmp_path, monkeypatch):
    from vlkd.suite import subject

    real = subject._Counted.image

    def failing(self, i):
        if i % 4 == 0:
            raise UserError("it is cut short")
        return real(self, i)

    monkeypatch.setattr(subject._Counted, "image", failing)
    run(job(root, models, tmp_path, "shapes_retrieval"))
    (row,) = read_results(tmp_path)
    assert row["status"] == "error"
    assert "10 of 40 pictures cannot be read" in row["error"]


def test_the_fingerprint_tells_activations_apart(tmp_path):
    """Equal weights under GELU and QuickGELU are two models."""
    from helpers.tiny_models import write_open_clip

    from vlkd.models.fingerprint import model_fingerprint

    prints = set()
    for quick in (False, True):
        folder = write_open_clip(tmp_path / str(quick))
        config = json.loads((folder / "open_clip_config.json").read_text())
        config["model_cfg"]["quick_gelu"] = quick
        (folder / "open_clip_config.json").write_text(json.dumps(config))
        prints.add(model_fingerprint(load(str(folder))))
    assert len(prints) == 2


def test_one_model_that_does_not_load_does_not_end_the_others(root, models, tmp_path):
    broken = tmp_path / "broken"
    shutil.copytree(models / "student", broken)
    weights = broken / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:5000])
    names = ("shapes_multilabel", "shapes_retrieval")
    one = job(root, models, tmp_path / "out", *names, refs=(str(broken), str(models / "student")))
    summary = run(one)
    assert (summary.made, summary.failed) == (2, 2)
    failed = cells(tmp_path / "out", broken)
    assert set(failed) == {(name, "data") for name in names}
    for row in failed.values():
        assert (row["status"], row["metrics"]) == ("error", {})
        assert row["error"].startswith("The model was not loaded: ")
    # Mended, it is measured by the same command.
    shutil.rmtree(broken)
    shutil.copytree(models / "student", broken)
    summary = run(one)
    assert (summary.made, summary.kept, summary.failed) == (2, 2, 0)


def test_without_its_teacher_a_student_still_has_its_own_results(root, models, tmp_path):
    broken = tmp_path / "teacher"
    shutil.copytree(models / "teacher", broken)
    (broken / "model.json").write_text("{")
    summary = run(job(root, models, tmp_path / "out", "shapes_retrieval", teacher=str(broken)))
    assert (summary.made, summary.failed) == (1, 2)
    row = cells(tmp_path / "out", models / "student")["shapes_retrieval", "agreement"]
    assert "was not loaded; see its rows" in row["error"]


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"refs": ("gone",)}, "Found no model 'gone'"),
        ({"device": "abacus"}, "The device abacus cannot be used"),
        ({"store": Path(__file__)}, "--embeddings .* is a file; expected a folder"),
    ],
)
def test_what_fails_for_sure_is_refused_before_anything_is_written(root, models, tmp_path, changes, sentence):
    with pytest.raises(UserError, match=sentence):
        run(job(root, models, tmp_path / "out", **changes))
    assert not (tmp_path / "out").exists()


def test_pictures_that_could_not_be_read_for_a_moment_are_tried_again(done, root, models, tmp_path, monkeypatch):
    from vlkd.suite import subject

    real = subject._Counted.image
    broken, read = {3, 7}, []

    def image(self, i):
        read.append(i)
        if i in broken and len(self) == 40 and self.keys[0] == first:
            raise OSError(5, "Input/output error")
        return real(self, i)

    first = open_eval_set(root / "shapes_retrieval", split="test").keys[0]
    monkeypatch.setattr(subject._Counted, "image", image)
    one = job(root, models, tmp_path, "shapes_retrieval")
    assert run(one).made == 1
    (row,) = read_results(tmp_path)
    assert (row["unreadable"], row["counts"]["images"]) == (2, 38)
    read.clear()
    assert run(one).kept == 1
    assert sorted(read) == [3, 7]
    broken.remove(3)
    assert run(one).made == 1
    assert read_results(tmp_path)[0]["unreadable"] == 1
    broken.clear()
    read.clear()
    assert run(one).made == 1
    assert read == [7]
    (row,) = read_results(tmp_path)
    was = cells(done[0], models / "student")["shapes_retrieval", "retrieval"]
    assert row["unreadable"] == 0
    assert row["counts"] == was["counts"]
    assert row["score"] == pytest.approx(was["score"])
    assert run(one).kept == 1
