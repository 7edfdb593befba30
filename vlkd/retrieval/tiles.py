"""The scoring kernel: a product of two sets of vectors in tiles of one shape, and exact counting over the tiles.

Every score comes from a matrix product of the same shape on the same grid, whatever the caller's chunk size, so a
pair of vectors has one score, bit for bit. Beyond the last vector a tile holds -inf.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

TILE_ROWS = 240
TILE_COLUMNS = 960
"""Eight truth values are added as one 64-bit word, byte by byte without a carry: at most 255 rows and 255 * 8 columns.
Both are multiples of the register blocks of the usual kernels, so that equal vectors score equally at any place."""
KEPT_TILES = 64
"""Tiles that are known before counting begins and are not computed again: 0.9 MB each."""
SLOTS = 8
"""Positives of every query of a block that are counted in one call."""


class Grid:
    """Scores of `rows` (Q, D) against `columns` (G, D), float32, one tile at a time into one buffer.

    With `prepare` the columns enter the product as `prepare(block)`, made when a tile needs another block than the last
    one, so that a changed copy of all columns is never held. Zero vectors that pad a block may become anything.
    """

    def __init__(self, rows: Tensor, columns: Tensor, prepare: Callable[[Tensor], Tensor] | None = None) -> None:
        self.height, self.width = len(rows), len(columns)
        self._rows, self._columns = _blocks(rows, TILE_ROWS), _blocks(columns, TILE_COLUMNS)
        self._buffer = torch.empty(TILE_ROWS, TILE_COLUMNS)
        self._prepare = prepare
        self._prepared = (-1, self._buffer)

    @property
    def shape(self) -> tuple[int, int]:
        """Number of tiles down and across."""
        return len(self._rows), len(self._columns)

    def tile(self, row: int, column: int) -> Tensor:
        """(TILE_ROWS, TILE_COLUMNS) scores, valid until the next call."""
        torch.mm(self._rows[row], self._column(column).T, out=self._buffer)
        self._buffer[self.height - row * TILE_ROWS :] = -torch.inf
        self._buffer[:, self.width - column * TILE_COLUMNS :] = -torch.inf
        return self._buffer

    def _column(self, column: int) -> Tensor:
        if self._prepare is None:
            return self._columns[column]
        if self._prepared[0] != column:
            self._prepared = column, self._prepare(self._columns[column])
        return self._prepared[1]


def _blocks(vectors: Tensor, size: int) -> list[Tensor]:
    """Blocks of `size` vectors, the last one padded with zero vectors."""
    blocks = list(torch.split(vectors, size))
    blocks[-1] = pad(blocks[-1], (0, 0, 0, size - len(blocks[-1])))
    return blocks


@dataclass(frozen=True)
class _Line:
    """The pairs that belong to one block of queries, as a table with one query per line.

    Attributes:
        pair: (L, J) number of the pair, -1 where the query has fewer than J.
        partner: (L, J) the gallery id of the pair's positive.
        threshold: (L, J) the positive's score, +inf where there is none, so that nothing exceeds it.
        below: (L, J) the largest float32 below `threshold`: exceeding it is the same as reaching `threshold`.
        count: (L, J) gallery items found so far that come before the positive.
    """

    pair: Tensor
    partner: Tensor
    threshold: Tensor
    below: Tensor
    count: Tensor


def _lines(query: Tensor, partner: Tensor, score: Tensor, blocks: int, size: int) -> list[_Line]:
    """Sort the pairs into one table per block of `size` queries."""
    order = torch.argsort(query, stable=True)
    owner = query[order]
    place = torch.arange(len(owner)) - torch.searchsorted(owner, owner)
    edges = torch.searchsorted(owner, torch.arange(blocks + 1) * size).tolist()
    lines = []
    for block in range(blocks):
        part = slice(edges[block], edges[block + 1])
        slots = int(place[part].max()) + 1 if edges[block + 1] > edges[block] else 0
        pair = torch.full((size, slots), -1)
        pair[owner[part] - block * size, place[part]] = order[part]
        real = pair >= 0
        at = pair.clamp(min=0)
        threshold = torch.where(real, score[at], torch.inf)
        below = torch.nextafter(threshold, torch.full_like(threshold, -torch.inf)).where(real, threshold)
        lines.append(_Line(pair, torch.where(real, partner[at], -1), threshold, below, torch.zeros_like(pair)))
    return lines


def _count(line: _Line, tile: Tensor, mask: Tensor, start: int, dim: int) -> None:
    """Add to `line.count` the gallery items of a tile that come before each positive.

    Args:
        line: the queries' positives.
        tile: (TILE_ROWS, TILE_COLUMNS) scores.
        mask: a bool buffer (SLOTS, TILE_ROWS, TILE_COLUMNS).
        start: id of the first gallery item of the tile.
        dim: the gallery's dimension of the tile, 1 if the queries are its rows.
    """
    size = tile.shape[dim]
    # Equal scores are ordered by id: before the positive's own tile an equal score precedes it, after it none does.
    threshold = torch.where(line.partner >= start + size, line.below, line.threshold)
    for few, count in zip(torch.split(threshold, SLOTS, 1), torch.split(line.count, SLOTS, 1), strict=True):
        higher = mask[: few.shape[1]]
        torch.gt(tile, few.T.unsqueeze(dim + 1), out=higher)
        count += _count_true(higher, dim + 1).T
    inside = (line.partner >= start) & (line.partner < start + size)
    query, slot_of = inside.nonzero(as_tuple=True)
    if len(query):
        scores = tile.index_select(1 - dim, query)
        scores = scores if dim else scores.T
        earlier = torch.arange(size) < (line.partner[query, slot_of] - start).unsqueeze(1)
        equal = scores == line.threshold[query, slot_of].unsqueeze(1)
        line.count[query, slot_of] += (equal & earlier).sum(1)


def _count_true(mask: Tensor, dim: int) -> Tensor:
    """Count the true values of tiles along `dim`, eight at a time: much faster than summing booleans."""
    packed = mask.view(torch.int64).sum(dim).view(torch.uint8)
    return packed.view(len(mask), -1, 8).sum(2) if dim == 2 else packed.long()


def _pair_scores(grid: Grid, row: Tensor, column: Tensor) -> tuple[Tensor, dict[tuple[int, int], Tensor]]:
    """(P,) the scores of single pairs, and the first `KEPT_TILES` of the tiles that hold them, by place."""
    scores = torch.empty(len(row))
    kept: dict[tuple[int, int], Tensor] = {}
    down = grid.shape[0]
    home = (column // TILE_COLUMNS) * down + row // TILE_ROWS
    order = torch.argsort(home, stable=True)
    tiles, counts = torch.unique_consecutive(home[order], return_counts=True)
    for number, pairs in zip(tiles.tolist(), torch.split(order, counts.tolist()), strict=True):
        place = number % down, number // down
        tile = grid.tile(*place)
        scores[pairs] = tile[row[pairs] % TILE_ROWS, column[pairs] % TILE_COLUMNS]
        if len(kept) < KEPT_TILES:
            kept[place] = tile.clone()
    return scores, kept


def count_ranks(
    rows: Tensor, columns: Tensor, row: Tensor, column: Tensor, prepare: Callable[[Tensor], Tensor] | None = None
) -> tuple[Tensor, Tensor]:
    """Exact ranks of pairs in both directions, by counting, in one pass over the product.

    The rank of an item for a query is the number of items with a higher score, or with an equal score and a smaller
    id. The tiles that hold a pair are computed beforehand, to know the scores to compare with, and but for a few kept
    ones computed again: few if the pairs are sorted, all at worst. Time grows with the number of positives per query.

    Args:
        rows: (Q, D) float32.
        columns: (G, D) float32.
        row: (P,) int64, the row of each pair.
        column: (P,) int64, the column of each pair.
        prepare: what is done to a block of columns before the product, as for `Grid`.

    Returns:
        (P,) int64 rank of the pair's column among all columns for its row, and of its row among all rows for its
        column.
    """
    grid = Grid(rows, columns, prepare)
    score, kept = _pair_scores(grid, row, column)
    down, across = grid.shape
    row_lines = _lines(row, column, score, down, TILE_ROWS)
    column_lines = _lines(column, row, score, across, TILE_COLUMNS)
    mask = torch.empty(SLOTS, TILE_ROWS, TILE_COLUMNS, dtype=torch.bool)
    for j in range(across):
        for i in range(down):
            tile = kept.pop((i, j)) if (i, j) in kept else grid.tile(i, j)
            _count(row_lines[i], tile, mask, j * TILE_COLUMNS, 1)
            _count(column_lines[j], tile, mask, i * TILE_ROWS, 0)
    return _collect(row_lines, len(row)), _collect(column_lines, len(row))


def _collect(lines: list[_Line], pairs: int) -> Tensor:
    ranks = torch.empty(pairs, dtype=torch.int64)
    for line in lines:
        real = line.pair >= 0
        ranks[line.pair[real]] = line.count[real]
    return ranks
