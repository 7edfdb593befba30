"""Rows of logits worked through a few at a time, so that a loss needs little memory beside the logits themselves.

Letters: A answer tokens, all answer positions of the batch in one list; V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from vlkd.errors import UserError

RowLoss = Callable[..., Tensor]
"""The student's rows and as many rows of each constant to one value per row."""


def by_chunks(loss: RowLoss, student_AX: Tensor, *constants: Tensor, chunk: int) -> Tensor:
    """`loss(student_AX, *constants)`, at most `chunk` rows at a time, forward and backward: (A,).

    Between the passes nothing is kept but the inputs: backward computes each chunk again and writes its gradient in
    place. Slices of `student_AX` inside a graph would each cost a gradient of the whole shape. Differentiable once,
    and towards the student alone.

    Args:
        loss: must treat every row by itself.
        student_AX: first axis A.
        constants: tensors with the same first axis, handed over detached.
        chunk: rows at a time, at least 1.
    """
    detached = (constant.detach() for constant in constants)
    return cast(Tensor, _ByChunks.apply(loss, chunk, student_AX, *detached))  # type: ignore[no-untyped-call]


class _ByChunks(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, loss: RowLoss, chunk: int, student_AX: Tensor, *constants: Tensor) -> Tensor:
        ctx.save_for_backward(student_AX, *constants)
        ctx.loss, ctx.chunk = loss, chunk
        inputs = (student_AX, *constants)
        return torch.cat([loss(*(tensor[rows] for tensor in inputs)) for rows in row_slices(len(student_AX), chunk)])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient_A: Tensor) -> tuple[Tensor | None, ...]:
        student_AX, *constants = ctx.saved_tensors
        gradient_AX = torch.empty_like(student_AX)
        for rows in row_slices(len(student_AX), ctx.chunk):
            part = student_AX[rows].detach().requires_grad_()
            with torch.enable_grad():
                value = ctx.loss(part, *(constant[rows] for constant in constants))
            (gradient_AX[rows],) = torch.autograd.grad(value, part, gradient_A[rows])
        return None, None, gradient_AX, *(None for _ in constants)


def row_slices(count: int, chunk: int) -> Iterator[slice]:
    """Slices that cover `count` rows in order; one empty slice where there are none."""
    return (slice(start, start + chunk) for start in range(0, max(count, 1), chunk))


def wide(logits: Tensor) -> Tensor:
    """In float32, under autocast, too; float64 stays float64."""
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def shared_vocabulary(teacher_AV: Tensor, student_AV: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Both in `wide`, with -inf wherever either has -inf, and the mask of those entries, (A, V).

    An entry that one model can never say belongs to neither distribution: a KL would be infinite there, or blind.
    """
    masked_AV = (teacher_AV == -math.inf) | (student_AV == -math.inf)
    teacher_AV, student_AV = (wide(logits).masked_fill(masked_AV, -math.inf) for logits in (teacher_AV, student_AV))
    return teacher_AV, student_AV, masked_AV


def has_masked(logits_AV: Tensor) -> bool:
    """Whether an entry is -inf; rows with NaN are not looked at, as nothing can be said of them anyway."""
    return bool(logits_AV.amin(dim=1).isneginf().any())


def check_logits(teacher_AV: Tensor, student_AV: Tensor, objective: str) -> None:
    """Raise `UserError` unless both are (A, V) of one shape with V of at least 2: anything else would broadcast."""
    if teacher_AV.ndim != 2 or teacher_AV.shape != student_AV.shape or teacher_AV.shape[1] < 2:
        raise UserError(
            f"{objective}: the teacher's logits are {tuple(teacher_AV.shape)} and the student's "
            f"{tuple(student_AV.shape)}; expected one shape (A, V) of two or more tokens: take the same answer "
            "positions of both and slice both to the shared vocabulary."
        )


def check_tau(tau: float, objective: str) -> None:
    """Raise `UserError` unless tau is a number above 0."""
    if not 0 < tau < math.inf:
        raise UserError(f"{objective}: found the temperature tau {tau}, expected a number above 0.")


def check_chunk(chunk: int, objective: str) -> None:
    """Raise `UserError` unless a chunk holds a row."""
    if chunk < 1:
        raise UserError(f"{objective}: found a chunk of {chunk} positions, expected at least 1.")
