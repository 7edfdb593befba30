"""The two constants of the mix, chosen on validation images."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from vlkd.models.classifier import mixed_probabilities

ALPHAS = tuple(float(a) for a in np.arange(0, 21) / 20)
BETAS = (0.5, 0.75, 1.0, 1.25, 1.5, 2.0, 4.0)
"""The grid of DHO's public code for its ten data sets; the paper names none."""


def accuracy(probabilities: Tensor, labels: Tensor) -> float:
    """The share of rows (V, C) whose largest entry, of equal ones the first, is the label (V,)."""
    return float(probabilities.argmax(dim=1).eq(labels).double().mean())


def choose_mix(label_VC: Tensor, teacher_VC: Tensor, labels: Tensor) -> tuple[float, float, float]:
    """alpha, beta and their accuracy, the best of the grid on validation images.

    Of equally accurate ones the lower negative log-likelihood decides: few images make many ties.

    Args:
        label_VC: logits of the label head on V validation images.
        teacher_VC: of the teacher head.
        labels: (V,) class ids.
    """
    best = (ALPHAS[0], BETAS[0], -1.0)
    best_likelihood = -np.inf
    rows = torch.arange(len(labels))
    for beta in BETAS:
        for alpha in ALPHAS:
            mixed = mixed_probabilities(label_VC.double(), teacher_VC.double(), alpha=alpha, beta=beta)
            likelihood = float(mixed[rows, labels].clamp_min(1e-12).log().mean())
            found = accuracy(mixed, labels)
            if (found, likelihood) > (best[2], best_likelihood):
                best, best_likelihood = (alpha, beta, found), likelihood
    return best
