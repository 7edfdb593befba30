"""Wilson's interval and the bootstrap within strata against scipy and closed forms."""

from __future__ import annotations

import numpy as np
import pytest

from vlkd.errors import UserError
from vlkd.metrics import bootstrap_interval, stratified_interval, wilson_interval


@pytest.mark.parametrize(("hits", "n"), [(0, 10), (10, 10), (3, 7), (1, 1), (450, 1000), (49_999, 50_000)])
def test_wilson_is_scipys(hits, n):
    stats = pytest.importorskip("scipy.stats")
    expected = stats.binomtest(hits, n).proportion_ci(method="wilson")
    assert wilson_interval(hits, n) == pytest.approx((expected.low, expected.high), abs=1e-12)


def test_wilson_stays_inside_and_is_symmetric():
    assert wilson_interval(0, 5)[0] == 0.0
    assert wilson_interval(5, 5)[1] == 1.0
    low, high = wilson_interval(2.5, 20)
    assert wilson_interval(17.5, 20) == pytest.approx((1 - high, 1 - low))


def test_one_stratum_is_the_plain_bootstrap():
    values = np.random.default_rng(0).normal(size=60)
    assert stratified_interval(values, np.zeros(60), seed=3) == pytest.approx(bootstrap_interval(values, seed=3))


def test_strata_weigh_alike_and_their_differences_do_not_widen():
    # Recall 1.0 on 400 images of one class and 0.5 on 100 of another: the standard error is 1/2 sqrt(0.25 / 100).
    correct = np.concatenate([np.ones(400), np.tile([0.0, 1.0], 50)])
    label = np.repeat([4, 1], [400, 100])
    low, high = stratified_interval(correct, label, n=4000)
    assert (low + high) / 2 == pytest.approx(0.75, abs=0.004)
    assert (high - low) / 2 == pytest.approx(1.96 * 0.5 * np.sqrt(0.25 / 100), rel=0.08)
    shuffled = np.random.default_rng(1).permutation(500)
    again = stratified_interval(correct[shuffled], label[shuffled], n=4000)
    assert again == pytest.approx((low, high), abs=0.01)
    assert stratified_interval(correct, label) == stratified_interval(correct, label)


def test_values_equal_within_their_stratum_have_no_interval():
    assert stratified_interval([1.0, 1.0, 0.0, 0.0], [0, 0, 1, 1]) == (0.5, 0.5)


@pytest.mark.parametrize(
    ("call", "sentence"),
    [
        (lambda: wilson_interval(6, 5), "6 hits in 5 trials"),
        (lambda: wilson_interval(float("nan"), 5), "nan hits"),
        (lambda: wilson_interval(0, 0), "n = 0"),
        (lambda: stratified_interval([1.0], [0, 1]), "values and their strata"),
        (lambda: stratified_interval([], []), "none empty"),
        (lambda: stratified_interval([np.nan], [0]), "NaN"),
        (lambda: stratified_interval([1.0], [0], n=0), "n = 0"),
        (lambda: bootstrap_interval([1.0], n=0), "n = 0"),
    ],
)
def test_bad_input_is_refused(call, sentence):
    with pytest.raises(UserError, match=sentence):
        call()
