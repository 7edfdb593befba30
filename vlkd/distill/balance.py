"""The weight of each teacher in one step, from the losses and from their gradients at the student's embedding.

Gradients are compared at the anchor, the student's shared embedding before any head: behind the heads each teacher
has a space of its own. They are of the loss of the global batch, so that every rank holds the same ones: where ranks
compute their own rows of a loss alone, gradients are averaged over ranks before they are multiplied.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vlkd.distill.distiller import Compared
from vlkd.distill.term import Term
from vlkd.errors import UserError
from vlkd.weighting import GradientBalanced, Weighting, duality_gap, gradient_cosines

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Balance:
    """Attributes: weights: of its teacher, by term. figures: what is logged of them."""

    weights: dict[str, float]
    figures: dict[str, float]


def _unchanged(tensor: Tensor) -> Tensor:
    return tensor


def balance_teachers(
    terms: Sequence[Term],
    compared: Compared,
    weighting: Weighting,
    agree: Callable[[Tensor], Tensor] = _unchanged,
) -> Balance:
    """One weight per teacher for the terms of each anchor: image, text, or both together.

    A teacher with several terms at one anchor enters with their weighted sum. No gradient flows through the weights.

    Args:
        terms: of the method.
        compared: losses with their graph, and anchors.
        weighting: the rule.
        agree: makes a tensor the same on all ranks (the mean over ranks); the identity on one.

    Raises:
        UserError: gradients are asked for and a teacher's terms read no embedding of the student.
    """
    weights: dict[str, float] = {}
    figures: dict[str, float] = {}
    for anchor in dict.fromkeys(term.anchor for term in terms if term.teacher):
        group = {term.name: term for term in terms if term.teacher and term.anchor == anchor}
        losses = losses_of_teachers(group, compared.losses)
        if not losses:
            continue
        name = "+".join(anchor) or "no embedding"
        if weighting.gradients and len(losses) > 1 and not anchor:
            raise UserError(
                f"The terms {', '.join(group)} read no embedding of the student, where gradients could be compared; "
                "give their teachers fixed weights."
            )
        values = [float(value) for value in agree(torch.stack([loss.detach() for loss in losses.values()]))]
        gramian = None
        if weighting.gradients and len(losses) > 1:
            at = [compared.anchors[side] for side in anchor]
            averaged = agree if compared.local & group.keys() else _unchanged
            gramian = agree(gradient_gramian(list(losses.values()), at, averaged)).cpu().numpy()
        found = weighting.weigh(name, values, gramian) if len(losses) > 1 else [1.0]
        alpha = dict(zip(losses, map(float, found), strict=True))
        weights |= {term.name: alpha[term.teacher] for term in group.values() if term.teacher in alpha}
        if len(losses) > 1:
            figures |= {f"weight/{name}/{teacher}": value for teacher, value in alpha.items()}
        if len(losses) > 1 and gramian is not None:
            figures |= figures_of(name, list(losses), gramian, np.array(list(alpha.values())), weighting)
    return Balance(weights, figures)


def losses_of_teachers(group: Mapping[str, Term], losses: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The weighted sum of each teacher's losses, (); a teacher none of whose terms took part is left out."""
    found: dict[str, Tensor] = {}
    for name, term in group.items():
        if name in losses:
            part = term.weight * losses[name]
            found[term.teacher] = found[term.teacher] + part if term.teacher in found else part
    return found


def gradient_gramian(
    losses: Sequence[Tensor], anchors: Sequence[Tensor], averaged: Callable[[Tensor], Tensor] = _unchanged
) -> Tensor:
    r"""The inner products of the losses' gradients at the anchors: (M, M) float64.

    .. math:: G_{mn} = \sum_i \langle \partial L_m / \partial z_i,\; \partial L_n / \partial z_i \rangle

    Gradients are taken per sample and not averaged over the batch first, as AE-KD's public code does with logits of
    fixed classes: with class vectors that change from batch to batch the mean would say little. The towers are not
    entered: each gradient costs one pass backward through a loss and a head.

    Args:
        losses: M of them, ().
        anchors: z, embeddings.
        averaged: the mean over ranks, where a rank's losses are of its own rows alone. It is taken of the gradients,
            (M, N): a mean of Gramians would miss the products between ranks.
    """
    gradients = [torch.autograd.grad(loss, anchors, retain_graph=True, materialize_grads=True) for loss in losses]
    gradients_MN = averaged(torch.stack([torch.cat([part.flatten() for part in parts]) for parts in gradients]))
    gradients_MN = gradients_MN.double()
    return gradients_MN @ gradients_MN.T


def figures_of(
    name: str, teachers: Sequence[str], gramian: Array, alpha: Array, weighting: Weighting
) -> dict[str, float]:
    """The cosines between teachers, the length of what is left of the gradients, the residual of the solution."""
    cosines = gradient_cosines(gramian)
    figures = {
        f"gradient_cosine/{name}/{teachers[m]}~{teachers[n]}": float(cosines[m, n])
        for m in range(len(teachers))
        for n in range(m + 1, len(teachers))
    }
    lengths = np.sqrt(np.clip(np.diag(gramian), 0, None))
    figures |= {
        f"gradient_norm/{name}/{teacher}": float(length) for teacher, length in zip(teachers, lengths, strict=True)
    }
    left = float(np.sqrt(np.clip(alpha @ gramian @ alpha, 0, None)))
    figures[f"common_descent/{name}"] = left / max(float(alpha @ lengths), 1e-30)
    if isinstance(weighting, GradientBalanced):
        moved = float(alpha @ lengths)
        solved = (cosines, alpha * lengths / moved) if weighting.normalised and moved else (gramian, alpha)
        # Below this lies rounding alone.
        figures[f"residual/{name}"] = round(max(0.0, duality_gap(*solved, weighting.bound)), 12)
    return figures
