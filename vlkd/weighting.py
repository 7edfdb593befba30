"""How the M terms of a group are combined: one weight per teacher.

Gradient-balanced weights come from the teachers' gradients g_m with respect to one shared quantity of the student.
They seek a direction d that improves every teacher's term, with slack xi where teachers disagree:

    primal:  min over d, v, xi of  1/2 |d|^2 - v + C sum_m xi_m   s.t.  <g_m, d> >= v - xi_m,  xi_m >= 0
    dual:    min over alpha of     1/2 |sum_m alpha_m g_m|^2      s.t.  sum_m alpha_m = 1,  0 <= alpha_m <= C

so that d = sum_m alpha_m g_m. The dual reads the gradients only through their Gramian G_mn = <g_m, g_n>. C = 1 is the
min-norm point of MGDA, the largest slack price; C = 1/M leaves only the mean. Source: AE-KD (Du et al., "Agree to
Disagree", NeurIPS 2020), whose public code solves the dual as a one-class SVM with nu = 1/(C M). AMMKD
(arXiv:2509.00039) describes the same idea in its abstract, all of it that we could read: hence "AMMKD-style".
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from vlkd.errors import UserError

Floats = NDArray[np.float64]
MAX_TEACHERS = 8
_ROUNDING = 1e-5  # a single-precision Gramian is symmetric only up to its own rounding
_RIDGE = 1e-9


def uniform_weights(teachers: int) -> tuple[float, ...]:
    """alpha_m = 1/M for M teachers; () for none."""
    return tuple(1 / teachers for _ in range(teachers))


def fixed_weights(weights: Sequence[float], teachers: int) -> tuple[float, ...]:
    """alpha_m = w_m / sum(w).

    Raises:
        UserError: their number is not M, one is negative or not finite, or all are zero.
    """
    if len(weights) != teachers or any(not 0 <= weight < np.inf for weight in weights) or not sum(weights) > 0:
        raise UserError(
            f"Found the teacher weights {tuple(weights)} for {teachers} teachers; expected one of at least 0 for each, "
            "not all 0."
        )
    return tuple(weight / sum(weights) for weight in weights)


def min_norm_weights(gramian: NDArray[Any], bound: float) -> Floats:
    """argmin over alpha of alpha^T G alpha s.t. sum(alpha) = 1, 0 <= alpha_m <= C: (M,) from G (M, M).

    Exact: M = 2 by its closed form (1/2 each where g_1 = g_2), more teachers by the KKT system of every face of the
    feasible set. Of several minimisers it is the most even one, by a ridge of 1e-9 of G's mean diagonal; uniform for
    G = 0. One teacher gets exactly 1, whatever the bound. A zero gradient draws weight up to the bound to itself: the
    min-norm point is then a stationary one.

    Raises:
        UserError: G is not a finite Gramian, M is above 8, or C lies outside [1/M, 1].
    """
    gram, _ = _problem(gramian, bound)
    teachers = len(gram)
    if teachers == 1 or not gram.any():
        return np.full(teachers, 1 / teachers)
    if teachers == 2:
        difference = gram[0, 0] - 2 * gram[0, 1] + gram[1, 1]
        first = np.clip((gram[1, 1] - gram[0, 1]) / difference if difference > 1e-12 else 0.5, 1 - bound, bound)
        return np.array([first, 1 - first])
    alpha = _best_face(gram, bound).clip(0, bound)
    within: Floats = np.minimum(alpha / alpha.sum(), bound)
    return within


def _best_face(gram: Floats, bound: float) -> Floats:
    """The minimiser by enumeration: each weight is 0, free or C, and the free ones share one multiplier."""
    teachers = len(gram)
    values, vectors = np.linalg.eigh(gram)
    # Rounding leaves eigenvalues just below 0; lifted, they make every KKT system below regular.
    gram = (vectors * (values.clip(0) + _RIDGE)) @ vectors.T
    state = np.indices((3,) * teachers).reshape(teachers, -1).T
    free, high = state == 1, state == 2
    least, most = bound * high.sum(1), bound * (high | free).sum(1)
    possible = free.any(1) & (least <= 1 + _RIDGE) & (most >= 1 - _RIDGE)
    free, high = free[possible], high[possible]
    system = np.zeros((len(free), teachers + 1, teachers + 1))
    system[:, :-1, :-1] = np.where(free[:, :, None], gram, np.eye(teachers))
    system[:, :-1, -1] = np.where(free, -1, 0)
    system[:, -1, :-1] = 1
    right = np.concatenate([bound * high, np.ones((len(free), 1))], axis=1)
    alpha = np.linalg.solve(system, right[:, :, None])[:, :-1, 0]
    alpha = alpha[((alpha >= -_RIDGE) & (alpha <= bound + _RIDGE)).all(1)]
    best: Floats = alpha[((alpha @ gram) * alpha).sum(1).argmin()]
    return best


def duality_gap(gramian: NDArray[Any], alpha: NDArray[Any], bound: float) -> float:
    """(alpha^T G alpha - min over feasible beta of beta^T G alpha) / mean_m G_mm; 0 for G = 0.

    The Frank-Wolfe gap is 0 at the optimum alone, and twice it bounds how far the value lies above. The inner minimum
    fills the smallest entries of G alpha up to C.

    Raises:
        UserError: as `min_norm_weights`.
    """
    gram, bound = _problem(gramian, bound)
    slope = gram @ alpha
    filled = (1 - bound * np.arange(len(gram))).clip(0, bound)
    return float(slope @ alpha - np.sort(slope) @ filled)


def gradient_cosines(gramian: NDArray[Any]) -> Floats:
    """G_mn / sqrt(G_mm G_nn): (M, M); 0 beside a zero gradient, 1 on the diagonal.

    Raises:
        UserError: G is not a finite Gramian.
    """
    gram = _gramian(gramian)
    norms = np.sqrt(gram.diagonal())
    inverse = np.divide(1, norms, out=np.zeros_like(norms), where=norms > 0)
    cosines = (gram * inverse[:, None] * inverse).clip(-1, 1)
    np.fill_diagonal(cosines, 1)
    return cosines


def balanced_weights(gramian: NDArray[Any], bound: float, *, normalised: bool) -> Floats:
    """Gradient-balanced weights (M,), summing to 1, from the Gramian (M, M) of the raw gradients.

    Raw gradients: `min_norm_weights`, which favours the shorter gradient. Normalised (AE-KD's `is_norm`): beta solves
    the same problem on the cosines and alpha_m = (beta_m / |g_m|) / sum_n (beta_n / |g_n|). The bound holds for beta,
    the share of each unit direction; alpha may exceed it. There a zero gradient counts as orthogonal to every other and
    gets alpha_m = 0, as no weight makes it move anything; all gradients zero: uniform.

    Raises:
        UserError: as `min_norm_weights`.
    """
    if not normalised:
        return min_norm_weights(gramian, bound)
    norms = np.sqrt(_problem(gramian, bound)[0].diagonal())
    if not norms.any():
        return np.array(uniform_weights(len(norms)))
    beta = min_norm_weights(gradient_cosines(gramian), bound)
    alpha = np.divide(beta, norms, out=np.zeros_like(norms), where=norms > 0)
    share: Floats = alpha / alpha.sum()
    return share


def pcgrad_weights(gramian: NDArray[Any]) -> Floats:
    """PCGrad's conflict removal for two gradients, as weights: (2,) from their Gramian (2, 2).

    Where d = <g_1, g_2> < 0 each gradient loses its part along the other one, as it was before any removal:

        g_1' = g_1 - d / |g_2|^2 g_2,    g_2' = g_2 - d / |g_1|^2 g_1,    so that  <g_1', g_2> = <g_2', g_1> = 0
        g_1' + g_2' = w_1 g_1 + w_2 g_2  with  w_1 = 1 - d / |g_1|^2,  w_2 = 1 - d / |g_2|^2

    Otherwise, as with a gradient of zero, nothing is removed: 1, 1. Source: algorithm 1 of PCGrad (Yu et al., "Gradient
    surgery for multi-task learning", NeurIPS 2020, arXiv:2001.06782), which sums the gradients; its random order of
    tasks is without effect for two. Factors of the losses belong into the gradients. Unlike the weights above these
    do not sum to 1, and they grow without bound as the conflict does with one gradient far shorter than the other.

    Raises:
        UserError: G is not a finite Gramian of two gradients.
    """
    gram = _gramian(gramian)
    if len(gram) != 2:
        raise UserError(f"Found the Gramian of {len(gram)} gradients; expected that of two, one per loss.")
    squares = gram.diagonal()
    if gram[0, 1] >= 0 or not squares.all():
        return np.ones(2)
    dot = max(gram[0, 1], -float(np.sqrt(squares).prod()))  # rounding may break Cauchy-Schwarz
    weights: Floats = 1 - dot / squares
    return weights


def relative_change_weights(changes: NDArray[Any]) -> Floats:
    """AdapMTL's loss-relative weights: the mean of `changes` (steps, M) over steps, divided by its sum: (M,).

    Row i holds |L_m(i-1) - L_m(i)| / L_m(i). The sum is 1, as of every weighting here (AdapMTL's code scales it to M).
    No change at all: uniform.
    """
    mean = np.asarray(changes, dtype=np.float64).mean(axis=0)
    return mean / mean.sum() if mean.sum() > 0 else np.array(uniform_weights(len(mean)))


def _gramian(gramian: NDArray[Any]) -> Floats:
    """G in double precision, divided by its mean diagonal (unless that is 0) and made symmetric."""
    gram = np.asarray(gramian, dtype=np.float64)
    if gram.ndim != 2 or gram.shape[0] != gram.shape[1] or not gram.size or not np.isfinite(gram).all():
        raise UserError(
            f"Found a Gramian of shape {gram.shape} with {np.count_nonzero(~np.isfinite(gram))} entries that are not "
            "finite; expected finite (M, M); look for NaN in the losses or teachers' embeddings."
        )
    size, asymmetry = gram.diagonal().max(), np.abs(gram - gram.T).max()
    # The largest entry of an inner-product matrix lies on its diagonal, which has no negative entry.
    if gram.diagonal().min() < 0 or asymmetry > _ROUNDING * size or np.abs(gram).max() > (1 + _ROUNDING) * size:
        raise UserError(
            "Found a matrix that is no Gramian (asymmetric, or with an entry above its diagonal); expected the inner "
            "products <g_m, g_n> of M gradients."
        )
    scaled: Floats = (gram + gram.T) / 2 / (gram.diagonal().mean() or 1.0)
    return scaled


def _problem(gramian: NDArray[Any], bound: float) -> tuple[Floats, float]:
    """The scaled Gramian and its bound, which is 1 for a single teacher."""
    gram = _gramian(gramian)
    teachers = len(gram)
    if teachers > MAX_TEACHERS:
        raise UserError(f"Found {teachers} teachers; expected at most {MAX_TEACHERS} under gradient-balanced weights.")
    if teachers > 1 and not 1 / teachers <= bound <= 1:
        raise UserError(
            f"Found the bound {bound} on the weights of {teachers} teachers; expected 1/{teachers} = "
            f"{1 / teachers:.4g} (the mean) to 1 (the min-norm point)."
        )
    return gram, bound if teachers > 1 else 1.0


class Weighting(Protocol):
    """Chooses the weights of a group of terms ("image", "text", ...), once per group and optimiser step."""

    @property
    def gradients(self) -> bool:
        """Whether `weigh` needs the Gramian."""
        ...

    def weigh(self, group: str, losses: Sequence[float], gramian: NDArray[Any] | None) -> Floats:
        """Weights (M,) of at least 0 and sum 1, from the M losses and the Gramian (M, M) of their gradients."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """What the next weights depend on, for JSON; {} for none."""
        ...

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue exactly where `state_dict` was taken."""
        ...


class _Stateless:
    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Nothing depends on earlier steps."""


class Fixed(_Stateless):
    """The same weights at every step, scaled to sum 1. Raises `UserError` as `fixed_weights`."""

    gradients = False

    def __init__(self, weights: Sequence[float]) -> None:
        self.weights = fixed_weights(weights, len(weights))

    def weigh(self, group: str, losses: Sequence[float], gramian: NDArray[Any] | None) -> Floats:  # noqa: ARG002
        return np.array(fixed_weights(self.weights, len(losses)))


class GradientBalanced(_Stateless):
    """`balanced_weights` of each step's Gramian; a single teacher gets 1. Raises `UserError` as that does."""

    gradients = True

    def __init__(self, bound: float = 0.6, normalised: bool = False) -> None:
        if not 0 < bound <= 1:
            raise UserError(f"Found the bound {bound} on a teacher's weight; expected 1/M (the mean) to 1 (min-norm).")
        self.bound, self.normalised = bound, normalised

    def weigh(self, group: str, losses: Sequence[float], gramian: NDArray[Any] | None) -> Floats:
        if gramian is None or len(gramian) != len(losses):
            raise ValueError(f"gradient-balanced weights of {group!r} need the Gramian of its {len(losses)} terms")
        return balanced_weights(gramian, self.bound, normalised=self.normalised)


class LossRelative:
    """`relative_change_weights` over the last `window` changes of each group's losses.

    Uniform for a group's first `start` losses and while it has no change yet. A loss that reaches 0 has no relative
    change at that step: it counts as 0.
    """

    gradients = False

    def __init__(self, window: int = 500, start: int = 0) -> None:
        if window < 1 or start < 0:
            raise UserError(f"Found window {window} and start {start}; expected a window of at least 1, a start of 0.")
        self.window, self.start = window, start
        self.load_state_dict({})

    def weigh(self, group: str, losses: Sequence[float], gramian: NDArray[Any] | None) -> Floats:  # noqa: ARG002
        now = np.array(losses, dtype=np.float64)
        changes = self._changes.setdefault(group, deque(maxlen=self.window))
        if group in self._last:
            size = np.abs(now)
            change = np.abs(np.array(self._last[group]) - now)
            changes.append(np.divide(change, size, out=np.zeros_like(now), where=size > 0).tolist())
        self._last[group] = now.tolist()
        self._seen[group] = self._seen.get(group, 0) + 1
        if self._seen[group] <= self.start or not changes:
            return np.array(uniform_weights(len(now)))
        return relative_change_weights(np.array(changes))

    def state_dict(self) -> dict[str, Any]:
        changes = {group: list(rows) for group, rows in self._changes.items()}
        return {"seen": dict(self._seen), "last": dict(self._last), "changes": changes}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._seen: dict[str, int] = dict(state.get("seen", {}))
        self._last: dict[str, list[float]] = dict(state.get("last", {}))
        self._changes = {group: deque(rows, maxlen=self.window) for group, rows in state.get("changes", {}).items()}
