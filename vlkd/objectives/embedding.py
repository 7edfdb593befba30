"""Embeddings compared one by one, and the normalisation that every objective shares."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from vlkd.errors import UserError

SHORTEST = 1e-6
"""Vectors shorter than this are divided by it, not by their length, so that the gradient at zero stays bounded."""


def unit(vectors_BD: Tensor) -> Tensor:
    """The vectors divided by their L2 length, (B, D), in float32 (float64 stays float64); zero stays zero."""
    return F.normalize(vectors_BD.to(torch.promote_types(vectors_BD.dtype, torch.float32)), dim=-1, eps=SHORTEST)


def cosines(left_BD: Tensor, right_CD: Tensor) -> Tensor:
    """All cosines between two sets of vectors, (B, C), in float32 or float64 also inside autocast.

    Raises:
        UserError: The inputs are not two matrices of one width with at least one row.
    """
    matrices = left_BD.ndim == 2 and right_CD.ndim == 2
    if not matrices or left_BD.shape[1] != right_CD.shape[1] or 0 in (len(left_BD), len(right_CD)):
        raise UserError(
            f"Embeddings of shapes {tuple(left_BD.shape)} and {tuple(right_CD.shape)} cannot be compared: expected two "
            "matrices of one width with at least one row; project one side to the width of the other."
        )
    # Autocast would run the product in half precision, where a scale of 100 turns rounding into whole logits.
    with torch.autocast(left_BD.device.type, enabled=False):
        left, right = unit(left_BD), unit(right_CD)
        wide = torch.promote_types(left.dtype, right.dtype)
        return left.to(wide) @ right.to(wide).T


def check_paired(left_BD: Tensor, right_BD: Tensor, objective: str, roles: tuple[str, str]) -> None:
    """Raise `UserError` unless both are (B, D) of one shape: anything else would broadcast to a plausible number."""
    if left_BD.ndim != 2 or left_BD.shape != right_BD.shape:
        raise UserError(
            f"{objective}: the {roles[0]} embeddings are {tuple(left_BD.shape)} and the {roles[1]} embeddings "
            f"{tuple(right_BD.shape)}; expected one shape (B, D): pair the rows and project to one width."
        )


def embedding_mse(student_BD: Tensor, teacher_BD: Tensor) -> Tensor:
    r"""Squared distance of the normalised embeddings, summed over D: (B,), between 0 and 4.

    .. math:: \ell_b = \lVert \hat s_b - \hat t_b \rVert_2^2 = 2 - 2\cos(s_b, t_b), \quad \hat x = x / \lVert x \rVert_2

    Feature distillation (FD) of CLIP-KD (Yang et al., CVPR 2024, arXiv:2307.12732, section 3.2), one modality; the
    caller adds image and text. The paper's sum over D is used here. The authors' public code instead averages over B
    *and* D and multiplies by 2000, so its loss at width D is 2000 / D of this one (3.9 at D = 512): a weight carried
    over from there must be divided by D.

    Equal to twice `embedding_cosine`, gradient included, wherever no vector vanishes; it is kept beside it because
    methods are described by either name. The teacher must be of the student's width: project the student first.

    Args:
        student_BD: s, the student's embeddings, (B, D).
        teacher_BD: t, the teacher's embeddings of the same inputs, (B, D); constant.

    Raises:
        UserError: The shapes differ.
    """
    check_paired(student_BD, teacher_BD, "embedding_mse", ("student", "teacher"))
    return (unit(student_BD) - unit(teacher_BD.detach())).square().sum(dim=-1)


def embedding_cosine(student_BD: Tensor, teacher_BD: Tensor) -> Tensor:
    r"""One minus the cosine of student and teacher: (B,), between 0 and 2.

    .. math:: \ell_b = 1 - \cos(s_b, t_b)

    The cosine matching of feature-agglomeration methods (e.g. AM-RADIO, Ranzinger et al., CVPR 2024, arXiv:2312.06709,
    which mixes it with a smooth L1 on tokens). Half of `embedding_mse`.

    Args:
        student_BD: s, the student's embeddings, (B, D).
        teacher_BD: t, the teacher's embeddings of the same inputs, (B, D); constant.

    Raises:
        UserError: The shapes differ.
    """
    check_paired(student_BD, teacher_BD, "embedding_cosine", ("student", "teacher"))
    return 1 - (unit(student_BD) * unit(teacher_BD.detach())).sum(dim=-1)
