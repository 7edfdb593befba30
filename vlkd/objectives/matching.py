"""Image-text matching: a judgement on each pair, and the choice of pairs that are hard to judge."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from vlkd.errors import UserError


def image_text_matching(match_logits: Tensor, labels: Tensor) -> Tensor:
    r"""Binary cross entropy of P judged pairs: (P,).

    .. math:: \ell_p = -y_p \log\sigma(a_p) - (1 - y_p) \log\sigma(-a_p)

    The matching loss of ALBEF (Li et al., 2021, arXiv:2107.07651, section 3.2), which writes it as a softmax over two
    classes; one logit says the same, the difference of theirs.

    Args:
        match_logits: a, large where image and text of a pair are thought to belong together, (P,).
        labels: y, true where they do, (P,) bool.

    Raises:
        UserError: The shapes differ, or the labels are not bool.
    """
    if match_logits.ndim != 1 or labels.shape != match_logits.shape or labels.dtype != torch.bool:
        raise UserError(
            f"image_text_matching: the logits are {tuple(match_logits.shape)} and the labels {tuple(labels.shape)} of "
            f"{labels.dtype}; expected one shape (P,) and torch.bool."
        )
    logits = match_logits.to(torch.promote_types(match_logits.dtype, torch.float32))
    return F.binary_cross_entropy_with_logits(logits, labels.to(logits.dtype), reduction="none")


def hard_negatives(similarities_BB: Tensor, match: Tensor, *, generator: torch.Generator | None = None) -> Tensor:
    r"""For each row a column that does not match it, drawn the more often the more similar it is: (B,) int64.

    .. math:: P(j \mid i) = \frac{(1 - Y_{ij}) \, e^{S_{ij}}}{\sum_k (1 - Y_{ik}) \, e^{S_{ik}}}

    The in-batch negatives of ALBEF (Li et al., 2021, arXiv:2107.07651, section 3.2), which excludes the row's own
    partner alone; here every column that matches is excluded, so that another image with the same caption is never
    called wrong. A row without any negative, as in a batch of one caption repeated, gets -1.

    Args:
        similarities_BB: S, scaled cosines between the rows' and the columns' embeddings, (B, B); constant.
        match: Y, true where row i and column j belong together, (B, B) bool; the diagonal counts as true.
        generator: where the draws come from; torch's global one by default.

    Raises:
        UserError: The similarities are not square, or `match` is not bool of their shape.
    """
    square = similarities_BB.ndim == 2 and similarities_BB.shape[0] == similarities_BB.shape[1]
    if not square or match.shape != similarities_BB.shape or match.dtype != torch.bool:
        raise UserError(
            f"hard_negatives: the similarities are {tuple(similarities_BB.shape)} and match {tuple(match.shape)} of "
            f"{match.dtype}; expected one shape (B, B) and torch.bool."
        )
    similarities = similarities_BB.detach().to(torch.promote_types(similarities_BB.dtype, torch.float32))
    excluded = match | torch.eye(len(match), dtype=torch.bool, device=match.device)
    barren = excluded.all(dim=1)
    # Something must be drawn for a row without negatives, too; it is overwritten below.
    weights = similarities.masked_fill(excluded & ~barren[:, None], -torch.inf).softmax(dim=1)
    return torch.multinomial(weights, 1, generator=generator).squeeze(1).masked_fill(barren, -1)
