"""What an approximate index loses and saves: recall against exact search, time of one query, bytes per vector."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import faiss as _faiss
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vlkd.errors import UserError
from vlkd.retrieval.index import SearchIndex
from vlkd.retrieval.kinds import IndexSettings
from vlkd.retrieval.search import Vectors, check_embeddings, normalize, topk

faiss: Any = _faiss  # its own stubs lack half of its names

_ROUNDING = 1e-6


@dataclass(frozen=True, kw_only=True)
class Truth:
    """Queries with their exact neighbours in a gallery.

    Attributes:
        queries: (Q, D) float32.
        gallery: (G, D) float32.
        ids: (Q, k) the exact neighbours, best first.
    """

    queries: Tensor
    gallery: Tensor
    ids: NDArray[np.int64]


def exact_neighbours(queries: Vectors, gallery: Vectors, k: int) -> Truth:
    """The k nearest by cosine, all of the gallery if k is more; raises `UserError` as `topk`."""
    items = check_embeddings(gallery, "gallery")
    asked = check_embeddings(queries, "queries", items.shape[1])
    return Truth(queries=asked, gallery=items, ids=topk(asked, items, min(k, len(items)))[1].numpy())


def recall(found: Sequence[Sequence[int]], truth: Truth) -> float:
    """Mean fraction of the k places that hold a neighbour as near as the k-th exact one.

    An item counts by its exact cosine, not by its id: of equal items any is right. The cosine may be 1e-6 below the
    k-th, for rounding.

    Args:
        found: per query the different ids that were found; those beyond the first k do not count.
        truth: the exact neighbours.
    """
    k = truth.ids.shape[1]
    shares = []
    for i, ids in enumerate(found):
        both = [*ids[:k], *truth.ids[i].tolist()]
        vectors = normalize(truth.gallery[both]).double()
        scores = vectors @ normalize(truth.queries[[i]]).double()[0]
        near = scores[: len(ids[:k])] >= scores[len(ids[:k]) :].min() - _ROUNDING
        shares.append(float(near.sum()) / k)
    return float(np.mean(shares))


@contextmanager
def one_thread() -> Iterator[None]:
    """FAISS and torch on one thread, and as before afterwards."""
    before, torch_before = faiss.omp_get_max_threads(), torch.get_num_threads()
    faiss.omp_set_num_threads(1)
    torch.set_num_threads(1)
    try:
        yield
    finally:
        faiss.omp_set_num_threads(before)
        torch.set_num_threads(torch_before)


def search_each(index: SearchIndex, queries: Tensor, k: int) -> tuple[list[list[int]], NDArray[np.float64]]:
    """Search queries one by one on one thread: the ids found, and (Q,) milliseconds."""
    found, times = [], np.empty(len(queries))
    with one_thread():
        index.search(queries[0], k)
        for i, query in enumerate(queries):
            start = time.perf_counter()
            hits = index.search(query, k)
            times[i] = 1e3 * (time.perf_counter() - start)
            found.append([hit.id for hit in hits])
    return found, times


def bytes_per_vector(index: SearchIndex) -> float:
    """Size of the stored vectors, ids, links and lists on disk, divided by the items; paths are not counted."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "index.faiss"
        index.write_vectors(path)
        return path.stat().st_size / len(index)


@dataclass(frozen=True, kw_only=True)
class IndexQuality:
    """An index measured.

    Attributes:
        recall: mean share of the exact first k that a query of the other modality finds (see `recall`).
        self_recall: the same for queries taken from the gallery, which flatter an approximate index.
        p50_ms: median time of one query at one thread, milliseconds.
        p99_ms: its 99th percentile.
        bytes_per_vector: bytes on disk.
        found: per query the ids found.
    """

    recall: float
    self_recall: float
    p50_ms: float
    p99_ms: float
    bytes_per_vector: float
    found: list[list[int]]


def measure_index(index: SearchIndex, queries: Vectors, gallery: Vectors, k: int) -> IndexQuality:
    """Measure an index of the gallery, whose ids are the gallery's rows.

    Args:
        index: made from the gallery, with nothing removed.
        queries: (Q, D) of the other modality: where the index holds images, texts.
        gallery: (G, D).
        k: neighbours asked.

    Raises:
        UserError: bad embeddings, k below 1, or an index of other items.
    """
    return measure_against(index, exact_neighbours(queries, gallery, k), self_truth(gallery, len(queries), k))


def self_truth(gallery: Vectors, most: int, k: int) -> Truth:
    """At most so many rows of the gallery, evenly spread, as queries to it."""
    rows = np.unique(np.linspace(0, len(gallery) - 1, min(most, len(gallery))).astype(np.int64))
    return exact_neighbours(gallery[rows], gallery, k)


def measure_against(index: SearchIndex, truth: Truth, own: Truth) -> IndexQuality:
    """`measure_index` with the exact neighbours at hand, so that several indexes share them.

    Args:
        index: made from the gallery.
        truth: queries of the other modality.
        own: queries from the gallery.

    Raises:
        UserError: the index does not hold the gallery's rows under their numbers.
    """
    if list(index.items) != list(range(len(truth.gallery))):
        raise UserError(
            f"The index holds {len(index)} items, the gallery {len(truth.gallery)}; build it from the gallery, whole."
        )
    k = truth.ids.shape[1]
    found, times = search_each(index, truth.queries, k)
    return IndexQuality(
        recall=recall(found, truth),
        self_recall=recall(search_each(index, own.queries, k)[0], own),
        p50_ms=float(np.percentile(times, 50)),
        p99_ms=float(np.percentile(times, 99)),
        bytes_per_vector=bytes_per_vector(index),
        found=found,
    )


def timed_build(gallery: Vectors, settings: IndexSettings) -> tuple[SearchIndex, float]:
    """An index of the gallery under its row numbers, and the seconds it took with the threads there are."""
    names = [str(i) for i in range(len(gallery))]
    start = time.perf_counter()
    index = SearchIndex.build(gallery, names, model="", settings=settings)
    return index, time.perf_counter() - start
