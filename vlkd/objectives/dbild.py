r"""Differences between the logits that stand out, matched in both directions (BiLD and its dynamic form, DBiLD).

Letters: A answer tokens, V vocabulary, W the widest k of the batch.
"""

from __future__ import annotations

import math
from functools import partial
from typing import Literal

import torch
from torch import Tensor

from vlkd.errors import UserError
from vlkd.objectives.chunks import (
    by_chunks,
    check_chunk,
    check_logits,
    check_tau,
    has_masked,
    row_slices,
    shared_vocabulary,
    wide,
)
from vlkd.objectives.kneedle import Curve, check_knee, knee_counts
from vlkd.objectives.pair_softmax import pair_kl

Pairs = Literal["upper", "rows"]


def dbild(
    teacher_AV: Tensor,
    student_AV: Tensor,
    *,
    tau: float = 3.0,
    k_min: int = 2,
    k_max: int = 256,
    k: int | None = None,
    reverse: bool = True,
    pairs: Pairs = "upper",
    on: Curve = "logits",
    chunk: int = 64,
) -> Tensor:
    r"""Dynamic bi-directional logits difference: (A,).

    .. math::
        \ell_a = \mathrm{KL}\big(p(s; I^t) \Vert p(t; I^t)\big) + \mathrm{KL}\big(p(s; I^s) \Vert p(t; I^s)\big), \quad
        p(z; I) = \mathrm{softmax}_{i < j}\big((z_{I_i} - z_{I_j}) / \tau\big)

    I^t holds the teacher's k^t largest logits in falling order, I^s the student's k^s, each k by `kneedle_k` of its
    own row; the softmax runs over all k (k - 1) / 2 pairs at once. Switch-KD (Sun et al., 2026, arXiv:2604.14629,
    equations 7 to 15), where the first argument is z^T and the second z^S, or z^switch. The gradient flows through
    the student's values in both branches, never through the choice of I. As there, no factor tau^2. Pairs are summed
    without being made (`pair_softmax`), since the knees of real logits leave thousands of them.

    A branch at k = 2 has one pair, whose softmax is 1: it teaches nothing, and a position where both sides have k = 2
    has value and gradient 0. `k_min` of 3 or more keeps every position in the loss; what the paper takes is not known.

    With `k=8, reverse=False` it is BiLD (Li et al., COLING 2025, arXiv:2406.13555, by its public code). Blind to a
    shift of either side's row, and to all that neither names among its largest.

    Ours: `k_max`, which the paper's text as we have it does not give; the row-wise variant, a softmax over j > i for
    each i < k, averaged over these k - 1 rows; and masked vocabulary, where an entry that is -inf on either side is
    left out on both. A position with fewer than two entries left has no pair and the value 0. Kneedle's k is lowered
    to the beginning of a run of equal logits that goes on past it: which of them come first says nothing. Stored
    answers end in such a run, so that their k is at most the number of tokens stored.

    Args:
        teacher_AV: t, the teacher's logits, (A, V); constant.
        student_AV: s, the student's logits of the same positions, or those of the switch path, (A, V).
        tau: the temperature of the differences, above 0; the paper's and BiLD's is 3.
        k_min: the smallest k, at least 2.
        k_max: the largest k. Time and memory grow with it at most, not with the pairs.
        k: one k for every position and side instead of Kneedle's; k_min, k_max and on have no effect then.
        reverse: KL(student || teacher), as Switch-KD; otherwise KL(teacher || student), as BiLD.
        pairs: "upper", one softmax over all pairs, or "rows", one for each i.
        on: the curve whose knee is sought, see `kneedle_k`.
        chunk: positions at a time, in backward, too; some 30 bytes times chunk times V are in memory for them.

    Raises:
        UserError: the shapes differ, the vocabulary is smaller than k or k_min, tau is not above 0, or a bound or
            option is wrong.
    """
    check_logits(teacher_AV, student_AV, "dbild")
    check_tau(tau, "dbild")
    check_chunk(chunk, "dbild")
    if k is not None:
        k_min = k_max = k
    check_knee(k_min, k_max, on, "dbild")
    vocabulary = teacher_AV.shape[1]
    if k_min > vocabulary:
        raise UserError(f"dbild: found k of {k_min} or more for a vocabulary of {vocabulary}; lower it to that.")
    if pairs not in ("upper", "rows"):
        raise UserError(f"dbild: found pairs={pairs!r}, expected 'upper' or 'rows'.")

    parts = []
    with torch.no_grad():
        for rows in row_slices(len(teacher_AV), chunk):
            both = [wide(logits[rows]) for logits in (teacher_AV, student_AV)]
            if any(map(has_masked, both)):
                both = list(shared_vocabulary(*both)[:2])
            leads = [_lead(logits, k_min, k_max, on) for logits in both]
            parts.append([torch.stack(part, dim=1) for part in zip(*leads, strict=True)])
        index_A2W, k_A2 = (torch.cat(part) for part in zip(*parts, strict=True))
        width = max(2, int(k_A2.max())) if len(k_A2) else 2
        index_A2W = index_A2W[:, :, :width].contiguous()
    # One gather for both branches: its backward is the only thing as large as the logits.
    values = [logits.gather(1, index_A2W.flatten(1)).view_as(index_A2W) for logits in (teacher_AV.detach(), student_AV)]
    loss = partial(_both_branches, tau=tau, reverse=reverse, flat=pairs == "upper")
    return by_chunks(loss, values[1], values[0], k_A2, chunk=chunk)


def _lead(logits_AV: Tensor, k_min: int, k_max: int, on: Curve) -> tuple[Tensor, Tensor]:
    """The entries with the largest logits, (A, W), and how many of them count, (A,); -inf never counts."""
    width = min(k_max, logits_AV.shape[1])
    values_AW, index_AW = logits_AV.topk(min(width + 1, logits_AV.shape[1]), dim=1)
    if k_min < k_max:
        k_A = knee_counts(logits_AV, values_AW[:, :width], k_min=k_min, k_max=k_max, on=on)
        k_A = _before_ties(values_AW, k_A, k_min)
    else:
        k_A = index_AW.new_full((len(logits_AV),), k_max)
    return index_AW[:, :width], torch.minimum(k_A, (values_AW != -math.inf).sum(dim=1))


def _before_ties(falling_AW: Tensor, k_A: Tensor, k_min: int) -> Tensor:
    """k, or how many entries are larger than the first one left out, where these are k_min or more: (A,)."""
    last = falling_AW.shape[1] - 1
    larger_A = (falling_AW > falling_AW.gather(1, k_A[:, None].clamp(max=last))).sum(dim=1)
    return torch.where((k_A <= last) & (larger_A >= k_min), larger_A, k_A)


def _both_branches(
    student_A2W: Tensor, teacher_A2W: Tensor, k_A2: Tensor, *, tau: float, reverse: bool, flat: bool
) -> Tensor:
    """The sum of the teacher-led and the student-led KL: (A,)."""
    valid_A2W = torch.arange(student_A2W.shape[2], device=k_A2.device) < k_A2[:, :, None]
    student, teacher = (values.double() / tau for values in (student_A2W, teacher_A2W))
    left, right = (student, teacher) if reverse else (teacher, student)
    return pair_kl(left, right, valid_A2W, flat=flat).sum(dim=1).to(wide(student_A2W[:0]).dtype)
