from __future__ import annotations

import math
from functools import partial

import numpy as np
import pytest
import torch
from helpers import properties, references
from torch.nn import functional as F

from vlkd.errors import UserError
from vlkd.objectives import class_kl

SHAPES = [(6, 5), (6, 5), (9, 5)]


def by_hand(student, teacher, classes, scale, tau):
    """numpy, row by row."""
    student, teacher, classes = (references.normalised(part.detach().numpy()) for part in (student, teacher, classes))
    losses = []
    for own, wanted in zip(student, teacher, strict=True):
        p, q = (references.softmax(scale / tau * classes @ row) for row in (wanted, own))
        losses.append(tau**2 * sum(a * math.log(a / b) for a, b in zip(p, q, strict=True)))
    return np.array(losses)


@pytest.mark.parametrize(("scale", "tau"), [(1.0, 1.0), (14.0, 2.0), (50.0, 4.0)])
def test_the_formula(scale, tau):
    inputs = properties.embeddings(*SHAPES)
    np.testing.assert_allclose(
        class_kl(*inputs, scale, tau=tau).detach().numpy(), by_hand(*inputs, scale, tau), rtol=1e-9
    )


def test_shared_properties():
    student, teacher, classes = properties.embeddings(*SHAPES)
    objective = partial(class_kl, teacher_scale=9.0, tau=2.0)
    of_rows = lambda s, t: objective(s, t, classes)  # noqa: E731
    properties.assert_follows_permutation(of_rows, [student, teacher])
    properties.assert_ignores_length(objective, [student, teacher, classes])
    properties.assert_gradient_reaches(objective, [student, teacher, classes], {0})
    properties.assert_float32_under_autocast(objective, [student, teacher, classes])
    assert torch.autograd.gradcheck(lambda s: objective(s, teacher.detach(), classes.detach()), student)
    order = torch.randperm(len(classes))
    torch.testing.assert_close(objective(student, teacher, classes[order]), objective(student, teacher, classes))


@pytest.mark.parametrize("scale", [0.01, 100.0, 1e4])
def test_finite_at_extremes(scale):
    properties.assert_finite_at_extremes(partial(class_kl, teacher_scale=scale, tau=0.5), SHAPES, [0])


def test_zero_at_equality_and_with_a_single_class():
    student, teacher, classes = properties.embeddings(*SHAPES)
    assert class_kl(3 * teacher, teacher, classes, 20.0).abs().max() < 1e-9
    assert class_kl(student, teacher, classes[:1], 20.0).abs().max() < 1e-12
    assert class_kl(student, teacher, classes, 20.0).min() > 1e-3


def test_a_certain_teacher_and_an_indifferent_student():
    # The teacher's cosines are (1, 0), the student's (c, c): its distribution is even, so KL = log 2 - H(p).
    teacher, student, classes = torch.tensor([[1.0, 0.0]]), torch.tensor([[1.0, 1.0]]), torch.eye(2)
    q = 1 / (1 + math.exp(-3 / 2))
    expected = 4 * (math.log(2) + q * math.log(q) + (1 - q) * math.log(1 - q))
    assert class_kl(student, teacher, classes, 3.0, tau=2.0).item() == pytest.approx(expected, rel=1e-5)


def test_the_gradient_keeps_its_size_over_high_temperatures():
    # At high tau the gradient tends to that of (s^2 / 2K) times the squared difference of centred cosines, without tau.
    student, teacher, classes = properties.embeddings(*SHAPES)
    sizes = [
        torch.autograd.grad(class_kl(student, teacher, classes, 1.0, tau=tau).sum(), student)[0] for tau in (2000, 8000)
    ]
    torch.testing.assert_close(sizes[0], sizes[1], rtol=1e-2, atol=1e-5)
    cosines = [F.normalize(rows, dim=1) @ F.normalize(classes.detach(), dim=1).T for rows in (student, teacher)]
    centred = [part - part.mean(dim=1, keepdim=True) for part in cosines]
    limit = (centred[0] - centred[1].detach()).square().sum() / (2 * len(classes))
    torch.testing.assert_close(sizes[1], torch.autograd.grad(limit, student)[0], rtol=1e-2, atol=1e-5)


def test_a_class_that_stands_twice_counts_twice():
    student, teacher, classes = properties.embeddings(*SHAPES)
    doubled = torch.cat([classes, classes[:1]])
    assert not torch.allclose(class_kl(student, teacher, doubled, 9.0), class_kl(student, teacher, classes, 9.0))


@pytest.mark.parametrize(
    ("shapes", "tau"),
    [([(6, 5), (6, 4), (9, 5)], 1.0), ([(6, 5), (5, 5), (9, 5)], 1.0), ([(6, 5), (6, 5), (9, 4)], 1.0)],
)
def test_shapes_that_do_not_fit(shapes, tau):
    with pytest.raises(UserError, match="expected \\(B, D\\)"):
        class_kl(*properties.embeddings(*shapes), 1.0, tau=tau)


@pytest.mark.parametrize("tau", [0.0, -1.0, float("nan")])
def test_a_temperature_that_is_none(tau):
    with pytest.raises(UserError, match="temperature"):
        class_kl(*properties.embeddings(*SHAPES), 1.0, tau=tau)
