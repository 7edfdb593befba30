"""Losses on answer tokens in numpy, float64, one position after the other, as plain loops over pairs and tokens."""

from __future__ import annotations

import math

import numpy as np
from helpers.references import Array, kl, softmax


def knee(row: Array, k_min: int, k_max: int) -> int:
    points = sorted((float(value) for value in row if value > -math.inf), reverse=True)
    last, span = len(points) - 1, points[0] - points[-1]
    if last < 2 or span == 0:
        return k_min
    # The distance to a line through (0, 1) and (1, 0), by the cross product, positive below it.
    below = []
    for i, value in enumerate(points):
        x, y = i / last, (value - points[-1]) / span
        below.append(((1 - 0) * (1 - y) - (0 - x) * (0 - 1)) / math.sqrt(2))
    return min(max(below.index(max(below)) + 1, k_min), k_max)


def differences(row: Array, chosen: list[int], tau: float) -> list[list[float]]:
    return [[(float(row[i]) - float(row[j])) / tau for j in chosen[place + 1 :]] for place, i in enumerate(chosen[:-1])]


def branch(teacher: Array, student: Array, chosen: list[int], tau: float, reverse: bool, flat: bool) -> float:
    of_teacher, of_student = differences(teacher, chosen, tau), differences(student, chosen, tau)
    if flat:
        of_teacher, of_student = [sum(of_teacher, [])], [sum(of_student, [])]  # noqa: RUF017
    total = 0.0
    for t, s in zip(of_teacher, of_student, strict=True):
        p, q = softmax(np.array(t)), softmax(np.array(s))
        total += kl(q, p) if reverse else kl(p, q)
    return total / len(of_teacher)


def dbild(teacher: Array, student: Array, ks: Array, tau: float, reverse: bool = True, flat: bool = True) -> Array:
    """`ks` (A, 2): the teacher's and the student's k of each position."""
    losses = []
    for t, s, (k_t, k_s) in zip(teacher, student, ks, strict=True):
        leads = [list(np.argsort(-row))[:k] for row, k in ((t, k_t), (s, k_s))]
        losses.append(sum(branch(t, s, chosen, tau, reverse, flat) for chosen in leads))
    return np.array(losses)


def token_kl(teacher: Array, student: Array, tau: float, reverse: bool) -> Array:
    pairs = [(softmax(t / tau), softmax(s / tau)) for t, s in zip(teacher, student, strict=True)]
    return tau**2 * np.array([kl(q, p) if reverse else kl(p, q) for p, q in pairs])
