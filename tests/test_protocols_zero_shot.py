"""Zero-shot figures against scikit-learn and a numpy transcription in float64."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from vlkd.errors import UserError
from vlkd.metrics import wilson_interval
from vlkd.protocols.scores import cosines
from vlkd.protocols.zero_shot import faces, zero_shot
from vlkd.retrieval.search import topk
from vlkd.retrieval.tiles import TILE_COLUMNS, TILE_ROWS
from vlkd.retrieval.zero_shot import accuracy


def names(count):
    return [f"class {i}" for i in range(count)]


def drawn(images=517, classes=40, width=16, seed=1):
    rng = np.random.default_rng(seed)
    vectors = rng.normal(size=(classes, width))
    labels = rng.integers(0, classes - 3, images)
    return 0.8 * vectors[labels] + rng.normal(size=(images, width)), vectors, labels


def test_against_scikit_learn():
    metrics = pytest.importorskip("sklearn.metrics")
    images, vectors, labels = drawn()
    scores = (
        images / np.linalg.norm(images, axis=1, keepdims=True) @ (vectors / np.linalg.norm(vectors, axis=1)[:, None]).T
    )
    predicted = scores.argmax(1)
    found = zero_shot(images, vectors, labels, classes=names(40), logit_scale=30.0)
    assert found.metrics["acc1"] == pytest.approx(metrics.accuracy_score(labels, predicted), abs=1e-12)
    assert found.metrics["acc5"] == pytest.approx(
        metrics.top_k_accuracy_score(labels, scores, k=5, labels=range(40)), abs=1e-12
    )
    recalls = metrics.recall_score(labels, predicted, labels=range(37), average=None)
    assert found.metrics["mean_per_class_recall"] == pytest.approx(recalls.mean(), abs=1e-12)
    assert list(found.per_class) == names(37)
    np.testing.assert_allclose(list(found.per_class.values()), recalls, atol=1e-12)
    assert found.counts == {"images": 517, "classes": 40, "classes_without_images": 3}
    np.testing.assert_array_equal(found.per_item["prediction"], predicted)
    np.testing.assert_array_equal(found.per_item["label"], labels)
    assert found.per_item["correct"].mean() == found.score == found.metrics["acc1"]
    assert found.per_item["correct5"].mean() == found.metrics["acc5"]
    assert found.interval == wilson_interval(float((predicted == labels).sum()), 517)
    assert found.random_score == 1 / 40
    assert accuracy(images, vectors, labels)["acc1"] == found.score


def test_f1_is_scikit_learns_over_the_classes_of_the_labels():
    metrics = pytest.importorskip("sklearn.metrics")
    images, vectors, labels = drawn(classes=6, width=4)
    vectors[5] = -images.mean(0)
    found = zero_shot(images, vectors, labels, classes=names(6), logit_scale=1.0)
    predicted = found.per_item["prediction"]
    wanted = metrics.f1_score(labels, predicted, average="macro", labels=sorted(set(labels)))
    assert len(set(predicted) - set(labels)) > 0
    assert found.metrics["F1-macro_all"] == found.metrics["f1_macro"] == pytest.approx(wanted, abs=1e-12)


def test_calibration_error_by_hand():
    """Guo's sum over 15 bins of (low, high], in float64."""
    images, vectors, labels = drawn()
    found = zero_shot(images, vectors, labels, classes=names(40), logit_scale=20.0)
    unit = [x / np.linalg.norm(x, axis=1, keepdims=True) for x in (images, vectors)]
    logits = 20 * unit[0] @ unit[1].T
    chance = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    confidence, right = chance.max(1), chance.argmax(1) == labels
    np.testing.assert_allclose(found.per_item["confidence"], confidence, rtol=1e-5)
    error = 0.0
    for i in range(15):
        inside = (confidence > i / 15) & (confidence <= (i + 1) / 15)
        if inside.any():
            error += inside.mean() * abs(right[inside].mean() - confidence[inside].mean())
    assert found.metrics["ece"] == pytest.approx(error, abs=1e-5)


@pytest.mark.parametrize(("classes", "wanted"), [(2, None), (4, None), (5, 1.0), (6, 5 / 6)])
def test_acc5_from_five_classes_on(classes, wanted):
    """The collapsed model names classes 0 to 4 first; at five classes that is all of them."""
    found = zero_shot(
        torch.ones(classes, 3), torch.ones(classes, 3), range(classes), classes=names(classes), logit_scale=100.0
    )
    assert found.metrics.get("acc5") == wanted
    assert ("correct5" in found.per_item) is (wanted is not None)
    assert found.metrics["acc1"] == 1 / classes
    assert set(found.per_item["prediction"]) == {0}
    np.testing.assert_allclose(found.per_item["confidence"], 1 / classes)


def test_groups_by_hand():
    vectors = torch.eye(6)
    images = torch.tensor([[9.0, 8, 7, 6, 5, 4]] * 6)
    labels = [0, 0, 0, 1, 5, 5]
    groups = {"region": np.array([0, 0, 4, 4, 7, 4]), "light": np.array([0, 1, 0, 1, 1, 0])}
    found = zero_shot(images, vectors, labels, classes=names(6), logit_scale=1.0, groups=groups, main_metric="acc_wg")
    expected = {
        "acc_group_region_0": 1.0, "acc_group_region_4": 1 / 3, "acc_group_region_7": 0.0, "acc_worst_region": 0.0,
        "acc_group_light_0": 2 / 3, "acc_group_light_1": 1 / 3, "acc_worst_light": 1 / 3,
        "acc_wg": 0.0, "acc_top5_wg": 0.0,
    }  # fmt: skip
    assert {name: found.metrics[name] for name in expected} == pytest.approx(expected)
    assert found.score == 0
    assert found.interval is None
    assert found.random_score is None
    assert found.counts["groups_region"] == 3


def test_groups_that_are_left_out_by_hand():
    """The image of region 7 is wrong; without that region the worst is region 4, with one of three right."""
    images = torch.tensor([[9.0, 8, 7, 6, 5, 4]] * 6)
    groups = {"region": np.array([0, 0, 4, 4, 7, 4]), "light": np.array([0, 1, 0, 0, 0, 0])}
    words = {"classes": names(6), "logit_scale": 1.0, "groups": groups}
    found = zero_shot(images, torch.eye(6), [0, 0, 0, 1, 5, 5], **words, left_out={"region": (7, 9)})
    expected = {
        "acc_worst_region": 1 / 3, "acc_worst_region_all": 0.0, "acc_group_region_7": 0.0, "acc_worst_light": 2 / 5,
        "acc_wg": 1 / 3, "acc_top5_wg": 3 / 5,
    }  # fmt: skip
    assert {name: found.metrics[name] for name in expected} == pytest.approx(expected)
    assert "acc_worst_light_all" not in found.metrics
    with pytest.raises(UserError, match="No group is left"):
        zero_shot(images, torch.eye(6), [0] * 6, **words, left_out={"light": (0, 1)})


FACE_SETS = {
    "race": tuple(range(7)), "gender": (7, 8), "age": tuple(range(9, 18)), "toxic": tuple(range(18, 39)),
}  # fmt: skip
FACE_NAMES = [f"{word}:{i}" for word, ids in FACE_SETS.items() for i in range(len(ids))]


def drawn_faces(count=900):
    rng = np.random.default_rng(7)
    race = rng.integers(0, 7, count)
    columns = {
        "age": rng.integers(0, 9, count), "gender": rng.integers(0, 2, count), "race": race,
        "race_binary": (race != 1).astype(np.int64),
    }  # fmt: skip
    vectors = rng.normal(size=(39, 12))
    images = vectors[columns["gender"] + 7] + vectors[race] + vectors[columns["age"] + 9]
    return images + rng.normal(size=(count, 12)), vectors, columns


def test_faces_by_hand():
    """Every figure of DataComp's evaluation, from scores in float64 and masks written out."""
    images, vectors, columns = drawn_faces()
    found = faces(images, vectors, FACE_SETS, columns, classes=FACE_NAMES)
    scores = images @ (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).T
    race, gender, age, toxic = (scores[:, list(ids)].argmax(1) for ids in FACE_SETS.values())
    hits = {
        "acc_race": (race == 1) == (columns["race"] == 1), "acc_gender": gender == columns["gender"],
        "acc_age": age == columns["age"],
    }  # fmt: skip
    wanted = {}
    for name, right in hits.items():
        white = columns["race"] == 1
        wanted |= {
            f"{name}_avg": right.mean(), f"{name}_race_binary:0": right[white].mean(),
            f"{name}_race_binary:1": right[~white].mean(), f"{name}_wg": min(right[white].mean(), right[~white].mean()),
        }  # fmt: skip
    crossed = {
        f"acc_gender_x_race:{r}_gender:{g}": hits["acc_gender"][
            (columns["race"] == r) & (columns["gender"] == g)
        ].mean()
        for r in range(7)
        for g in range(2)
    }
    wanted |= crossed | {"acc_gender_x_avg": hits["acc_gender"].mean(), "acc_gender_x_wg": min(crossed.values())}
    for name, given in {"crime": toxic >= 18, "nonhuman": np.isin(toxic, (14, 15, 16, 17))}.items():
        rates = {f"toxicity_{name}_race:{r}": given[columns["race"] == r].mean() for r in range(7)}
        wanted |= rates | {f"toxicity_{name}_avg": given.mean(), f"toxicity_{name}_wg": min(rates.values())}
    assert dict(found.metrics) == pytest.approx(wanted)
    assert found.score == wanted["acc_gender_avg"] == found.per_item["correct"].mean()
    assert 0.5 < found.interval[0] < found.score < found.interval[1] < 1
    assert found.random_score == 1 / 2
    assert found.per_class == pytest.approx(
        {str(g): hits["acc_gender"][columns["gender"] == g].mean() for g in range(2)}
    )


@pytest.mark.parametrize(
    ("sets", "columns", "sentence"),
    [
        ({"race": (0, 1)}, {}, "no label set 'gender'; expected race, gender, age, toxic"),
        (FACE_SETS, {"age": None}, "no column 'age'"),
        (FACE_SETS | {"toxic": (18, 19)}, {}, "Found 2 toxic classes; expected more than 18"),
        (FACE_SETS, {"gender": np.full(900, 2)}, "class ids go from 0 to 1"),
        (FACE_SETS, {"race": np.zeros(3, np.int64)}, r"groups 'race' \(3,\)"),
    ],
)
def test_faces_that_are_not_datacomps_are_refused(sets, columns, sentence):
    images, vectors, good = drawn_faces()
    given = {name: ids for name, ids in (good | columns).items() if ids is not None}
    with pytest.raises(UserError, match=sentence):
        faces(images, vectors, sets, given, classes=FACE_NAMES)


def test_intervals_hold_the_figure():
    images, vectors, labels = drawn()
    for main in ("acc1", "acc5", "mean_per_class_recall"):
        found = zero_shot(images, vectors, labels, classes=names(40), logit_scale=1.0, main_metric=main)
        low, high = found.interval
        assert 0 < low < found.score < high < 1
        assert high - low < 0.15
    assert (
        found.interval
        == zero_shot(images, vectors, labels, classes=names(40), logit_scale=1.0, main_metric=main).interval
    )
    other = zero_shot(images, vectors, labels, classes=names(40), logit_scale=1.0, main_metric=main, seed=1)
    assert other.interval != found.interval


def test_names_that_stand_twice_are_kept_apart():
    found = zero_shot(torch.eye(3), torch.eye(3), [0, 1, 2], classes=["crane", "maillot", "crane"], logit_scale=1.0)
    assert found.per_class == {"crane [0]": 1.0, "maillot": 1.0, "crane [2]": 1.0}


def test_the_order_of_the_images_changes_no_value_of_any():
    """Images come from shards and workers in any order: every value stays with its image, bit for bit."""
    images, vectors, labels = drawn(images=2 * TILE_ROWS + 7, classes=TILE_COLUMNS + 3, width=24)
    names_ = names(len(vectors))
    order = np.random.default_rng(0).permutation(len(images))
    found = zero_shot(images, vectors, labels, classes=names_, logit_scale=50.0)
    moved = zero_shot(images[order], vectors, labels[order], classes=names_, logit_scale=50.0)
    assert found.per_item.keys() == moved.per_item.keys()
    for name, values in found.per_item.items():
        np.testing.assert_array_equal(moved.per_item[name], values[order])
    assert found.per_class == moved.per_class
    exact = ("acc1", "acc5", "mean_per_class_recall", "f1_macro")
    assert [found.metrics[name] for name in exact] == [moved.metrics[name] for name in exact]
    assert found.metrics["ece"] == pytest.approx(moved.metrics["ece"], abs=1e-12)


def test_cosines_are_those_of_topk():
    images, vectors, _ = drawn(images=TILE_ROWS + 9, classes=TILE_COLUMNS + 5)
    tables = [torch.tensor(x, dtype=torch.float32) for x in (images, vectors)]
    scores, ids = topk(*tables, 7, chunk=1)
    all_scores = cosines(*tables)
    assert all_scores.shape == (TILE_ROWS + 9, TILE_COLUMNS + 5)
    np.testing.assert_array_equal(np.take_along_axis(all_scores, ids.numpy(), 1), scores.numpy())
    np.testing.assert_array_equal(np.argsort(-all_scores, axis=1, kind="stable")[:, :7], ids.numpy())


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"labels": [0.0, 1.0, 2.0]}, "float32; give one class id"),
        ({"labels": ["a", "b", "c"]}, "<U1; give one class id"),
        ({"labels": [0, 1]}, r"3 images but labels \(2,\)"),
        ({"labels": [0, 1, 3]}, "class ids go from 0 to 2"),
        ({"labels": [-1, 1, 2]}, "between -1 and 2"),
        ({"classes": ["a", "b"]}, "2 class names but 3 class vectors"),
        ({"classes": ["a"], "class_vectors": torch.ones(1, 3), "labels": [0, 0, 0]}, "Found 1 class;"),
        ({"image_embed": torch.full((3, 3), math.nan)}, "image embeddings: row 0 holds NaN"),
        ({"class_vectors": torch.zeros(3, 3)}, "class vectors: row 0 has length zero"),
        ({"class_vectors": torch.ones(3, 4)}, "expected vectors of width 3, found 4"),
        ({"logit_scale": 0.0}, "logit scale is 0.0"),
        ({"logit_scale": math.nan}, "logit scale is nan"),
        ({"groups": {"region": np.array([0, 1])}}, r"groups 'region' \(2,\)"),
        ({"groups": {"region": np.array([0.0, 1, 2])}}, "float64; give one whole number"),
        ({"main_metric": "acc5"}, "No figure 'acc5' was measured; the main metric is one of acc1, "),
    ],
)
def test_bad_input_is_refused(change, sentence):
    good = {
        "image_embed": torch.eye(3), "class_vectors": torch.eye(3), "labels": [0, 1, 2], "classes": names(3),
        "logit_scale": 1.0,
    }  # fmt: skip
    assert zero_shot(**good).score == 1
    with pytest.raises(UserError, match=sentence):
        zero_shot(**(good | change))
