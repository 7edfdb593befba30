"""Choosing between captions for an image and between images for a caption: SugarCrepe, Winoground, ARO, WinoGAViL."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import comb

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vlkd.errors import UserError
from vlkd.metrics import bootstrap_interval, jaccard, wilson_interval
from vlkd.protocols.classified import check_main_metric
from vlkd.protocols.measured import Measured
from vlkd.protocols.scores import cosines
from vlkd.retrieval.search import Vectors, check_embeddings
from vlkd.retrieval.tiles import TILE_COLUMNS, TILE_ROWS

Scores = NDArray[np.float32]


@dataclass(frozen=True, kw_only=True)
class ChoiceRows:
    """One item: images and captions, of which the i-th ones or the `gold` belong together; the rest are distractors.

    Attributes:
        images: N rows of the image embeddings.
        texts: M rows of the text embeddings, N or M above 1.
        group: name of its part of the data set, "" for none.
        gold: for `associations`, places in `images` of those that belong to the one caption.
    """

    images: tuple[int, ...]
    texts: tuple[int, ...]
    group: str = ""
    gold: tuple[int, ...] = ()


def selection(
    image_embed: Vectors, text_embed: Vectors, choices: Sequence[ChoiceRows], *, main_metric: str = "acc"
) -> Measured:
    """How often every image prefers its caption, and every caption its image.

    `text_acc`: every image has a higher cosine with its own caption than with each other caption of its item;
    `image_acc`: every caption with its own image; `acc`: both (Winoground's text, image and group score, Thrush et al.,
    2022, https://arxiv.org/abs/2204.03162). Higher means higher: an equal cosine is an error, so a model that has
    collapsed to a point scores 0, where an argmax that prefers the first caption gives it 1. A figure of a side with
    nothing to choose from is left out: with one image and n captions there is `text_acc`, equal to `acc`.

    With groups, `acc_group_<group>` and the mean of these, `acc_mean_of_groups`.

    Args:
        image_embed: (I, D), not necessarily normalised.
        text_embed: (T, D).
        choices: Q items.
        main_metric: one of the figures; `acc`, `text_acc` and `image_acc` get Wilson's interval.

    Returns:
        `correct`: 1 where an item counts for `acc`. `margin`: by how much the closest of its comparisons was won.

    Raises:
        UserError: bad embeddings (`check_embeddings`), no item, a row that does not exist, an item with nothing to
            choose from, or a `main_metric` that was not measured.
    """
    images = check_embeddings(image_embed, "image embeddings")
    texts = check_embeddings(text_embed, "text embeddings", images.shape[1])
    _check_choices(choices, len(images), len(texts))
    margins = np.array([_margins(scores) for scores in _score_tables(images, texts, choices)])
    margin = margins.min(axis=1)
    sides = {"text_acc": margins[:, 0], "image_acc": margins[:, 1], "acc": margin}
    asked = {name: np.isfinite(side) for name, side in sides.items()}
    right = {name: (side > 0)[asked[name]] for name, side in sides.items()}
    metrics = {name: float(hits.mean()) for name, hits in right.items() if len(hits)}
    by_group = _by_group((margin > 0).astype(np.float64), [choice.group for choice in choices])
    metrics |= {f"acc_group_{group}": value for group, value in by_group.items()}
    if by_group:
        metrics["acc_mean_of_groups"] = float(np.mean(list(by_group.values())))
    check_main_metric(main_metric, metrics)
    hits = right.get(main_metric)
    shapes = [choice for choice, there in zip(choices, asked.get(main_metric, []), strict=False) if there]
    return Measured(
        protocol="selection",
        task="image_caption_selection",
        metrics=metrics,
        main_metric=main_metric,
        interval=None if hits is None else wilson_interval(float(hits.sum()), len(hits)),
        random_score=_random_score(main_metric, shapes),
        counts={"items": len(choices), "images": len(images), "texts": len(texts), "ties": int((margin == 0).sum())},
        per_item={"correct": (margin > 0).astype(np.float64), "margin": margin.astype(np.float64)},
        per_class=by_group,
        notes={"ties": "an error"},
    )


def associations(
    image_embed: Vectors,
    text_embed: Vectors,
    choices: Sequence[ChoiceRows],
    *,
    main_metric: str = "avg_jaccard_score",
    seed: int = 0,
) -> Measured:
    """WinoGAViL: the Jaccard index of the K images closest to a cue and the K images that people gave it.

    `avg_jaccard_score` is the mean over the items, `jaccard_score_<N>` that over the items of N images,
    `jaccard_score_5-6` and `jaccard_score_10-12` those over the items of up to 6 and of 10 or more, under DataComp's
    names; what has no item is left out (Bitton et al., 2022, https://arxiv.org/abs/2207.12576). Of equal cosines the
    distractor is taken, so that a model that has collapsed to a point scores as low as can be.

    Args:
        image_embed: (I, D), not necessarily normalised.
        text_embed: (T, D).
        choices: Q items of one caption, each with `gold`.
        main_metric: one of the figures, all of which have a bootstrap interval over their items.
        seed: of the bootstrap.

    Returns:
        `correct`: the Jaccard index of each item.

    Raises:
        UserError: bad embeddings (`check_embeddings`), no item, a row that does not exist, an item with other than one
            caption or without gold among its images, or a `main_metric` that was not measured.
    """
    images = check_embeddings(image_embed, "image embeddings")
    texts = check_embeddings(text_embed, "text embeddings", images.shape[1])
    _check_choices(choices, len(images), len(texts))
    for number, choice in enumerate(choices):
        if len(choice.texts) != 1 or not choice.gold or not set(choice.gold) <= set(range(len(choice.images))):
            raise UserError(
                f"Item {number} has {len(choice.texts)} captions and the gold images {list(choice.gold)} of "
                f"{len(choice.images)}; expected one caption, and one or more places among the images."
            )
    tables = _score_tables(images, texts, choices)
    scores = np.array([_association(table[:, 0], choice.gold) for table, choice in zip(tables, choices, strict=True)])
    items = _by_size(np.array([len(choice.images) for choice in choices]))
    metrics = {name: float(scores[those].mean()) for name, those in items.items()}
    check_main_metric(main_metric, metrics)
    those = items[main_metric]
    sizes = [(len(choice.images), len(set(choice.gold))) for choice, there in zip(choices, those, strict=True) if there]
    return Measured(
        protocol="selection",
        task="image_caption_selection",
        metrics=metrics,
        main_metric=main_metric,
        interval=bootstrap_interval(scores[those], seed=seed),
        random_score=float(np.mean([_random_jaccard(*size) for size in sizes])),
        counts={"items": len(choices), "main_metric_items": len(sizes), "images": len(images), "texts": len(texts)},
        per_item={"correct": scores},
        notes={"ties": "an error", "seed": seed},
    )


def _association(scores: Scores, gold: Sequence[int]) -> float:
    belongs = np.isin(np.arange(len(scores)), gold)
    chosen = np.lexsort((belongs, -scores))[: belongs.sum()]
    return jaccard(set(chosen.tolist()), set(gold))


def _by_size(sizes: NDArray[np.int64]) -> Mapping[str, NDArray[np.bool_]]:
    """(Q,) which items each figure is over; every figure has some."""
    items = {"avg_jaccard_score": np.ones(len(sizes), dtype=np.bool_)}
    items |= {f"jaccard_score_{size}": sizes == size for size in np.unique(sizes).tolist()}
    items |= {"jaccard_score_5-6": sizes <= 6, "jaccard_score_10-12": sizes >= 10}
    return {name: those for name, those in items.items() if those.any()}


def _random_jaccard(images: int, gold: int) -> float:
    """The expectation for K images drawn out of N: k hits, hypergeometric, make k / (2 K - k)."""
    ways = [comb(gold, hits) * comb(images - gold, gold - hits) for hits in range(gold + 1)]
    return sum(way * hits / (2 * gold - hits) for hits, way in enumerate(ways)) / comb(images, gold)


def _check_choices(choices: Sequence[ChoiceRows], images: int, texts: int) -> None:
    if not choices:
        raise UserError("There is no item to choose in; give at least one.")
    for number, choice in enumerate(choices):
        for rows, count, what in ((choice.images, images, "images"), (choice.texts, texts, "captions")):
            if not rows or min(rows) < 0 or max(rows) >= count:
                raise UserError(
                    f"Item {number} has the {what} {list(rows)}; expected one or more of the rows 0 to {count - 1}."
                )
        if len(choice.images) == len(choice.texts) == 1:
            raise UserError(f"Item {number} has one image and one caption; it needs a second of either to choose from.")


def _score_tables(images: Tensor, texts: Tensor, choices: Sequence[ChoiceRows]) -> Iterator[Scores]:
    """(N, M) cosines of each item; as many items as fill a tile of the kernel are scored together."""
    pack: list[ChoiceRows] = []
    rows = columns = 0
    for choice in choices:
        if pack and (rows + len(choice.images) > TILE_ROWS or columns + len(choice.texts) > TILE_COLUMNS):
            yield from _score_pack(images, texts, pack)
            pack, rows, columns = [], 0, 0
        pack.append(choice)
        rows, columns = rows + len(choice.images), columns + len(choice.texts)
    yield from _score_pack(images, texts, pack)


def _score_pack(images: Tensor, texts: Tensor, pack: Sequence[ChoiceRows]) -> Iterator[Scores]:
    row = torch.tensor([i for choice in pack for i in choice.images])
    column = torch.tensor([i for choice in pack for i in choice.texts])
    scores = cosines(images[row], texts[column])
    top = left = 0
    for choice in pack:
        yield scores[top : top + len(choice.images), left : left + len(choice.texts)]
        top, left = top + len(choice.images), left + len(choice.texts)


def _margins(scores: Scores) -> tuple[float, float]:
    """By how much the closest comparison of captions and of images is won; infinite where there is none."""
    return _margin(scores), _margin(scores.T)


def _margin(scores: Scores) -> float:
    if scores.shape[1] == 1:
        return float("inf")
    pairs = np.arange(min(scores.shape))
    others = scores[pairs].copy()
    others[pairs, pairs] = -np.inf
    return float((scores[pairs, pairs] - others.max(axis=1)).min())


def _by_group(correct: NDArray[np.float64], groups: Sequence[str]) -> dict[str, float]:
    """Mean within each named group, in the order of their first items."""
    names = np.array(groups)
    return {group: float(correct[names == group].mean()) for group in dict.fromkeys(groups) if group}


def _random_score(main_metric: str, choices: Sequence[ChoiceRows]) -> float | None:
    """The mean over the items of what independent random scores give; None for a shape without a closed form."""
    chances = [_chance(main_metric, len(choice.images), len(choice.texts)) for choice in choices]
    known = [chance for chance in chances if chance is not None]
    return float(np.mean(known)) if known and len(known) == len(chances) else None


def _chance(main_metric: str, images: int, texts: int) -> float | None:
    pairs = min(images, texts)
    if main_metric == "text_acc" or images == 1:
        return float(texts) ** -pairs
    if main_metric == "image_acc" or texts == 1:
        return float(images) ** -pairs
    # Of four scores the two on the diagonal are the highest: 2! 2! / 4!.
    return 1 / 6 if images == texts == 2 else None
