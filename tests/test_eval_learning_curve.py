"""Learning curves of made-up runs with known figures: names, means, intervals, paired differences, refusals."""

from __future__ import annotations

import csv
import json
import math

import numpy as np
import pytest

from vlkd import recipes
from vlkd.config import override, to_json
from vlkd.engine.classify.curve import ANY, learning_curve, words_of
from vlkd.engine.classify.curve_page import page, tables
from vlkd.engine.classify.curve_runs import flat
from vlkd.errors import UserError
from vlkd.metrics.seeds import t_interval, t_quantile

TAUGHT = ["teacher.ref=teachers/large"]
METHODS = {
    "labels only": ["method.distillation=0"],
    "teacher only": [*TAUGHT, "method.supervised=0"],
    "one head (features)": [*TAUGHT, "model.heads=one", "method.match=features"],
    "one head + PCGrad": [*TAUGHT, "model.heads=one", "method.surgery=true"],
    "one head (logits)": [*TAUGHT, "model.heads=one"],
    "auxiliary head (DHKD)": [*TAUGHT, "method.match=binary", "mix.tune=false", "mix.alpha=1"],
    "DHO-F": [*TAUGHT, "teacher.few_shot=true"],
    "DHO": TAUGHT,
}
DHO, ONE = METHODS["DHO"], METHODS["one head (logits)"]
ACCURACY = {
    ("DHO", "1"): (0.50, 0.54, 0.55),
    ("DHO", "2"): (0.60, 0.61, 0.65),
    ("one head (logits)", "1"): (0.48, 0.50, 0.49),
    ("one head (logits)", "2"): (0.61, 0.60, 0.63),
}


@pytest.fixture(scope="module")
def recipe():
    return recipes.load(recipes.find("tasks", "dho"))


@pytest.fixture
def write(tmp_path, recipe):
    """Writes a run's folder and returns its path."""

    def made(name, settings, *, acc1=0.5, seed=0, shots="4", samples=640, conflicts=(), teacher=0.7):
        config = override(recipe.config(), ["data.root=DATA", f"data.shots={shots}", f"seed={seed}", *settings])
        folder = tmp_path / "runs" / name
        folder.mkdir(parents=True)
        (folder / "config.json").write_text(json.dumps(to_json(config)))
        shared = {"split": "test", "samples": samples, "seconds": 10.0 + seed, "seed": seed, "shots": shots,
                  "labelled": 40, "counts": {"images": 200, "classes": 10},
                  "best": {"alpha": 0.25, "beta": 1.0, "step": 5, "score": 0.5}}  # fmt: skip
        roles = {"student": acc1, "label head": acc1 - 0.1, "teacher head": acc1 - 0.2}
        roles |= {"teacher": teacher} if config.teacher.ref else {}
        rows = [shared | {"role": role, "acc1": value, "metrics": {"ece": value / 10}} for role, value in roles.items()]
        rows.append(shared | {"role": "student", "acc1": 0.99, "metrics": {"ece": 0.9}, "name": "compared"})
        (folder / "results.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        lines = [{"step": step, "samples": 64 * step, "conflict/trunk": c} for step, c in enumerate(conflicts, 1)]
        (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        return str(folder)

    return made


@pytest.fixture
def grid(write):
    """Two methods, two numbers of shots, three seeds."""
    return [
        write(f"{name}-{shots}-{seed}", METHODS[name], acc1=acc1, seed=seed, shots=shots, conflicts=(0.1, 0.3 * seed))
        for (name, shots), values in ACCURACY.items()
        for seed, acc1 in enumerate(values)
    ]


def by_name(curve):
    return {line.name: line for line in curve.lines}


@pytest.mark.parametrize("degrees", [1, 2, 3, 4, 5, 6, 9, 30, 101])
@pytest.mark.parametrize("coverage", [0.5, 0.95, 0.99])
def test_quantiles_are_scipys(degrees, coverage):
    stats = pytest.importorskip("scipy.stats")
    assert t_quantile(degrees, coverage) == pytest.approx(stats.t.ppf((1 + coverage) / 2, degrees), rel=1e-9)


def test_intervals_in_closed_form():
    # One degree of freedom is Cauchy's distribution; two have t = sqrt(2) p / sqrt(1 - p^2).
    assert t_quantile(1) == pytest.approx(math.tan(0.475 * math.pi))
    assert t_quantile(2) == pytest.approx(math.sqrt(2) * 0.95 / math.sqrt(1 - 0.95**2))
    assert t_interval([1.0, 3.0]) == pytest.approx((2 - t_quantile(1), 2 + t_quantile(1)))
    assert t_interval([0.5]) is None
    assert t_interval([0.5, 0.5, 0.5]) == (0.5, 0.5)
    with pytest.raises(UserError, match="NaN"):
        t_interval([0.5, math.nan])


@pytest.mark.parametrize("name", METHODS)
def test_settings_name_the_method(recipe, name):
    words, _ = words_of(flat(to_json(override(recipe.config(), METHODS[name]))))
    assert words == name


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (["model.heads=one", "teacher.few_shot=true"], "one head (logits), few-shot teacher"),
        (["method.surgery=true"], "DHO, PCGrad"),
        (["method.match=features"], "DHO, features"),
        (["method.supervised=0", "model.heads=one"], "teacher only, one head"),
    ],
)
def test_what_a_name_does_not_tell_is_added(recipe, settings, words):
    assert words_of(flat(to_json(override(recipe.config(), settings))))[0] == words


def test_means_and_intervals_over_seeds(grid):
    curve = learning_curve(grid, "test")
    assert (curve.shots, curve.places) == (("1", "2"), (1, 2))
    assert [line.name for line in curve.lines] == ["one head (logits)", "DHO", "teacher, zero-shot"]
    cells = tables(curve)["Accuracy"].rows[1]
    assert (cells[0], cells[-1]) == ("DHO", "3")
    for cell, shots in zip(cells[1:-1], curve.shots, strict=True):
        values = 100 * np.array(ACCURACY["DHO", shots])
        # 4.302652729911275: the table's 97.5 % point at two degrees of freedom.
        half = 4.302652729911275 * values.std(ddof=1) / math.sqrt(3)
        assert (cell.value, cell.low, cell.high) == pytest.approx(
            (values.mean(), values.mean() - half, values.mean() + half)
        )
    assert tables(curve)["Label head alone"].rows[1][1].value == pytest.approx(cells[1].value - 10)
    # Of seeds 0, 1 and 2 the means of (0.1, 0.3 seed): 0.05, 0.2, 0.35.
    assert tables(curve)["Cosine of the two gradients in the trunk"].rows[0][1].value == pytest.approx(0.2)
    assert "Cosine of the two gradients in the heads" not in tables(curve)
    assert tables(curve)["Seconds of training"].rows[0][1].value == pytest.approx(11)


def test_differences_are_paired_by_seed(grid):
    stats = pytest.importorskip("scipy.stats")
    table = tables(learning_curve(grid, "test"))["Paired differences of accuracy"]
    assert [row[0] for row in table.rows] == ["DHO − one head (logits)"]
    for cell, shots in zip(table.rows[0][1:-1], ("1", "2"), strict=True):
        ours, other = (ACCURACY[name, shots] for name in ("DHO", "one head (logits)"))
        test = stats.ttest_rel(ours, other)
        low, high = test.confidence_interval(0.95)
        assert cell.value == pytest.approx(100 * np.mean(np.subtract(ours, other)))
        assert (cell.low, cell.high) == pytest.approx((100 * low, 100 * high))


def test_a_seed_that_one_side_lacks_is_no_pair(grid):
    curve = learning_curve(grid[1:], "test")
    rows = tables(curve)
    assert rows["Accuracy"].rows[1][-1] == "2 to 3"
    assert rows["Paired differences of accuracy"].rows[0][1].value == pytest.approx(100 * (0.04 + 0.06) / 2)


def test_a_student_without_labels_stands_at_all_shots(grid, write):
    more = [write(f"teacher-{seed}", METHODS["teacher only"], acc1=0.4, seed=seed, shots="1") for seed in range(2)]
    again = write("teacher-again", METHODS["teacher only"], acc1=0.1, seed=0, shots="2")
    curve = learning_curve([*grid, *more, again], "test")
    line = by_name(curve)["teacher only"]
    assert list(line.results) == [ANY]
    assert line.at("1", "acc1") == line.at("2", "acc1") == {0: 0.4, 1: 0.4}
    assert curve.left_out == ((again, f"the same method, shots and seed as {more[0]}"),)


def test_a_few_shot_teacher_has_a_line_of_its_own(grid, write):
    few = [write(f"f-{shots}", METHODS["DHO-F"], shots=shots, teacher=0.7 + int(shots) / 100) for shots in ("1", "2")]
    curve = learning_curve([*grid, *few], "test")
    assert [line.name for line in curve.lines][-3:] == ["DHO-F", "teacher, zero-shot", "teacher, few-shot"]
    assert by_name(curve)["teacher, zero-shot"].at("2", "acc1") == {0: 0.7}
    assert by_name(curve)["teacher, few-shot"].at("2", "acc1") == pytest.approx({0: 0.72})
    assert tables(curve)["Accuracy"].aside == [3, 4]


def test_other_settings_make_another_method(write):
    runs = [write("a", DHO), write("b", [*DHO, "train.lr=0.01"]), write("c", [*ONE, "train.log_steps=3"])]
    curve = learning_curve(runs, "test")
    names = [line.name for line in curve.lines if line.student]
    assert names == ["one head (logits)", "DHO, train.lr=0.001", "DHO, train.lr=0.01"]
    differences = tables(curve)["Paired differences of accuracy"].rows
    assert [row[0] for row in differences] == [f"{name} − one head (logits)" for name in names[1:]]


def test_shares_have_their_place_by_labels_per_class(write):
    curve = learning_curve(
        [write("a", DHO, shots="16"), write("b", DHO, shots="10%"), write("c", DHO, shots="2")], "test"
    )
    assert curve.shots == ("2", "10%", "16")
    assert curve.places == (2, 4, 16)


@pytest.mark.parametrize(
    ("settings", "samples", "told"),
    [
        (["data.root=OTHER"], 640, "data.root"),
        (["model.image=resnet18"], 640, "model.image"),
        (["data.leave_out=cat"], 640, "data.leave_out"),
        ([], 1280, r"student samples \(640 and 1280\)"),
    ],
)
def test_runs_that_cannot_be_compared_are_refused(write, settings, samples, told):
    runs = [write("a", DHO), write("b", [*ONE, *settings], samples=samples)]
    with pytest.raises(UserError, match=f"differ in {told}"):
        learning_curve(runs, "test")


def test_unfinished_runs_are_listed_and_left_out(grid, tmp_path, write):
    half = write("half", METHODS["labels only"])
    (tmp_path / "runs" / "half" / "results.jsonl").unlink()
    assert learning_curve([*grid, half], "test").left_out == ((half, "not finished: no results.jsonl"),)
    with pytest.raises(UserError, match="None of 1 folders is a finished run"):
        learning_curve([half], "test")
    with pytest.raises(UserError, match="There is no folder"):
        learning_curve([*grid, str(tmp_path / "absent")], "test")


def test_what_is_no_classifiers_run_is_refused(tmp_path, write):
    with pytest.raises(UserError, match="no figures of the split 'val', only of test"):
        learning_curve([write("a", DHO)], "val")
    other = tmp_path / "other"
    other.mkdir()
    (other / "config.json").write_text('{"seed": 0}')
    (other / "results.jsonl").write_text('{"role": "student", "split": "test"}\n')
    with pytest.raises(UserError, match=r"KeyError: 'data.shots'.*leave it out"):
        learning_curve([str(other)], "test")
    (other / "results.jsonl").write_text('{"role": "stu')
    with pytest.raises(UserError, match="JSONDecodeError"):
        learning_curve([str(other)], "test")


def test_one_run_alone_has_a_page(write):
    curve = learning_curve([write("a", METHODS["teacher only"], shots="all")], "test")
    assert "teacher only" in page(curve, "T").html()


def test_all_outputs(grid, tmp_path, capsys):
    main = recipes.load(recipes.find("eval", "learning_curve")).main
    main([*grid, "--out", str(tmp_path / "curve"), "--json"])
    printed = capsys.readouterr().out
    last = json.loads(printed.splitlines()[-1])
    assert last["acc1"]["DHO"]["1"]["by_seed"] == {"0": 0.5, "1": 0.54, "2": 0.55}
    assert last["acc1"]["teacher, zero-shot"]["2"] == {"mean": 0.7, "low": None, "high": None, "by_seed": {"0": 0.7}}
    assert last["differences"]["DHO - one head (logits)"]["2"]["mean"] == pytest.approx(0.02 / 3)
    assert "| teacher, zero-shot | 70.0 | 70.0 | 1 |" in printed
    assert "above 0 at 2 of 2 shot counts; the 95 % interval lies above 0 at 0 and below 0 at 0." in printed
    with (tmp_path / "curve" / "learning_curve.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 13
    row = next(row for row in rows if row["method"] == "DHO")
    assert [row[name] for name in ("shots", "seed", "acc1", "ece")] == ["1", "0", "0.5", "0.05"]
    html = (tmp_path / "curve" / "learning_curve.html").read_text()
    # Two students have three seeds at two numbers of shots; the teacher has no seeds.
    assert html.count('<path class="interval"') == 4
    assert "12 runs of 640 student samples each" in html
