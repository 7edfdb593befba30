"""Contrastive objectives: every embedding finds its partner among the batch's embeddings of the other modality."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from vlkd.errors import UserError
from vlkd.objectives.embedding import check_paired, cosines


def info_nce(image_BD: Tensor, text_BD: Tensor, logit_scale: Tensor | float, *, match: Tensor | None = None) -> Tensor:
    r"""Symmetric cross entropy over the pairs of a batch: (), the loss of CLIP.

    .. math::
        L = \tfrac12 \big(H(Y, S) + H(Y^\top, S^\top)\big), \quad S_{ij} = s \cos(v_i, w_j), \quad
        H(Y, S) = -\tfrac1B \sum_{i,j} \frac{Y_{ij}}{\sum_k Y_{ik}} \log\mathrm{softmax}(S_i)_j

    CLIP (Radford et al., 2021, arXiv:2103.00020, figure 3) has Y = identity. Batches of real captions repeat: two
    photos share the sentence "a man riding a wave", or one image comes with two of its captions, and then the identity
    punishes a right answer. `match` marks such pairs as positives too, and the target is spread evenly over the
    positives of a row: equation 2 (L_out) of SupCon (Khosla et al., 2020, arXiv:2004.11362) across two modalities,
    which is the loss of UniCL (Yang et al., 2022, arXiv:2204.03610).

    Without `match`, or with the identity, it equals `open_clip.loss.ClipLoss` on normalised features. `siglip` judges
    each pair on its own instead; `interactive_contrastive` takes the other modality from the teacher.

    Args:
        image_BD: v, image embeddings, (B, D).
        text_BD: w, text embeddings, row i belonging to image i, (B, D).
        logit_scale: s > 0, the factor on cosines (1 / tau, already exponentiated), ().
        match: Y, (B, B) bool, true where image i and text j belong together; the diagonal counts as true.

    Raises:
        UserError: The embeddings differ in shape, or `match` is not a (B, B) bool tensor.
    """
    check_paired(image_BD, text_BD, "info_nce", ("image", "text"))
    logits_BB = logit_scale * cosines(image_BD, text_BD)
    positives = _positives(logits_BB, match)
    return (_cross_entropy(logits_BB, positives) + _cross_entropy(logits_BB.T, positives.T)) / 2


def siglip(
    image_BD: Tensor,
    text_BD: Tensor,
    logit_scale: Tensor | float,
    logit_bias: Tensor | float,
    *,
    match: Tensor | None = None,
) -> Tensor:
    r"""Binary cross entropy of each image-text pair of a batch, summed over texts, averaged over images: ().

    .. math:: L = -\tfrac1B \sum_{i,j} \log\sigma\big(z_{ij}\,(s\cos(v_i, w_j) + b)\big), \quad z_{ij} = 2 Y_{ij} - 1

    SigLIP (Zhai et al., ICCV 2023, arXiv:2303.15343, section 3.2). Equals `open_clip.loss.SigLipLoss` on normalised
    features when Y is the identity. The paper knows one positive per row; further positives through `match` simply
    change the sign of their pair. The paper starts at s = 10, b = -10: with b = 0 the B - 1 negatives of each row
    dominate the first steps.

    Args:
        image_BD: v, image embeddings, (B, D).
        text_BD: w, text embeddings, row i belonging to image i, (B, D).
        logit_scale: s > 0, the factor on cosines, already exponentiated, ().
        logit_bias: b, added to the scaled cosines, ().
        match: Y, (B, B) bool, true where image i and text j belong together; the diagonal counts as true.

    Raises:
        UserError: The embeddings differ in shape, or `match` is not a (B, B) bool tensor.
    """
    check_paired(image_BD, text_BD, "siglip", ("image", "text"))
    logits_BB = logit_scale * cosines(image_BD, text_BD) + logit_bias
    sign_BB = _positives(logits_BB, match).to(logits_BB.dtype) * 2 - 1
    return -F.logsigmoid(sign_BB * logits_BB).sum() / len(logits_BB)


def interactive_contrastive(
    student_BD: Tensor, teacher_BD: Tensor, logit_scale: Tensor | float, *, match: Tensor | None = None
) -> Tensor:
    r"""The student's embeddings of one modality find their partners among the teacher's of the other: ().

    .. math:: L = -\tfrac1B \sum_{i,j} \frac{Y_{ij}}{\sum_k Y_{ik}} \log\mathrm{softmax}(S_i)_j, \quad
        S_{ij} = s \cos(x_i, t_j)

    Interactive contrastive learning (ICL) of CLIP-KD (Yang et al., CVPR 2024, arXiv:2307.12732, section 3.2). Only the
    direction student anchor -> teacher candidates is taken, as in the paper; a method calls it twice, once with student
    images against teacher texts, once with student texts against teacher images, and adds the parts. With the student's
    own embeddings as candidates the two parts would be the halves of `info_nce`.

    The authors' public code averages the two parts, and multiplies the cosines by a trainable *logarithm* of the scale
    that is never exponentiated (2.66 at the start, where the student's own scale is 14.3). Here the scale is whatever
    the caller passes, exponentiated.

    Args:
        student_BD: x, the student's embeddings of one modality, projected to the teacher's width if need be, (B, D).
        teacher_BD: t, the teacher's embeddings of the other modality, row i belonging to row i, (B, D); constant.
        logit_scale: s > 0, the factor on cosines, already exponentiated, ().
        match: Y, (B, B) bool, true where rows i and j belong together; the diagonal counts as true.

    Raises:
        UserError: The embeddings differ in shape, or `match` is not a (B, B) bool tensor.
    """
    check_paired(student_BD, teacher_BD, "interactive_contrastive", ("student", "teacher"))
    logits_BB = logit_scale * cosines(student_BD, teacher_BD.detach())
    return _cross_entropy(logits_BB, _positives(logits_BB, match))


def _positives(logits_BB: Tensor, match: Tensor | None) -> Tensor:
    """Which pairs belong together, (B, B) bool, the diagonal always among them."""
    identity = torch.eye(len(logits_BB), dtype=torch.bool, device=logits_BB.device)
    if match is None:
        return identity
    if match.shape != logits_BB.shape or match.dtype != torch.bool:
        raise UserError(
            f"match is {tuple(match.shape)} of {match.dtype}; expected {tuple(logits_BB.shape)} of torch.bool, true "
            "where two rows of the batch belong together."
        )
    return match | identity


def _cross_entropy(logits_BB: Tensor, positives_BB: Tensor) -> Tensor:
    """Cross entropy of each row's softmax against the even distribution over its positives, averaged over rows."""
    target_BB = positives_BB.to(logits_BB.dtype)
    return F.cross_entropy(logits_BB, target_BB / target_BB.sum(dim=1, keepdim=True))
