from __future__ import annotations

import numpy as np
import pytest
import torch
from helpers import properties, references
from torch.nn import functional as F

from vlkd.errors import UserError
from vlkd.objectives import embedding_cosine, embedding_mse

OBJECTIVES = [embedding_mse, embedding_cosine]
SHAPES = [(5, 4), (5, 4)]


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_shared_properties(objective):
    inputs = properties.embeddings(*SHAPES)
    assert objective(*inputs).shape == (5,)
    properties.assert_follows_permutation(objective, inputs)
    properties.assert_ignores_length(objective, inputs)
    properties.assert_gradient_reaches(objective, inputs, {0})
    properties.assert_finite_at_extremes(objective, SHAPES, [0])
    properties.assert_float32_under_autocast(objective, inputs)


def test_values_at_known_angles():
    # Angles of 0, 90, 180 and 60 degrees: 2 - 2 cos is 0, 2, 4, 1 and 1 - cos half of it, whatever the lengths.
    student = torch.tensor([[3.0, 0.0], [1.0, 0.0], [0.2, 0.0], [2.0, 0.0]])
    teacher = torch.tensor([[1.0, 0.0], [0.0, 9.0], [-5.0, 0.0], [0.5, 0.75**0.5]])
    expected = torch.tensor([0.0, 2.0, 4.0, 1.0])
    torch.testing.assert_close(embedding_mse(student, teacher), expected)
    torch.testing.assert_close(embedding_cosine(student, teacher), expected / 2)


def test_agree_with_torch_and_numpy():
    student, teacher = properties.embeddings(*SHAPES)
    cosine = 1 - F.cosine_similarity(student, teacher)
    torch.testing.assert_close(embedding_cosine(student, teacher), cosine)
    plain = references.normalised(student.detach().numpy()) - references.normalised(teacher.detach().numpy())
    np.testing.assert_allclose(embedding_mse(student, teacher).detach().numpy(), (plain**2).sum(axis=1))


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_zero_and_still_at_equality(objective):
    student, teacher = properties.embeddings(*SHAPES)
    loss = objective(student, student.detach() * 3)
    torch.testing.assert_close(loss, torch.zeros(5, dtype=torch.float64))
    gradient = torch.autograd.grad(loss.sum(), student)[0]
    assert gradient.abs().max().item() < 1e-12
    assert (objective(student, teacher) > 0.01).all()


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_gradcheck(objective):
    student, teacher = properties.embeddings(*SHAPES)
    torch.autograd.gradcheck(lambda x: objective(x, teacher.detach()), (student,))


@pytest.mark.parametrize("shapes", [((4, 8), (4, 6)), ((4, 8), (1, 8)), ((4, 8), (4, 1)), ((8,), (8,))])
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_refuses_shapes_that_would_broadcast(objective, shapes):
    with pytest.raises(UserError, match=r"expected one shape \(B, D\)"):
        objective(torch.ones(shapes[0]), torch.ones(shapes[1]))


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_half_precision_teacher(objective):
    student, teacher = (tensor.detach().float() for tensor in properties.embeddings(*SHAPES))
    loss = objective(student, teacher.half())
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, objective(student, teacher), rtol=0, atol=5e-3)
