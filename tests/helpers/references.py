"""Objectives transcribed from their papers into numpy, in float64 and mostly as loops: slow, plain, independent."""

from __future__ import annotations

import math

import numpy as np

Array = np.ndarray


def normalised(rows: Array) -> Array:
    return np.array([row / math.sqrt(sum(value * value for value in row)) for row in rows.astype(np.float64)])


def softmax(row: Array) -> Array:
    powers = np.exp(row - row.max())
    return powers / powers.sum()


def anchored_cross_entropy(anchors: Array, candidates: Array, scale: float, match: Array) -> float:
    """Mean over anchors of the mean over their positives of -log softmax, which is SupCon's equation 2."""
    anchors, candidates = normalised(anchors), normalised(candidates)
    losses = []
    for i, anchor in enumerate(anchors):
        probabilities = softmax(np.array([scale * float(anchor @ candidate) for candidate in candidates]))
        positives = [j for j in range(len(candidates)) if match[i, j]]
        losses.append(-sum(math.log(probabilities[j]) for j in positives) / len(positives))
    return sum(losses) / len(losses)


def info_nce(image: Array, text: Array, scale: float, match: Array) -> float:
    return (anchored_cross_entropy(image, text, scale, match) + anchored_cross_entropy(text, image, scale, match.T)) / 2


def siglip(image: Array, text: Array, scale: float, bias: float, match: Array) -> float:
    image, text = normalised(image), normalised(text)
    total = 0.0
    for i in range(len(image)):
        for j in range(len(text)):
            sign = 1.0 if match[i, j] else -1.0
            total += math.log1p(math.exp(-sign * (scale * float(image[i] @ text[j]) + bias)))
    return total / len(image)


def kl(p: Array, q: Array) -> float:
    return sum(float(a) * (math.log(a) - math.log(b)) for a, b in zip(p, q, strict=True))


def relational_kl(student: tuple[Array, Array], teacher: tuple[Array, Array], scales: tuple[float, float]) -> float:
    student_logits = scales[0] * normalised(student[0]) @ normalised(student[1]).T
    teacher_logits = scales[1] * normalised(teacher[0]) @ normalised(teacher[1]).T
    size = len(student_logits)
    rows = sum(kl(softmax(teacher_logits[i]), softmax(student_logits[i])) for i in range(size))
    columns = sum(kl(softmax(teacher_logits[:, i]), softmax(student_logits[:, i])) for i in range(size))
    return (rows + columns) / (2 * size)


def neighbour_kl(student: Array, teacher: Array, scales: tuple[float, float]) -> float:
    student, teacher = normalised(student), normalised(teacher)
    total = 0.0
    for i in range(len(student)):
        others = [j for j in range(len(student)) if j != i]
        p = softmax(np.array([scales[1] * float(teacher[i] @ teacher[j]) for j in others]))
        q = softmax(np.array([scales[0] * float(student[i] @ student[j]) for j in others]))
        total += kl(p, q)
    return total / len(student)
