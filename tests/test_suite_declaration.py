"""Suites: those that ship hold what their names promise; a bad file is refused with a sentence."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path

import pytest

from vlkd.errors import UserError
from vlkd.suite.declaration import DataEntry, load_suite, suite_names

SHIPPED = ["datacomp38", "imagenet_robustness", "retrieval", "sugar_crepe", "tier0", "vtab", "vtab+"]
ENTRY = '[[data]]\nname = "a/b"\n'


def written(folder: Path, text: str, name: str = "mine.toml") -> str:
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return str(path)


def names(suite: str) -> list[str]:
    return [entry.name for entry in load_suite(suite).entries]


def test_the_shipped_suites_are_listed_as_users_type_them() -> None:
    assert suite_names() == SHIPPED


@pytest.mark.parametrize("name", SHIPPED)
def test_every_shipped_suite_loads(name: str) -> None:
    suite = load_suite(name)
    assert suite.name == name
    assert suite.title
    for entry in suite.entries:
        assert entry.kind is not None
        assert entry.paths
        assert not any("{" in place for place in entry.paths)
    for aggregate in suite.aggregates:
        assert set(aggregate.names) <= {entry.name for entry in suite.entries}


@pytest.mark.parametrize("name", ["vtab", "vtab+", "imagenet_robustness", "retrieval", "sugar_crepe"])
def test_suites_of_clip_benchmark_hold_its_data_sets(name: str) -> None:
    builder = pytest.importorskip("clip_benchmark.datasets.builder", exc_type=ImportError)
    assert Counter(names(name)) == Counter(builder.dataset_collection[name])


def test_counts() -> None:
    counts = {name: len(names(name)) for name in SHIPPED}
    assert counts == {
        "datacomp38": 40, "imagenet_robustness": 5, "retrieval": 3, "sugar_crepe": 7, "tier0": 4,
        "vtab": 19, "vtab+": 36,
    }  # fmt: skip


def test_datacomp_averages_exactly_its_38_main_metrics() -> None:
    suite = load_suite("datacomp38")
    assert {one.name: one.count for one in suite.aggregates} == {
        "ImageNet": 1, "ImageNet dist. shifts": 6, "VTAB": 13, "Retrieval": 3, "Average": 38,
    }  # fmt: skip
    average = next(one for one in suite.aggregates if one.name == "Average")
    left_out = {entry.name for entry in suite.entries} - set(average.names)
    assert left_out == {"fairness/fairface", "fairness/utkface"}
    # The total of DataComp's task list.
    assert sum(entry.images or 0 for entry in suite.entries) == 732_026
    exceptions = {entry.name: entry.main_metric for entry in suite.entries if entry.main_metric not in ("", "acc1")}
    assert Counter(exceptions.values()) == {
        "mean_per_class_recall": 4, "mean_recall@1": 2, "jaccard_score_10-12": 1, "F1-macro_all": 1,
        "acc_worst_region_all": 1, "acc_top5_wg": 1, "acc_wg": 1,
    }  # fmt: skip


def test_balanced_sets_guess_one_in_the_number_of_classes() -> None:
    entries = {entry.name: entry for entry in load_suite("datacomp38").entries}
    for name, classes in (("vtab/cifar100", 100), ("imagenet1k", 1000), ("vtab/resisc45", 45), ("vtab/pets", 37)):
        assert entries[name].random_score == pytest.approx(1 / classes, abs=2e-4)


def test_paths_are_those_of_the_hubs() -> None:
    entries = {entry.name: entry for entry in load_suite("vtab").entries}
    assert entries["vtab/caltech101"].paths == ("wds_vtab-caltech101", "vtab-caltech101", "vtab/caltech101")
    of_datacomp = {entry.name: entry.paths[0] for entry in load_suite("datacomp38").entries}
    assert of_datacomp["vtab/caltech101"] == "wds_vtab-caltech101_test"
    assert of_datacomp["wilds/fmow"] == "wds_wilds-fmow_test"
    assert of_datacomp["fairness/geode"] == "wds_geode_test"


@pytest.mark.parametrize(
    ("entry", "kind", "expected"),
    [
        (DataEntry(name="a"), "classification", ("zero_shot",)),
        (DataEntry(name="a", train="train"), "classification", ("zero_shot", "linear_probe", "knn")),
        (DataEntry(name="a"), "multilabel", ("multilabel",)),
        (DataEntry(name="a"), "retrieval", ("retrieval",)),
        (DataEntry(name="a"), "selection", ("selection",)),
        (DataEntry(name="a", train="train", protocols=("knn",)), "classification", ("knn",)),
    ],
)
def test_protocols_follow_from_the_kind(entry: DataEntry, kind: str, expected: tuple[str, ...]) -> None:
    assert entry.protocols_for(kind) == expected  # type: ignore[arg-type]


def test_a_users_file_is_read(tmp_path: Path) -> None:
    text = """
    title = "Mine"
    [[data]]
    name = "food/x"
    paths = ["here/{cleaned}"]
    split = ""
    kind = "classification"
    random_score = 1
    templates = ["a {c}"]
    tags = ["one"]
    [[data]]
    name = "b"
    [[aggregate]]
    name = "One"
    tags = ["one"]
    count = 1
    [[aggregate]]
    name = "Named"
    names = ["b", "food/x"]
    count = 2
    """
    suite = load_suite(written(tmp_path, text))
    assert suite.name == "mine"
    first, second = suite.entries
    assert first == DataEntry(
        name="food/x",
        paths=("here/food-x",),
        split="",
        kind="classification",
        random_score=1.0,
        templates=("a {c}",),
        tags=("one",),
    )
    assert second.paths == ("wds_b", "b")
    assert second.split == "test"
    assert [one.names for one in suite.aggregates] == [("food/x",), ("food/x", "b")]


def test_include_adds_shipped_and_own_suites(tmp_path: Path) -> None:
    written(tmp_path, f'title = "Inner"\npaths = ["inner/{{name}}"]\n{ENTRY}', "inner.toml")
    text = 'title = "Outer"\ninclude = ["retrieval", "inner.toml"]\n[[data]]\nname = "own"\n'
    entries = load_suite(written(tmp_path, text)).entries
    assert [entry.name for entry in entries] == [*names("retrieval"), "a/b", "own"]
    assert entries[3].paths == ("inner/a/b",)


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("title = 't'\nx x", "mine.toml is not TOML .*line 2"),
        (ENTRY, "mine.toml: the key 'title' is missing"),
        ('title = ""\n' + ENTRY, "the key 'title' is empty"),
        ('title = "t"\n', "mine.toml: the suite has no data set"),
        ('title = "t"\nsets = 1\n' + ENTRY, "mine.toml: the key 'sets' is unknown; expected some of title, include"),
        ('title = "t"\n' + ENTRY + "tag = []", r"mine.toml: data\[0\] \(a/b\): the key 'tag' is unknown.*mean 'tags'"),
        (
            'title = "t"\n' + ENTRY + "images = 1.5",
            r"mine.toml: data\[0\] \(a/b\): images is 1.5; expected a whole num",
        ),
        ('title = "t"\n' + ENTRY + "images = true", "images is True; expected a whole number"),
        ('title = "t"\n' + ENTRY + "images = -1", "data 'a/b': images is -1; expected 0 or more"),
        ('title = "t"\n' + ENTRY + 'random_score = "low"', "random_score is 'low'; expected a number"),
        ('title = "t"\n' + ENTRY + "random_score = nan", "random_score is nan; expected a number"),
        ('title = "t"\n' + ENTRY + 'tags = "x"', "tags is 'x'; expected a list"),
        ('title = "t"\n' + ENTRY + "tags = [1]", r"tags\[0\] is 1; expected a text"),
        ('title = "t"\n' + ENTRY + 'kind = "regression"', "kind is 'regression'; expected one of classification"),
        ('title = "t"\n' + ENTRY + 'protocols = ["magic"]', "data 'a/b': protocols has 'magic'; expected some of zero"),
        ('title = "t"\n' + ENTRY + 'paths = ["../x"]', "mine.toml: data 'a/b': the path '../x' leaves the data root"),
        ('title = "t"\n' + ENTRY + 'prompts_file = "/x"', "the path '/x' leaves the data root"),
        ('title = "t"\ndata = 3', "data is 3; expected a list"),
        ('title = "t"\ndata = [3]', r"data\[0\] is 3; expected a table"),
        ('title = "t"\n' + ENTRY + ENTRY, "mine.toml: data 'a/b' stands twice"),
        ('title = "t"\ninclude = ["retrieval"]\n[[data]]\nname = "flickr8k"', "data 'flickr8k' stands twice"),
        ('title = "t"\ninclude = ["retrieva"]\n' + ENTRY, "No suite is called 'retrieva'.*mean 'retrieval'"),
        ('title = "t"\ninclude = ["gone.toml"]\n' + ENTRY, "There is no suite file .*gone.toml"),
        ('title = "t"\ninclude = ["mine.toml"]\n' + ENTRY, "mine.toml: include leads back"),
        (
            'title = "t"\n' + ENTRY + '[[aggregate]]\nname = "m"\ncount = 2',
            "aggregate 'm' has 1 data sets, but count .* 2",
        ),
        ('title = "t"\n' + ENTRY + '[[aggregate]]\nname = "m"', "aggregate.* the key 'count' is missing"),
        ('title = "t"\n' + ENTRY + '[[aggregate]]\nname = "m"\nnames = ["x"]\ncount = 1', "'x', which is no data set"),
        (
            'title = "t"\n' + ENTRY + '[[aggregate]]\nname = "m"\nnames = ["a/b"]\ntags = ["x"]\ncount = 1',
            "aggregate 'm' has names and tags",
        ),
    ],
)
def test_a_bad_file_is_refused_with_one_sentence(tmp_path: Path, text: str, sentence: str) -> None:
    with pytest.raises(UserError) as caught:
        load_suite(written(tmp_path, text))
    assert re.search(sentence, str(caught.value)), str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("ref", ["vtab_plu", "nothing", "../suites/vtab", "missing.toml", ""])
def test_an_unknown_suite_is_refused_with_the_names(ref: str) -> None:
    with pytest.raises(UserError, match=r"vtab\+"):
        load_suite(ref)
