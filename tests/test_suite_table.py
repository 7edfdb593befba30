from __future__ import annotations

import re

import pytest
from helpers.result_rows import error_row, result_row, speed_row

from vlkd.errors import UserError
from vlkd.suite.declaration import Aggregate
from vlkd.suite.metric_words import metric_words
from vlkd.suite.table import (
    aggregate_score,
    find_model,
    join_results,
    pivot,
    retention,
    short_names,
    wide_rows,
)
from vlkd.suite.table_markdown import grid, markdown
from vlkd.suite.table_page import mean_scores, page

TEACHER, STUDENT = "runs/large/student", "runs/small/student"


def cells(text: str, start: str) -> list[str]:
    line = next(line for line in text.splitlines() if line.startswith(f"| {start}"))
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_lines_hold_scores_errors_and_gaps():
    rows = [
        result_row(TEACHER, "pets", 0.8),
        result_row(STUDENT, "pets", 0.6),
        result_row(TEACHER, "cars", 0.5),
        error_row(STUDENT, "cars", "the shard is cut | short"),
        result_row(TEACHER, "dtd", 0.3),
    ]
    text = markdown(pivot(rows))
    assert cells(text, "data set") == ["data set", "metric", "chance", "large/student", "small/student"]
    assert cells(text, "pets") == ["pets (zero shot)", "acc1", "10.0", "**80.0** [75.0, 85.0]", "60.0 [55.0, 65.0]"]
    assert cells(text, "cars")[3:] == ["50.0 [45.0, 55.0]", "error"]
    assert cells(text, "dtd")[4] == "–"
    assert "- small/student, cars (zero shot): the shard is cut \\| short" in text


def test_the_teacher_is_never_the_best_and_gives_the_retention():
    rows = [result_row(TEACHER, "pets", 0.8), result_row(STUDENT, "pets", 0.6), result_row("tiny", "pets", 0.2)]
    table = pivot(rows)
    assert table.lines[0].best() == {TEACHER}
    assert table.lines[0].best(aside=TEACHER) == {STUDENT}
    assert retention(table.lines[0], STUDENT, TEACHER) == pytest.approx(0.75)
    kept = markdown(table, teacher=TEACHER).split("kept, in percent:")[1]
    assert cells(kept, "pets") == ["pets (zero shot)", "75.0", "25.0"]


def test_other_data_are_no_contest():
    rows = [result_row(TEACHER, "pets", 0.8), result_row(STUDENT, "pets", 0.6, data_hash="other")]
    table = pivot(rows)
    assert not table.lines[0].best()
    assert retention(table.lines[0], STUDENT, TEACHER) is None
    assert "pets (zero shot): measured on different data" in markdown(table)
    assert mean_scores(table, "zero_shot") == ({}, [])


def test_two_models_under_one_name_are_told():
    rows = [result_row(STUDENT, "pets", 0.8), result_row(STUDENT, "cars", 0.6, fingerprint="retrained")]
    assert "the rows come from 2 different models" in markdown(pivot(rows))
    with pytest.raises(UserError, match="call different models runs/small/student"):
        join_results([rows[:1], rows[1:]])
    later = result_row(STUDENT, "pets", 0.9)
    assert join_results([rows[:1], [later]]) == [later]
    # A failure to open ends with the next result, not before it.
    failure = error_row(later["model_ref"], later["dataset"], "gone", "data")
    assert join_results([[failure], [later]]) == [later]
    assert join_results([[later], [failure]]) == [later, failure]


def test_other_main_metrics_stand_on_lines_of_their_own():
    rows = [result_row(TEACHER, "pets", 0.8), result_row(STUDENT, "pets", 0.7, main_metric="mean_per_class_recall")]
    table = pivot(rows)
    assert [line.metric for line in table.lines] == ["acc1", "mean_per_class_recall"]
    assert [line.score(STUDENT) for line in table.lines] == [None, 0.7]


def test_a_data_set_that_was_not_opened_fails_in_all_its_protocols():
    rows = [
        result_row(TEACHER, "pets", 0.8),
        result_row(TEACHER, "pets", 0.9, protocol="knn"),
        error_row(STUDENT, "pets", "nothing there", "data"),
        error_row(STUDENT, "cars", "nothing there", "data"),
        # It was measured before, and those figures stay.
        error_row(TEACHER, "pets", "was not there", "data"),
    ]
    table = pivot(rows)
    (remark,) = table.remarks
    assert "pets: the figures are of an earlier run; the last one failed: was not there" in remark
    assert [line.title for line in table.lines] == ["pets (zero shot)", "pets (knn)", "cars"]
    assert all(line.failed(STUDENT) for line in table.lines)
    assert not any(line.failed(TEACHER) for line in table.lines)


def test_an_aggregate_is_the_mean_of_exactly_its_data_sets():
    """48 rows of which 38 count: the mean over all rows is another number."""
    scores = {f"d{n}": (0.3 if n < 38 else 0.9) + n / 1000 for n in range(48)}
    lines = pivot([result_row("m", name, score) for name, score in scores.items()]).lines
    names = tuple(f"d{n}" for n in range(38))
    found = aggregate_score(lines, Aggregate(name="datacomp38", names=names), "m")
    assert found == pytest.approx(0.3 + sum(range(38)) / 38 / 1000)
    assert aggregate_score(lines[1:], Aggregate(name="x", names=names), "m") == "37 of 38 data sets"


def test_probes_do_not_mix_into_an_aggregate():
    rows = [result_row("m", "pets", 0.5), result_row("m", "pets", 0.9, protocol="linear_probe")]
    rows += [result_row("m", "pets", 0.7, protocol="agreement"), error_row("m", "cars", "gone")]
    one = Aggregate(name="own", names=("pets",))
    two = Aggregate(name="both", names=("pets", "cars"))
    assert aggregate_score(pivot(rows).lines, one, "m") == pytest.approx(0.5)
    assert aggregate_score(pivot(rows).lines, one, "m", "linear_probe") == pytest.approx(0.9)
    text = markdown(pivot(rows), [one, two])
    assert cells(text, "own ")[3] == "50.0"
    assert cells(text, "own (linear probe)")[3] == "90.0"
    assert cells(text, "both")[3] == "1 of 2 data sets"
    assert "both (linear probe)" not in text
    twice = pivot([*rows, result_row("m", "pets", 0.4, protocol="retrieval")]).lines
    assert aggregate_score(twice, one, "m") == "pets has two scores"


def test_speed_is_lowest_best_in_its_own_unit():
    rows = [speed_row("a", 20_000_000, 31.25), speed_row("b", 8_000_000, 12.5), result_row("a", "pets", 0.5)]
    table = pivot(rows)
    assert [line.dataset for line in table.lines] == ["pets", "speed"]
    assert table.lines[1].best() == {"b"}
    assert cells(markdown(table), "speed")[3:] == ["31.25", "**12.5**"]


def test_names_are_the_shortest_ends_that_differ():
    refs = ["runs/a/student", "runs/b/student", "timm:resnet18", "student"]
    assert short_names(refs) == {
        "runs/a/student": "a/student", "runs/b/student": "b/student", "timm:resnet18": "timm:resnet18",
        "student": "student",
    }  # fmt: skip
    assert find_model(refs, "a/student") == "runs/a/student"
    with pytest.raises(UserError, match="no single model 'c'"):
        find_model(refs, "c")


def test_wide_rows_are_a_superset_of_clip_benchmark():
    rows = [result_row("m", "pets", 0.5, pretrained="laion"), speed_row("m", 8, 2.0), error_row("m", "cars", "gone")]
    wide = wide_rows(rows)
    assert list(wide[0])[:6] == ["dataset", "model", "pretrained", "task", "language", "model_fullname"]
    assert len({tuple(row) for row in wide}) == 1
    assert wide[0]["model_fullname"] == "m laion"
    assert (wide[0]["acc1"], wide[0]["interval_low"], wide[0]["count_images"]) == (0.5, pytest.approx(0.45), 200)
    assert wide[1]["acc1"] is None
    assert (wide[2]["status"], wide[2]["error"], wide[2]["score"]) == ("error", "gone", None)


def test_no_rows_are_refused():
    with pytest.raises(UserError, match="hold no row"):
        pivot([])


def test_grid_aligns_and_escapes():
    assert grid(["a", "b"], [["x|y", "1.0"]]).splitlines() == ["| a    |   b |", "| ---- | --: |", "| x\\|y | 1.0 |"]


@pytest.mark.parametrize(
    ("metric", "percent", "lower"),
    [
        ("acc1", True, False), ("mean_recall@1", True, False), ("image_retrieval_recall@5", True, False),
        ("fold5_image_to_text_hit@1", True, False), ("mean_average_precision", True, False), ("ece", True, True),
        ("image_to_text_median_rank", False, True), ("rsum", False, False), ("kl", False, True),
        ("latency_ms_p50_1_thread", False, True), ("images_per_second_all_threads", False, False),
        ("top1_agreement", True, False), ("something_new", False, False),
    ],
)  # fmt: skip
def test_figures_have_their_unit(metric, percent, lower):
    words = metric_words(metric)
    assert (words.percent, words.lower_is_better) == (percent, lower)
    assert bool(words.meaning) == (metric != "something_new")


def test_page_has_plots_classes_and_errors():
    rows = [result_row(TEACHER, "pets", 0.8, parameters=10**8), result_row(STUDENT, "pets", 0.6)]
    rows += [
        speed_row(TEACHER, 10**8, 400.0),
        speed_row(STUDENT, 10**6, 10.0),
        error_row(STUDENT, "x<b>", "it <broke>"),
    ]
    own = Aggregate(name="own", names=("pets",))
    html = page(pivot(rows), [own], TEACHER).html()
    for part in ("Overview", "<rect", "<circle", "<details>", "it &lt;broke&gt;", "75.0", "milliseconds", "x&lt;b&gt;"):
        assert part in html
    assert html.count("<circle") == 4
    assert "small/student" in html


def test_bars_are_split_evenly_and_leave_out_models_without_a_value():
    models = [f"m{number}" for number in range(10)]
    names = [f"set{number}" for number in range(7)]
    rows = [result_row(model, name, 0.5) for name in names for model in models]
    rows += [result_row(model, "set0", 0.5, protocol="knn") for model in models[1:3]]
    html = page(pivot(rows)).html()
    plots = [part for part in html.split("<svg")[1:] if 'class="interval"' in part]
    # 70 bars in two plots, of 4 and 3 data sets; k-NN has the second and the third model, in their own colours.
    assert [part.count("<rect") for part in plots] == [40, 30, 2]
    assert "no value" not in html
    colours = [re.findall(r'<rect[^>]*style="fill:([^"]*)"', part) for part in plots]
    assert colours[2] == colours[0][1:3]
    assert [f"stroke:{colour};" in plots[2] for colour in colours[0][:4]] == [False, True, True, False]
    assert "knn: score on the one data set that all its models have: set0." in html
    assert "zero shot: mean over the 7 data sets that all its models have: set0" in html
