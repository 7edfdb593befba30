"""`vlkd eval classifier`: classifiers by their own classes, in the suite's results, beside zero-shot models."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from helpers.classes import CLASSES, tiny_classifier
from helpers.pairs import noise
from helpers.tiny_models import tiny_composite

from vlkd.cli.main import main
from vlkd.data.labelled import open_split
from vlkd.errors import UserError
from vlkd.models.classifier import load_classifier
from vlkd.protocols.classifier import classifier as measure
from vlkd.suite.declaration import DataEntry, Suite
from vlkd.suite.job import Job
from vlkd.suite.results import read_items, read_results
from vlkd.suite.run import run_suite
from vlkd.suite.subject import Encoding

ORDER = ("eel", "bee", "dog", "ant", "cat")
"""Of the classifier's columns; the data's are sorted."""


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    place = tmp_path_factory.mktemp("classifier")
    for split in ("train", "test"):
        for number in range(30):
            path = place / "data" / split / CLASSES[number % 5] / f"{number:02}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            noise(number + 100 * (split == "test")).save(path)
    student = tiny_classifier(seed=3)
    student.classes, student.layout["classes"] = ORDER, list(ORDER)
    student.alpha, student.beta = 0.3, 0.7
    student.save(place / "run/student")
    tiny_classifier(heads="one").save(place / "single")
    tiny_composite().save(place / "dual")
    other = tiny_classifier()
    other.layout["classes"] = [*CLASSES[:-1], "emu"]
    other.save(place / "other")
    return place


def evaluate(place, *models, out, protocol="classifier", more=()):
    words = ["--model", *(str(place / name) for name in models), "--data", f"{place / 'data'}#test"]
    main(["eval", protocol, *words, "--out", str(out), *more])
    return [row for row in read_results(out) if row["protocol"] == protocol]


def figures_by_hand(folder, data):
    """Probabilities by the model's own call, columns in the order of the data."""
    model = load_classifier(folder)
    pixels = torch.stack([model.preprocessing.image_transform(data.image(i)) for i in range(len(data))])
    with torch.no_grad():
        found = model.probabilities(pixels)
    columns = [model.classes.index(name) for name in data.classes]
    return {name: values.double().numpy()[:, columns] for name, values in found.items()}


def test_a_row_has_the_protocols_figures_and_each_heads(place, tmp_path, capsys):
    (row,) = evaluate(place, "run", out=tmp_path, more=["--json"])
    told = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert told["results"] == [row]
    data = open_split(place / "data", "test")
    assert data.classes == CLASSES
    tables = figures_by_hand(place / "run/student", data)
    wanted = measure(tables["mix"], data.labels, classes=CLASSES)
    assert row["model_ref"] == str(place / "run/student")
    for name, value in wanted.metrics.items():
        assert row["metrics"][name] == pytest.approx(value, abs=1e-6)
    for head in ("label", "teacher"):
        accuracy = np.mean(tables[head].argmax(axis=1) == data.labels)
        assert row["metrics"][f"acc1_{head}_head"] == pytest.approx(accuracy)
    assert row["interval"] == pytest.approx(wanted.interval)
    assert row["per_class"] == pytest.approx(dict(wanted.per_class))
    assert (row["notes"]["alpha"], row["notes"]["beta"]) == (0.3, 0.7)
    assert {"acc1", "acc5", "mean_per_class_recall", "ece"} <= set(row["metrics"])
    items, keys = read_items(tmp_path, row)
    np.testing.assert_array_equal(items["prediction"], tables["mix"].argmax(axis=1))
    np.testing.assert_array_equal(items["label"], data.labels)
    assert keys == data.keys


def test_the_order_of_classes_matters(place):
    """Without it the test above could not tell a column by its name from a column by its place."""
    data = open_split(place / "data", "test")
    tables = figures_by_hand(place / "run/student", data)
    as_stored = tables["mix"][:, [CLASSES.index(name) for name in ORDER]]
    assert np.mean(as_stored.argmax(axis=1) == tables["mix"].argmax(axis=1)) < 0.9


def test_a_single_head_has_no_figures_of_heads(place, tmp_path):
    (row,) = evaluate(place, "single", out=tmp_path)
    assert not [name for name in row["metrics"] if name.endswith("_head")]


def test_results_stand_and_compare_beside_zero_shot_ones(place, tmp_path, capsys):
    (own,) = evaluate(place, "run", out=tmp_path)
    (zero,) = evaluate(place, "dual", out=tmp_path, protocol="zero_shot")
    assert own["data_hash"] == zero["data_hash"]
    before = (tmp_path / "results.jsonl").read_bytes()
    evaluate(place, "run", out=tmp_path)
    assert (tmp_path / "results.jsonl").read_bytes() == before
    capsys.readouterr()
    main(["eval", "table", str(tmp_path)])
    shown = capsys.readouterr().out
    assert f"{100 * own['score']:.1f}" in shown
    assert "(classifier)" in shown
    assert "(zero shot)" in shown
    main(["eval", "compare", str(tmp_path), "--a", own["model_ref"], "--b", zero["model_ref"], "--json"])
    told = json.loads(capsys.readouterr().out.splitlines()[-1])
    (compared,) = told["compared"] if "compared" in told else told["results"]
    assert (compared["a"], compared["b"]) == pytest.approx((own["score"], zero["score"]))
    assert compared["protocol"] == "classifier_and_zero_shot"


def test_a_suite_takes_classifiers_and_dual_encoders(place, tmp_path):
    entry = DataEntry(name="shapes", paths=("data",), train="train")
    names = ("run/student", "dual", "other")
    job = Job(
        suite=Suite(name="own", title="own", entries=(entry,)),
        root=place,
        refs=tuple(str(place / name) for name in names),
        out=tmp_path,
        store=tmp_path / "embeddings",
        encoding=Encoding(batch_size=8),
        teacher=str(place / "dual"),
    )
    summary = run_suite(job, progress=False)
    rows = {(row["model_ref"].removeprefix(f"{place}/"), row["protocol"]): row for row in read_results(tmp_path)}
    probes = {"linear_probe", "knn"}
    assert {protocol for name, protocol in rows if name == "run/student"} == {"classifier", *probes}
    assert {protocol for name, protocol in rows if name == "dual"} == {"zero_shot", *probes}
    assert summary.failed == 1
    failed = rows["other", "classifier"]
    assert failed["status"] == "error"
    assert "only in the data: 'eel'; only in the model: 'emu'" in failed["error"]
    assert (summary.made, summary.kept) == (8, 0)
    again = run_suite(job, progress=False)
    assert (again.made, again.kept, again.failed) == (0, 8, 1)


def test_other_weights_or_another_mix_are_measured_again(place, tmp_path):
    model = load_classifier(place / "run/student")
    model.save(tmp_path / "m")
    words = ["--model", str(tmp_path / "m"), "--data", f"{place / 'data'}#test", "--out", str(tmp_path / "o")]
    main(["eval", "classifier", *words])
    model.alpha = 1.0
    model.save(tmp_path / "m")
    main(["eval", "classifier", *words])
    (row,) = read_results(tmp_path / "o")
    assert row["notes"]["alpha"] == 1
    assert row["metrics"]["acc1"] == row["metrics"]["acc1_label_head"]
    assert len((tmp_path / "o/results.jsonl").read_text().splitlines()) == 2


def test_refusals(place, tmp_path):
    for name, message in (
        ("other", "expected the same names"),
        ("dual", "has no classes of its own; measure it by `vlkd eval zero_shot`"),
        ("missing", "missing"),
    ):
        with pytest.raises(UserError) as caught:
            evaluate_directly(place / name, f"{place / 'data'}#test", tmp_path / name)
        assert message in str(caught.value)
    with pytest.raises(UserError, match="There is nothing at"):
        evaluate_directly(place / "run", str(place / "nowhere"), tmp_path)


def evaluate_directly(model, data, out):
    from vlkd import recipes

    recipes.load(recipes.find("eval", "classifier")).main(["--model", str(model), "--data", data, "--out", str(out)])
