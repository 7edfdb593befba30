"""Visual tokens of two vision-language models: matched one by one, or by how the tokens of an image relate."""

from __future__ import annotations

import torch
from torch import Tensor

from vlkd.errors import UserError
from vlkd.objectives.chunks import wide
from vlkd.objectives.embedding import unit


def relation_loss(teacher_tokens_BNC: Tensor, student_tokens_BNC: Tensor) -> Tensor:
    r"""One minus the cosine of the two self-correlation matrices of an image's visual tokens: (B,), between 0 and 1.

    .. math::
        \ell_b = 1 - \frac{\langle R^s_b, R^t_b \rangle}{\lVert R^s_b \rVert\, \lVert R^t_b \rVert}, \quad
        R_{ij} = \cos(x_i, x_j)

    Relation distillation in the manner of LLaVA-KD (Cai et al., ICCV 2025, arXiv:2410.16236), whose training code is
    not public. One minus the cosine of the flattened matrices of products x_i . x_j of the visual positions' outputs
    is its form as others have rebuilt it. Ours: cosines instead of products, because a few long tokens would make up
    the whole matrix; and one value per image. It is then one minus the linear CKA of the unit tokens, not centred,
    and the widths of the two models need not agree. Which tokens (the tower's, the projector's, the language
    model's hidden states or logits at visual positions) is the caller's choice. Zero exactly when all cosines agree;
    a rotation or a scaling of the student's tokens changes nothing.

    Args:
        teacher_tokens_BNC: the teacher's tokens, (B, N, C); constant.
        student_tokens_BNC: the student's tokens of the same places in the same order, (B, N, C') of any width.

    Raises:
        UserError: the two differ in images or tokens.
    """
    teacher, student = teacher_tokens_BNC, student_tokens_BNC
    if teacher.ndim != 3 or student.ndim != 3 or teacher.shape[:2] != student.shape[:2]:
        raise UserError(
            f"relation_loss: the teacher's tokens are {tuple(teacher.shape)} and the student's "
            f"{tuple(student.shape)}; expected (B, N, C) and (B, N, C') with equally many tokens per image."
        )
    # Autocast would run the products in half precision.
    with torch.autocast(student.device.type, enabled=False):
        teacher_BNC, student_BNC = unit(teacher.detach()), unit(student)
        relations = [(tokens @ tokens.transpose(1, 2)).flatten(1) for tokens in (teacher_BNC, student_BNC)]
        return 1 - (unit(relations[0]) * unit(relations[1])).sum(dim=1)


def visual_feature_matching(student_BNC: Tensor, teacher_BNC: Tensor) -> Tensor:
    r"""Mean squared difference of visual tokens over tokens and channels: (B,).

    .. math:: \ell_b = \frac{1}{N C} \sum_{n, c} (s_{bnc} - t_{bnc})^2

    Squared differences and not cosines: a projector reads the length of a token, too, and the teacher's must be able
    to read the student's tokens if they are to be switched. The value is in the teacher's own units, so its weight
    must be chosen anew for another teacher or layer.

    Args:
        student_BNC: s, the student's tokens, (B, N, C).
        teacher_BNC: t, the teacher's tokens of the same places, (B, N, C); constant.

    Raises:
        UserError: the shapes differ.
    """
    if student_BNC.ndim != 3 or student_BNC.shape != teacher_BNC.shape:
        raise UserError(
            f"visual_feature_matching: the student's tokens are {tuple(student_BNC.shape)} and the teacher's "
            f"{tuple(teacher_BNC.shape)}; expected one shape (B, N, C): compare where token count and width agree."
        )
    return (wide(student_BNC) - wide(teacher_BNC.detach())).square().mean(dim=(1, 2))
