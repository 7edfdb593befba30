"""Softmax over all pairs by running sums, against the pairs themselves."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn import functional as F

from vlkd.objectives.pair_softmax import pair_kl

ORDERS = {"falling": lambda z: z.sort(descending=True).values, "rising": lambda z: z.sort().values, "none": lambda z: z}


def by_pairs(p, q, k, flat):
    """KL of one list in float64, every difference written out."""
    p, q = p[:k].double(), q[:k].double()
    total = 0.0
    if flat:
        i, j = torch.triu_indices(k, k, 1)
        groups = [(i, j)]
    else:
        groups = [(torch.tensor(i), torch.arange(i + 1, k)) for i in range(k - 1)]
    for i, j in groups:
        left, right = ((z[i] - z[j]).log_softmax(0) for z in (p, q))
        total += F.kl_div(right, left, reduction="sum", log_target=True)
    return total / len(groups)


def lists(size, order, dtype):
    generator = torch.Generator().manual_seed(0)
    p, q = (ORDERS[order](size * torch.randn(3, 200, generator=generator)).to(dtype) for _ in range(2))
    return p.requires_grad_(), q.requires_grad_(), [200, 57, 2]


@pytest.mark.parametrize("flat", [True, False])
@pytest.mark.parametrize("order", list(ORDERS))
@pytest.mark.parametrize(("size", "dtype"), [(1.0, torch.float64), (1.0, torch.float32), (300.0, torch.float32)])
def test_value_and_gradients_of_the_pairs(flat, order, size, dtype):
    p, q, counts = lists(size, order, dtype)
    valid = torch.arange(200) < torch.tensor(counts)[:, None]
    ours = pair_kl(p, q, valid, flat=flat)
    expected = torch.stack([by_pairs(p[row], q[row], k, flat) for row, k in enumerate(counts)])
    torch.testing.assert_close(ours, expected, rtol=1e-9, atol=1e-12 * size)
    for own, wanted in zip(
        torch.autograd.grad(ours.sum(), (p, q)), torch.autograd.grad(expected.sum(), (p, q)), strict=True
    ):
        torch.testing.assert_close(own, wanted, rtol=1e-5, atol=1e-9 * size)


@pytest.mark.parametrize("flat", [True, False])
@pytest.mark.parametrize("fill", [math.nan, math.inf, -math.inf, 1e30])
@pytest.mark.parametrize("side", [0, 1])
def test_what_does_not_count_may_be_anything(flat, fill, side):
    p, q, counts = lists(1.0, "none", torch.float64)
    valid = torch.arange(200) < torch.tensor(counts)[:, None]
    wild = [z.detach().clone().requires_grad_() for z in (p, q)]
    wild[side].data.masked_fill_(~valid, fill)
    value = pair_kl(*wild, valid, flat=flat)
    torch.testing.assert_close(value, pair_kl(p, q, valid, flat=flat))
    for gradient in torch.autograd.grad(value.sum(), wild):
        assert torch.isfinite(gradient).all()
        assert not gradient[~valid].any()


@pytest.mark.parametrize("flat", [True, False])
@pytest.mark.parametrize("mask", [-1e9, -1e15, torch.finfo(torch.float32).min])
def test_a_token_masked_by_a_large_number_leaves_the_others_their_digits(flat, mask):
    p, q, _ = lists(1.0, "falling", torch.float32)
    found = []
    for lowest in (-1e5, mask):
        masked = [torch.cat([z.detach(), torch.full((3, 1), lowest)], 1).requires_grad_() for z in (p, q)]
        value = pair_kl(*masked, torch.ones(3, 201, dtype=torch.bool), flat=flat)
        found.append([value, *(gradient[:, :-1] for gradient in torch.autograd.grad(value.sum(), masked))])
    for low, lower in zip(*found, strict=True):
        torch.testing.assert_close(low, lower, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("flat", [True, False])
@pytest.mark.parametrize("count", [0, 1])
def test_fewer_than_two_entries_have_no_pair(flat, count):
    p, q, _ = lists(1.0, "none", torch.float64)
    value = pair_kl(p, q, (torch.arange(200) < count).expand(3, -1), flat=flat)
    assert value.tolist() == [0, 0, 0]
    for gradient in torch.autograd.grad(value.sum(), (p, q)):
        assert not gradient.any()
