from __future__ import annotations

import math
from functools import partial

import open_clip
import pytest
import torch
from helpers import properties, references
from torch.nn import functional as F

from vlkd.errors import UserError
from vlkd.objectives import neighbour_kl, relational_kl

BATCH = 6
CASES = {
    "relational_kl": (relational_kl, [(BATCH, 5), (BATCH, 5), (BATCH, 3), (BATCH, 3)], {0, 1}),
    "neighbour_kl": (neighbour_kl, [(BATCH, 5), (BATCH, 3)], {0}),
}


@pytest.mark.parametrize("name", CASES)
def test_shared_properties(name):
    function, shapes, students = CASES[name]
    objective = partial(function, student_scale=8.0, teacher_scale=14.0)
    inputs = properties.embeddings(*shapes)
    assert objective(*inputs).shape == ()
    properties.assert_follows_permutation(objective, inputs)
    properties.assert_ignores_length(objective, inputs)
    properties.assert_gradient_reaches(objective, inputs, students)
    properties.assert_float32_under_autocast(objective, inputs)


@pytest.mark.parametrize("scale", [0.01, 100.0, 1e4])
@pytest.mark.parametrize("name", CASES)
def test_finite_at_extremes(name, scale):
    function, shapes, students = CASES[name]
    objective = partial(function, student_scale=scale, teacher_scale=scale)
    properties.assert_finite_at_extremes(objective, shapes, sorted(students))


@pytest.mark.parametrize("name", CASES)
def test_no_gradient_reaches_the_scale_of_the_teacher(name):
    function, shapes, _ = CASES[name]
    scales = [torch.tensor(5.0, requires_grad=True) for _ in range(2)]
    student, teacher = torch.autograd.grad(
        function(*properties.embeddings(*shapes), *scales), scales, allow_unused=True
    )
    assert student is not None
    assert student.abs().item() > 0
    assert teacher is None


def test_relational_kl_of_a_sharp_teacher_and_an_indifferent_student():
    # Teacher cosines are the 2x2 identity: p = (q, 1 - q) with q = e^t / (e^t + 1). The student's rows are even, so
    # KL = log 2 - H(p) in both directions.
    teacher, student = torch.eye(2), torch.ones(2, 4)
    q = 1 / (1 + math.exp(-3))
    expected = math.log(2) + q * math.log(q) + (1 - q) * math.log(1 - q)
    actual = relational_kl(student, student, teacher, teacher, 20.0, 3.0)
    assert actual.item() == pytest.approx(expected, rel=1e-5)


def test_neighbour_kl_of_three_leaves_the_diagonal_out():
    # Member 0 has neighbours at cosines (1, 0), member 1 the same, member 2 at (0, 0). The student sees even rows:
    # two rows lose log 2 - H(q), the third nothing. A diagonal kept in would change all three.
    teacher = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
    q = 1 / (1 + math.exp(-2))
    row = math.log(2) + q * math.log(q) + (1 - q) * math.log(1 - q)
    assert neighbour_kl(torch.eye(3), teacher, 9.0, 2.0).item() == pytest.approx(row * 2 / 3, rel=1e-5)


def test_relational_kl_is_open_clip_distillation_less_the_teachers_entropy():
    image, text, t_image, t_text = (F.normalize(x, dim=1) for x in properties.embeddings(*CASES["relational_kl"][1]))
    s, t = torch.tensor(8.0, dtype=torch.float64), torch.tensor(14.0, dtype=torch.float64)
    _, cross_entropy = open_clip.loss.DistillClipLoss()(image, text, s, t_image, t_text, t)
    logits = t * t_image @ t_text.T
    entropy = sum(-(x.softmax(1) * x.log_softmax(1)).sum(1).mean() for x in (logits, logits.T)) / 2
    actual = relational_kl(image, text, t_image, t_text, s, t)
    torch.testing.assert_close(actual, cross_entropy - entropy)


def test_numpy_references():
    arrays = properties.embeddings(*CASES["relational_kl"][1], seed=4)
    image, text, t_image, t_text = (tensor.detach().numpy() for tensor in arrays)
    expected = references.relational_kl((image, text), (t_image, t_text), (8.0, 14.0))
    assert relational_kl(*arrays, 8.0, 14.0).item() == pytest.approx(expected)
    expected = references.neighbour_kl(image, t_image, (8.0, 14.0))
    assert neighbour_kl(arrays[0], arrays[2], 8.0, 14.0).item() == pytest.approx(expected)


def test_zero_and_still_at_equality():
    image, text = properties.embeddings((BATCH, 5), (BATCH, 5))
    # The teacher is the student in another basis and with other lengths: relations are all that counts.
    rotation = torch.linalg.qr(torch.randn(5, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0)))[0]
    t_image, t_text = (tensor.detach() @ rotation * 4 for tensor in (image, text))
    for loss in (relational_kl(image, text, t_image, t_text, 20.0, 20.0), neighbour_kl(image, t_image, 20.0, 20.0)):
        assert loss.item() == pytest.approx(0, abs=1e-12)
        assert torch.autograd.grad(loss, image)[0].abs().max().item() < 1e-12
    assert relational_kl(image, text, t_text, t_image, 20.0, 20.0).item() > 0.1


def test_gradcheck():
    image, text, t_image, t_text = properties.embeddings((4, 3), (4, 3), (4, 5), (4, 5))
    scale = torch.tensor(3.0, dtype=torch.float64, requires_grad=True)
    t_image, t_text = t_image.detach(), t_text.detach()
    torch.autograd.gradcheck(lambda a, b, s: relational_kl(a, b, t_image, t_text, s, 5.0), (image, text, scale))
    torch.autograd.gradcheck(lambda a, s: neighbour_kl(a, t_image, s, 5.0), (image, scale))


def test_small_batches_are_zero_with_a_zero_gradient():
    for size, objective in ((1, relational_kl), (1, neighbour_kl), (2, neighbour_kl)):
        shapes = [(size, width) for width in ((5, 5, 3, 3) if objective is relational_kl else (5, 3))]
        inputs = properties.embeddings(*shapes)
        loss = objective(*inputs, 9.0, 9.0)
        assert loss.item() == 0
        assert not torch.autograd.grad(loss, inputs[0])[0].any()


@pytest.mark.parametrize(
    "shapes",
    [((4, 5), (4, 5), (3, 3), (3, 3)), ((4, 5), (4, 3), (4, 3), (4, 3)), ((4, 5), (4, 5), (4, 3), (1, 3))],
)
def test_relational_kl_refuses_what_does_not_pair(shapes):
    with pytest.raises(UserError, match="expected"):
        relational_kl(*(torch.ones(shape) for shape in shapes), 1.0, 1.0)


@pytest.mark.parametrize("shapes", [((4, 5), (3, 5)), ((4,), (4, 5)), ((0, 5), (0, 5))])
def test_neighbour_kl_refuses_what_does_not_pair(shapes):
    with pytest.raises(UserError, match="expected"):
        neighbour_kl(torch.ones(shapes[0]), torch.ones(shapes[1]), 1.0, 1.0)
