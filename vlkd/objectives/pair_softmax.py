r"""Softmax over all differences of a list's entries, in time and memory of its length, not of its square.

Letters: A answer tokens, W entries of a list.

For :math:`p_{ij} \propto e^{z_i - z_j}, i < j` (W (W - 1) / 2 pairs in one softmax) the pairs never have to be made:

.. math::
    Z = \sum_i e^{z_i} \sum_{j > i} e^{-z_j}, \quad
    m_i = \frac{\partial \log Z}{\partial z_i} = \sum_{j > i} p_{ij} - \sum_{j < i} p_{ji}

are running sums from the end and from the beginning, and the KL of two such softmaxes is the Bregman divergence

.. math::
    \mathrm{KL}(p \Vert q) = \log Z(z^q) - \log Z(z^p) + \sum_i m_i(z^p) (z^p_i - z^q_i)

(both are one exponential family with the lists as parameters). It is exact, and takes the thousands of entries that
Kneedle names in a large vocabulary, whose pairs would not fit in memory. Sums run in logarithms, so that lists need
not be sorted, and in float64: a logarithm in the hundreds would leave float32 four digits of a probability.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

BELOW = 100.0
"""So far under the smallest summand a filled entry lies: e^-100 of it is nothing in float64, and yet no infinity."""

LOWEST = -1e6
"""Entries further below their list's largest are raised to this: e^-1e6 is nothing, and sums beside a token that was
masked with the least float would have no digit left for the others."""


def pair_kl(p_AW: Tensor, q_AW: Tensor, valid_AW: Tensor, *, flat: bool) -> Tensor:
    """KL(p || q) of the softmaxes over differences of both lists: (A,), float64.

    Args:
        p_AW: z^p, divided by its temperature; of any floating type.
        q_AW: z^q.
        valid_AW: entries that count, the first k of each row. With fewer than two the value is 0.
        flat: one softmax over all pairs; otherwise one over j > i for each i < k, whose k - 1 KL are averaged.
    """
    p_AW, q_AW = (_centred(values.double(), valid_AW) for values in (p_AW, q_AW))
    potential = _flat if flat else _rows
    (p_A, m_AW), (q_A, _) = potential(p_AW, valid_AW), potential(q_AW, valid_AW)
    return q_A - p_A + (m_AW * (p_AW - q_AW)).sum(dim=-1)


def _centred(values_AW: Tensor, valid_AW: Tensor) -> Tensor:
    """With a maximum of 0, which no softmax of differences sees, and `LOWEST` at least; 0 where invalid."""
    top_A1 = values_AW.detach().masked_fill(~valid_AW, -math.inf).amax(dim=-1, keepdim=True)
    return (values_AW - top_A1).masked_fill(~valid_AW, 0).clamp(min=LOWEST)


def _flat(z_AW: Tensor, valid_AW: Tensor) -> tuple[Tensor, Tensor]:
    """log Z, (A,), and its gradient m, (A, W)."""
    first_AW = z_AW + _after(z_AW, valid_AW)
    second_AW = _before(z_AW) - z_AW
    leads_AW, follows_AW = _roles(valid_AW)
    alone_A1 = ~leads_AW.any(dim=-1, keepdim=True)
    # A logsumexp over -inf alone has no gradient; 0 everywhere is the same on both sides and cancels.
    total_A1 = first_AW.masked_fill(~leads_AW, -math.inf).masked_fill(alone_A1, 0).logsumexp(dim=-1, keepdim=True)
    m_AW = _share(first_AW - total_A1, leads_AW) - _share(second_AW - total_A1, follows_AW)
    return total_A1.squeeze(-1), m_AW


def _rows(z_AW: Tensor, valid_AW: Tensor) -> tuple[Tensor, Tensor]:
    """The mean of log Z_i = log sum_{j > i} e^{-z_j} over i, (A,), and its gradient, (A, W)."""
    leads_AW, follows_AW = _roles(valid_AW)
    rows_A1 = leads_AW.sum(dim=-1, keepdim=True).clamp(min=1)
    total_AW = _after(z_AW, valid_AW).masked_fill(~leads_AW, 0)
    m_AW = -_share(_before(-total_AW) - z_AW, follows_AW) / rows_A1
    return (total_AW / rows_A1).sum(dim=-1), m_AW


def _roles(valid_AW: Tensor) -> tuple[Tensor, Tensor]:
    """Entries that are the first, and that are the second of some pair."""
    later_AW = torch.nn.functional.pad(valid_AW[..., 1:], (0, 1))
    place_W = torch.arange(valid_AW.shape[-1], device=valid_AW.device)
    return valid_AW & later_AW, valid_AW & (place_W > 0)


def _share(logarithm_AW: Tensor, counts_AW: Tensor) -> Tensor:
    """exp, and 0 where it does not count."""
    return logarithm_AW.masked_fill(~counts_AW, -math.inf).exp()


def _after(z_AW: Tensor, valid_AW: Tensor) -> Tensor:
    """log sum_{j > i} e^{-z_j} over valid j, for `z_AW` of at most 0; without meaning at the last valid i."""
    summand_AW = (-z_AW).masked_fill(~valid_AW, -BELOW)
    sums_AW = summand_AW.flip(-1).logcumsumexp(dim=-1).flip(-1)
    return torch.nn.functional.pad(sums_AW[..., 1:], (0, 1), value=-BELOW)


def _before(z_AW: Tensor) -> Tensor:
    """log sum_{i < j} e^{z_i}; without meaning at j = 0."""
    return torch.nn.functional.pad(z_AW.logcumsumexp(dim=-1)[..., :-1], (1, 0))
