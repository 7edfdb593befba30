"""Exact search and exact retrieval metrics between two sets of embeddings, in tiles, float32 on the CPU.

The threads are torch's (`torch.set_num_threads`). Cosine similarity, ties broken by the smaller
id, NaN and zero vectors refused; nothing depends on a chunk size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vlkd.errors import UserError
from vlkd.metrics import PositiveRanks, average_precision_at_r, hit_at_k, mean_rank, median_rank, recall_at_k, rsum
from vlkd.retrieval.tiles import TILE_COLUMNS, TILE_ROWS, Grid, count_ranks

Vectors = Tensor | NDArray[np.floating]
Indices = Sequence[int] | NDArray[np.int64] | Tensor

_ROWS_AT_ONCE = 4096


def check_embeddings(x: Vectors, name: str, width: int | None = None) -> Tensor:
    """The embeddings as contiguous float32 on the CPU, if every row has a direction.

    Args:
        x: (N, D), any float type.
        name: what the rows are, for the error.
        width: the D that is expected, if it is known.

    Returns:
        (N, D) float32, sharing memory with `x` where it can.

    Raises:
        UserError: not two-dimensional, empty, of another width, or a row holds NaN or infinity or has no length; the
            first such row is named.
    """
    vectors = torch.as_tensor(x)
    if vectors.ndim != 2 or not vectors.is_floating_point():
        raise UserError(
            f"{name}: expected a table (N, D) of floats, found shape {tuple(vectors.shape)}, {vectors.dtype}."
        )
    if not vectors.numel():
        raise UserError(
            f"{name}: the table of embeddings is empty ({tuple(vectors.shape)}); give at least one image or text."
        )
    if width is not None and vectors.shape[1] != width:
        raise UserError(
            f"{name}: expected vectors of width {width}, found {vectors.shape[1]}; encode both sides with one model."
        )
    vectors = vectors.detach().to("cpu", torch.float32).contiguous()
    for start in range(0, len(vectors), _ROWS_AT_ONCE):
        norms = _norms(vectors[start : start + _ROWS_AT_ONCE])
        bad = ~torch.isfinite(norms) | (norms == 0)
        if bad.any():
            row = int(bad.nonzero()[0])
            what = "has length zero" if norms[row] == 0 else "holds NaN or infinity"
            raise UserError(
                f"{name}: row {start + row} {what}; expected a finite direction; check the model that made it."
            )
    return vectors


def _norms(vectors: Tensor) -> Tensor:
    norms: Tensor = torch.linalg.vector_norm(vectors, dim=1, dtype=torch.float64)
    return norms


def normalize(x: Tensor) -> Tensor:
    """Rows divided by their Euclidean length (taken in float64): (N, D) float32."""
    out = torch.empty_like(x, dtype=torch.float32)
    for start in range(0, len(x), _ROWS_AT_ONCE):
        part = slice(start, start + _ROWS_AT_ONCE)
        torch.div(x[part], _norms(x[part])[:, None], out=out[part])
    return out


def topk(queries: Vectors, gallery: Vectors, k: int, *, chunk: int = 8 * TILE_COLUMNS) -> tuple[Tensor, Tensor]:
    """The k most similar gallery items of each query, by cosine; equal scores in the order of their ids.

    Args:
        queries: (Q, D), not necessarily normalised.
        gallery: (G, D).
        k: 1 to G.
        chunk: gallery items scored before the best are taken, rounded up to whole tiles; bounds the memory and has
            no influence on the result.

    Returns:
        (Q, k) float32 cosines, descending, and (Q, k) int64 ids.

    Raises:
        UserError: bad embeddings (`check_embeddings`), or k outside 1 to G.
    """
    asked = normalize(check_embeddings(queries, "queries"))
    items = check_embeddings(gallery, "gallery", asked.shape[1])
    if not 1 <= k <= len(items):
        raise UserError(f"k = {k} neighbours asked from a gallery of {len(items)}; k goes from 1 to {len(items)}.")
    step = max(1, -(-chunk // TILE_COLUMNS)) * TILE_COLUMNS
    down = -(-len(asked) // TILE_ROWS)
    best = [(torch.empty(TILE_ROWS, 0), torch.empty(TILE_ROWS, 0, dtype=torch.int64))] * down
    for first in range(0, len(items), step):
        # Normalised part by part: a copy of the whole gallery would double its memory.
        part = normalize(items[first : first + step])
        grid = Grid(asked, part)
        for i in range(down):
            stripe = torch.cat([grid.tile(i, j).clone() for j in range(grid.shape[1])], 1)
            value, place = _best_of(stripe[:, : len(part)], k)
            joined = torch.cat([best[i][0], value], 1)
            # Earlier parts hold smaller ids, so a stable sort keeps equal scores in the order of their ids.
            value, order = joined.sort(dim=1, descending=True, stable=True)
            known = torch.cat([best[i][1], place + first], 1)
            best[i] = value[:, :k], known.gather(1, order[:, :k])
    scores, ids = (torch.cat(side)[: len(asked)] for side in zip(*best, strict=True))
    return scores, ids


def _best_of(scores: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """(Q, min(k, G)) largest scores and their places, equal scores in the order of their places."""
    width = min(k, scores.shape[1])
    value, place = scores.topk(min(width + 1, scores.shape[1]), dim=1)
    if value.shape[1] > width:
        # `torch.topk` keeps any of the equal scores at its edge; those rows are sorted whole.
        split = (value[:, width - 1] == value[:, width]).nonzero()[:, 0]
        value, place = value[:, :width], place[:, :width].clone()
        place[split] = scores[split].sort(dim=1, descending=True, stable=True).indices[:, :width]
    place = place.sort(dim=1).values
    value, order = scores.gather(1, place).sort(dim=1, descending=True, stable=True)
    return value, place.gather(1, order)


def positive_ranks(queries: Vectors, gallery: Vectors, positives: Sequence[Sequence[int]]) -> PositiveRanks:
    """The exact 0-based rank of every positive of every query, by counting, without storing the product.

    Args:
        queries: (Q, D).
        gallery: (G, D).
        positives: per query the ids of its positives in the gallery, at least one, each once.

    Raises:
        UserError: bad embeddings, a query without a positive, an id that is not in the gallery or is given twice.
    """
    asked = normalize(check_embeddings(queries, "queries"))
    items = check_embeddings(gallery, "gallery", asked.shape[1])
    if len(positives) != len(asked):
        raise UserError(f"{len(asked)} queries but positives for {len(positives)}; give one list of ids per query.")
    query = np.repeat(np.arange(len(asked)), [len(ids) for ids in positives])
    item = np.fromiter((i for ids in positives for i in ids), np.int64, len(query))
    if len(item) and (item.min() < 0 or item.max() >= len(items)):
        raise UserError(
            f"Positives lie between {item.min()} and {item.max()}; the gallery's ids go from 0 to {len(items) - 1}."
        )
    if len(np.unique(query * len(items) + item)) < len(item):
        raise UserError("A positive is given twice for one query; give each id once.")
    PositiveRanks.of(np.zeros_like(query), query, len(asked))
    ranks, _ = count_ranks(asked, items, torch.from_numpy(query), torch.from_numpy(item), normalize)
    return PositiveRanks.of(ranks.numpy(), query, len(asked))


@dataclass(frozen=True, kw_only=True)
class RetrievalRanks:
    """Ranks of the positives in both directions.

    Attributes:
        image_to_text: per image, the ranks of its captions among all captions.
        text_to_image: per caption, the rank of its image among all images.
    """

    image_to_text: PositiveRanks
    text_to_image: PositiveRanks


def retrieval_ranks(image_embed: Vectors, text_embed: Vectors, image_of_text: Indices) -> RetrievalRanks:
    """Rank the captions for each image and the images for each caption, from one pass over the product.

    Args:
        image_embed: (I, D).
        text_embed: (T, D).
        image_of_text: (T,) the image that each caption describes; every image has at least one caption.

    Raises:
        UserError: bad embeddings, different widths, an image without a caption, or an index that is no image.
    """
    images = normalize(check_embeddings(image_embed, "image embeddings"))
    texts = check_embeddings(text_embed, "text embeddings", images.shape[1])
    owner = torch.as_tensor(image_of_text, dtype=torch.int64).numpy()
    if owner.shape != (len(texts),):
        raise UserError(f"{len(texts)} captions but {owner.shape} image indices; give one image index per caption.")
    if owner.min() < 0 or owner.max() >= len(images):
        raise UserError(
            f"Captions name images {owner.min()} to {owner.max()}; the images go from 0 to {len(images) - 1}."
        )
    missing = np.flatnonzero(np.bincount(owner, minlength=len(images)) == 0)
    if len(missing):
        raise UserError(
            f"Image {missing[0]} has no caption ({len(missing)} such images); retrieval needs a positive for each."
        )
    text = torch.arange(len(texts))
    of_text, of_image = count_ranks(images, texts, torch.from_numpy(owner), text, normalize)
    return RetrievalRanks(
        image_to_text=PositiveRanks.of(of_text.numpy(), owner, len(images)),
        text_to_image=PositiveRanks.of(of_image.numpy(), text.numpy(), len(texts)),
    )


@dataclass(frozen=True, kw_only=True)
class RetrievalResult:
    """Retrieval quality in both directions.

    Attributes:
        image_to_text: hit@k, recall@k, mAP@R (fractions), median_rank and mean_rank (of the first positive, from 1).
        text_to_image: the same; with one image per caption recall@k equals hit@k.
        rsum: sum of both directions' hit@k in percent.
        images: number of images, the gallery of the captions.
        captions: number of captions, the gallery of the images.
        duplicate_captions: captions whose text equals an earlier one's; they stay in the gallery, and only an image's
            own captions are its positives. None if the texts were not given.
        ranks: the ranks themselves, for bootstraps and galleries.
        image_of_text: (T,) the image of each caption, the groups of a bootstrap over images.
    """

    image_to_text: dict[str, float]
    text_to_image: dict[str, float]
    rsum: float
    images: int
    captions: int
    duplicate_captions: int | None
    ranks: RetrievalRanks
    image_of_text: NDArray[np.int64]

    @property
    def mean_hit_at_1(self) -> float:
        """Mean of both directions' hit@1, a fraction."""
        return (self.image_to_text["hit@1"] + self.text_to_image["hit@1"]) / 2

    def as_row(self) -> dict[str, float | int | None]:
        """A flat row of finite numbers for strict JSON: `image_to_text_hit@1`, ..., `rsum`, `mean_hit@1`, counts."""
        row: dict[str, float | int | None] = {}
        for direction, figures in (("image_to_text", self.image_to_text), ("text_to_image", self.text_to_image)):
            row |= {f"{direction}_{name}": value for name, value in figures.items()}
        return row | {
            "rsum": self.rsum,
            "mean_hit@1": self.mean_hit_at_1,
            "images": self.images,
            "captions": self.captions,
            "image_gallery": self.images,
            "text_gallery": self.captions,
            "duplicate_captions": self.duplicate_captions,
        }


def evaluate_retrieval(
    image_embed: Vectors,
    text_embed: Vectors,
    image_of_text: Indices,
    ks: Sequence[int] = (1, 5, 10),
    *,
    captions: Sequence[str] | None = None,
) -> RetrievalResult:
    """Exact retrieval metrics in both directions, means over queries.

    A caption is one query of text to image, so an image with more captions weighs more there.

    Args:
        image_embed: (I, D).
        text_embed: (T, D).
        image_of_text: (T,) the image that each caption describes.
        ks: cut-offs; 1 is always among the figures. A cut-off beyond a gallery takes the whole gallery.
        captions: (T,) the texts, to count the duplicates.

    Raises:
        UserError: as `retrieval_ranks`; a cut-off below 1.
    """
    if any(k < 1 for k in ks):
        raise UserError(f"Cut-offs {tuple(ks)}: each must be 1 or more.")
    ranks = retrieval_ranks(image_embed, text_embed, image_of_text)
    cutoffs = sorted({1, *ks})
    figures = [_figures(positives, cutoffs) for positives in (ranks.image_to_text, ranks.text_to_image)]
    return RetrievalResult(
        image_to_text=figures[0],
        text_to_image=figures[1],
        rsum=rsum([direction[f"hit@{k}"] for direction in figures for k in cutoffs]),
        images=len(ranks.image_to_text.counts),
        captions=len(ranks.text_to_image.counts),
        duplicate_captions=None if captions is None else len(captions) - len(set(captions)),
        ranks=ranks,
        image_of_text=torch.as_tensor(image_of_text, dtype=torch.int64).numpy(),
    )


def _figures(positives: PositiveRanks, ks: Sequence[int]) -> dict[str, float]:
    hits = {f"hit@{k}": float(hit_at_k(positives, k).mean()) for k in ks}
    recalls = {f"recall@{k}": float(recall_at_k(positives, k).mean()) for k in ks}
    precision = float(average_precision_at_r(positives).mean())
    ranks = {"median_rank": median_rank(positives), "mean_rank": mean_rank(positives)}
    return hits | recalls | {"mAP@R": precision} | ranks
