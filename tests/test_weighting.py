"""Teacher weights sum to one, and the balanced ones are optimal."""

from __future__ import annotations

import itertools
import json
from fractions import Fraction

import numpy as np
import pytest

from vlkd.errors import UserError
from vlkd.weighting import (
    Fixed,
    GradientBalanced,
    LossRelative,
    Weighting,
    balanced_weights,
    duality_gap,
    fixed_weights,
    gradient_cosines,
    min_norm_weights,
    pcgrad_weights,
    relative_change_weights,
    uniform_weights,
)


def gramians(teachers, rng):
    """Full-rank, rank-1, near-singular, conflicting and badly scaled Gramians."""
    full = rng.standard_normal((teachers, 12))
    rank_one = np.outer(rng.standard_normal(teachers), rng.standard_normal(12))
    shared = rng.standard_normal(12) + 1e-4 * full
    conflict = full - full.mean(axis=0)
    scales = full * np.logspace(-3, 2, teachers)[:, None]
    return [vectors @ vectors.T for vectors in (full, rank_one, shared, conflict, scales)]


def simplex_grid(bound, steps=100):
    """Every point of three weights on a grid that satisfies the bound."""
    points = [(i, j, steps - i - j) for i in range(steps + 1) for j in range(steps + 1 - i)]
    grid = np.array(points) / steps
    return grid[(grid <= bound + 1e-12).all(axis=1)]


def vertices(teachers, bound):
    """Corners of the feasible set: as many weights at the bound as fit, the rest on one other."""
    full = int(1 / bound + 1e-9)
    values = [bound] * full + [1 - full * bound] + [0] * teachers
    return np.array(sorted(set(itertools.permutations(values[:teachers]))))


def value(gramian, alpha):
    return float(alpha @ gramian @ alpha)


def bounds(teachers):
    return [1 / teachers, (1 / teachers + 1) / 2, 0.6, 1.0] if teachers > 1 else [1.0]


CASES = [
    pytest.param(gramian, bound, id=f"{teachers}-{kind}-{bound:.2f}")
    for teachers in (2, 3, 4, 5)
    for kind, gramian in enumerate(gramians(teachers, np.random.default_rng(teachers)))
    for bound in bounds(teachers)
]


@pytest.mark.parametrize("teachers", [1, 2, 3, 7])
def test_uniform_weights(teachers):
    assert uniform_weights(teachers) == (float(Fraction(1, teachers)),) * teachers


def test_no_teacher_has_no_weight():
    assert uniform_weights(0) == ()


def test_fixed_weights_keep_their_proportions():
    assert fixed_weights((3, 1), 2) == (0.75, 0.25)
    assert fixed_weights((0, 2), 2) == (0.0, 1.0)
    assert fixed_weights((5, 5, 5, 5), 4) == uniform_weights(4)


@pytest.mark.parametrize("weights", [(1,), (1, 1, 1), (-1, 2), (0, 0), (float("nan"), 1), (float("inf"), 1)])
def test_impossible_weights_are_refused(weights):
    with pytest.raises(UserError, match="for 2 teachers"):
        fixed_weights(weights, 2)


@pytest.mark.parametrize(
    ("gramian", "bound", "first"),
    [
        ([[1, 0], [0, 3]], 1.0, 3 / 4),  # (3 - 0) / (1 + 3)
        ([[1, 0], [0, 3]], 0.6, 0.6),
        ([[3, 0], [0, 1]], 0.6, 0.4),
        ([[4, -1], [-1, 2]], 1.0, 3 / 8),  # (2 + 1) / (4 + 2 + 2)
        ([[1, 2], [2, 9]], 1.0, 1.0),  # (9 - 2) / (1 - 4 + 9) > 1: the shorter gradient alone
        ([[2, 2], [2, 2]], 0.9, 0.5),
        ([[0, 0], [0, 0]], 0.9, 0.5),
        ([[0, 0], [0, 5]], 0.8, 0.8),
    ],
)
def test_two_teachers_by_hand(gramian, bound, first):
    assert min_norm_weights(np.array(gramian), bound) == pytest.approx([first, 1 - first], abs=1e-15)


@pytest.mark.parametrize("kind", range(5))
@pytest.mark.parametrize("bound", [1 / 3, 0.4, 0.5, 0.65, 0.9, 1.0])
@pytest.mark.parametrize("seed", [0, 1])
def test_no_grid_point_is_better(kind, bound, seed):
    gramian = gramians(3, np.random.default_rng(seed))[kind]
    grid = simplex_grid(bound) if bound > 0.34 else np.full((1, 3), 1 / 3)
    grid_best = np.einsum("pi,ij,pj->p", grid, gramian, grid).min()
    found = value(gramian, min_norm_weights(gramian, bound))
    scale = gramian.diagonal().mean()
    assert found <= grid_best + 1e-9 * scale
    # A feasible grid point lies within 0.02 of the optimum per weight; the objective's slope is at most 2 max |G|.
    assert found >= grid_best - 2 * 3 * 0.02 * np.abs(gramian).max()


@pytest.mark.parametrize(("gramian", "bound"), CASES)
def test_solution_is_feasible_and_optimal(gramian, bound):
    alpha = min_norm_weights(gramian, bound)
    assert alpha.sum() == pytest.approx(1, abs=4e-16)
    assert alpha.min() >= 0
    assert alpha.max() <= bound + 2e-16
    assert abs(duality_gap(gramian, alpha, bound)) < 1e-9
    # First-order optimality against every corner, without the module's own gap.
    slopes = vertices(len(gramian), bound) @ gramian @ alpha
    assert slopes.min() >= value(gramian, alpha) - 1e-9 * gramian.diagonal().mean()


@pytest.mark.parametrize(("gramian", "bound"), CASES)
def test_gap_is_the_minimum_over_corners(gramian, bound):
    alpha = np.random.default_rng(0).dirichlet(np.full(len(gramian), 20.0))
    corners = vertices(len(gramian), bound)
    expected = value(gramian, alpha) - (corners @ gramian @ alpha).min()
    assert duality_gap(gramian, alpha, bound) == pytest.approx(expected / gramian.diagonal().mean(), abs=1e-12)


def test_gap_shows_a_point_that_is_not_optimal():
    gramian = np.diag([1.0, 2.0, 6.0])  # at the mean: (9/3 - 1)/3 above the corner e_1, over the mean diagonal 3
    assert duality_gap(gramian, np.full(3, 1 / 3), 1.0) == pytest.approx((1 - 1 / 3) / 3)
    assert duality_gap(gramian, np.full(3, 1 / 3), 1 / 3) == pytest.approx(0, abs=1e-15)
    assert duality_gap(np.zeros((3, 3)), np.full(3, 1 / 3), 0.5) == 0


@pytest.mark.parametrize("teachers", [2, 3, 5, 6, 7, 8])
def test_smallest_bound_is_the_mean(teachers):
    for gramian in gramians(teachers, np.random.default_rng(teachers)):
        assert min_norm_weights(gramian, 1 / teachers) == pytest.approx(np.full(teachers, 1 / teachers), abs=1e-12)


@pytest.mark.parametrize("teachers", [2, 3, 5, 8])
def test_largest_bound_is_mgda(teachers):
    torchjd = pytest.importorskip("torchjd.aggregation")
    import torch

    rng = np.random.default_rng(teachers)
    for gramian in gramians(teachers, rng):
        gramian = gramian / gramian.diagonal().mean()
        weights = torchjd.MGDAWeighting(epsilon=1e-9, max_iters=20_000)(torch.from_numpy(gramian)).numpy()
        assert value(gramian, min_norm_weights(gramian, 1.0)) == pytest.approx(value(gramian, weights), abs=2e-4)


@pytest.mark.parametrize("teachers", [2, 3, 5])
def test_direction_descends_for_every_teacher(teachers):
    for gramian in gramians(teachers, np.random.default_rng(teachers)):
        along = gramian @ min_norm_weights(gramian, 1.0)  # <g_m, d>
        norm = value(gramian, min_norm_weights(gramian, 1.0))  # |d|^2
        assert (along >= norm - 1e-9 * gramian.diagonal().mean()).all()


@pytest.mark.parametrize("teachers", [2, 3, 5])
@pytest.mark.parametrize("normalised", [False, True])
def test_order_of_teachers_does_not_matter(teachers, normalised):
    rng = np.random.default_rng(teachers)
    gramian, order = gramians(teachers, rng)[0], rng.permutation(teachers)
    alpha = balanced_weights(gramian, 0.6, normalised=normalised)
    permuted = balanced_weights(gramian[np.ix_(order, order)], 0.6, normalised=normalised)
    assert permuted == pytest.approx(alpha[order], abs=1e-9)


@pytest.mark.parametrize("scale", [1e-30, 1e-8, 1e8, 1e30])
@pytest.mark.parametrize("teachers", [2, 3, 5])
@pytest.mark.parametrize("normalised", [False, True])
def test_scale_of_the_gradients_does_not_matter(scale, teachers, normalised):
    gramian = gramians(teachers, np.random.default_rng(teachers))[0]
    alpha = balanced_weights(gramian, 0.6, normalised=normalised)
    assert balanced_weights(scale * gramian, 0.6, normalised=normalised) == pytest.approx(alpha, abs=1e-9)
    assert duality_gap(scale * gramian, uniform_weights(teachers), 0.6) == pytest.approx(
        duality_gap(gramian, uniform_weights(teachers), 0.6)
    )


@pytest.mark.parametrize("bound", [0.5, 0.7, 1.0])
def test_identical_teachers_share_evenly(bound):
    rng = np.random.default_rng(3)
    first, other = rng.standard_normal((2, 9))
    pair, three = np.array([first, first]), np.array([first, other, first])
    assert min_norm_weights(pair @ pair.T, bound).tolist() == [0.5, 0.5]
    alpha = min_norm_weights(three @ three.T, bound)
    assert alpha[0] == pytest.approx(alpha[2], abs=1e-6)
    assert np.ptp(min_norm_weights(np.ones((5, 5)), bound)) < 1e-6


def test_single_precision_gramian():
    vectors = np.random.default_rng(5).standard_normal((4, 4000)).astype(np.float32)
    vectors[3] = vectors[0]
    gramian = vectors @ vectors.T
    exact = vectors.astype(np.float64) @ vectors.astype(np.float64).T
    gramian[0, 1] *= 1 + 1e-7
    assert value(exact, min_norm_weights(gramian, 0.6)) == pytest.approx(
        value(exact, min_norm_weights(exact, 0.6)), rel=1e-5
    )


def test_gramian_with_rounded_negative_eigenvalues():
    gramian = np.ones((3, 3)) + 1e-9 * np.array([[0, 1, 1], [1, 0, 1], [1, 1, 0]])  # smallest eigenvalue -1e-9
    assert min_norm_weights(gramian, 1.0) == pytest.approx(np.full(3, 1 / 3), abs=1e-4)


@pytest.mark.parametrize("teachers", [1, 2, 3, 6])
def test_no_gradient_at_all_gives_the_mean(teachers):
    for normalised in (False, True):
        alpha = balanced_weights(np.zeros((teachers, teachers)), 1.0, normalised=normalised)
        assert alpha == pytest.approx(np.full(teachers, 1 / teachers))


@pytest.mark.parametrize("normalised", [False, True])
@pytest.mark.parametrize("bound", [0.1, 0.6, 1.0])
def test_one_teacher_gets_exactly_one(normalised, bound):
    assert balanced_weights(np.array([[7.3]]), bound, normalised=normalised).tolist() == [1.0]
    assert GradientBalanced(bound, normalised).weigh("image", [2.0], np.array([[7.3]])).tolist() == [1.0]
    assert duality_gap(np.array([[7.3]]), np.ones(1), bound) == 0


@pytest.mark.parametrize(
    ("gramian", "bound", "message"),
    [
        (np.eye(9), 1.0, "9 teachers; expected at most 8"),
        (np.eye(3), 0.3, r"1/3 = 0.3333"),
        (np.eye(2), 1.1, r"1/2 = 0.5"),
        (np.eye(2), float("nan"), r"1/2 = 0.5"),
        (np.array([[1, np.nan], [np.nan, 1]]), 1.0, "2 entries that are not finite"),
        (np.array([[np.inf]]), 1.0, "1 entries that are not finite"),
        (np.ones((2, 3)), 1.0, r"shape \(2, 3\)"),
        (np.ones(3), 1.0, r"shape \(3,\)"),
        (np.zeros((0, 0)), 1.0, r"shape \(0, 0\)"),
        (np.array([[1, 0.5], [0, 1]]), 1.0, "no Gramian"),
        (np.array([[1, 0], [0, -1]]), 1.0, "no Gramian"),
        (np.array([[0, 1], [1, 0]]), 1.0, "no Gramian"),
    ],
)
def test_impossible_problems_are_refused(gramian, bound, message):
    with pytest.raises(UserError, match=message):
        min_norm_weights(gramian, bound)
    with pytest.raises(UserError, match=message):
        duality_gap(gramian, np.ones(len(gramian)), bound)
    with pytest.raises(UserError, match=message):
        balanced_weights(gramian, bound, normalised=True)


def test_cosines():
    vectors = np.array([[3.0, 0], [1, 1], [0, -2], [0, 0]])
    half = 0.5**0.5
    expected = [[1, half, 0, 0], [half, 1, -half, 0], [0, -half, 1, 0], [0, 0, 0, 1]]
    assert gradient_cosines(vectors @ vectors.T) == pytest.approx(np.array(expected))
    assert gradient_cosines(1e-30 * vectors @ vectors.T) == pytest.approx(np.array(expected))


def test_raw_gradients_favour_the_shorter_and_normalised_directions_do_not():
    gramian = np.diag([1.0, 4.0])  # |g| = 1, 2, orthogonal
    assert balanced_weights(gramian, 1.0, normalised=False) == pytest.approx([4 / 5, 1 / 5])
    alpha = balanced_weights(gramian, 1.0, normalised=True)
    assert alpha == pytest.approx([2 / 3, 1 / 3])
    assert alpha * np.sqrt(gramian.diagonal()) == pytest.approx([2 / 3, 2 / 3])  # both pull equally
    assert balanced_weights(gramian, 0.5, normalised=True)[0] > 0.5  # the bound holds for the unit directions


@pytest.mark.parametrize("bound", [0.4, 0.6, 1.0])
def test_normalised_weights_solve_the_problem_of_unit_gradients(bound):
    vectors = np.random.default_rng(8).standard_normal((3, 6)) * [[0.1], [1], [30]]
    norms = np.linalg.norm(vectors, axis=1)
    units = vectors / norms[:, None]
    alpha = balanced_weights(vectors @ vectors.T, bound, normalised=True)
    beta = alpha * norms / (alpha * norms).sum()
    assert alpha.sum() == pytest.approx(1)
    assert beta.max() <= bound + 1e-12
    assert duality_gap(units @ units.T, beta, bound) == pytest.approx(0, abs=1e-9)


def test_zero_gradient():
    """Raw: the stationary point. Normalised: weight 0, and the others as if it were not there."""
    vectors = np.array([[1.0, 0, 0], [0, 0, 0], [1, 2, 0], [0, 1, 5]])
    assert balanced_weights(vectors @ vectors.T, 1.0, normalised=False) == pytest.approx([0, 1, 0, 0], abs=1e-8)
    alpha = balanced_weights(vectors @ vectors.T, 1.0, normalised=True)
    rest = np.delete(vectors, 1, axis=0)
    assert alpha[1] == 0
    assert np.delete(alpha, 1) == pytest.approx(balanced_weights(rest @ rest.T, 1.0, normalised=True), abs=1e-6)
    assert balanced_weights(np.diag([4.0, 0.0]), 0.5, normalised=True).tolist() == [1.0, 0.0]


def test_relative_changes_by_hand():
    changes = np.array([[0.1, 0.3], [0.3, 0.1], [0.2, 0.8]])
    assert relative_change_weights(changes) == pytest.approx([0.6 / 1.8, 1.2 / 1.8])
    assert relative_change_weights(np.full((4, 3), 0.07)) == pytest.approx(np.full(3, 1 / 3))
    assert relative_change_weights(np.zeros((4, 3))).tolist() == [1 / 3] * 3


def test_loss_relative_by_hand():
    weighting = LossRelative()
    assert weighting.weigh("image", [4.0, 1.0], None).tolist() == [0.5, 0.5]
    # |4 - 2| / 2 = 1 and |1 - 0.5| / 0.5 = 1; then |2 - 1| / 1 = 1 and |0.5 - 0.25| / 0.25 = 1, 0.5 -> 0.5: 0
    assert weighting.weigh("image", [2.0, 0.5], None).tolist() == [0.5, 0.5]
    assert weighting.weigh("image", [1.0, 0.5], None) == pytest.approx([2 / 3, 1 / 3])
    assert weighting.weigh("text", [1.0, 9.0], None).tolist() == [0.5, 0.5]  # a group of its own


def test_loss_relative_ignores_the_scale_of_each_loss():
    losses = np.random.default_rng(1).uniform(0.5, 2, (20, 3))
    one, other = LossRelative(window=7), LossRelative(window=7)
    for row in losses:
        expected = one.weigh("image", row, None)
        assert other.weigh("image", row * [1e-3, 1, 1e4], None) == pytest.approx(expected)
    changes = np.abs(losses[:-1] - losses[1:]) / losses[1:]
    mean = changes[-7:].mean(axis=0)
    assert expected == pytest.approx(mean / mean.sum())


def test_loss_relative_starts_late_with_what_it_has_seen():
    losses = np.random.default_rng(2).uniform(0.5, 2, (6, 2))
    late, early = LossRelative(start=4), LossRelative()
    for step, row in enumerate(losses):
        expected = early.weigh("image", row, None) if step >= 4 else early.weigh("image", row, None) * 0 + 0.5
        assert late.weigh("image", row, None).tolist() == expected.tolist()


def test_a_loss_of_zero_has_no_relative_change():
    weighting = LossRelative()
    with np.errstate(all="raise"):
        weighting.weigh("image", [1.0, 1.0], None)
        assert weighting.weigh("image", [0.0, 2.0], None).tolist() == [0.0, 1.0]
        assert weighting.weigh("image", [0.0, 2.0], None).tolist() == [0.0, 1.0]


def test_loss_relative_continues_exactly():
    losses = np.random.default_rng(4).uniform(0.1, 3, (30, 2, 3))
    whole, cut = LossRelative(window=6, start=3), LossRelative(window=6, start=3)
    for step, (image, text) in enumerate(losses):
        if step in (0, 1, 3, 17):
            state = json.loads(json.dumps(cut.state_dict()))
            cut = LossRelative(window=6, start=3)
            cut.load_state_dict(state)
        assert cut.weigh("image", image, None).tolist() == whole.weigh("image", image, None).tolist()
        assert cut.weigh("text", text, None).tolist() == whole.weigh("text", text, None).tolist()


def test_saved_state_does_not_follow_later_steps():
    weighting = LossRelative()
    weighting.weigh("image", [1.0, 2.0], None)
    state = weighting.state_dict()
    before = json.dumps(state)
    weighting.weigh("image", [2.0, 3.0], None)
    assert json.dumps(state) == before


@pytest.mark.parametrize("seed", range(20))
def test_pcgrad_equals_the_projections(seed):
    rng = np.random.default_rng(seed)
    first, second = rng.standard_normal((2, 9)) * rng.uniform(0.01, 10, (2, 1))
    if seed % 2:
        second -= rng.uniform(1, 3) * first
    dot = float(first @ second)
    kept = [first.copy(), second.copy()]
    if dot < 0:  # as the paper's algorithm writes it: each one against the other as it was
        kept = [first - dot / (second @ second) * second, second - dot / (first @ first) * first]
    weights = pcgrad_weights(np.array([[first @ first, dot], [dot, second @ second]]))
    assert weights @ np.array([first, second]) == pytest.approx(sum(kept))
    tiny = 1e-9 * np.linalg.norm(first) * np.linalg.norm(second)
    assert kept[0] @ second >= -tiny
    assert kept[1] @ first >= -tiny
    assert (weights > 1).all() if dot < 0 else weights.tolist() == [1, 1]
    update = weights @ np.array([first, second])
    assert min(update @ first, update @ second) >= -tiny


def test_pcgrad_by_hand_and_at_its_edges():
    assert pcgrad_weights(np.array([[4.0, -1.0], [-1.0, 1.0]])).tolist() == [1.25, 2.0]
    for gramian in ([[0, 0], [0, 3]], [[2, 0], [0, 0]], [[0, 0], [0, 0]], [[1, 0.5], [0.5, 1]], [[1, 0], [0, 1]]):
        assert pcgrad_weights(np.array(gramian)).tolist() == [1, 1]
    opposed = pcgrad_weights(np.array([[1.0, -2.0], [-2.0, 4.0]]))
    assert opposed @ np.array([1.0, -2.0]) == pytest.approx(0)
    with np.errstate(all="raise"):
        tiny = pcgrad_weights(1e-30 * np.array([[4.0, -1.0], [-1.0, 1.0]]))
    assert tiny == pytest.approx(np.array([1.25, 2.0]))
    with pytest.raises(UserError, match="3 gradients; expected that of two"):
        pcgrad_weights(np.eye(3))
    with pytest.raises(UserError, match="not finite"):
        pcgrad_weights(np.array([[1.0, np.nan], [np.nan, 1.0]]))


def test_one_protocol():
    gramian = np.diag([1.0, 3.0])
    fixed, balanced, relative = Fixed((3, 1)), GradientBalanced(0.6), LossRelative()
    every: list[Weighting] = [fixed, balanced, relative]
    assert [weighting.gradients for weighting in every] == [False, True, False]
    weights = [weighting.weigh("image", [1.0, 2.0], gramian) for weighting in every]
    assert np.array(weights) == pytest.approx(np.array([[0.75, 0.25], [0.6, 0.4], [0.5, 0.5]]))
    for weighting in every[:2]:
        assert weighting.state_dict() == {}
        weighting.load_state_dict({})
    assert GradientBalanced(1.0, normalised=True).weigh("image", [1.0, 2.0], np.diag([1.0, 4.0])) == pytest.approx(
        [2 / 3, 1 / 3]
    )


def test_unusable_settings_are_refused():
    with pytest.raises(UserError, match="0 teachers"):
        Fixed(())
    with pytest.raises(UserError, match="for 3 teachers"):
        Fixed((1, 1)).weigh("image", [1.0, 2.0, 3.0], None)
    with pytest.raises(UserError, match="window 0"):
        LossRelative(window=0)
    with pytest.raises(UserError, match="start -1"):
        LossRelative(start=-1)
    with pytest.raises(UserError, match=r"1/2 = 0.5"):
        GradientBalanced(0.4).weigh("image", [1.0, 2.0], np.eye(2))
    with pytest.raises(ValueError, match="the Gramian of its 2 terms"):
        GradientBalanced().weigh("image", [1.0, 2.0], None)
