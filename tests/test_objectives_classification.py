from __future__ import annotations

import math
from functools import partial

import numpy as np
import pytest
import torch
from helpers import properties, references

from vlkd.errors import UserError
from vlkd.models.classifier import mixed_probabilities
from vlkd.objectives import binary_kl_norm, cross_entropy, distillation_kl, feature_cosine

SHAPES = [(6, 5), (6, 5)]
LABELS = torch.tensor([0, 4, 2, 2, 1, 3])
DISTANCES = [partial(distillation_kl, tau=2.0), partial(binary_kl_norm, tau=2.0), feature_cosine]


def by_hand(objective, student, teacher, tau):
    """numpy, row by row, as the papers write it."""
    losses = []
    for s, t in zip(student.detach().numpy(), teacher.detach().numpy(), strict=True):
        if objective is distillation_kl:
            losses.append(tau**2 * references.kl(references.softmax(t / tau), references.softmax(s / tau)))
        else:
            q = 1 / (1 + np.exp(-(s - t) / tau))
            losses.append(tau**2 * sum(0.5 * math.log(0.5 / p) + 0.5 * math.log(0.5 / (1 - p)) for p in q))
    return np.array(losses)


@pytest.mark.parametrize("objective", [distillation_kl, binary_kl_norm])
@pytest.mark.parametrize(("size", "tau"), [(1.0, 1.0), (5.0, 2.0), (3.0, 0.5)])
def test_the_formulas(objective, size, tau):
    student, teacher = (size * part for part in properties.embeddings(*SHAPES))
    ours = objective(student, teacher, tau=tau).detach().numpy()
    # The paper's form loses digits in 1 - sigmoid where logits are far apart.
    np.testing.assert_allclose(ours, by_hand(objective, student, teacher, tau), rtol=1e-6)


def test_the_formulas_of_labels_features_and_the_mix():
    left, right = properties.embeddings(*SHAPES)
    rows = [references.softmax(row) for row in left.detach().numpy()]
    expected = [-math.log(row[label]) for row, label in zip(rows, LABELS, strict=True)]
    np.testing.assert_allclose(cross_entropy(left, LABELS).detach().numpy(), expected, rtol=1e-9)
    units = [references.normalised(part.detach().numpy()) for part in (left, right)]
    np.testing.assert_allclose(feature_cosine(left, right).detach().numpy(), 1 - (units[0] * units[1]).sum(1))
    mix = [0.3 * p + 0.7 * references.softmax(t / 0.4) for p, t in zip(rows, right.detach().numpy(), strict=True)]
    np.testing.assert_allclose(mixed_probabilities(left, right, alpha=0.3, beta=0.4).detach().numpy(), mix, rtol=1e-9)


@pytest.mark.parametrize("objective", DISTANCES)
def test_shared_properties(objective):
    student, teacher = properties.embeddings(*SHAPES)
    properties.assert_follows_permutation(objective, [student, teacher])
    properties.assert_gradient_reaches(objective, [student, teacher], {0})
    properties.assert_float32_under_autocast(objective, [student, teacher])
    properties.assert_finite_at_extremes(objective, SHAPES, [0])
    # Near 2 tau the two branches of log cosh meet.
    for factor in (1.0, 3.0):
        scaled = (factor * student).detach().requires_grad_()
        assert torch.autograd.gradcheck(lambda s: objective(s, teacher.detach()), scaled)
    order = torch.randperm(5)
    torch.testing.assert_close(objective(student[:, order], teacher[:, order]), objective(student, teacher))


def test_shared_properties_of_labels_and_the_mix():
    of_logits = lambda logits: cross_entropy(logits, LABELS)  # noqa: E731
    mix = partial(mixed_probabilities, alpha=0.4, beta=0.5)
    left, right = properties.embeddings(*SHAPES)
    properties.assert_gradient_reaches(of_logits, [left], {0})
    properties.assert_gradient_reaches(lambda a, b: mix(a, b)[:, 0], [left, right], {0, 1})
    properties.assert_follows_permutation(mix, [left, right])
    for objective, inputs in ((of_logits, [left]), (mix, [left, right])):
        properties.assert_float32_under_autocast(objective, inputs)
        properties.assert_finite_at_extremes(objective, [(6, 5)] * len(inputs), range(len(inputs)))
        assert torch.autograd.gradcheck(objective, inputs)


@pytest.mark.parametrize("objective", DISTANCES)
@pytest.mark.parametrize("size", [1.0, 1e4])
def test_zero_and_without_gradient_at_equality_alone(objective, size):
    student, teacher = (size * part.detach().float() for part in properties.embeddings(*SHAPES))
    same = teacher.clone().requires_grad_()
    value = objective(same, teacher)
    value.sum().backward()
    assert value.abs().max() < 1e-6
    assert same.grad.abs().max() < 1e-6
    assert objective(student, teacher).max() > 1e-3
    assert size > 1 or objective(student, teacher).min() > 1e-3  # far logits may agree on one certain class


def test_uniform_against_certain():
    classes, tau = 7, 3.0
    even, certain = torch.zeros(1, classes), torch.zeros(1, classes)
    certain[0, 2] = 1e4
    assert cross_entropy(even, torch.tensor([2])).item() == pytest.approx(math.log(classes))
    assert cross_entropy(certain, torch.tensor([2])).item() == 0
    # KL(one-hot || uniform) = log C.
    assert distillation_kl(even, certain, tau=tau).item() == pytest.approx(tau**2 * math.log(classes), rel=1e-5)
    # log cosh x tends to |x| - log 2.
    expected = tau**2 * (1e4 / (2 * tau) - math.log(2))
    assert binary_kl_norm(even, certain, tau=tau).item() == pytest.approx(expected, rel=1e-6)
    assert feature_cosine(certain, -certain).item() == pytest.approx(2)


def test_gradients_in_closed_form():
    (student, teacher), tau = properties.embeddings(*SHAPES), 2.0
    grad = lambda loss: torch.autograd.grad(loss.sum(), student)[0]  # noqa: E731
    heads = [(part / tau).softmax(1) for part in (student, teacher)]
    torch.testing.assert_close(grad(distillation_kl(student, teacher, tau=tau)), tau * (heads[0] - heads[1]))
    expected = tau / 2 * torch.tanh((student - teacher) / (2 * tau))
    torch.testing.assert_close(grad(binary_kl_norm(student, teacher, tau=tau)), expected)
    one_hot = torch.eye(5, dtype=torch.float64)[LABELS]
    torch.testing.assert_close(grad(cross_entropy(student, LABELS)), student.softmax(1) - one_hot)


def test_binary_kl_norm_keeps_its_gradient_far_away_and_its_digits_near_zero():
    teacher = torch.zeros(1, 4)
    for size in (1e-6, 1e-3, 1.0, 40.0, 1e3, 1e6):
        student = torch.full((1, 4), size, requires_grad=True)
        value = binary_kl_norm(student, teacher, tau=1.0)
        value.sum().backward()
        x = size / 2
        expected = 4 * (x * x / 2 if x < 1e-2 else x + math.log1p(math.exp(-2 * x)) - math.log(2))
        assert value.item() == pytest.approx(expected, rel=1e-5)
        assert student.grad[0, 0].item() == pytest.approx(math.tanh(x) / 2, rel=1e-5)


def test_high_temperatures_leave_squared_differences():
    student, teacher = properties.embeddings(*SHAPES)
    difference = student - teacher
    torch.testing.assert_close(binary_kl_norm(student, teacher, tau=1e4), difference.square().sum(1) / 8)
    centred = difference - difference.mean(1, keepdim=True)
    limit = centred.square().sum(1) / (2 * 5)
    torch.testing.assert_close(distillation_kl(student, teacher, tau=1e4), limit, rtol=1e-3, atol=1e-6)


def test_a_shift_of_all_logits():
    student, teacher = properties.embeddings(*SHAPES)
    moved = teacher + 3 * torch.arange(6)[:, None]
    plain = distillation_kl(student, teacher, tau=2.0)
    torch.testing.assert_close(distillation_kl(student, moved, tau=2.0), plain)
    torch.testing.assert_close(distillation_kl(student, teacher.log_softmax(1), tau=2.0), plain)
    torch.testing.assert_close(cross_entropy(student - 7, LABELS), cross_entropy(student, LABELS))
    shifted = mixed_probabilities(student + 1, moved, alpha=0.5, beta=2.0)
    torch.testing.assert_close(shifted, mixed_probabilities(student, teacher, alpha=0.5, beta=2.0))
    assert (binary_kl_norm(student, teacher + 100, tau=2.0) > 100 * binary_kl_norm(student, teacher, tau=2.0)).all()


def test_each_head_alone_and_rows_that_sum_to_one():
    label, teacher = (9 * part.detach().float() for part in properties.embeddings(*SHAPES))
    mix = partial(mixed_probabilities, label, teacher)
    assert torch.equal(mix(alpha=1.0, beta=0.5), label.softmax(1))
    assert torch.equal(mix(alpha=0.0, beta=0.5), (2 * teacher).softmax(1))
    for alpha in (0.0, 0.2, 0.7, 1.0):
        rows = mix(alpha=alpha, beta=0.3)
        assert (rows >= 0).all()
        torch.testing.assert_close(rows.sum(1), torch.ones(6))


@pytest.mark.parametrize("shapes", [[(6, 5), (6, 4)], [(6, 5), (1, 5)], [(5,), (5,)]])
def test_shapes_that_do_not_fit(shapes):
    for objective in (*DISTANCES, partial(mixed_probabilities, alpha=0.5, beta=1.0)):
        with pytest.raises(UserError, match=r"expected one shape \(B, [CDF]\)"):
            objective(*properties.embeddings(*shapes))
    with pytest.raises(UserError, match=r"expected \(B, C\) and \(B,\)"):
        cross_entropy(*properties.embeddings((6, 5), (6,)))
    with pytest.raises(UserError, match=r"expected \(B, C\) and \(B,\)"):
        cross_entropy(torch.zeros(5, 3), LABELS)


@pytest.mark.parametrize("label", [-100, -1, 5])
def test_labels_outside_the_classes(label):
    with pytest.raises(UserError, match=f"found the label {label}, expected 0 to 4"):
        cross_entropy(torch.zeros(3, 5), torch.tensor([0, label, 1]))


@pytest.mark.parametrize("wrong", [0.0, -1.0, float("nan"), float("inf")])
def test_temperatures_that_are_none(wrong):
    inputs = properties.embeddings(*SHAPES)
    for objective in (distillation_kl, binary_kl_norm):
        with pytest.raises(UserError, match="temperature tau"):
            objective(*inputs, tau=wrong)
    with pytest.raises(UserError, match="beta"):
        mixed_probabilities(*inputs, alpha=0.5, beta=wrong)


@pytest.mark.parametrize("alpha", [-0.1, 1.1, float("nan")])
def test_shares_that_are_none(alpha):
    with pytest.raises(UserError, match="alpha"):
        mixed_probabilities(*properties.embeddings(*SHAPES), alpha=alpha, beta=1.0)
