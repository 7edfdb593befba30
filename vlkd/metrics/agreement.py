"""How far two models agree: shared neighbours, order, geometry and probabilities."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

from vlkd.errors import UserError
from vlkd.metrics.checks import Floats, Integers, finite, same_shape, whole


def top_k_overlap(ids_a: ArrayLike, ids_b: ArrayLike) -> Floats:
    """(Q,) |A & B| / k, the share of the first k items that both have, in any order.

    Args:
        ids_a: (Q, k) ids of one model's first k items, each once.
        ids_b: (Q, k) ids of the other's.

    Raises:
        UserError: nothing to compare, shapes differ, ids that are no integers, or an id twice in one row.
    """
    first, second = whole(ids_a, "ids of the first model", 2), whole(ids_b, "ids of the second model", 2)
    same_shape(first, second, "ids of the two models")
    for ids in (first, second):
        if _equal_neighbours(ids).any():
            raise UserError("An id stands twice among the first k of one query; give each item once.")
    return np.asarray(_equal_neighbours(np.concatenate([first, second], 1)) / first.shape[1], np.float64)


def _equal_neighbours(ids: Integers) -> Integers:
    """(Q,) how often an id of the sorted row equals the one before it."""
    ordered = np.sort(ids, axis=1)
    return np.asarray((ordered[:, 1:] == ordered[:, :-1]).sum(axis=1), np.int64)


def kendall_tau(a: ArrayLike, b: ArrayLike) -> Floats:
    """(Q,) Kendall's tau-b between the orders that two rows of scores give; NaN where a row has no two unequal scores.

    tau-b = (concordant - discordant) / sqrt(pairs unequal in a * pairs unequal in b) (Kendall, 1945,
    https://doi.org/10.1093/biomet/33.3.239). Time grows with Q N^2, memory with Q N.

    Args:
        a: (Q, N) scores of one model.
        b: (Q, N) scores of the other for the same items.

    Raises:
        UserError: nothing to compare, shapes differ, or a score is not finite.
    """
    first, second = finite(a, "scores of the first model", 2), finite(b, "scores of the second model", 2)
    same_shape(first, second, "scores of the two models")
    agree, unequal_a, unequal_b = np.zeros((3, len(first)))
    # Every pair of columns is `shift` apart for exactly one shift.
    for shift in range(1, first.shape[1]):
        sign_a, sign_b = _signs(first, shift), _signs(second, shift)
        agree += (sign_a * sign_b).sum(axis=1, dtype=np.int64)
        unequal_a += np.count_nonzero(sign_a, axis=1)
        unequal_b += np.count_nonzero(sign_b, axis=1)
    scale = np.sqrt(unequal_a * unequal_b)
    tau: Floats = np.divide(agree, scale, out=np.full(len(first), np.nan), where=scale > 0)
    return tau


def _signs(scores: Floats, shift: int) -> NDArray[np.int8]:
    """(Q, N - shift) 1, 0 or -1: is a score above, equal to or below the one `shift` columns before it."""
    later, earlier = scores[:, shift:], scores[:, :-shift]
    return (later > earlier).view(np.int8) - (later < earlier).view(np.int8)


def linear_cka(x: ArrayLike, y: ArrayLike) -> float:
    """Linear centred kernel alignment ||Y'X||^2 / (||X'X|| ||Y'Y||) of centred columns, Frobenius norms.

    1 for representations that differ by a rotation and a factor, whatever their widths; biased upwards where D or E
    is not small against I (Kornblith et al., 2019, https://arxiv.org/abs/1905.00414). NaN where all rows of a side are
    equal.

    Args:
        x: (I, D) representations of one model.
        y: (I, E) of the other, for the same images.

    Raises:
        UserError: nothing to compare, other numbers of rows, or a value is not finite.
    """
    first, second = finite(x, "representations of the first model", 2), finite(y, "those of the second model", 2)
    same_shape(first[:, 0], second[:, 0], "rows of the two models")
    if (first == first[0]).all() or (second == second[0]).all():
        return float("nan")
    # CKA ignores scale; without it squares of squares of large or tiny values leave the range of float64.
    first, second = (side / np.linalg.norm(side) for side in (_centred(first), _centred(second)))
    cross = np.linalg.norm(second.T @ first) ** 2
    return float(cross / (np.linalg.norm(first.T @ first) * np.linalg.norm(second.T @ second)))


def _centred(x: Floats) -> Floats:
    scaled = x / np.abs(x).max()
    return np.asarray(scaled - scaled.mean(axis=0), np.float64)


def mean_kl(log_p: ArrayLike, log_q: ArrayLike) -> float:
    """Mean over the queries of KL(p || q) = sum of p (log p - log q), in nats.

    Args:
        log_p: (Q, N) log-probabilities of the reference, the teacher.
        log_q: (Q, N) of the model that is compared with it.

    Raises:
        UserError: nothing to compare, shapes differ, a value is not finite, or rows that do not add up to 1.
    """
    first, second = finite(log_p, "log-probabilities of p", 2), finite(log_q, "log-probabilities of q", 2)
    same_shape(first, second, "log-probabilities of p and q")
    for rows in (first, second):
        total = np.exp(rows).sum(axis=1)
        worst = float(total[np.argmax(np.abs(total - 1))])
        if not abs(worst - 1) < 1e-3:
            raise UserError(f"The probabilities of a row add up to {worst:.6g}, not 1; apply log-softmax first.")
    return float((np.exp(first) * (first - second)).sum(axis=1).mean())
