r"""Answer tokens: a student's distribution over the vocabulary against a teacher's, position by position.

Letters: A answer tokens, all answer positions of the batch in one list; V vocabulary. Which positions are answers, and
their mean, are the caller's. Beside the logits, every loss takes memory for one chunk of positions, in backward, too
(`vlkd.objectives.chunks`).

An entry that is -inf on either side, as vocabulary masked by hand, is left out of both distributions.
"""

from __future__ import annotations

import math
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional

from vlkd.errors import UserError
from vlkd.objectives.chunks import by_chunks, check_chunk, check_logits, check_tau, shared_vocabulary, wide


def token_cross_entropy(logits_AV: Tensor, targets_A: Tensor, *, chunk: int = 64) -> Tensor:
    r"""Cross entropy of the next-token distribution with the answer's token: (A,).

    .. math:: \ell_a = -\log\mathrm{softmax}(s_a)_{y_a}

    The same number as `cross_entropy`, in memory for one chunk of positions.

    Args:
        logits_AV: s, the student's logits, (A, V).
        targets_A: y, the tokens, int64 in [0, V), (A,).
        chunk: positions at a time.

    Raises:
        UserError: the shapes do not fit, a token lies outside [0, V), or chunk is not above 0.
    """
    check_chunk(chunk, "token_cross_entropy")
    if logits_AV.ndim != 2 or targets_A.shape != logits_AV.shape[:1] or targets_A.dtype != torch.int64:
        raise UserError(
            f"token_cross_entropy: found logits {tuple(logits_AV.shape)} and tokens {tuple(targets_A.shape)} of "
            f"{targets_A.dtype}; expected (A, V) and (A,) of torch.int64."
        )
    if ((targets_A < 0) | (targets_A >= logits_AV.shape[1])).any():
        raise UserError(
            f"token_cross_entropy: the tokens run from {targets_A.min().item()} to {targets_A.max().item()}, expected "
            f"0 to {logits_AV.shape[1] - 1}; take the answer positions alone, and this model's own tokenizer."
        )
    return by_chunks(_token_cross_entropy, logits_AV, targets_A, chunk=chunk)


def token_kl(teacher_AV: Tensor, student_AV: Tensor, *, tau: float, reverse: bool = False, chunk: int = 64) -> Tensor:
    r"""KL between the teacher's and the student's next-token distributions, both at one temperature: (A,).

    .. math:: \ell_a = \tau^2\, \mathrm{KL}\big(\mathrm{softmax}(t_a / \tau) \,\Vert\, \mathrm{softmax}(s_a / \tau)\big)

    and with its arguments exchanged for `reverse`, which seeks the teacher's modes where the forward KL covers all of
    its mass (MiniLLM, Gu et al., 2024, arXiv:2306.08543, which samples from the student; here the positions are the
    data's). tau^2 keeps the size of gradients over tau, as in `distillation_kl`, which is the same number for a list
    of classes. Zero exactly when the distributions agree.

    Args:
        teacher_AV: t, the teacher's logits, (A, V); constant.
        student_AV: s, the student's logits of the same positions, (A, V).
        tau: the temperature, above 0.
        reverse: KL(student || teacher).
        chunk: positions at a time.

    Raises:
        UserError: the shapes differ, or tau or chunk is not above 0.
    """
    check_logits(teacher_AV, student_AV, "token_kl")
    check_tau(tau, "token_kl")
    check_chunk(chunk, "token_kl")
    return by_chunks(partial(_token_kl, tau=tau, reverse=reverse), student_AV, teacher_AV, chunk=chunk)


def taid_target(teacher_AV: Tensor, student_AV: Tensor, t: float) -> Tensor:
    r"""TAID's target between the student and the teacher: (A, V) probabilities, without gradient.

    .. math:: p = \mathrm{softmax}\big((1 - t)\, s + t\, z\big)

    Temporally adaptive interpolated distillation (Shing et al., ICLR 2025, arXiv:2501.16937): t goes from 0.4 to 1
    over training, so that the target is never far from the student. The schedule is the caller's.

    Args:
        teacher_AV: z, the teacher's logits, (A, V).
        student_AV: s, the student's logits, (A, V).
        t: the teacher's share, between 0 and 1.

    Raises:
        UserError: the shapes differ, or t lies outside [0, 1].
    """
    check_logits(teacher_AV, student_AV, "taid_target")
    _check_share(t, "taid_target")
    return _taid_logits(teacher_AV.detach(), student_AV.detach(), t)[0].softmax(dim=1)


def taid_kl(teacher_AV: Tensor, student_AV: Tensor, *, t: float, chunk: int = 64) -> Tensor:
    r"""KL between TAID's interpolated target, a constant, and the student: (A,).

    .. math:: \ell_a = \mathrm{KL}\big(p_a \,\Vert\, \mathrm{softmax}(s_a)\big)

    with p by `taid_target`. At t = 1 the forward `token_kl` at tau = 1, at t = 0 zero. The gradient, softmax(s) - p,
    is that of the authors' cross entropy; its value is less by the target's entropy, so that it is zero at agreement.
    Their adaptive schedule follows the relative change of the cross entropy: with this value it would move otherwise.

    Args:
        teacher_AV: z, the teacher's logits, (A, V); constant.
        student_AV: s, the student's logits of the same positions, (A, V).
        t: the teacher's share, between 0 and 1.
        chunk: positions at a time.

    Raises:
        UserError: the shapes differ, t lies outside [0, 1], or chunk is not above 0.
    """
    check_logits(teacher_AV, student_AV, "taid_kl")
    _check_share(t, "taid_kl")
    check_chunk(chunk, "taid_kl")
    return by_chunks(partial(_taid_kl, t=t), student_AV, teacher_AV, chunk=chunk)


def _token_cross_entropy(logits_AV: Tensor, targets_A: Tensor) -> Tensor:
    return functional.cross_entropy(wide(logits_AV), targets_A, reduction="none")


def _token_kl(student_AV: Tensor, teacher_AV: Tensor, *, tau: float, reverse: bool) -> Tensor:
    teacher_AV, student_AV, masked_AV = shared_vocabulary(teacher_AV, student_AV)
    left, right = (student_AV, teacher_AV) if reverse else (teacher_AV, student_AV)
    return tau**2 * _kl(left / tau, right / tau, masked_AV)


def _taid_logits(teacher_AV: Tensor, student_AV: Tensor, t: float) -> tuple[Tensor, Tensor]:
    """The interpolated logits with -inf at the masked entries, and their mask."""
    masked_AV = (teacher_AV == -math.inf) | (student_AV == -math.inf)
    # Filled before as well: 0 times -inf is NaN at either end of t.
    teacher_AV, student_AV = (wide(logits).masked_fill(masked_AV, 0) for logits in (teacher_AV, student_AV))
    return ((1 - t) * student_AV + t * teacher_AV).masked_fill(masked_AV, -math.inf), masked_AV


def _taid_kl(student_AV: Tensor, teacher_AV: Tensor, *, t: float) -> Tensor:
    target_AV, masked_AV = _taid_logits(teacher_AV, student_AV.detach(), t)
    return _kl(target_AV, wide(student_AV).masked_fill(masked_AV, -math.inf), masked_AV)


def _kl(left_AV: Tensor, right_AV: Tensor, masked_AV: Tensor) -> Tensor:
    """KL(softmax of left || softmax of right) of logits that are -inf at the masked entries, which give zero: (A,)."""
    left_AV, right_AV = left_AV.log_softmax(dim=1), right_AV.log_softmax(dim=1).masked_fill(masked_AV, 0)
    # Entries where the left has no mass at all count nothing either; 0 times inf would be NaN.
    nothing_AV = masked_AV | (left_AV == -math.inf)
    weight_AV = left_AV.exp()
    return (weight_AV * (left_AV.masked_fill(nothing_AV, 0) - right_AV.masked_fill(nothing_AV, 0))).sum(dim=1)


def _check_share(t: float, objective: str) -> None:
    if not 0 <= t <= 1:
        raise UserError(f"{objective}: found the teacher's share t {t}, expected a number between 0 and 1.")
