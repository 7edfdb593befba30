"""The K largest log probabilities of each answer token, and logits made of them again."""

from __future__ import annotations

import torch
from torch import Tensor

from vlkd.objectives.chunks import row_slices

LEAST = 1e-30
"""Probability that is spread where rounding left nothing: -inf would mask these tokens on the student's side, too."""
CHUNK = 64


def sparsify(logits_AV: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """Of logits the K largest: tokens (A, K) int64, their log probabilities (A, K), and the others' probability (A,).

    In falling order, float32; the rest is a sum of its own, so that it keeps its digits where it is small.
    """
    parts = []
    for rows in row_slices(len(logits_AV), CHUNK):
        log_AV = logits_AV[rows].float().log_softmax(dim=1)
        values_AK, indices_AK = log_AV.topk(k, dim=1)
        rest_A = log_AV.scatter_(1, indices_AK, -torch.inf).exp().sum(dim=1).clamp(max=1)
        parts.append((indices_AK, values_AK, rest_A))
    indices, values, rest = zip(*parts, strict=True)
    return torch.cat(indices), torch.cat(values), torch.cat(rest)


def rounded(values_AK: Tensor, dtype: torch.dtype) -> Tensor:
    """Log probabilities as they are stored; those below the least number of `dtype` are that number, and not -inf.

    Logits of a vocabulary masked by a large negative number go that low, and -inf would mask their tokens on the
    student's side, too.
    """
    return values_AK.clamp_min(torch.finfo(dtype).min).to(dtype)


def densify(indices_AK: Tensor, values_AK: Tensor, rest_A: Tensor, vocabulary: int) -> Tensor:
    """Logits (A, V), float32, of which the K kept are what was stored and all others share the rest evenly.

    Their softmax is the stored distribution. Where K = V it is the full one.

    Args:
        indices_AK: kept tokens, distinct, in [0, V).
        values_AK: their log probabilities.
        rest_A: probability of all others together.
        vocabulary: V of the model whose distributions were stored.
    """
    others = max(vocabulary - indices_AK.shape[1], 1)
    share_A = (rest_A.float().clamp_min(LEAST) / others).log()
    # `repeat` and not `expand`: each row is written to.
    return share_A[:, None].repeat(1, vocabulary).scatter_(1, indices_AK, values_AK.float())
