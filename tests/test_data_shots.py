"""Shots and held-out images: counts against plain counting, nesting, independence of order, refusals."""

from __future__ import annotations

from collections import Counter
from itertools import pairwise

import numpy as np
import pytest

from vlkd.data.shots import choose_shots, listed_keys, split_validation
from vlkd.errors import UserError

SIZES = {"ant": 3, "bee": 20, "cow": 41, "dog": 1}
CLASSES = tuple(SIZES)
LABELS = np.repeat(np.arange(4), list(SIZES.values()))
KEYS = [f"train/{CLASSES[label]}/{row}.jpg" for row, label in enumerate(LABELS)]


def chosen(shots: str, *, seed: int = 0) -> set[str]:
    return {KEYS[row] for row in choose_shots(LABELS, CLASSES, shots, seed=seed, keys=KEYS)}


def per_class(keys: set[str]) -> list[int]:
    counts = Counter(key.split("/")[1] for key in keys)
    return [counts[name] for name in CLASSES]


@pytest.mark.parametrize("shots", [1, 2, 4, 8, 16, 1000])
def test_so_many_of_each_class_or_all_it_has(shots):
    assert per_class(chosen(str(shots))) == [min(shots, size) for size in SIZES.values()]


@pytest.mark.parametrize("ladder", [("1", "2", "4", "8", "16", "all"), ("1%", "10%", "33.3%", "90%", "100%")])
def test_fewer_are_among_more_and_another_seed_draws_others(ladder):
    draws = [chosen(shots, seed=3) for shots in ladder]
    assert all(fewer < more for fewer, more in pairwise(draws))
    assert draws[-1] == set(KEYS)
    assert all(chosen(shots, seed=3) != chosen(shots, seed=4) for shots in ladder[1:3])


def test_every_image_is_drawn_about_equally_often():
    """400 draws of 4 of 20: 80 expected with a deviation of 8; five deviations would be missed once in 10^6."""
    counts = Counter(key for seed in range(400) for key in chosen("4", seed=seed) if "bee" in key)
    assert len(counts) == 20
    assert all(abs(count - 80) < 40 for count in counts.values())


@pytest.mark.parametrize("shots", ["2", "10%"])
def test_neither_the_order_of_the_files_nor_another_class_changes_a_draw(shots):
    order = np.random.default_rng(0).permutation(len(KEYS))
    rows = choose_shots(LABELS[order], CLASSES, shots, seed=5, keys=[KEYS[i] for i in order])
    assert rows.dtype == np.int64
    assert (np.diff(rows) > 0).all()
    assert {KEYS[order[row]] for row in rows} == chosen(shots, seed=5)
    bees = LABELS == 1
    alone = choose_shots(
        np.zeros(20, np.int64), ("bee",), "2", seed=5, keys=[key for key, own in zip(KEYS, bees, strict=True) if own]
    )
    assert {KEYS[3 + row] for row in alone} == {key for key in chosen("2", seed=5) if "bee" in key}


@pytest.mark.parametrize(
    ("share", "expected"),
    [("1%", [1, 1, 1, 1]), ("10%", [1, 2, 3, 1]), ("50%", [1, 10, 20, 1]), ("100%", [3, 20, 41, 1])],
)
def test_a_share_has_its_size_in_proportion_and_one_of_each_class(share, expected):
    found = per_class(chosen(share))
    # 10% of 65 are 6 or 7, 50% are 32: one each, the rest as near to proportion as whole numbers are.
    assert sum(found) == max(4, round(float(share[:-1]) / 100 * 65))
    assert all(abs(a - b) <= 1 for a, b in zip(found, expected, strict=True))
    assert min(found) == 1


def test_rows_without_a_class_are_never_chosen():
    labels, keys = np.append(LABELS, [-1] * 50), [*KEYS, *(f"more/{i}" for i in range(50))]
    for shots in ("2", "10%", "all"):
        rows = choose_shots(labels, CLASSES, shots, seed=0, keys=keys)
        assert {keys[row] for row in rows} == chosen(shots)


def test_a_list_of_keys(tmp_path):
    file = tmp_path / "keys.txt"
    named = [KEYS[64], KEYS[30], KEYS[0], KEYS[5], KEYS[0]]
    file.write_text("\ufeff" + "\r\n".join(named) + "\n\n")
    assert choose_shots(LABELS, CLASSES, str(file), seed=0, keys=KEYS).tolist() == [0, 5, 30, 64]
    assert listed_keys(str(file)) == named
    assert listed_keys("16") == listed_keys("1%") == listed_keys("all") == []


@pytest.mark.parametrize(
    ("lines", "words"),
    [
        ([KEYS[0], "train/ant/none.jpg"], "1 of 2 keys that no training image has, first 'train/ant/none.jpg'"),
        ([*KEYS, "more/0"], "1 images without a known class, first 'more/0'"),
        ([KEYS[0], KEYS[5]], "2 of 4 classes have no labelled image .*'cow', 'dog'; expected"),
        ([], "is empty; expected one key"),
    ],
)
def test_a_list_that_does_not_fit_is_refused(tmp_path, lines, words):
    file = tmp_path / "keys.txt"
    file.write_text("\n".join(lines))
    with pytest.raises(UserError, match=words):
        choose_shots(np.append(LABELS, -1), CLASSES, str(file), seed=0, keys=[*KEYS, "more/0"])


@pytest.mark.parametrize("shots", ["", "sixteen", "-1", "1.5", "1 %", "x%", "none.txt", "٤", ".", "9" * 5000])
def test_nonsense_is_refused(shots):
    with pytest.raises(UserError, match=r"expected a number per class such as 16.*no such file"):
        chosen(shots)


@pytest.mark.parametrize("shots", ["0", "00", "0%", "0.0%", "101%"])
def test_a_number_out_of_range_is_refused(shots):
    with pytest.raises(UserError, match=r"shots is .*(expected )?(1 or more|more than 0%)"):
        chosen(shots)


def test_a_class_without_a_shot_is_named_up_to_five():
    names = [*CLASSES, *(f"class {i}" for i in range(7))]
    with pytest.raises(UserError, match=r"7 of 11 classes have .*'class 0', .*'class 4', \.\.\.; expected"):
        choose_shots(LABELS, names, "4", seed=0, keys=KEYS)


@pytest.mark.parametrize(
    ("labels", "keys", "words"),
    [
        (LABELS, KEYS[:-1], "65 labels for 64 keys"),
        (LABELS + 1, KEYS, "go up to 4, and there are 4 class names, so up to 3"),
        (LABELS[:0], [], "holds no image with a label"),
        (np.full(65, -1), KEYS, "holds no image with a label"),
    ],
)
def test_labels_that_do_not_match_are_refused(labels, keys, words):
    with pytest.raises(UserError, match=words):
        choose_shots(labels, CLASSES, "1", seed=0, keys=keys)


@pytest.mark.parametrize("share", [0.01, 0.2, 0.5, 0.99])
def test_held_out_images_are_in_proportion_and_each_class_keeps_one(share):
    labels, keys = np.append(LABELS, [-1] * 9), [*KEYS, *(f"more/{i}" for i in range(9))]
    train, val = split_validation(labels, share=share, seed=1, keys=keys)
    assert sorted([*train, *val]) == list(range(74))
    assert (np.diff(train) > 0).all()
    assert (np.diff(val) > 0).all()
    assert (labels[val] >= 0).all()
    counts = np.bincount(labels[val], minlength=4)
    assert len(val) == min(round(share * 65), 61)
    assert all(abs(own - share * size) <= 1 for own, size in zip(counts, SIZES.values(), strict=True))
    assert (counts < list(SIZES.values())).all()
    order = np.random.default_rng(0).permutation(74)
    _, again = split_validation(labels[order], share=share, seed=1, keys=[keys[i] for i in order])
    assert sorted(order[again]) == val.tolist()


@pytest.mark.parametrize("share", [0, 1, -0.1, 2, float("nan")])
def test_a_share_out_of_range_cannot_be_held_out(share):
    with pytest.raises(UserError, match="expected more than 0 and below 1"):
        split_validation(LABELS, share=share, seed=0, keys=KEYS)


def test_nothing_can_be_held_out_of_single_images():
    with pytest.raises(UserError, match="No class has two images"):
        split_validation(np.arange(4), share=0.5, seed=0, keys=KEYS[:4])
