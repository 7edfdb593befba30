"""CLIP_benchmark's and open_clip's own figures on the same model and folders."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("clip_benchmark", reason="clip_benchmark is not installed")
pytest.importorskip("clip_benchmark.datasets.builder", reason="a dependency of clip_benchmark is not installed")

import open_clip

from vlkd.data.eval_set import open_eval_set
from vlkd.protocols.zero_shot import zero_shot
from vlkd.retrieval.zero_shot import class_vectors

SCRIPT = Path(__file__).parents[1] / "scripts" / "compare_clip_benchmark.py"
pytestmark = pytest.mark.filterwarnings("ignore:WebDataset.shardshuffle:UserWarning")


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("compare_under_test", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    yield module
    del sys.modules[spec.name]


@pytest.fixture(scope="module")
def rows(script, tmp_path_factory):
    return script.compare(tmp_path_factory.mktemp("compared"), images=52, seed=1)


def test_figures_are_equal_where_the_definitions_are(rows):
    assert [row for row in rows if not row.fine] == []
    equal = {(row.case, row.figure) for row in rows if row.equal}
    accuracies = {
        (f"{classes} classes{own}", figure)
        for classes in (7, 5, 3)
        for own in ("", ", own sentences")
        for figure in ("acc1", "acc5", "mean_per_class_recall")
        if figure != "acc5" or classes >= 5
    }
    recalls = {("retrieval", f"{side}_retrieval_recall@{k}") for side in ("image", "text") for k in (1, 5, 10)}
    default = {("retrieval, their default k", f"{side}_retrieval_recall@5") for side in ("image", "text")}
    chosen = {("SugarCrepe", "text_acc"), ("SugarCrepe", "acc")}
    chosen |= {("two by two", figure) for figure in ("image_acc", "text_acc", "acc")}
    assert equal >= accuracies | recalls | default | chosen | {("multilabel", "mean_average_precision")}


def test_differences_are_those_that_are_known(rows):
    other = {(row.case, row.figure): (row.theirs, row.ours) for row in rows if not row.equal}
    ties = {case for case, _ in other if case.startswith("collapsed")}
    assert {(case, figure) for case, figure in other if case not in ties} == {
        ("3 classes", "acc5"),
        ("3 classes, own sentences", "acc5"),
        ("multilabel, a class without a picture", "mean_average_precision"),
        ("SugarCrepe", "image_acc"),
    }
    assert other["3 classes", "acc5"] == (None, None)
    assert other["SugarCrepe", "image_acc"] == (1.0, None)
    assert other["collapsed model, selection", "text_acc"] == (1.0, 0.0)
    assert all(row.why for row in rows if not row.equal)


def test_a_difference_without_a_reason_fails_the_command(script, rows, monkeypatch, capsys):
    wrong = script.Row(case="7 classes", figure="acc1", theirs=0.5, ours=0.5 + 1 / 52)
    monkeypatch.setattr(script, "compare", lambda folder, images, seed: [*rows, wrong])
    assert script.main(["--json"]) == 1
    table, line = capsys.readouterr().out.strip().rsplit("\n", 1)
    assert "DIFFERENT" in table
    assert json.loads(line, parse_constant=pytest.fail)["unexplained"] == 1
    monkeypatch.setattr(script, "compare", lambda folder, images, seed: rows)
    assert script.main([]) == 0


def test_open_clips_classifier_gives_the_same_accuracy(script, tmp_path):
    both = script.Both(script.write_model(tmp_path / "model", 2), np.random.default_rng(2))
    both.classification(tmp_path / "data", 60, 7)
    data = open_eval_set(tmp_path / "data")
    templates = ["a drawing of a {} thing", "{}", "some {} shape on noise"]
    theirs = open_clip.build_zero_shot_classifier(
        both.model, both.tokenizer, data.classes, templates, num_classes_per_batch=3
    )
    vectors = class_vectors(both.ours.encode_text, data.classes, templates)
    torch.testing.assert_close(vectors, theirs.T, rtol=0, atol=1e-6)

    with torch.no_grad():
        pixels = torch.stack([both.transform(data.image(i)) for i in range(len(data))])
        logits = 100 * both.model.encode_image(pixels, normalize=True) @ theirs
    best = logits.topk(5, dim=1).indices == torch.from_numpy(data.labels)[:, None]
    found = zero_shot(both.images(data), vectors, data.labels, classes=data.classes, logit_scale=100.0)
    assert found.metrics["acc1"] == best[:, 0].double().mean().item()
    assert found.metrics["acc5"] == best.any(dim=1).double().mean().item()
    confidence = logits.softmax(dim=1).amax(dim=1).double().numpy()
    np.testing.assert_allclose(found.per_item["confidence"], confidence, atol=1e-4)
