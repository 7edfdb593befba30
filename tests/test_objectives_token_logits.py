from __future__ import annotations

import math
from collections import Counter
from functools import partial

import numpy as np
import pytest
import torch
from helpers import properties, references, token_references
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from vlkd.errors import UserError
from vlkd.objectives import dbild, distillation_kl, taid_kl, taid_target, token_kl

SHAPES = [(6, 9), (6, 9)]


LOSSES = [
    partial(token_kl, tau=2.0),
    partial(token_kl, tau=0.5, reverse=True),
    partial(taid_kl, t=0.6),
]


def arrays(*tensors):
    return [tensor.detach().double().numpy() for tensor in tensors]


@pytest.mark.parametrize("tau", [1.0, 2.5])
@pytest.mark.parametrize("reverse", [False, True])
def test_token_kl_by_hand(tau, reverse):
    teacher, student = properties.embeddings(*SHAPES)
    ours = token_kl(teacher, student, tau=tau, reverse=reverse, chunk=4)
    expected = token_references.token_kl(*arrays(teacher, student), tau, reverse)
    np.testing.assert_allclose(ours.detach().numpy(), expected, rtol=1e-9)
    if not reverse:
        torch.testing.assert_close(ours, distillation_kl(student, teacher, tau=tau))


@pytest.mark.parametrize("t", [0.0, 0.4, 1.0])
def test_taid_by_hand(t):
    teacher, student = properties.embeddings(*SHAPES)
    target = taid_target(teacher, student, t)
    rows = [references.softmax((1 - t) * s + t * z) for z, s in zip(*arrays(teacher, student), strict=True)]
    np.testing.assert_allclose(target.numpy(), rows, rtol=1e-9)
    assert not target.requires_grad
    value = taid_kl(teacher, student, t=t, chunk=4)
    losses = [references.kl(p, references.softmax(s)) for p, s in zip(rows, arrays(student)[0], strict=True)]
    np.testing.assert_allclose(value.detach().numpy(), losses, rtol=1e-9, atol=1e-12)
    # The gradient of the cross entropy with a constant target.
    (gradient,) = torch.autograd.grad(value.sum(), student)
    torch.testing.assert_close(gradient, student.softmax(1) - target)


@pytest.mark.parametrize("loss", LOSSES)
def test_shared_properties(loss):
    teacher, student = properties.embeddings(*SHAPES)
    properties.assert_follows_permutation(loss, [teacher, student])
    properties.assert_gradient_reaches(loss, [teacher, student], {1})
    singles = [part.detach().float() for part in (teacher, student)]
    properties.assert_finite_at_extremes(loss, SHAPES, [1])
    if loss.func is not taid_kl:  # whose target moves with the student; its gradient is checked in closed form
        assert torch.autograd.gradcheck(lambda s: loss(teacher.detach(), s, chunk=4), student)
    plain = loss(teacher, student)
    torch.testing.assert_close(loss(teacher - 4, student + torch.arange(6)[:, None]), plain)
    assert plain.min() > 1e-3
    assert loss(*singles).dtype == torch.float32
    assert loss(teacher[:0], student[:0]).shape == (0,)


@pytest.mark.parametrize("loss", LOSSES)
def test_float32_under_autocast(loss):
    properties.assert_float32_under_autocast(loss, properties.embeddings(*SHAPES))


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("size", [1.0, 1e4])
def test_zero_and_without_gradient_at_equality_up_to_a_shift(loss, size):
    teacher, _ = (size * part.detach() for part in properties.embeddings(*SHAPES))
    same = (teacher + 3 * torch.arange(6)[:, None]).requires_grad_()
    value = loss(teacher, same)
    value.sum().backward()
    assert value.abs().max() < 1e-9
    assert same.grad.abs().max() < 1e-9


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("size", [1.0, 1e4])
def test_masked_vocabulary_is_no_vocabulary(loss, size):
    teacher, student = ((size * part.detach()).float() for part in properties.embeddings(*SHAPES))
    wide = [torch.cat([part, torch.full((6, 2), -math.inf)], 1).requires_grad_() for part in (teacher, student)]
    value = loss(*wide)
    (gradient,) = torch.autograd.grad(value.sum(), wide[1])
    assert torch.isfinite(gradient).all()
    assert not gradient[:, 9:].any()
    torch.testing.assert_close(value, loss(teacher, student))


@pytest.mark.parametrize("loss", LOSSES)
def test_an_entry_masked_on_one_side_is_left_out_on_both(loss):
    teacher, student = (part.detach().clone() for part in properties.embeddings(*SHAPES))
    teacher[:, 2] = student[:, 5] = -math.inf
    kept = [0, 1, 3, 4, 6, 7, 8]
    torch.testing.assert_close(loss(teacher, student), loss(teacher[:, kept], student[:, kept]))
    assert taid_target(teacher, student, 0.0)[:, [2, 5]].tolist() == [[0, 0]] * 6


@pytest.mark.parametrize("reverse", [False, True])
def test_chunks_equal_the_plain_form(reverse):
    teacher, student = properties.embeddings((11, 9), (11, 9))
    weights = torch.rand(11, dtype=torch.float64)
    t, s = ((part / 2).log_softmax(1) for part in (teacher.detach(), student))
    plain = 4 * F.kl_div(*((t, s) if reverse else (s, t)), reduction="none", log_target=True).sum(1)
    (expected,) = torch.autograd.grad((weights * plain).sum(), student)
    for chunk in (1, 4, 11, 50):
        value = token_kl(teacher, student, tau=2.0, reverse=reverse, chunk=chunk)
        torch.testing.assert_close(value, plain)
        torch.testing.assert_close(torch.autograd.grad((weights * value).sum(), student)[0], expected)


class Largest(TorchDispatchMode):
    """Counts the tensors as large as the logits, and the largest below that operations make, by their type."""

    def __init__(self, limit):
        super().__init__()
        self.limit, self.whole, self.largest = limit, 0, Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        given = {
            leaf.untyped_storage()._cdata for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)
        }
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor) and leaf.untyped_storage()._cdata not in given:
                if leaf.numel() >= self.limit:
                    self.whole += 1
                else:
                    self.largest[leaf.dtype] = max(self.largest[leaf.dtype], leaf.numel())
        return result


def measured(loss, vocabulary, *, positions=64, chunk=4):
    teacher, student = properties.embeddings(*[(positions, vocabulary)] * 2, dtype=torch.float32)
    with Largest(positions * vocabulary) as forward:
        total = loss(teacher, student, chunk=chunk).sum()
    with Largest(positions * vocabulary) as backward:
        total.backward()
    assert forward.whole == 0
    assert backward.whole <= 2  # the gradient itself, twice where it is gathered into zeros
    return forward.largest | backward.largest


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("vocabulary", [300, 3000])
def test_memory_beside_the_logits_is_that_of_a_chunk(loss, vocabulary):
    assert max(measured(loss, vocabulary).values()) <= 4 * vocabulary


@pytest.mark.parametrize("pairs", ["upper", "rows"])
@pytest.mark.parametrize("vocabulary", [300, 3000])
@pytest.mark.parametrize("k", [6, 100])
def test_memory_of_pairs_is_that_of_their_entries_in_a_chunk(pairs, vocabulary, k):
    largest = measured(partial(dbild, k=k, pairs=pairs), vocabulary)
    # Entries are named and gathered for all positions at once; what is summed over pairs is in float64.
    assert max(largest.values()) <= max(4 * vocabulary, 64 * 2 * k)
    assert 0 < largest[torch.float64] <= 4 * 2 * k


@pytest.mark.parametrize("shapes", [[(6, 5), (6, 4)], [(6, 5), (1, 5)], [(5,), (5,)], [(5, 1), (5, 1)]])
def test_shapes_that_do_not_fit(shapes):
    for loss in (*LOSSES, partial(taid_target, t=0.5)):
        with pytest.raises(UserError, match=r"expected one shape \(A, V\)"):
            loss(*properties.embeddings(*shapes))


@pytest.mark.parametrize("wrong", [0.0, -1.0, math.nan, math.inf])
def test_numbers_that_are_none(wrong):
    inputs = properties.embeddings(*SHAPES)
    with pytest.raises(UserError, match="temperature tau"):
        token_kl(*inputs, tau=wrong)
    with pytest.raises(UserError, match="chunk"):
        token_kl(*inputs, tau=1.0, chunk=0)
    for share in (-0.1, 1.5, math.nan):
        with pytest.raises(UserError, match="between 0 and 1"):
            taid_kl(*inputs, t=share)
        with pytest.raises(UserError, match="between 0 and 1"):
            taid_target(*inputs, share)
