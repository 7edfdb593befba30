from __future__ import annotations

import math
from functools import partial

import numpy as np
import pytest
import torch
from helpers import properties, token_references
from torch.nn import functional as F

from vlkd.errors import UserError
from vlkd.objectives import dbild, kneedle_k

SHAPES = [(7, 30), (7, 30)]
VARIANTS = [{}, {"reverse": False}, {"pairs": "rows"}, {"on": "probabilities"}, {"k": 5}, {"k_min": 4, "k_max": 6}]


def logits(dtype=torch.float64):
    """Cubed, so that k differs over the positions."""
    return [(part.detach() ** 3).to(dtype).requires_grad_() for part in properties.embeddings(*SHAPES)]


def dynamic_ks(teacher, student, k_max, on="logits"):
    curves = [part.detach() if on == "logits" else part.detach().softmax(1) for part in (teacher, student)]
    return np.array([[token_references.knee(row, 2, k_max) for row in part.numpy()] for part in curves]).T


@pytest.mark.parametrize("reverse", [True, False])
@pytest.mark.parametrize("pairs", ["upper", "rows"])
@pytest.mark.parametrize(("tau", "k_max", "on"), [(3.0, 64, "logits"), (0.7, 7, "logits"), (3.0, 30, "probabilities")])
def test_the_formula(reverse, pairs, tau, k_max, on):
    teacher, student = logits()
    ks = dynamic_ks(teacher, student, k_max, on)
    assert len(set(ks.flatten())) > 2
    inputs = [part.detach().numpy() for part in (teacher, student)]
    expected = token_references.dbild(*inputs, ks, tau, reverse=reverse, flat=pairs == "upper")
    ours = dbild(teacher, student, tau=tau, k_max=k_max, reverse=reverse, pairs=pairs, on=on, chunk=3)
    np.testing.assert_allclose(ours.detach().numpy(), expected, rtol=1e-9, atol=1e-12)


def test_bild_at_eight_and_forward():
    teacher, student = logits()
    expected = token_references.dbild(
        *(part.detach().numpy() for part in (teacher, student)), np.full((7, 2), 8), 3.0, reverse=False
    )
    ours = dbild(teacher, student, k=8, reverse=False)
    np.testing.assert_allclose(ours.detach().numpy(), expected, rtol=1e-9)


@pytest.mark.parametrize("options", VARIANTS, ids=str)
def test_gradients(options):
    teacher, student = logits()
    loss = partial(dbild, **options)
    properties.assert_gradient_reaches(loss, [teacher, student], {1})
    assert torch.autograd.gradcheck(lambda s: loss(teacher.detach(), s, chunk=3), student)
    # Chunks, one position at a time or all, give one gradient.
    grads = [torch.autograd.grad(loss(teacher, student, chunk=chunk).square().sum(), student)[0] for chunk in (1, 100)]
    torch.testing.assert_close(*grads)


def test_the_gradient_of_both_branches_by_plain_autograd():
    teacher, student = logits()
    ks = dynamic_ks(teacher, student, 64)
    total = 0
    for row, (k_t, k_s) in enumerate(ks):
        for lead, k in ((teacher, k_t), (student, k_s)):
            chosen = lead[row].detach().argsort(descending=True)[:k]
            i, j = torch.triu_indices(k, k, 1)
            p, q = (((part[row][chosen][i] - part[row][chosen][j]) / 3).log_softmax(0) for part in (teacher, student))
            total = total + F.kl_div(p.detach(), q, reduction="sum", log_target=True)
    (expected,) = torch.autograd.grad(total, student)
    torch.testing.assert_close(torch.autograd.grad(dbild(teacher, student).sum(), student)[0], expected)


@pytest.mark.parametrize("options", VARIANTS, ids=str)
@pytest.mark.parametrize("shift", [0.0, 7.0])
def test_zero_and_without_gradient_at_equality_up_to_a_shift(options, shift):
    teacher, _ = logits()
    same = (teacher.detach() + shift * torch.arange(7)[:, None]).requires_grad_()
    value = dbild(teacher, same, **options)
    value.sum().backward()
    assert value.abs().max() < 1e-12
    assert same.grad.abs().max() < 1e-12


@pytest.mark.parametrize("options", VARIANTS, ids=str)
def test_shared_properties(options):
    teacher, student = logits()
    loss = partial(dbild, **options)
    moved = dbild(teacher - 3, student + torch.arange(7)[:, None], **options)
    torch.testing.assert_close(moved, loss(teacher, student))
    assert loss(teacher, student).max() > 1e-2
    properties.assert_follows_permutation(loss, [teacher, student])
    properties.assert_float32_under_autocast(loss, [teacher, student])
    properties.assert_finite_at_extremes(loss, SHAPES, [1])
    order = torch.randperm(30)
    torch.testing.assert_close(loss(teacher[:, order], student[:, order]), loss(teacher, student))


@pytest.mark.parametrize("options", VARIANTS, ids=str)
def test_a_position_is_the_same_in_any_batch(options):
    teacher, student = logits()
    ks = dynamic_ks(teacher, student, 64)
    assert ks.max() > ks.min() + 3  # so that most positions are padded
    together = dbild(teacher, student, **options)
    (gradient,) = torch.autograd.grad(together.sum(), student)
    for row in range(7):
        alone = dbild(teacher[row : row + 1], student[row : row + 1], **options)
        torch.testing.assert_close(alone[0], together[row], rtol=1e-12, atol=1e-14)
        (own,) = torch.autograd.grad(alone.sum(), student)
        torch.testing.assert_close(own[row], gradient[row], rtol=1e-9, atol=1e-14)


def test_what_neither_side_names_has_no_gradient():
    teacher, student = logits()
    (gradient,) = torch.autograd.grad(dbild(teacher, student).sum(), student)
    ks = dynamic_ks(teacher, student, 64)
    for row, (k_t, k_s) in enumerate(ks):
        named = {*teacher[row].topk(int(k_t)).indices.tolist(), *student[row].topk(int(k_s)).indices.tolist()}
        touched = gradient[row].nonzero().flatten().tolist()
        assert set(touched) <= named
        assert len(touched) >= max(k_t, k_s) or max(k_t, k_s) == 2
    assert (torch.stack([kneedle_k(part, k_max=64) for part in (teacher, student)], 1).numpy() == ks).all()


@pytest.mark.parametrize("options", VARIANTS, ids=str)
@pytest.mark.parametrize("size", [1e-4, 1.0, 1e4])
def test_masked_vocabulary_is_no_vocabulary(options, size):
    teacher, student = ((size * part.detach()).float() for part in logits())
    wide = [torch.cat([part, torch.full((7, 3), -math.inf)], 1).requires_grad_() for part in (teacher, student)]
    wide[1].data[:, 31] = 5.0  # masked by the teacher alone
    value = dbild(*wide, **options)
    (gradient,) = torch.autograd.grad(value.sum(), wide[1])
    assert torch.isfinite(gradient).all()
    assert not gradient[:, 30:].any()
    torch.testing.assert_close(value, dbild(teacher, student, **options))


def test_k_does_not_end_between_equal_logits():
    # As stored answers are: seven tokens, the rest of the probability spread over the others.
    teacher = torch.full((1, 40), -8.0)
    teacher[0, :7] = torch.linspace(0, -4, 7)
    student = torch.randn(1, 40, generator=torch.Generator().manual_seed(0))
    assert kneedle_k(teacher, k_max=30).item() == 8
    expected = token_references.dbild(
        teacher.numpy(), student.numpy(), np.array([[7, kneedle_k(student, k_max=30).item()]]), 3.0
    )
    np.testing.assert_allclose(dbild(teacher, student, k_max=30).numpy(), expected, rtol=1e-5)
    # One below which nothing is larger keeps what it has.
    flat = dbild(torch.zeros(1, 40), student, k_min=3, k_max=30)
    assert torch.isfinite(flat).all()
    assert flat.item() > 0


def test_two_logits_make_one_certain_pair():
    teacher, student = logits()
    value = dbild(teacher, student, k=2)
    value.sum().backward()
    assert value.abs().max() < 1e-12
    assert student.grad.abs().max() < 1e-12
    assert dbild(teacher, student, k=3).min() > 1e-4


def test_fewer_than_two_tokens_left_have_no_pair():
    teacher, student = (part.detach().clone() for part in logits())
    student[0, 1:] = -math.inf
    teacher[1] = -math.inf
    student.requires_grad_()
    value = dbild(teacher, student)
    value.sum().backward()
    assert value[:2].tolist() == [0, 0]
    assert torch.isfinite(student.grad).all()
    assert not student.grad[:2].any()
    assert dbild(teacher[:2], student[:2]).tolist() == [0, 0]
    assert dbild(teacher[:0], student[:0]).shape == (0,)
    student.data[5, 3] = math.nan
    assert dbild(teacher, student)[5].isnan()


@pytest.mark.parametrize("shapes", [[(6, 5), (6, 4)], [(6, 5), (1, 5)], [(5,), (5,)], [(2, 3, 4), (2, 3, 4)]])
def test_shapes_that_do_not_fit(shapes):
    with pytest.raises(UserError, match=r"expected one shape \(A, V\)"):
        dbild(*properties.embeddings(*shapes))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tau": 0.0}, "temperature tau"),
        ({"tau": -1.0}, "temperature tau"),
        ({"tau": math.nan}, "temperature tau"),
        ({"k_min": 1}, "2 <= k_min <= k_max"),
        ({"k_min": 5, "k_max": 4}, "2 <= k_min <= k_max"),
        ({"k": 1}, "2 <= k_min <= k_max"),
        ({"k": 31}, "vocabulary of 30"),
        ({"pairs": "columns"}, "'upper' or 'rows'"),
        ({"on": "ranks"}, "'logits' or 'probabilities'"),
        ({"chunk": 0}, "chunk of 0"),
    ],
)
def test_options_that_are_none(options, message):
    with pytest.raises(UserError, match=message):
        dbild(*logits(), **options)
