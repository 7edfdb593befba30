"""Matching of a teacher's distribution over class vectors: the embeddings of a set of captions, or of images."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

from vlkd.errors import UserError
from vlkd.objectives.embedding import cosines


def class_kl(
    student_BD: Tensor, teacher_BD: Tensor, classes_KD: Tensor, teacher_scale: Tensor | float, *, tau: float = 1.0
) -> Tensor:
    r"""KL between the teacher's and the student's softmax over K class vectors of the teacher: (B,).

    .. math::
        L_i = \tau^2\, \mathrm{KL}\Big(\mathrm{softmax}\big(\tfrac{s}{\tau} \cos(t_i, W)\big) \,\Big\Vert\,
        \mathrm{softmax}\big(\tfrac{s}{\tau} \cos(x_i, W)\big)\Big)

    x is the student's embedding in the teacher's space. For images, W are the teacher's text vectors; for captions its
    image vectors. Because the targets are soft, several rows of W may be right for one input (further captions of the
    same image); equal strings must be one row, or they would count twice.

    AMMKD (Li et al., 2025, arXiv:2509.00039) matches the two distributions over stored text features, its "class
    vectors", with KL; its abstract is all that could be read. The form is PromptKD's (Li et al., CVPR 2024,
    arXiv:2403.02781, section 3.3), whose public code divides by B K where we take the mean over B. The factor tau^2
    keeps the size of gradients over tau (Hinton et al., 2015, arXiv:1503.02531, section 2). `relational_kl` compares
    the student with itself in both modalities; here the student stands in the teacher's own space. Zero exactly when
    the distributions agree; with K = 1 it is always zero.

    Args:
        student_BD: x, the student's embeddings, projected to the teacher's width if need be, (B, D).
        teacher_BD: t, the teacher's embeddings of the same inputs, (B, D); constant.
        classes_KD: W, the teacher's vectors of the other modality, none twice, (K, D); constant.
        teacher_scale: s > 0, the teacher's factor on cosines, already exponentiated, (); constant.
        tau: the temperature, above 0.

    Raises:
        UserError: the shapes do not fit, or tau is not above 0.
    """
    if student_BD.shape != teacher_BD.shape or classes_KD.ndim != 2 or classes_KD.shape[-1] != student_BD.shape[-1]:
        raise UserError(
            f"class_kl: the student's embeddings are {tuple(student_BD.shape)}, the teacher's "
            f"{tuple(teacher_BD.shape)}, the class vectors {tuple(classes_KD.shape)}; expected (B, D), (B, D), (K, D)."
        )
    if not tau > 0:
        raise UserError(f"class_kl: found the temperature {tau}, expected more than 0.")
    student_BK = teacher_scale / tau * cosines(student_BD, classes_KD.detach())
    teacher_BK = (teacher_scale / tau * cosines(teacher_BD, classes_KD)).detach()
    divergence_BK = F.kl_div(
        student_BK.log_softmax(dim=1), teacher_BK.log_softmax(dim=1), reduction="none", log_target=True
    )
    return tau**2 * divergence_BK.sum(dim=1)
