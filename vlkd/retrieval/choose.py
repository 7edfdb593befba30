"""Which kind of index suits a number of vectors, and why, in one sentence."""

from __future__ import annotations

import os

from vlkd.errors import UserError
from vlkd.retrieval.kinds import PQ_CENTROIDS, IndexSettings

FLAT_NUMBERS = 200_000 * 256
"""Numbers (vectors x width) up to which every vector is compared: 8 ms a query on one core of 2020s hardware."""

_FLOAT_BYTES = 4
_LINK_BYTES = 8
_ID_BYTES = 8


def choose_kind(n: int, width: int, memory: int) -> tuple[IndexSettings, str]:
    """Settings for n float32 vectors of a width, and the reason.

    `flat` while a query takes some milliseconds, then `hnsw` while (4 D + 8 M) bytes per vector fit, then `ivf_pq`.
    M counts the links per vector; see FAISS's guidelines to choose an index.

    Args:
        n: vectors, those to come included.
        width: D, the numbers kept of each.
        memory: bytes that the index may take when it is searched.

    Raises:
        UserError: a number below 1.
    """
    if min(n, width, memory) < 1:
        raise UserError(f"{n} vectors of width {width} in {memory} bytes of memory; each is 1 or more.")
    size = f"{n:,} vectors of width {width}"
    whole = n * (_FLOAT_BYTES * width + _ID_BYTES)
    if n * width <= FLAT_NUMBERS and (whole <= memory or n < PQ_CENTROIDS):
        return IndexSettings(kind="flat"), f"flat: {size} are few enough to compare every one, which is exact."
    graph = n * (_FLOAT_BYTES * width + _LINK_BYTES * IndexSettings().hnsw_neighbours)
    limit = f"{graph / 1e9:.3g} GB with its links, the limit is {memory / 1e9:.3g} GB"
    if graph <= memory:
        return IndexSettings(kind="hnsw"), f"hnsw: {size} are too many to compare every one, and a graph fits: {limit}."
    return IndexSettings(kind="ivf_pq"), f"ivf_pq: {size} do not fit whole ({limit}), so they are compressed."


def usable_memory() -> int:
    """Half of the machine's memory in bytes; 8 GB where the system does not tell."""
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2
    except (AttributeError, OSError, ValueError):
        return 8_000_000_000
