from __future__ import annotations

import json
import math

import numpy as np
import pytest
from helpers.result_rows import error_row, result_row, speed_row
from PIL import Image

from vlkd import recipes
from vlkd.errors import UserError
from vlkd.metrics import paired_bootstrap
from vlkd.suite.compare import compare_results, compare_rows, sign_test
from vlkd.suite.compare_page import changed_items, comparison_markdown, comparison_page
from vlkd.suite.results import append_row, read_results, write_items

CLASSES = ("ant", "bee", "cow")
LABEL = np.array([0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2])
A = np.array([0, 0, 0, 0, 1, 1, 1, 2, 0, 0, 2, 2])
B = np.array([0, 0, 1, 1, 1, 1, 1, 1, 2, 0, 2, 2])


@pytest.fixture
def pictures(tmp_path):
    """A class folder of twelve pictures."""
    for number, label in enumerate(LABEL):
        folder = tmp_path / "data" / "test" / CLASSES[label]
        folder.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (32, 24), (20 * number, 90, 10)).save(folder / f"{number:02d}.png")
    return tmp_path / "data"


def store(folder, model, prediction, data, **changes):
    keys = changes.pop("keys", [f"{CLASSES[label]}/{number:02d}.png" for number, label in enumerate(LABEL)])
    correct = (prediction == LABEL).astype(np.float64)
    place = {"path": str(data), "split": "test", "kind": "classification", "train": ""}
    by_class = {name: float(correct[i == LABEL].mean()) for i, name in enumerate(CLASSES)}
    row = result_row(model, "insects", float(correct.mean()), per_class=by_class, data=place, **changes)
    row["items"] = write_items(folder, row, {"correct": correct, "prediction": prediction, "label": LABEL}, keys)
    append_row(folder, row)


@pytest.fixture
def results(tmp_path, pictures):
    folder = tmp_path / "results"
    store(folder, "small", A, pictures)
    store(folder, "large", B, pictures)
    return folder


def of(folder, model):
    return [row for row in read_results(folder) if row["model_ref"] == model]


def test_wins_losses_and_interval(results):
    one = compare_results(of(results, "small"), results, of(results, "large"), results).compared[0]
    # By hand: items 2 and 3 are won, 7 and 8 lost.
    assert (one.wins, one.losses, one.difference) == (2, 2, 0)
    assert [(own.name, own.items, own.wins, own.losses) for own in one.classes] == [
        ("ant", 4, 2, 0), ("bee", 4, 0, 1), ("cow", 4, 0, 1),
    ]  # fmt: skip
    assert one.interval == paired_bootstrap((A == LABEL).astype(float), (B == LABEL).astype(float))
    assert one.interval[0] < 0 < one.interval[1]
    assert changed_items(one) == ([2, 3], [7, 8])
    assert changed_items(one, 1) == ([2], [7])


@pytest.mark.parametrize(("wins", "losses"), [(0, 0), (3, 3), (0, 5), (10, 2), (2, 10), (600, 500)])
def test_sign_test_is_the_binomial_tail(wins, losses):
    total = wins + losses
    tail = sum(math.comb(total, i) for i in range(min(wins, losses) + 1))
    assert sign_test(wins, losses) == pytest.approx(min(1, 2 * tail / 2**total))


def test_other_data_or_items_are_refused(tmp_path, results, pictures):
    row = of(results, "small")[0]
    store(tmp_path / "b", "large", B, pictures, data_hash="other")
    with pytest.raises(UserError, match="the data differ"):
        compare_rows(row, results, of(tmp_path / "b", "large")[0], tmp_path / "b")
    keys = [f"{CLASSES[label]}/{number:02d}.png" for number, label in enumerate(LABEL)]
    store(tmp_path / "c", "large", B, pictures, keys=[*keys[:-1], "cow/99.png"])
    with pytest.raises(UserError, match=r"2 items were measured for one model alone \(cow/11.png, cow/99.png\)"):
        compare_rows(row, results, of(tmp_path / "c", "large")[0], tmp_path / "c")
    store(tmp_path / "d", "large", B, pictures, keys=keys[::-1])
    with pytest.raises(UserError, match="the items differ: their order"):
        compare_rows(row, results, of(tmp_path / "d", "large")[0], tmp_path / "d")
    with pytest.raises(UserError, match="Nothing can be compared: insects"):
        compare_results([row], results, of(tmp_path / "d", "large"), tmp_path / "d")


def test_one_refusal_leaves_the_others(results, pictures):
    for model in ("small", "large"):
        append_row(results, result_row(model, "cars", 0.5, data_hash=model))
        append_row(results, speed_row(model, 1, 2.0))
    append_row(results, error_row("small", "birds", "gone"))
    found = compare_results(of(results, "small"), results, of(results, "large"), results)
    assert [one.dataset for one in found.compared] == ["insects"]
    assert [reason[:16] for reason in found.refused] == ["cars (zero shot)"]
    assert "Not compared: cars" in comparison_page(found).html()


def test_page_shows_what_changed_or_says_why_not(results, pictures):
    found = compare_results(of(results, "small"), results, of(results, "large"), results)
    html = comparison_page(found).html()
    assert html.count("<img ") == 4
    for part in ("Better in a: 2 of 2", "Better in b: 2 of 2", "ant/02.png", "cow/08.png", "All 3 classes"):
        assert part in html
    pictures.rename(pictures.with_name("moved"))
    html = comparison_page(found).html()
    assert "<img " not in html
    assert "The pictures cannot be shown: " in html


def test_models_without_classes_compare_by_their_values(tmp_path, pictures):
    for model, values in (("a", [0.5, 1.0, 0.25]), ("b", [0.5, 0.5, 0.5])):
        row = result_row(model, "coco", 0.5, protocol="retrieval", per_class={}, data_hash="h")
        row["data"] = {"path": "/nowhere", "split": "", "kind": "retrieval", "train": ""}
        row["items"] = write_items(tmp_path, row, {"correct": np.array(values)}, ["x", "y", "z"])
        append_row(tmp_path, row)
    found = compare_results(of(tmp_path, "a"), tmp_path, of(tmp_path, "b"), tmp_path)
    one = found.compared[0]
    assert (one.wins, one.losses, one.classes) == (1, 1, ())
    assert one.difference == pytest.approx(0.25 / 3)
    assert "cannot be shown" in comparison_page(found).html()


def run(*words):
    recipes.load(recipes.find("eval", "compare")).main(words)


def test_command(results, tmp_path, capsys):
    run(str(results), "--a", "large", "--out", str(tmp_path / "new" / "page.html"), "--json")
    printed = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (printed["a"], printed["b"]) == ("large", "small")
    assert (printed["results"][0]["wins"], printed["results"][0]["items"]) == (2, 12)
    assert printed["results"][0]["classes"][0] == {"class": "ant", "items": 4, "wins": 0, "losses": 2}
    assert "<img " in (tmp_path / "new" / "page.html").read_text()


def test_command_on_two_folders(results, tmp_path, pictures, capsys):
    store(tmp_path / "after", "small", B, pictures)
    run(str(results), str(tmp_path / "after"), "--a", "small", "--json")
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["results"][0]["losses"] == 2
    with pytest.raises(UserError, match="holds 2 models; name --a and --b among small, large"):
        run(str(results), str(tmp_path / "after"))
    with pytest.raises(UserError, match="Both sides are the same model"):
        run(str(results), "--a", "small", "--b", "small")


def remark_of(folder, protocol, items, figures):
    for model in ("a", "b"):
        values = np.array(items[model])
        row = result_row(
            model, "coco", figures[model][0], protocol=protocol, main_metric="mean_average_precision", per_class={},
            metrics={"mean_average_precision": figures[model][0], "label_ranking_average_precision": figures[model][1]},
        )  # fmt: skip
        row["data"] = {"path": "/nowhere", "split": "", "kind": protocol, "train": ""}
        row["items"] = write_items(folder, row, {"correct": values}, ["x", "y"])
        append_row(folder, row)
    found = compare_results(of(folder, "a"), folder, of(folder, "b"), folder)
    remark = found.compared[0].remark
    if remark:
        assert remark in comparison_markdown(found)
        assert comparison_page(found).html().count("not the main metric of the table") == 1
    return remark


def test_items_whose_mean_is_not_the_figure_of_the_table_are_said_to_be_so(tmp_path):
    items = {"a": [0.5, 1.0], "b": [0.25, 0.25]}
    assert remark_of(tmp_path / "1", "multilabel", items, {"a": (0.75, 0.1), "b": (0.25, 0.2)}) == ""
    remark = remark_of(tmp_path / "2", "multilabel", items, {"a": (0.6, 0.75), "b": (0.5, 0.25)})
    assert "compared here is label_ranking_average_precision (a 75.0 and b 25.0)" in remark
    assert "not the main metric of the table, mean_average_precision (a 60.0 and b 50.0)" in remark
    remark = remark_of(tmp_path / "3", "retrieval", items, {"a": (0.6, 0.1), "b": (0.5, 0.2)})
    assert "an image's captions counting as one (a 75.0 and b 25.0)" in remark
