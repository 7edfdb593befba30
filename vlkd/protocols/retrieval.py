"""Retrieval between images and captions in both directions, under every name that users know the figures by."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vlkd.errors import UserError
from vlkd.metrics import (
    PositiveRanks,
    bootstrap_means,
    hit_at_k,
    interval,
    ndcg_at_k,
    random_hit_at_k,
    reciprocal_rank,
)
from vlkd.protocols.classified import check_main_metric
from vlkd.protocols.measured import Measured
from vlkd.retrieval.search import Indices, RetrievalResult, Vectors, check_embeddings, evaluate_retrieval, topk

CUTOFFS = (1, 5, 10)
DIRECTIONS = ("image_to_text", "text_to_image")
_RETRIEVED = {"image_to_text": "text", "text_to_image": "image"}


def retrieval(
    image_embed: Vectors,
    text_embed: Vectors,
    image_of_text: Indices,
    captions: Sequence[str] | None = None,
    *,
    ks: Sequence[int] | None = None,
    folds: int = 0,
    main_metric: str = "mean_recall@1",
    seed: int = 0,
) -> Measured:
    """Exact retrieval figures, means over queries, every caption being a query of text to image.

    For both directions `<direction>_hit@k` (one of the query's own is among the first k), `_recall@k` (which share of
    its own is), `_mAP@R`, `_r_precision`, `_mrr`, `_ndcg@k` (binary gains), `_median_rank` and `_mean_rank` of the
    first of its own; `rsum` of the hits at 1, 5, 10 in percent, `mean_hit@1` of both directions. The hits also stand
    under the names of CLIP_benchmark (`image_retrieval_recall@k` is text to image, `text_retrieval_recall@k` image to
    text), of open_clip (`image_to_text_R@k`) and of DataComp (`mean_recall@1`).

    With folds, `fold<n>_...` is the mean over n folds of consecutive images with their captions, of which each is a
    gallery of its own: COCO 1K is five folds of the 5,000 test images.

    `correct` of an image is the mean of its own hit@1 and of its captions' mean hit@1; with equally many captions for
    each image its mean is `mean_recall@1`. `<direction>_rank` of an image counts from 1, the mean over its captions
    for text to image.

    Args:
        image_embed: (I, D), not necessarily normalised.
        text_embed: (T, D).
        image_of_text: (T,) the image that each caption describes; every image has one or more.
        captions: (T,) the texts, to count the duplicates.
        ks: cut-offs; by default 1, 5 and 10, each left out where a gallery is smaller, and `rsum` with it.
        folds: number of folds, 0 for none.
        main_metric: one of the figures; the means and hits of all images get an interval (bootstrap over images).
        seed: of the bootstrap.

    Raises:
        UserError: as `evaluate_retrieval`; a given k beyond a gallery, more folds than images, or a `main_metric` that
            was not measured.
    """
    images = check_embeddings(image_embed, "image embeddings")
    texts = check_embeddings(text_embed, "text embeddings", images.shape[1])
    smallest = min(len(images), len(texts))
    if ks is not None and (not ks or max(ks) > smallest):
        raise UserError(
            f"Cut-offs {tuple(ks)} with {len(images)} images and {len(texts)} captions; k is 1 to {smallest}."
        )
    if folds and not 2 <= folds <= len(images):
        raise UserError(f"{folds} folds of {len(images)} images; expected 2 to {len(images)} folds, or 0 for none.")
    if captions is not None and len(captions) != len(texts):
        raise UserError(f"{len(captions)} captions but {len(texts)} text embeddings; give one vector per caption.")
    wanted = tuple(sorted(set(ks or CUTOFFS)))
    result = evaluate_retrieval(images, texts, image_of_text, wanted, captions=captions)
    cutoffs = [k for k in sorted({1, *wanted}) if k <= smallest]
    hits = _hits(result, cutoffs)
    metrics = _figures(result, hits, cutoffs)
    if folds:
        metrics |= _fold_figures(images, texts, result.image_of_text, folds, wanted)
    check_main_metric(main_metric, metrics)
    return Measured(
        protocol="retrieval",
        task="zeroshot_retrieval",
        metrics=metrics,
        main_metric=main_metric,
        interval=_interval(result, hits, main_metric, seed),
        random_score=_random_score(result, main_metric, cutoffs),
        counts=_counts(result, images, texts, cutoffs),
        per_item=_per_image(result, hits),
        notes={"seed": seed, "folds": folds, "ties": "smaller id", "queries": "every caption, every image"},
    )


def _hits(result: RetrievalResult, cutoffs: Sequence[int]) -> dict[str, NDArray[np.float64]]:
    """Hits of every query by `<direction>_hit@k`."""
    return {
        f"{direction}_hit@{k}": hit_at_k(getattr(result.ranks, direction), k)
        for direction in DIRECTIONS
        for k in cutoffs
    }


def _figures(result: RetrievalResult, hits: dict[str, NDArray[np.float64]], cutoffs: Sequence[int]) -> dict[str, float]:
    figures: dict[str, float] = {}
    for direction in DIRECTIONS:
        ranks: PositiveRanks = getattr(result.ranks, direction)
        known: dict[str, float] = getattr(result, direction)
        figures |= {f"{direction}_hit@{k}": known[f"hit@{k}"] for k in cutoffs}
        figures |= {f"{direction}_recall@{k}": known[f"recall@{k}"] for k in cutoffs}
        figures |= {f"{direction}_ndcg@{k}": float(ndcg_at_k(ranks, k).mean()) for k in cutoffs}
        figures[f"{direction}_r_precision"] = float(_r_precision(ranks).mean())
        figures[f"{direction}_mrr"] = float(reciprocal_rank(ranks).mean())
        figures |= {f"{direction}_{name}": known[name] for name in ("mAP@R", "median_rank", "mean_rank")}
    if set(CUTOFFS) <= set(cutoffs):
        figures["rsum"] = 100 * sum(figures[f"{direction}_hit@{k}"] for direction in DIRECTIONS for k in CUTOFFS)
    figures["mean_hit@1"] = figures["mean_recall@1"] = result.mean_hit_at_1
    for name in hits:
        figures |= {alias: figures[name] for alias in _aliases(name)}
    return figures


def _aliases(name: str) -> tuple[str, str]:
    """CLIP_benchmark's and open_clip's name of `<direction>_hit@k`."""
    direction, k = name.split("_hit@")
    return f"{_RETRIEVED[direction]}_retrieval_recall@{k}", f"{direction}_R@{k}"


def _r_precision(positives: PositiveRanks) -> NDArray[np.float64]:
    """(Q,) share of the R positives that are among the first R."""
    counts = positives.counts
    inside = (positives.ranks < np.repeat(counts, counts)).astype(np.float64)
    return np.asarray(np.add.reduceat(inside, positives.offsets[:-1]) / counts)


def _fold_figures(
    images: Tensor, texts: Tensor, owner: NDArray[np.int64], folds: int, ks: Sequence[int]
) -> dict[str, float]:
    rows: list[dict[str, float]] = []
    parts = np.array_split(np.arange(len(images)), folds)
    cutoffs = [k for k in sorted({1, *ks}) if k <= min(len(part) for part in parts)]
    for part in parts:
        inside = np.flatnonzero((owner >= part[0]) & (owner <= part[-1]))
        result = evaluate_retrieval(
            images[part[0] : part[-1] + 1], texts[torch.from_numpy(inside)], owner[inside] - part[0], cutoffs
        )
        row = {f"{d}_hit@{k}": getattr(result, d)[f"hit@{k}"] for d in DIRECTIONS for k in cutoffs}
        if set(CUTOFFS) <= set(cutoffs):
            row["rsum"] = 100 * sum(row[f"{d}_hit@{k}"] for d in DIRECTIONS for k in CUTOFFS)
        rows.append(row | {"mean_recall@1": result.mean_hit_at_1})
    return {f"fold{folds}_{name}": float(np.mean([row[name] for row in rows])) for name in rows[0]}


def _parts(main_metric: str, names: Sequence[str]) -> list[str]:
    """The hits of which the main metric is the mean; none if it is something else."""
    if main_metric in ("mean_recall@1", "mean_hit@1"):
        return [f"{direction}_hit@1" for direction in DIRECTIONS]
    return [name for name in names if main_metric in (name, *_aliases(name))]


def _interval(
    result: RetrievalResult, hits: dict[str, NDArray[np.float64]], main_metric: str, seed: int
) -> tuple[float, float] | None:
    """Images are drawn with their captions, the same ones for both directions."""
    means = [
        bootstrap_means(hits[name], groups=result.image_of_text if name.startswith("text") else None, seed=seed)
        for name in _parts(main_metric, list(hits))
    ]
    return interval(np.mean(means, axis=0)) if means else None


def _random_score(result: RetrievalResult, main_metric: str, cutoffs: Sequence[int]) -> float | None:
    """The expected hit rate of a random order: hypergeometric in each query's number of positives."""
    found = []
    for name in _parts(main_metric, [f"{direction}_hit@{k}" for direction in DIRECTIONS for k in cutoffs]):
        direction, k = name.split("_hit@")
        sizes, queries = np.unique(getattr(result.ranks, direction).counts, return_counts=True)
        gallery = result.captions if direction == "image_to_text" else result.images
        chances = [float(random_hit_at_k(int(size), gallery, int(k))) for size in sizes]
        found.append(np.average(chances, weights=queries))
    return float(np.mean(found)) if found else None


def _counts(result: RetrievalResult, images: Tensor, texts: Tensor, cutoffs: Sequence[int]) -> dict[str, int]:
    """Sizes, and how many queries have equal scores on both sides of a cut, where the smaller id was preferred."""
    counts = {
        "images": result.images,
        "captions": result.captions,
        "image_gallery": result.images,
        "text_gallery": result.captions,
    }
    if result.duplicate_captions is not None:
        counts["duplicate_captions"] = result.duplicate_captions
    for direction, queries, gallery in zip(DIRECTIONS, (images, texts), (texts, images), strict=True):
        scores = topk(queries, gallery, min(max(cutoffs) + 1, len(gallery)))[0]
        for k in cutoffs:
            tied = (scores[:, k - 1] == scores[:, k]).sum() if k < scores.shape[1] else 0
            counts[f"{direction}_ties@{k}"] = int(tied)
    return counts


def _per_image(result: RetrievalResult, hits: dict[str, NDArray[np.float64]]) -> dict[str, NDArray[np.float64]]:
    owner = result.image_of_text
    number = np.bincount(owner, minlength=result.images)
    by_text = np.bincount(owner, weights=hits["text_to_image_hit@1"], minlength=result.images) / number
    rank = result.ranks.text_to_image.best.astype(np.float64) + 1
    return {
        "correct": (hits["image_to_text_hit@1"] + by_text) / 2,
        "image_to_text_rank": result.ranks.image_to_text.best.astype(np.float64) + 1,
        "text_to_image_rank": np.bincount(owner, weights=rank, minlength=result.images) / number,
        "captions": number.astype(np.float64),
    }


def hit_means(per_item: Mapping[str, NDArray[Any]], seed: int) -> dict[str, NDArray[np.float64]]:
    """(n,) bootstrap means of hit@1 by direction: images are drawn with their captions, the same ones for any model.

    Args:
        per_item: of `retrieval`; `correct` is the mean of both directions' hits.
        seed: of the draws.
    """
    by_image = np.asarray(per_item["image_to_text_rank"] == 1, np.float64)
    number = np.asarray(per_item["captions"], np.int64)
    by_text = np.repeat(2 * per_item["correct"] - by_image, number)
    return {
        "image_to_text": bootstrap_means(by_image, seed=seed),
        "text_to_image": bootstrap_means(by_text, groups=np.repeat(np.arange(len(number)), number), seed=seed),
    }
