"""Whether the batch size of the encoders changes anything: the same items encoded twice, their ranks and predictions.

Libraries choose other kernels for other shapes, so the last digits of an embedding depend on its batch; scores that are
that close to each other may then change places.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vlkd.errors import UserError
from vlkd.retrieval.search import Indices, Vectors, check_embeddings, normalize, retrieval_ranks, topk

TOLERANCE = 1e-5
"""Between the entries of unit embeddings of one item."""
_QUERIES_AT_ONCE = 256


@dataclass(frozen=True, kw_only=True)
class RankChange:
    """A query whose first positive has another rank.

    Attributes:
        direction: `image_to_text` or `text_to_image`.
        query: row of the image, or of the caption.
        before: rank of the first positive, from 1.
        after: with the other embeddings.
        gap: largest difference of cosines, in the embeddings before, between the first positive and what it passed or
            was passed by.
    """

    direction: str
    query: int
    before: int
    after: int
    gap: float


@dataclass(frozen=True, kw_only=True)
class PredictionChange:
    """An image whose nearest class is another one; `gap` is what the cosine of `before` was ahead of `after`."""

    image: int
    before: int
    after: int
    gap: float


def largest_difference(before: Vectors, after: Vectors, name: str) -> float:
    """The largest absolute difference of two encodings of the same items: max |x / ||x|| - y / ||y|||.

    Args:
        before: (N, D), not necessarily normalised.
        after: (N, D).
        name: what the rows are, for the error.

    Raises:
        UserError: bad embeddings (`check_embeddings`), or tables of different shapes.
    """
    first = check_embeddings(before, name)
    second = check_embeddings(after, name, first.shape[1])
    if len(first) != len(second):
        raise UserError(f"{name}: {len(first)} vectors before and {len(second)} after; encode the same items twice.")
    return float((normalize(first) - normalize(second)).abs().max())


def rank_changes(
    before: tuple[Vectors, Vectors], after: tuple[Vectors, Vectors], image_of_text: Indices
) -> tuple[RankChange, ...]:
    """Every query of retrieval whose first positive has another rank, images first.

    Args:
        before: (I, D) images and (T, D) captions.
        after: the same items, encoded otherwise.
        image_of_text: (T,) the image of each caption.

    Raises:
        UserError: as `retrieval_ranks`.
    """
    ranks = [retrieval_ranks(*pair, image_of_text) for pair in (before, after)]
    changes: list[RankChange] = []
    for direction, query_side in (("image_to_text", 0), ("text_to_image", 1)):
        first, second = (getattr(one, direction).best for one in ranks)
        changed = np.flatnonzero(first != second)
        for start in range(0, len(changed), _QUERIES_AT_ONCE):
            rows = changed[start : start + _QUERIES_AT_ONCE]
            gaps = _gaps(before, after, query_side, rows, first[rows], second[rows])
            changes += [
                RankChange(direction=direction, query=row, before=was + 1, after=now + 1, gap=gap)
                for row, was, now, gap in zip(
                    rows.tolist(), first[rows].tolist(), second[rows].tolist(), gaps, strict=True
                )
            ]
    return tuple(changes)


def _gaps(
    before: tuple[Vectors, Vectors],
    after: tuple[Vectors, Vectors],
    query_side: int,
    rows: NDArray[np.int64],
    was: NDArray[np.int64],
    now: NDArray[np.int64],
) -> list[float]:
    """For each of the rows how far apart the first positive and the items were that changed sides."""
    (scores, ids), (_, ids_after) = (_ranked(pair[query_side], pair[1 - query_side], rows) for pair in (before, after))
    gaps = []
    for query in range(len(rows)):
        # No positive stands before the first one, so those before it are the others in both orders.
        passed = np.setxor1d(ids[query, : was[query]], ids_after[query, : now[query]])
        distance = np.abs(scores[query] - scores[query, was[query]])
        gaps.append(float(distance[np.isin(ids[query], passed)].max()))
    return gaps


def _ranked(
    queries: Vectors, gallery: Vectors, rows: NDArray[np.int64]
) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """All items of the gallery for these queries, best first: cosines and ids."""
    asked = torch.as_tensor(queries)[torch.from_numpy(rows)]
    scores, ids = topk(asked, gallery, len(gallery))
    return scores.numpy(), ids.numpy()


def prediction_changes(before: tuple[Tensor, Tensor], after: tuple[Tensor, Tensor]) -> tuple[PredictionChange, ...]:
    """Every image whose nearest class vector is another one.

    Args:
        before: (I, D) images and (C, D) class vectors.
        after: the same items, encoded otherwise.

    Raises:
        UserError: bad embeddings (`check_embeddings`).
    """
    first, second = (topk(*pair, 1)[1][:, 0].numpy() for pair in (before, after))
    changed = np.flatnonzero(first != second)
    changes: list[PredictionChange] = []
    for start in range(0, len(changed), _QUERIES_AT_ONCE):
        rows = changed[start : start + _QUERIES_AT_ONCE]
        scores, ids = _ranked(*before, rows)
        for place, row in enumerate(rows.tolist()):
            gap = scores[place, 0] - scores[place, ids[place] == second[row]][0]
            changes.append(PredictionChange(image=row, before=int(first[row]), after=int(second[row]), gap=float(gap)))
    return tuple(changes)
