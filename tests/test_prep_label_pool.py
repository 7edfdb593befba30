"""`vlkd prep label_pool`: rounds of keys to label, from a file of probabilities."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.pairs import noise

from vlkd.active import k_centre, write_pool
from vlkd.errors import UserError

Main = Callable[[Sequence[str]], None]
KEYS = [f"{'ab'[i % 2]}/{i:02}.jpg" for i in range(20)]


def script() -> Main:
    scope: dict[str, Any] = {"__name__": "label_pool"}
    path = Path(__file__).parents[1] / "data_prep/label_pool.py"
    exec(compile(path.read_text(encoding="utf-8"), str(path), "exec"), scope)
    return scope["main"]  # type: ignore[no-any-return]


main = script()


def rows(seed=0):
    return np.random.default_rng(seed).dirichlet(np.full(4, 0.5), len(KEYS)).astype(np.float32)


def features():
    return np.random.default_rng(9).standard_normal((len(KEYS), 6)).astype(np.float32)


@pytest.fixture
def place(tmp_path):
    for key in KEYS:
        path = tmp_path / "pool" / key
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"" if path.name != "00.jpg" else b"not looked at")
    for seed in (0, 1):
        write_pool(tmp_path / f"p{seed}", KEYS, rows(seed), features(), classes=["w", "x, y", "y", "z"])
    write_pool(tmp_path / "bare", KEYS, rows())
    return tmp_path


def command(place, strategy="pcoreset", *more, count=5, file="p0", pool="pool"):
    return [
        "--pool", f"{place}/{pool}", "--probabilities", str(place / file), "--strategy", strategy,
        "--count", str(count), "--out", str(place / "rounds"), *map(str, more),
    ]  # fmt: skip


def listed(place, number=1):
    return (place / "rounds" / f"round-{number:03}.txt").read_text().split("\n")[:-1]


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_a_round_and_its_companion(place, capsys):
    (place / "seen.txt").write_text(f"{KEYS[3]}\r\n\n{KEYS[8]}\n{KEYS[3]}\n")
    main(command(place, "pcoreset", "--labelled", place / "seen.txt"))
    expected = k_centre(rows(), 5, [3, 8], seed=0)
    assert listed(place) == [KEYS[row] for row in expected]
    assert "5 images to label (pcoreset), 13 stay unlabelled" in capsys.readouterr().out
    with (place / "rounds/round-001.csv").open(newline="") as file:
        table = list(csv.DictReader(file))
    assert [line["key"] for line in table] == listed(place)
    for line, row in zip(table, expected, strict=True):
        own = rows()[row].astype(float)
        assert line["class"] == ["w", "x, y", "y", "z"][own.argmax()]
        assert float(line["probability"]) == pytest.approx(own.max(), abs=1e-6)
        assert float(line["entropy"]) == pytest.approx(-sum(p * math.log(p) for p in own if p > 0), abs=1e-5)


@pytest.mark.parametrize("strategy", ["pcoreset", "random", "entropy", "margin", "feature_k_centre"])
def test_rounds_follow_each_other_and_never_repeat(place, strategy, capsys):
    main(command(place, strategy))
    main(command(place, strategy, file="p1"))
    main(command(place, strategy, "--round", 3, "--json", file="p1", count=10))
    told = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (told["round"], told["new"], told["labelled"], told["strategy"]) == (3, True, 10, strategy)
    every = [key for number in (1, 2, 3) for key in listed(place, number)]
    assert sorted(every) == sorted(KEYS)


def test_strategies_choose_what_their_names_say(place):
    expected = {
        "entropy": np.argsort((rows() * np.log(rows())).sum(1)),
        "margin": np.argsort(np.diff(np.sort(rows())[:, -2:])[:, 0]),
        "feature_k_centre": k_centre(features(), 5, [], seed=2),
        "pcoreset": k_centre(rows(), 5, [], seed=2),
    }
    for strategy, order in expected.items():
        main(command(place, strategy, "--seed", 2))
        assert listed(place) == [KEYS[row] for row in order[:5]]
        for path in (place / "rounds").iterdir():
            path.unlink()


def test_the_same_command_changes_nothing(place, capsys):
    main(command(place))
    main(command(place, file="p1"))
    before = contents(place / "rounds")
    for file in ("p0", "p1"):
        capsys.readouterr()
        main(command(place, file=file))
        assert "is there already, made with these settings; nothing is changed" in capsys.readouterr().out
    assert contents(place / "rounds") == before


@pytest.mark.parametrize(
    ("strategy", "more", "count", "message"),
    [
        ("random", [], 5, r"strategy pcoreset \(now random\)"),
        ("pcoreset", [], 6, r"count 5 \(now 6\)"),
        ("pcoreset", ["--seed", 1], 5, r"seed 0 \(now 1\)"),
        ("pcoreset", ["--labelled", "seen.txt"], 5, r"labelled 0 \(now 1\)"),
    ],
)
def test_other_settings_for_a_round_that_exists(place, strategy, more, count, message, monkeypatch):
    main(command(place))
    before = contents(place / "rounds")
    monkeypatch.chdir(place)
    Path("seen.txt").write_text(f"{KEYS[0]}\n")
    with pytest.raises(UserError, match=message):
        main(command(place, strategy, *more, count=count))
    with pytest.raises(UserError, match="probabilities"):
        main(command(place, "pcoreset", "--round", 1, file="p1"))
    assert contents(place / "rounds") == before


@pytest.mark.parametrize("lost", [["round-001.txt"], ["round-001.csv"], ["round-001.txt", "round-001.csv"]])
def test_a_killed_run_is_completed(place, lost):
    main(command(place))
    before = contents(place / "rounds")
    for name in lost:
        (place / "rounds" / name).unlink()
    main(command(place))
    assert contents(place / "rounds") == before


def test_a_list_by_hand_is_a_round(place):
    (place / "rounds").mkdir()
    (place / "rounds/round-001.txt").write_text("\n".join(KEYS[:15]))
    main(command(place))
    assert sorted(listed(place, 2)) == sorted(KEYS[15:])
    with pytest.raises(UserError, match=r"without its settings, round-001\.json"):
        main(command(place, "pcoreset", "--round", 1))
    with pytest.raises(UserError, match="expected 1 to 3"):
        main(command(place, "pcoreset", "--round", 4))


def test_a_split_and_images_without_probabilities(place, capsys):
    main([*command(place, pool="pool#a", count=3), "--labelled", str(_list(place, KEYS[1::2]))])
    assert all(key.startswith("a/") for key in listed(place))
    noise(0).save(place / "pool/a/new.jpg")
    main(command(place, file="p1"))
    assert "1 images of" in (out := capsys.readouterr().out)
    assert "cannot be chosen, first a/new.jpg" in out


@pytest.mark.parametrize("strategy", ["pcoreset", "feature_k_centre", "margin"])
def test_what_is_left_out_counts_for_nothing(place, strategy):
    """The choice is that of a file without these images."""
    gone = KEYS[2:9]
    rest = [number for number, key in enumerate(KEYS) if key not in gone]
    write_pool(place / "rest", [KEYS[number] for number in rest], rows()[rest], features()[rest])
    main([*command(place, strategy, count=4), "--leave-out", str(_list(place, gone))])
    first = listed(place)
    assert not set(first) & set(gone)
    # A list of labels may name some of them, too.
    (place / "labels.txt").write_text("\n".join(gone[:2]))
    main([*command(place, strategy, count=4)[:-1], str(place / "named"), "--labelled", str(place / "labels.txt"),
          "--leave-out", str(place / "list.txt")])  # fmt: skip
    assert (place / "named/round-001.txt").read_text().split("\n")[:-1] == first
    main([*command(place, strategy, count=4, file="rest")[:-1], str(place / "other")])
    assert (place / "other/round-001.txt").read_text().split("\n")[:-1] == first


def _list(place, keys):
    (place / "list.txt").write_text("\n".join(keys))
    return place / "list.txt"


def test_refusals(place):
    def refused(message, *words, **settings):
        with pytest.raises(UserError, match=message):
            main(command(place, *words, **settings))
        assert not (place / "rounds").exists()

    refused("1 of 2 keys have no row in .*first 'c/1.jpg'", "random", "--labelled", _list(place, ["c/1.jpg", KEYS[0]]))
    refused("count of 21; expected 1 to 20", count=21)
    refused("count of 0", "entropy", count=0)
    refused("has no features, which feature_k_centre needs", "feature_k_centre", file="bare")
    refused("no file of probabilities", file="none")
    refused("10 of 20 keys of .* are no images of .*first 'b/01.jpg'", pool="pool#a")
    refused("There is nothing at", pool="nowhere")
    refused("cannot be read", "random", "--labelled", place / "none.txt")
    refused("none of its 1 keys has probabilities", "random", "--leave-out", _list(place, ["c/1.jpg"]))
    refused("names all 20 images", "random", "--leave-out", _list(place, KEYS))
    refused("count of 20; expected 1 to 19", "random", "--leave-out", _list(place, KEYS[:1]), count=20)
    refused("--seed -1", "random", "--seed", -1)


def test_settings_that_are_damaged(place):
    main(command(place))
    for text in ("{", "[]", '{"a": NaN}'):
        (place / "rounds/round-001.json").write_text(text)
        with pytest.raises(UserError, match=r"round-001\.json (cannot be read|holds no settings)"):
            main(command(place))
