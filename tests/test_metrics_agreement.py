"""Agreement of two models against scipy, loops and invariances."""

from __future__ import annotations

import numpy as np
import pytest

from vlkd.errors import UserError
from vlkd.metrics import kendall_tau, linear_cka, mean_kl, top_k_overlap


def log_softmax(logits):
    return logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))


def test_overlap_is_of_sets():
    assert top_k_overlap([[1, 2, 3], [7, 8, 9]], [[3, 1, 5], [4, 5, 6]]) == pytest.approx([2 / 3, 0])
    rng = np.random.default_rng(0)
    a, b = (np.argsort(rng.random((50, 20)), axis=1)[:, :6] for _ in range(2))
    expected = [len(set(x) & set(y)) / 6 for x, y in zip(a.tolist(), b.tolist(), strict=True)]
    assert top_k_overlap(a, b) == pytest.approx(expected)
    assert top_k_overlap(a, a[:, ::-1]).tolist() == [1.0] * 50


@pytest.mark.parametrize("levels", [3, 10, None], ids=["many ties", "some ties", "no ties"])
def test_kendall_tau_is_scipys_tau_b(levels):
    stats = pytest.importorskip("scipy.stats")
    rng = np.random.default_rng(1)
    a = rng.normal(size=(25, 31)) if levels is None else rng.integers(levels, size=(25, 31))
    b = a + rng.normal(size=(25, 31)) if levels is None else rng.integers(levels, size=(25, 31))
    expected = [stats.kendalltau(x, y, variant="b").statistic for x, y in zip(a, b, strict=True)]
    assert kendall_tau(a, b) == pytest.approx(expected)


def test_kendall_tau_of_equal_reversed_and_collapsed_orders():
    scores = np.random.default_rng(2).normal(size=(4, 9))
    assert kendall_tau(scores, np.exp(scores)) == pytest.approx([1.0] * 4)
    assert kendall_tau(scores, -scores) == pytest.approx([-1.0] * 4)
    scores[2] = 0.5
    tau = kendall_tau(scores, scores)
    assert np.isnan(tau).tolist() == [False, False, True, False]
    assert np.isnan(kendall_tau([[1.0]], [[2.0]])).all()


def test_kendall_tau_sees_differences_of_one_unit_in_the_last_place():
    a = np.array([[1.0, np.nextafter(1.0, 2), 5e-324, 0.0]])
    assert kendall_tau(a, [[2.0, 3.0, 1.0, 0.0]]).tolist() == [1.0]


def test_cka_is_that_of_centred_gram_matrices():
    rng = np.random.default_rng(3)
    x, y = rng.normal(size=(40, 7)) + 2, rng.normal(size=(40, 11))
    y[:, :7] += x
    centre = np.eye(40) - 1 / 40
    k, h = centre @ x @ x.T @ centre, centre @ y @ y.T @ centre
    expected = (k * h).sum() / np.sqrt((k * k).sum() * (h * h).sum())
    assert linear_cka(x, y) == pytest.approx(expected)
    assert linear_cka(y, x) == pytest.approx(expected)
    assert 0.1 < expected < 0.9


def test_cka_ignores_rotation_scale_shift_and_width():
    rng = np.random.default_rng(4)
    x = rng.normal(size=(30, 6))
    rotation, _ = np.linalg.qr(rng.normal(size=(9, 9)))
    assert linear_cka(x, 1e-90 * (x + 3) @ rotation[:6]) == pytest.approx(1.0)
    assert linear_cka(1e150 * x, x) == pytest.approx(1.0)
    stretched = x * [10, 1, 1, 1, 1, 1]
    assert linear_cka(x, stretched) < 0.9
    assert np.isnan(linear_cka(x, np.ones((30, 2))))


def test_kl_against_scipy_and_by_hand():
    p, q = np.log([[0.5, 0.5], [0.9, 0.1]]), np.log([[0.25, 0.75], [0.9, 0.1]])
    expected = (0.5 * np.log(2) + 0.5 * np.log(2 / 3)) / 2
    assert mean_kl(p, q) == pytest.approx(expected)
    assert mean_kl(p, p) == 0.0
    stats = pytest.importorskip("scipy.stats")
    a, b = (log_softmax(np.random.default_rng(seed).normal(size=(20, 50))) for seed in (5, 6))
    assert mean_kl(a, b) == pytest.approx(np.mean(stats.entropy(np.exp(a), np.exp(b), axis=1)))
    assert mean_kl(a, b) != pytest.approx(mean_kl(b, a))
    assert mean_kl(a.astype(np.float32), b.astype(np.float32)) == pytest.approx(mean_kl(a, b), abs=1e-5)


@pytest.mark.parametrize(
    ("call", "sentence"),
    [
        (lambda: top_k_overlap([[1, 2]], [[1, 2, 3]]), "ids of the two models have the shapes"),
        (lambda: top_k_overlap([[1, 1]], [[1, 2]]), "stands twice"),
        (lambda: top_k_overlap([[0.5]], [[0.5]]), "integers"),
        (lambda: top_k_overlap(np.zeros((3, 0), int), np.zeros((3, 0), int)), "none empty"),
        (lambda: kendall_tau([[1.0, np.nan]], [[1.0, 2.0]]), "NaN"),
        (lambda: kendall_tau([[1.0, 2.0]], [[1.0]]), "shapes"),
        (lambda: kendall_tau([1.0, 2.0], [1.0, 2.0]), "2 dimension"),
        (lambda: linear_cka(np.ones((3, 2)), np.ones((4, 2))), r"rows of the two models have the shapes \(3,\)"),
        (lambda: linear_cka([[np.inf]], [[1.0]]), "infinity"),
        (lambda: mean_kl([[0.3, 0.7]], [[0.3, 0.7]]), "add up to .*, not 1"),
        (lambda: mean_kl([[0.0]], [[0.0, 0.0]]), "shapes"),
        (lambda: mean_kl([[0.0, -np.inf]], [[0.0, -np.inf]]), "infinity"),
    ],
)
def test_bad_input_is_refused(call, sentence):
    with pytest.raises(UserError, match=sentence):
        call()
