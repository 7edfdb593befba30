"""Cosines from the fixed-tile kernel, for the protocols that need more of a query than its nearest neighbours."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from vlkd.retrieval.search import normalize
from vlkd.retrieval.tiles import TILE_ROWS, Grid


def score_blocks(queries: Tensor, gallery: Tensor) -> Iterator[tuple[slice, NDArray[np.float32]]]:
    """Cosines of a block of queries with the whole gallery, block after block.

    Args:
        queries: (Q, D) as `check_embeddings` returns them.
        gallery: (G, D) likewise.

    Yields:
        The block's place among the queries, and its (B, G) cosines, equal to those of `topk` bit for bit.
    """
    grid = Grid(normalize(queries), normalize(gallery))
    down, across = grid.shape
    for i in range(down):
        rows = slice(i * TILE_ROWS, min((i + 1) * TILE_ROWS, len(queries)))
        block = np.concatenate([grid.tile(i, j)[: rows.stop - rows.start].numpy().copy() for j in range(across)], 1)
        yield rows, block[:, : len(gallery)]


def cosines(queries: Tensor, gallery: Tensor) -> NDArray[np.float32]:
    """(Q, G) cosines, all of them; arguments as for `score_blocks`."""
    return np.concatenate([block for _, block in score_blocks(queries, gallery)])
