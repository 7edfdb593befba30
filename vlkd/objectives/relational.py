"""Relations between the members of a batch, matched instead of the embeddings themselves.

The widths of student and teacher need not agree, so no projection is trained beside the student.
"""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

from vlkd.errors import UserError
from vlkd.objectives.embedding import check_paired, cosines


def relational_kl(
    student_image_BD: Tensor,
    student_text_BD: Tensor,
    teacher_image_BD: Tensor,
    teacher_text_BD: Tensor,
    student_scale: Tensor | float,
    teacher_scale: Tensor | float,
) -> Tensor:
    r"""KL between the teacher's and the student's image-text softmax over the batch, mean of both directions: ().

    .. math::
        L = \tfrac12 \big(K(T, S) + K(T^\top, S^\top)\big), \quad
        K(T, S) = \tfrac1B \sum_i \mathrm{KL}\big(\mathrm{softmax}(T_i) \,\Vert\, \mathrm{softmax}(S_i)\big),
        \quad S_{ij} = s \cos(v_i, w_j), \quad T_{ij} = s' \cos(v'_i, w'_j)

    Contrastive relational distillation (CRD) of CLIP-KD (Yang et al., CVPR 2024, arXiv:2307.12732, section 3.2); the
    authors' public code takes the same mean of directions, but on one process it uses names before they are defined.
    `open_clip.loss.DistillClipLoss` is the same up to a constant: it is the cross entropy, which leaves out the
    teacher's entropy. Zero exactly when the distributions agree, so it says nothing about where the embeddings lie;
    `embedding_mse` does. With a batch of one both distributions are certain and the loss is zero.

    Args:
        student_image_BD: v, the student's image embeddings, (B, D).
        student_text_BD: w, the student's text embeddings, row i belonging to image i, (B, D).
        teacher_image_BD: v', the teacher's image embeddings, (B, D') of any width; constant.
        teacher_text_BD: w', the teacher's text embeddings, (B, D'); constant.
        student_scale: s > 0, the factor on the student's cosines, already exponentiated, ().
        teacher_scale: s' > 0, the factor on the teacher's cosines, already exponentiated, (); constant.

    Raises:
        UserError: Image and text differ in shape, or student and teacher in batch size.
    """
    check_paired(student_image_BD, student_text_BD, "relational_kl", ("student's image", "student's text"))
    check_paired(teacher_image_BD, teacher_text_BD, "relational_kl", ("teacher's image", "teacher's text"))
    _check_batch(student_image_BD, teacher_image_BD, "relational_kl")
    student_BB = student_scale * cosines(student_image_BD, student_text_BD)
    teacher_BB = (teacher_scale * cosines(teacher_image_BD, teacher_text_BD)).detach()
    return (_row_kl(teacher_BB, student_BB) + _row_kl(teacher_BB.T, student_BB.T)) / 2


def neighbour_kl(
    student_BD: Tensor, teacher_BD: Tensor, student_scale: Tensor | float, teacher_scale: Tensor | float
) -> Tensor:
    r"""KL between the teacher's and the student's softmax over each member's neighbours in one modality: ().

    .. math::
        L = \tfrac1B \sum_i \mathrm{KL}\big(\mathrm{softmax}_{j \ne i}(s' \cos(t_i, t_j)) \,\Vert\,
        \mathrm{softmax}_{j \ne i}(s \cos(x_i, x_j))\big)

    Needs no caption, so unlabelled images take part. It is similarity-distribution distillation in the style of
    CompRess (Abbasi Koohpayegani et al., 2020, arXiv:2010.14713) and SEED (Fang et al., 2021, arXiv:2101.04731), and
    relational in the sense of RKD (Park et al., 2019, arXiv:1904.05068). None of the three is reproduced: CompRess and
    SEED compare with a queue of past embeddings and RKD matches distances and angles; here the candidates are the rest
    of the batch. A member is no neighbour of itself: its cosine of one would take most of a sharp softmax and hide the
    rest. With fewer than three members there is nothing to distribute and the loss is zero.

    Args:
        student_BD: x, the student's embeddings of one modality, (B, D).
        teacher_BD: t, the teacher's embeddings of the same inputs, (B, D') of any width; constant.
        student_scale: s > 0, the factor on the student's cosines, ().
        teacher_scale: s' > 0, the factor on the teacher's cosines, (); constant. Cosines within a modality are much
            higher than across, so a scale learned across modalities may be too sharp here.

    Raises:
        UserError: The batch sizes differ.
    """
    _check_batch(student_BD, teacher_BD, "neighbour_kl")
    student_BB = student_scale * cosines(student_BD, student_BD)
    teacher_BB = (teacher_scale * cosines(teacher_BD, teacher_BD)).detach()
    return _row_kl(_without_diagonal(teacher_BB), _without_diagonal(student_BB))


def _row_kl(teacher_logits_BK: Tensor, student_logits_BK: Tensor) -> Tensor:
    """KL(softmax of the teacher's row || softmax of the student's row), averaged over rows."""
    return F.kl_div(
        student_logits_BK.log_softmax(dim=1),
        teacher_logits_BK.log_softmax(dim=1),
        reduction="batchmean",
        log_target=True,
    )


def _without_diagonal(square_BB: Tensor) -> Tensor:
    """The entries off the diagonal, in order: (B, B - 1)."""
    size = len(square_BB)
    # Dropping, not masking with -inf: zero times infinity would make the KL NaN.
    return square_BB.flatten()[1:].view(size - 1, size + 1)[:, :-1].reshape(size, size - 1)


def _check_batch(student_BD: Tensor, teacher_BD: Tensor, objective: str) -> None:
    if student_BD.ndim != 2 or len(student_BD) != len(teacher_BD):
        raise UserError(
            f"{objective}: the student's embeddings are {tuple(student_BD.shape)} and the teacher's "
            f"{tuple(teacher_BD.shape)}; expected matrices with equally many rows, one per input."
        )
