r"""Contrastive objectives: every embedding finds its partner among the batch's embeddings of the other modality.

Each is a sum over the rows of the batch, the anchors, divided by B. With `rows`, a slice of b of them, an objective
returns the share of these rows and computes b x B logits, never B x B:

.. math:: L = \tfrac1B \sum_{i=1}^{B} \ell_i, \qquad L_{\text{rows}} = \tfrac1B \sum_{i \in \text{rows}} \ell_i,
    \qquad \sum_{\text{parts}} L_{\text{part}} = L

for any partition of the rows into parts of whatever sizes, empty ones included. So W ranks that hold the same gathered
embeddings may each take their own rows: the mean over ranks of W L_part, and of its gradients, is that of L. `match` is
then a pair, the own rows of Y and those of its transpose, each (b, B).
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from vlkd.errors import UserError
from vlkd.objectives.embedding import check_paired, cosines, unit

Match = Tensor | tuple[Tensor, Tensor]
"""Y, (B, B) bool, true where row i of the first and row j of the second input belong together; with `rows`, the pair
(Y[rows], Y.T[rows]), each (b, B). The diagonal of Y counts as true."""


def info_nce(
    image_BD: Tensor,
    text_BD: Tensor,
    logit_scale: Tensor | float,
    *,
    match: Match | None = None,
    rows: slice | None = None,
) -> Tensor:
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
        match: Y, true where image i and text j belong together, or its own rows; see `Match`.
        rows: slice(start, stop) of the batch; the part of the loss whose anchors these images and these texts are.

    Raises:
        UserError: The embeddings differ in shape, `match` is not bool of the shape above, or `rows` leave the batch.
    """
    check_paired(image_BD, text_BD, "info_nce", ("image", "text"))
    to_texts, to_images = _positives(match, rows, image_BD)
    texts_bB = logit_scale * _cosines_of(rows, image_BD, text_BD)
    images_bB = texts_bB.T if rows is None else logit_scale * _cosines_of(rows, text_BD, image_BD)
    return (_cross_entropy(texts_bB, to_texts) + _cross_entropy(images_bB, to_images)) / 2


def siglip(
    image_BD: Tensor,
    text_BD: Tensor,
    logit_scale: Tensor | float,
    logit_bias: Tensor | float,
    *,
    match: Match | None = None,
    rows: slice | None = None,
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
        match: Y, true where image i and text j belong together, or its own rows; see `Match`.
        rows: slice(start, stop) of the batch; the part of the loss that belongs to these images.

    Raises:
        UserError: The embeddings differ in shape, `match` is not bool of the shape above, or `rows` leave the batch.
    """
    check_paired(image_BD, text_BD, "siglip", ("image", "text"))
    positives_bB, _ = _positives(match, rows, image_BD)
    logits_bB = logit_scale * _cosines_of(rows, image_BD, text_BD) + logit_bias
    sign_bB = positives_bB.to(logits_bB.dtype) * 2 - 1
    return -F.logsigmoid(sign_bB * logits_bB).sum() / len(image_BD)


def interactive_contrastive(
    student_BD: Tensor,
    teacher_BD: Tensor,
    logit_scale: Tensor | float,
    *,
    match: Match | None = None,
    rows: slice | None = None,
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
        match: Y, true where rows i and j belong together, or its own rows; see `Match`.
        rows: slice(start, stop) of the batch; the part of the loss whose anchors these rows of the student are.

    Raises:
        UserError: The embeddings differ in shape, `match` is not bool of the shape above, or `rows` leave the batch.
    """
    check_paired(student_BD, teacher_BD, "interactive_contrastive", ("student", "teacher"))
    positives_bB, _ = _positives(match, rows, student_BD)
    return _cross_entropy(logit_scale * _cosines_of(rows, student_BD, teacher_BD.detach()), positives_bB)


def _cosines_of(rows: slice | None, anchors_BD: Tensor, candidates_BD: Tensor) -> Tensor:
    """The cosines of some anchors, all by default, with all candidates: (b, B), as `cosines` gives them.

    There may be no such anchor: a rank without captions takes part in the backward pass like the others.
    """
    if rows is None:
        return cosines(anchors_BD, candidates_BD)
    with torch.autocast(anchors_BD.device.type, enabled=False):
        anchors, candidates = unit(anchors_BD[rows]), unit(candidates_BD)
        wide = torch.promote_types(anchors.dtype, candidates.dtype)
        return anchors.to(wide) @ candidates.to(wide).T


def _positives(match: Match | None, rows: slice | None, batch_BD: Tensor) -> tuple[Tensor, Tensor]:
    """Which pairs belong together, the diagonal always among them: the rows of Y and of its transpose, (b, B) bool."""
    numbers = torch.arange(len(batch_BD), device=batch_BD.device)
    own = numbers if rows is None else numbers[_checked(rows, len(numbers))]
    identity_bB = own[:, None] == numbers
    if match is None:
        return identity_bB, identity_bB
    given: tuple[Tensor, ...] = match if isinstance(match, tuple) else (match,)
    if len(given) != (1 if rows is None else 2) or any(
        part.shape != identity_bB.shape or part.dtype != torch.bool for part in given
    ):
        found = " and ".join(f"{tuple(part.shape)} of {part.dtype}" for part in given)
        again = "" if rows is None else ", and again for the transpose, as `rows` ask for"
        raise UserError(
            f"match is {found}; expected {tuple(identity_bB.shape)} of torch.bool{again}, true where two rows of the "
            "batch belong together."
        )
    first_bB = given[0] | identity_bB
    return first_bB, first_bB.T if rows is None else given[1] | identity_bB


def _checked(rows: slice, size: int) -> slice:
    """The same slice, unless it would be cut: parts that overlap or leave rows out would add up to another loss."""
    begin, end, step = rows.indices(size)
    if not size or (rows.start, rows.stop, step) != (begin, end, 1) or end < begin:
        raise UserError(f"rows is {rows} of a batch of {size}; expected slice(start, stop) inside it.")
    return rows


def _cross_entropy(logits_bB: Tensor, positives_bB: Tensor) -> Tensor:
    """Cross entropy of each row's softmax against the even distribution over its positives, summed, divided by B."""
    target_bB = positives_bB.to(logits_bB.dtype)
    target_bB = target_bB / target_bB.sum(dim=1, keepdim=True)
    return F.cross_entropy(logits_bB, target_bB, reduction="sum") / logits_bB.shape[1]
