from __future__ import annotations

import numpy as np
import pytest
import torch
from helpers import properties, references

from vlkd.errors import UserError
from vlkd.objectives import relation_loss, visual_feature_matching

TEACHER, STUDENT = (3, 5, 8), (3, 5, 6)


def test_relation_by_hand():
    teacher, student = properties.embeddings(TEACHER, STUDENT)
    losses = []
    for t, s in zip(teacher.detach().numpy(), student.detach().numpy(), strict=True):
        left, right = ([float(a @ b) for a in units for b in units] for units in map(references.normalised, (t, s)))
        losses.append(1 - np.dot(left, right) / np.sqrt(np.dot(left, left) * np.dot(right, right)))
    np.testing.assert_allclose(relation_loss(teacher, student).detach().numpy(), losses, rtol=1e-9)


def test_relation_is_zero_at_equal_cosines_alone():
    teacher, student = properties.embeddings(TEACHER, STUDENT)
    turn = torch.linalg.qr(properties.embeddings((8, 8))[0].detach())[0]
    same = (teacher.detach() @ turn * torch.rand(3, 5, 1)).requires_grad_()
    value = relation_loss(teacher, same)
    value.sum().backward()
    assert value.abs().max() < 1e-12
    assert same.grad.abs().max() < 1e-9
    assert relation_loss(teacher, student).min() > 1e-3


def test_matching_by_hand():
    student, teacher = properties.embeddings(TEACHER, TEACHER)
    s, t = (part.detach().numpy() for part in (student, teacher))
    losses = [sum((a - b) ** 2 for a, b in zip(x.flat, y.flat, strict=True)) / 40 for x, y in zip(s, t, strict=True)]
    np.testing.assert_allclose(visual_feature_matching(student, teacher).detach().numpy(), losses)
    assert not visual_feature_matching(teacher, teacher).any()
    (gradient,) = torch.autograd.grad(visual_feature_matching(student, teacher).sum(), student)
    torch.testing.assert_close(gradient, (student - teacher) / 20)


@pytest.mark.parametrize(("loss", "shapes", "place"), [
    (relation_loss, [TEACHER, STUDENT], 1),
    (visual_feature_matching, [TEACHER, TEACHER], 0),
])  # fmt: skip
def test_shared_properties(loss, shapes, place):
    inputs = properties.embeddings(*shapes)
    properties.assert_follows_permutation(loss, inputs)
    properties.assert_gradient_reaches(loss, inputs, {place})
    properties.assert_float32_under_autocast(loss, inputs)
    properties.assert_finite_at_extremes(loss, shapes, [place])
    constants = [part.detach() for part in inputs]
    assert torch.autograd.gradcheck(lambda s: loss(*constants[:place], s, *constants[place + 1 :]), inputs[place])


def test_shapes_that_do_not_fit():
    for shapes in ([(3, 5, 8), (3, 4, 8)], [(3, 5, 8), (2, 5, 8)], [(5, 8), (5, 8)]):
        for loss in (relation_loss, visual_feature_matching):
            with pytest.raises(UserError, match=r"expected .*\(B, N, C\)"):
                loss(*properties.embeddings(*shapes))
    with pytest.raises(UserError, match="count and width agree"):
        visual_feature_matching(*properties.embeddings(TEACHER, STUDENT))
