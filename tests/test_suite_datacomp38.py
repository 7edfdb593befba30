"""DataComp's suite from end to end on a made-up root: all 40 data sets are measured, 38 of them averaged."""

from __future__ import annotations

import csv
import io
import json
import tarfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.tiny_models import tiny_composite
from numpy.typing import NDArray
from PIL import Image

from vlkd.data.eval_set import open_eval_set
from vlkd.models.load import load
from vlkd.suite.declaration import load_suite
from vlkd.suite.results import read_items, read_results
from vlkd.suite.run import Job, restrict, run_suite
from vlkd.suite.subject import Encoding
from vlkd.suite.table import aggregate_score, pivot

CLASSES = 6
IMAGES = 12
MORE = 36
"""Pictures of the sets with groups."""
FEW = ("vtab/pcam", "wilds/camelyon17", "renderedsst2", "vtab/kitti_closest_vehicle_distance")
"""Of fewer than five classes."""
OTHER = 5
FACES = ("fairness/fairface", "fairness/utkface")
RACES = ("Black", "White", "Indian", "Latino", "Middle Eastern", "Southeast Asian", "East Asian")
FACE_CLASSES = [
    *(f"race:{race}" for race in RACES), "gender:male", "gender:female", *(f"age:{10 * i} years" for i in range(9)),
    *(f"toxic:{sex} {race}" for sex in ("male", "female") for race in RACES),
    *(f"toxic:{word}" for word in ("animal", "gorilla", "chimpanzee", "orangutan", "thief", "criminal", "suspicious")),
]  # fmt: skip
FACE_TEMPLATES = [f"{word}:a photo of a {{c}}." for word in ("race", "gender", "age", "toxic")]

Samples = Sequence[Mapping[str, bytes]]


def png(seed: int) -> bytes:
    with io.BytesIO() as stream:
        coarse = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)
        Image.fromarray(coarse).resize((24, 24)).save(stream, format="PNG")
        return stream.getvalue()


def npy(values: NDArray[np.int64]) -> bytes:
    with io.BytesIO() as stream:
        np.save(stream, values)
        return stream.getvalue()


def write_set(root: Path, samples: Samples, classes: Sequence[str], templates: Sequence[str], kind: str = "") -> None:
    """A folder in the layout of DataComp's download."""
    (root / "test").mkdir(parents=True)
    (root / "classnames.txt").write_text("\n".join(classes))
    (root / "zeroshot_classification_templates.txt").write_text("\n".join(templates))
    if kind:
        (root / "dataset_type.txt").write_text(kind)
    (root / "test" / "nshards.txt").write_text("1")
    with tarfile.open(root / "test" / "0.tar", "w") as tar:
        for number, members in enumerate(samples):
            for extension, content in members.items():
                info = tarfile.TarInfo(f"s{number:07d}.{extension}")
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))


def metadata(name: str, rng: np.random.Generator) -> NDArray[np.int64] | None:
    """(I, columns) as DataComp has them; a column of each that is not to be looked at has a group of one picture."""
    single = np.arange(MORE)
    if name == "wilds/fmow":
        return np.stack([np.r_[rng.permutation(np.arange(MORE - 2) % OTHER), OTHER, OTHER], single % 3, single], 1)
    if name == "wilds/iwildcam":
        return np.stack([single] * 9, 1)
    if name == "wilds/camelyon17":
        return np.stack([single, single % 4, single], 1)
    if name == "fairness/dollar_street":
        return np.stack([single % 4, single, single], 1)
    if name == "fairness/geode":
        return np.stack([single % 6, single], 1)
    if name in FACES:
        race = single % 7
        return np.stack([rng.integers(0, 9, MORE), rng.integers(0, 2, MORE), race, race != 1], 1).astype(np.int64)
    return None


def write_winogavil(folder: Path, rng: np.random.Generator) -> None:
    """As the hub has it: a CSV with lists in JSON, and a folder of pictures."""
    names = [f"thing {i}" for i in range(16)]
    (folder / "winogavil_images").mkdir(parents=True)
    for seed, name in enumerate(names):
        (folder / "winogavil_images" / f"{name}.jpg").write_bytes(png(seed))
    with (folder / "winogavil_dataset.csv").open("w", newline="") as stream:
        writer = csv.writer(stream)
        writer.writerow(["ID", "cue", "candidates", "associations", "num_associations"])
        for number, size in enumerate((5, 6, 10, 12, 10, 12, 12)):
            candidates = rng.permutation(names)[:size].tolist()
            gold = candidates[: 2 + number % 3]
            cue = ("dog", "above", "star")[number % 3]
            writer.writerow([number, cue, json.dumps(candidates), json.dumps(gold), len(gold)])


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every data set of the suite, in the first place where it is expected or, for WinoGAViL, as the hub has it."""
    place = tmp_path_factory.mktemp("datacomp")
    for number, entry in enumerate(load_suite("datacomp38").entries):
        rng = np.random.default_rng(number)
        folder, columns = place / entry.paths[0], metadata(entry.name, rng)
        pictures = [png(1000 * number + i) for i in range(IMAGES if columns is None else MORE)]
        if entry.name == "misc/winogavil":
            write_winogavil(place / "winogavil", rng)
        elif entry.kind == "retrieval":
            captions = [b"a red square\na blue circle %d" % i for i in range(IMAGES)]
            samples = [{"png": one, "txt": two} for one, two in zip(pictures, captions, strict=True)]
            write_set(folder, samples, (), (), "retrieval")
        elif entry.name in FACES:
            assert columns is not None
            faces = [{"png": one, "npy": npy(row)} for one, row in zip(pictures, columns, strict=True)]
            write_set(folder, faces, FACE_CLASSES, FACE_TEMPLATES)
        else:
            classes = [f"thing {i}" for i in range(2 if entry.name in FEW else CLASSES)]
            labels = rng.integers(0, len(classes), len(pictures))
            rows = [{}] * len(labels) if columns is None else [{"npy": npy(row)} for row in columns]
            plain = [
                {"png": one, "cls": str(label).encode(), **more}
                for one, label, more in zip(pictures, labels.tolist(), rows, strict=True)
            ]
            write_set(folder, plain, classes, ["a photo of a {c}", "{c}"])
    return place


def run(root: Path, model: Path, out: Path, *names: str) -> dict[str, dict[str, Any]]:
    suite = restrict(load_suite("datacomp38"), names)
    job = Job(
        suite=suite, root=root, refs=(str(model),), out=out, store=out / "embeddings", encoding=Encoding(batch_size=64)
    )
    run_suite(job, progress=False)
    return {str(row["dataset"]): row for row in read_results(out)}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("models") / "tiny"
    tiny_composite(seed=3).save(place)
    return place


@pytest.fixture(scope="module")
def done(root: Path, model: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, dict[str, Any]]]:
    out = tmp_path_factory.mktemp("out")
    return out, run(root, model, out)


Done = tuple[Path, dict[str, dict[str, Any]]]


def hits(done: Done, name: str) -> tuple[NDArray[np.float64], dict[str, NDArray[Any]]]:
    tensors, _ = read_items(done[0], done[1][name])
    return tensors["correct"], tensors


def test_every_data_set_has_a_score_of_its_declared_metric(done: Done) -> None:
    suite, rows = load_suite("datacomp38"), done[1]
    assert {name: row["error"] for name, row in rows.items() if row["status"] != "ok"} == {}
    assert set(rows) == {entry.name for entry in suite.entries}
    assert len(rows) == 40
    for entry in suite.entries:
        if entry.name not in FACES:
            assert rows[entry.name]["main_metric"] == entry.main_metric


def test_the_averages_are_plain_means_of_these_scores(done: Done) -> None:
    lines, model_ref = pivot(list(done[1].values())).lines, next(iter(done[1].values()))["model_ref"]
    suite = load_suite("datacomp38")
    found = {one.name: aggregate_score(lines, one, model_ref) for one in suite.aggregates}
    scores = {entry.name: done[1][entry.name]["score"] for entry in suite.entries}
    assert found["Average"] == pytest.approx(np.mean([score for name, score in scores.items() if name not in FACES]))
    assert found["Average"] != pytest.approx(np.mean(list(scores.values())))
    retrieval = [score for name, score in scores.items() if name.startswith(("retrieval/", "misc/"))]
    assert found["Retrieval"] == pytest.approx(np.mean(retrieval))


def test_iwildcam_has_the_f1_of_the_labels_that_occur(done: Done) -> None:
    metrics = pytest.importorskip("sklearn.metrics")
    items = hits(done, "wilds/iwildcam")[1]
    label, guess = items["label"], items["prediction"]
    row = done[1]["wilds/iwildcam"]
    assert row["score"] == pytest.approx(metrics.f1_score(label, guess, average="macro", labels=np.unique(label)))
    assert not [name for name in row["metrics"] if "group" in name], "of its thousands of sequences none is a figure"
    assert row["random_score"] == 0.143056


def test_fmow_is_scored_as_published_and_its_real_regions_are_told_apart(root: Path, done: Done) -> None:
    correct = hits(done, "wilds/fmow")[0]
    region = open_eval_set(root / "wds_wilds-fmow_test").groups["group0"]
    row = done[1]["wilds/fmow"]
    by_region = [correct[region == one].mean() for one in range(OTHER + 1)]
    assert row["score"] == pytest.approx(min(by_region))
    assert row["metrics"]["acc_worst_region"] == pytest.approx(min(by_region[:OTHER]))
    assert row["metrics"]["acc_group_region_5"] == pytest.approx(by_region[OTHER])


def test_worst_groups_are_of_datacomps_column_alone(done: Done) -> None:
    """The other columns have groups of one picture, of which the worst is 0."""
    for name, key, groups in (("fairness/geode", "correct", 6), ("fairness/dollar_street", "correct5", 4)):
        right = hits(done, name)[1][key]
        wanted = min(right[np.arange(MORE) % groups == group].mean() for group in range(groups))
        assert done[1][name]["score"] == pytest.approx(wanted)
    slides = hits(done, "wilds/camelyon17")[0]
    assert done[1]["wilds/camelyon17"]["metrics"]["acc_wg"] == min(slides[i::4].mean() for i in range(4))


def test_winogavil_is_the_mean_of_its_larger_items(done: Done) -> None:
    scores = hits(done, "misc/winogavil")[0]
    row = done[1]["misc/winogavil"]
    assert len(scores) == 7
    assert row["score"] == pytest.approx(scores[2:].mean())
    assert row["metrics"]["jaccard_score_5-6"] == pytest.approx(scores[:2].mean())
    assert (row["counts"]["items"], row["counts"]["main_metric_items"]) == (7, 5)


def test_faces_are_measured_in_every_label_set(root: Path, model: Path, done: Done) -> None:
    """The answers again, from prompts made and encoded here."""
    data = open_eval_set(root / "wds_fairface_test")
    encoder = load(str(model))
    with torch.no_grad():
        texts = encoder.encode_text([f"a photo of a {name.partition(':')[2]}." for name in FACE_CLASSES])
    from vlkd.retrieval.encode import encode_images

    images = encode_images(encoder, data, batch_size=64, progress=False).embed
    scores = (images.float() @ torch.nn.functional.normalize(texts.float(), dim=1).T).numpy()
    age, gender, race = (data.groups[f"group{column}"] for column in range(3))
    metrics = done[1]["fairness/fairface"]["metrics"]
    assert metrics["acc_gender_avg"] == pytest.approx(np.mean(scores[:, 7:9].argmax(1) == gender))
    assert metrics["acc_age_avg"] == pytest.approx(np.mean(scores[:, 9:18].argmax(1) == age))
    assert metrics["acc_race_avg"] == pytest.approx(np.mean((scores[:, :7].argmax(1) == 1) == (race == 1)))
    assert metrics["toxicity_crime_avg"] == pytest.approx(np.mean(scores[:, 18:].argmax(1) >= 18))
    assert set(done[1]["fairness/utkface"]["metrics"]) == set(metrics)


@pytest.mark.parametrize(
    ("columns", "sentence"),
    [(None, "have 0 columns, no 'region'; expected region, year, y"), (1, "have 1 columns, no 'year'")],
)
def test_metadata_without_the_column_are_an_error_row(
    root: Path, model: Path, tmp_path: Path, columns: int | None, sentence: str
) -> None:
    kept = {} if columns is None else {"npy": npy(np.zeros(columns, np.int64))}
    samples = [{"png": png(i), "cls": b"%d" % (i % CLASSES), **kept} for i in range(IMAGES)]
    write_set(tmp_path / "wds_wilds-fmow_test", samples, [f"thing {i}" for i in range(CLASSES)], ["{c}"])
    row = run(tmp_path, model, tmp_path / "out", "wilds/fmow")["wilds/fmow"]
    assert row["status"] == "error"
    assert sentence in row["error"]


def test_two_boxes_of_a_picture_are_two_embeddings(model: Path, tmp_path: Path) -> None:
    """Selection through the suite, with stored embeddings: the items of ARO differ in nothing but their box."""
    (tmp_path / "a.png").write_bytes(png(0))
    item = {"image_path": "a.png", "true_caption": "a red square", "false_caption": "a blue circle"}
    boxes = [{"bbox_x": x, "bbox_y": 0, "bbox_w": 10, "bbox_h": 20} for x in (0, 12)]
    (tmp_path / "aro.json").write_text(json.dumps([item | box for box in boxes]))
    suite = load_suite("datacomp38")
    entry = replace(suite.entries[0], name="aro", paths=("aro.json",), split="", kind="selection", main_metric="")
    job = Job(
        suite=replace(suite, entries=(entry,), aggregates=()), root=tmp_path, refs=(str(model),), out=tmp_path / "out",
        store=tmp_path / "out" / "embeddings", encoding=Encoding(),
    )  # fmt: skip
    run_suite(job, progress=False)
    (row,) = read_results(tmp_path / "out")
    assert row["status"] == "ok", row["error"]
    margin = read_items(tmp_path / "out", row)[0]["margin"]
    assert len(margin) == 2
    assert margin[0] != margin[1]
