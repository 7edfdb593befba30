r"""How many logits of a row stand out: the knee of the sorted curve.

Letters: A answer tokens, V vocabulary, W the width of the sorted head of a row.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

from vlkd.errors import UserError
from vlkd.objectives.chunks import check_chunk, has_masked, row_slices, wide

Curve = Literal["logits", "probabilities"]

BINS = 2048
"""Of the histogram that stands in for sorting the tail."""

SORTED_WHOLE = 2048
"""Vocabularies up to this size are sorted whole, which is then cheaper than a histogram."""

MARGIN = 1e-5
"""Sums of a rank and a height, both in [0, 1], that differ by less are compared by sorting: float32 keeps 1e-7."""


def kneedle_k(logits_AV: Tensor, *, k_min: int = 2, k_max: int, on: Curve = "logits", chunk: int = 64) -> Tensor:
    r"""Kneedle's k of each row: (A,) int64, between k_min and k_max.

    .. math::
        k = 1 + \arg\max_i \Big(1 - \frac{i}{V - 1} - \frac{z_i - z_{V-1}}{z_0 - z_{V-1}}\Big), \quad
        z_0 \ge \dots \ge z_{V-1}

    The bracket is sqrt 2 times the distance below the chord from the first to the last point, with both axes on
    [0, 1] (Kneedle, Satopää et al., 2011, for a convex falling curve; equations 8 and 9 of Switch-KD,
    arXiv:2604.14629, by second-hand reports). Ours, where those are silent:

    - the knee itself is counted, hence 1 + the index from 0, and the first of equal maxima is taken;
    - only points *below* the chord are knees. Sorted logits are S-shaped; the bend above the chord at the lower end
      would otherwise win whenever a few tokens are far less likely than the rest, and k would be nearly V;
    - entries of -inf are masked tokens, not points, and V counts the others;
    - a flat row and one of fewer than three points have no knee: k_min.

    A vocabulary of more than `SORTED_WHOLE` tokens is sorted up to k_max only. A histogram of the rest bounds what it
    can hold: either some point there surely lies further below the chord, so that k is clipped to k_max, or surely
    none does; a row in between is sorted whole. The result is the full sort's in every case.

    Args:
        logits_AV: z, (A, V); no gradient.
        k_min: the smallest result, at least 2: one logit has no pair.
        k_max: the largest result, at least k_min.
        on: the curve of the logits, as in the paper's figure, or of their softmax at temperature 1, where k is small.
        chunk: positions at a time; memory beside the logits is some 30 bytes times chunk times V.

    Raises:
        UserError: the logits are no matrix, V is below k_min or the bounds are wrong.
    """
    check_knee(k_min, k_max, on, "kneedle_k")
    check_chunk(chunk, "kneedle_k")
    if logits_AV.ndim != 2 or logits_AV.shape[1] < k_min:
        raise UserError(
            f"kneedle_k: the logits are {tuple(logits_AV.shape)}, expected (A, V) with at least k_min = {k_min} tokens."
        )
    counts = []
    with torch.no_grad():
        for rows in row_slices(len(logits_AV), chunk):
            part_AV = wide(logits_AV[rows])
            head_AW = part_AV.topk(min(k_max, part_AV.shape[1]), dim=1).values
            counts.append(knee_counts(part_AV, head_AW, k_min=k_min, k_max=k_max, on=on))
    return torch.cat(counts)


def check_knee(k_min: int, k_max: int, on: Curve, objective: str) -> None:
    """Raise `UserError` unless 2 <= k_min <= k_max and the curve is known."""
    if not 2 <= k_min <= k_max:
        raise UserError(
            f"{objective}: found k_min {k_min} and k_max {k_max}, expected 2 <= k_min <= k_max; one logit has no pair."
        )
    if on not in ("logits", "probabilities"):
        raise UserError(f"{objective}: found the curve on={on!r}, expected 'logits' or 'probabilities'.")


def knee_counts(logits_AV: Tensor, head_AW: Tensor, *, k_min: int, k_max: int, on: Curve) -> Tensor:
    """`kneedle_k` of rows whose largest W = min(k_max, V) logits are sorted already, `head_AW`; all in memory."""
    # Passes over the whole vocabulary are what this costs, so that masks are made only where something is masked.
    point_AV = logits_AV != -math.inf if has_masked(logits_AV) else None
    points_A = torch.full_like(logits_AV[:, :1], logits_AV.shape[1], dtype=torch.int64)
    if point_AV is not None:
        points_A = point_AV.sum(dim=1, keepdim=True)
    if on == "probabilities":
        total_A = logits_AV.logsumexp(dim=1, keepdim=True)
        logits_AV, head_AW = (logits_AV - total_A).exp(), (head_AW - total_A).exp()
    points_AV = logits_AV if point_AV is None else logits_AV.masked_fill(~point_AV, math.inf)
    low_A = points_AV.amin(dim=1, keepdim=True)
    span_A = head_AW[:, :1] - low_A
    kneeless_A = (span_A <= 0) | (points_A < 3)
    span_A, low_A = span_A.masked_fill(kneeless_A, 1), low_A.masked_fill(kneeless_A, 0)
    height_AV = (logits_AV - low_A).div_(span_A)
    if point_AV is not None:
        height_AV.masked_fill_(~point_AV, -math.inf)
    head_AW = (head_AW - low_A) / span_A

    best_A, first_A = _corner(head_AW, points_A).min(dim=1)
    k_A = first_A + 1
    if head_AW.shape[1] < height_AV.shape[1]:
        unsure_A = torch.ones_like(k_A, dtype=torch.bool)
        if height_AV.shape[1] > SORTED_WHOLE:
            beaten_A, unsure_A = _tail(height_AV, points_A, best_A, head_AW[:, -1], k_max)
            k_A = k_A.masked_fill(beaten_A, k_max)
        unsure_A = unsure_A & ~kneeless_A[:, 0]
        if unsure_A.any():
            sorted_AV = height_AV[unsure_A].sort(dim=1, descending=True).values
            k_A[unsure_A] = _corner(sorted_AV, points_A[unsure_A]).argmin(dim=1) + 1
    return k_A.masked_fill(kneeless_A[:, 0], k_min).clamp(k_min, k_max)


def _corner(sorted_AW: Tensor, points_A: Tensor) -> Tensor:
    """Rank plus height, both on [0, 1]: smallest where the curve is furthest below its chord; inf past the points."""
    rank_W = torch.arange(sorted_AW.shape[1], device=sorted_AW.device)
    corner_AW = rank_W / (points_A - 1).clamp(min=1).to(sorted_AW.dtype) + sorted_AW
    return corner_AW.masked_fill(rank_W >= points_A, math.inf)


def _tail(height_AV: Tensor, points_A: Tensor, best_A: Tensor, edge_A: Tensor, k_max: int) -> tuple[Tensor, Tensor]:
    """Whether a point of rank k_max or more surely has a smaller `_corner` than `best_A`; whether that is unsure.

    In a bin of height [b, b + 1) / BINS the first such point has a known rank and a height between the two bounds;
    none is higher than `edge_A`, the lowest of the head.
    """
    rows = len(height_AV)
    bin_AV = (height_AV * BINS).nan_to_num_(0, 0, 0).clamp_(0, BINS - 1).int()
    if has_masked(height_AV):
        # They fall into a bin of their own, which is dropped.
        bin_AV.masked_fill_(height_AV == -math.inf, BINS)
    bin_AV += (BINS + 1) * torch.arange(rows, device=bin_AV.device, dtype=torch.int32)[:, None]
    counts = torch.bincount(bin_AV.flatten(), minlength=rows * (BINS + 1)).view(rows, BINS + 1)[:, :BINS]
    upto = counts.flip(1).cumsum(1).flip(1)
    rank = (upto - counts).clamp(min=k_max)
    absent = rank >= upto
    lower = torch.arange(BINS, device=counts.device) / torch.tensor(BINS, dtype=height_AV.dtype, device=counts.device)
    share = rank / (points_A - 1).clamp(min=1).to(height_AV.dtype)
    least_A = (share + lower).masked_fill(absent, math.inf).amin(dim=1)
    most_A = (share + torch.minimum(lower + 1 / BINS, edge_A[:, None])).masked_fill(absent, math.inf).amin(dim=1)
    beaten_A = most_A < best_A - MARGIN
    return beaten_A, ~beaten_A & ~(least_A > best_A + MARGIN)
