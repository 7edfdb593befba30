"""Kinds of FAISS index: made and trained from settings, and asked with the parameters of their kind."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import faiss as _faiss
import numpy as np
import torch
from numpy.typing import NDArray

from vlkd.errors import UserError
from vlkd.retrieval.search import Vectors, check_embeddings, normalize

faiss: Any = _faiss  # its own stubs lack half of its names

Kind = Literal["flat", "hnsw", "ivf", "ivf_pq"]
KINDS: tuple[Kind, ...] = ("flat", "hnsw", "ivf", "ivf_pq")
Storage = Literal["float32", "int8", "binary"]
STORAGES: tuple[Storage, ...] = ("float32", "int8", "binary")

PQ_CENTROIDS = 256
"""Centroids of a product quantizer with one byte per part: at least as many vectors must be there to train it."""

_POINTS_PER_LIST = 39
_INT8_DEVIATIONS = 4


@dataclass(frozen=True, kw_only=True)
class IndexSettings:
    """How an index stores and searches.

    Attributes:
        kind: `flat` compares with every vector; with float32 vectors whole it is exact.
            `hnsw` walks a graph: fast at any size, more memory, slow to build. `ivf` looks into the nearest of the
            lists that k-means made of the vectors present at the build. `ivf_pq` does so with vectors compressed by a
            product quantizer: small, and the order of near neighbours is approximate.
        dims: only the first so many numbers of each vector are kept and made length one again; 0 keeps all. Scores
            and order are then approximate; little is lost if the model was trained for it (Matryoshka).
        storage: of `flat`. `float32`; `int8`, one byte per number, scores off by about a thousandth; `binary`, one
            sign bit per number: with h of D bits different the score is the estimate cos(pi h / D).
        hnsw_neighbours: links per vector (M); memory per vector grows by about 8 M bytes.
        hnsw_build_effort: candidates looked at for each insertion (efConstruction).
        hnsw_search_effort: candidates looked at in a search (efSearch); more is nearer to exact and slower.
        ivf_lists: number of lists; 0 takes 4 sqrt(N), at least 39 vectors for each (FAISS's own minimum).
        ivf_probes: lists looked into by a search; 0 takes an eighth of the lists, at least 8.
        pq_bytes: bytes per vector of `ivf_pq`, a divisor of the width; 0 takes the largest up to a quarter of it.
    """

    kind: Kind = "flat"
    dims: int = 0
    storage: Storage = "float32"
    hnsw_neighbours: int = 32
    hnsw_build_effort: int = 200
    hnsw_search_effort: int = 128
    ivf_lists: int = 0
    ivf_probes: int = 0
    pq_bytes: int = 0

    @property
    def lossy(self) -> bool:
        """Whether the vectors cannot be had back as they came."""
        return bool(self.dims) or self.storage != "float32" or self.kind == "ivf_pq"

    @property
    def name(self) -> str:
        """Kind, storage and numbers kept, in one word: `flat`, `flat-int8`, `hnsw-64`."""
        storage = "" if self.storage == "float32" else f"-{self.storage}"
        return f"{self.kind}{storage}{f'-{self.dims}' if self.dims else ''}"


def shortened(vectors: Vectors, name: str, width: int | None, dims: int) -> NDArray[np.float32]:
    """Vectors as an index with `dims` takes them: cut, then of length one.

    Args:
        vectors: (N, D).
        name: what the rows are, for the error.
        width: the D expected, None for any.
        dims: numbers kept, 0 for all.

    Returns:
        (N, dims or D) float32.

    Raises:
        UserError: as `check_embeddings`, also for what is left of a row; more numbers asked than there are.
    """
    whole = check_embeddings(vectors, name, width)
    if not dims:
        return normalize(whole).numpy()
    if not 0 < dims <= whole.shape[1]:
        raise UserError(f"dims = {dims} of vectors of width {whole.shape[1]}; give 1 to that, or 0 for all.")
    part = check_embeddings(whole[:, :dims], f"{name}, their first {dims} numbers")
    return normalize(part).numpy()


def make_index(vectors: NDArray[np.float32], settings: IndexSettings) -> Any:
    """An empty FAISS index for normalised vectors (N, d) like these, which train lists, codes and ranges.

    Raises:
        UserError: a kind or storage that does not exist or that does not go together, or too few vectors to train.
    """
    width = vectors.shape[1]
    if settings.storage not in STORAGES:
        raise UserError(f"No index stores {settings.storage!r}; choose one of {', '.join(STORAGES)}.")
    if settings.kind not in KINDS:
        raise UserError(f"No index is of kind {settings.kind!r}; choose one of {', '.join(KINDS)}.")
    if settings.storage != "float32" and settings.kind != "flat":
        raise UserError(f"{settings.kind} stores no {settings.storage} vectors; take flat, or float32 storage.")
    if settings.kind == "flat":
        return faiss.IndexIDMap2(_flat(vectors, settings.storage))
    if settings.kind == "hnsw":
        graph = faiss.IndexHNSWFlat(width, settings.hnsw_neighbours, faiss.METRIC_INNER_PRODUCT)
        graph.hnsw.efConstruction = settings.hnsw_build_effort
        return faiss.IndexIDMap2(graph)
    return _lists(vectors, settings)


def _flat(vectors: NDArray[np.float32], storage: Storage) -> Any:
    width = vectors.shape[1]
    if storage == "binary":
        return faiss.IndexLSH(width, width, False, False)  # neither rotation nor thresholds: the plain sign bits
    if storage == "int8":
        index = faiss.IndexScalarQuantizer(width, faiss.ScalarQuantizer.QT_8bit, faiss.METRIC_INNER_PRODUCT)
        # The range has a floor, or an index begun with a few vectors would clip those that are added later.
        bound = np.maximum(np.abs(vectors).max(0), np.float32(_INT8_DEVIATIONS / width**0.5))
        index.train(np.stack([bound, -bound]))
        return index
    return faiss.IndexFlatIP(width)


def _lists(vectors: NDArray[np.float32], settings: IndexSettings) -> Any:
    count, width = vectors.shape
    most = max(1, count // _POINTS_PER_LIST)
    lists = settings.ivf_lists or min(most, round(4 * count**0.5))
    if lists > count:
        raise UserError(f"ivf_lists = {lists} with {count} vectors; give at most one list per vector, or 0.")
    if settings.kind == "ivf":
        index = faiss.index_factory(width, f"IVF{lists},Flat", faiss.METRIC_INNER_PRODUCT)
    else:
        if count < PQ_CENTROIDS:
            raise UserError(f"ivf_pq with {count} vectors; it needs {PQ_CENTROIDS} to be trained: take flat.")
        parts = settings.pq_bytes or next(m for m in range(max(1, width // 4), 0, -1) if width % m == 0)
        if parts < 1 or width % parts:
            raise UserError(f"pq_bytes = {parts} for vectors of width {width}; give a divisor of the width, or 0.")
        index = faiss.index_factory(width, f"IVF{lists},PQ{parts}x8np", faiss.METRIC_INNER_PRODUCT)
        # "np": no polysemous training, which takes minutes and serves a search by Hamming distance only.
        index.pq.cp.min_points_per_centroid = 1  # fewer than 39 is allowed; FAISS would warn for each part
    index.train(vectors)
    index.set_direct_map_type(faiss.DirectMap.Hashtable)
    return index


def ask(
    index: Any, settings: IndexSettings, vector: NDArray[np.float32], k: int, removed: NDArray[np.int64] | Sequence[int]
) -> list[tuple[float, int]]:
    """(score, id) of at most k items, descending; never the -1 with which FAISS pads.

    Args:
        index: made by `make_index`.
        settings: those it was made with.
        vector: (1, d) the query, normalised.
        k: 1 or more.
        removed: ids that a graph still holds and that are passed over.
    """
    parameters = None
    if settings.kind == "hnsw":
        selector = faiss.IDSelectorNot(faiss.IDSelectorBatch(removed)) if len(removed) else None
        parameters = faiss.SearchParametersHNSW(efSearch=max(settings.hnsw_search_effort, k), sel=selector)
    elif settings.kind != "flat":
        probes = min(index.nlist, settings.ivf_probes or max(8, index.nlist // 8))
        made = faiss.SearchParametersIVF if settings.kind == "ivf" else faiss.IVFPQSearchParameters
        parameters = made(nprobe=probes)
    scores, ids = index.search(vector, k, params=parameters)
    if settings.storage == "binary":
        scores = np.cos(math.pi / index.d * scores.astype(np.float64))
    return [pair for pair in zip(scores[0].tolist(), ids[0].tolist(), strict=True) if pair[1] >= 0]


def stored_vectors(index: Any, settings: IndexSettings, ids: NDArray[np.int64]) -> NDArray[np.float32]:
    """(N, d) what the index holds under these ids: the normalised vectors, or what compression left of them."""
    vectors = np.asarray(index.reconstruct_batch(ids), np.float32)
    if not settings.lossy:
        return vectors
    return normalize(torch.from_numpy(vectors)).numpy()
