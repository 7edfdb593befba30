"""Figures of several models on one held-out set, as rows and as the report's table and galleries."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vlkd.config import to_json
from vlkd.data.sources import Pairs, source_name
from vlkd.engine.settings import Run
from vlkd.metrics import bootstrap_interval, hit_at_k
from vlkd.models.base import DualEncoderModule
from vlkd.report import Estimate, Gallery, ImageQuery, RankedImage, RankedText, Table, TextQuery, write_run_report
from vlkd.report.table import Value
from vlkd.retrieval.encode import EncodedPairs, encode_pairs
from vlkd.retrieval.search import RetrievalResult, evaluate_retrieval, normalize

Array = NDArray[np.float32]
QUERIES = 8
SHOWN = 5


@dataclass(frozen=True, kw_only=True)
class Entry:
    """A model and the part it plays in the table."""

    role: str
    name: str
    model: DualEncoderModule


@dataclass(frozen=True, kw_only=True)
class Evaluated:
    """An entry's embeddings, figures and row."""

    entry: Entry
    encoded: EncodedPairs
    result: RetrievalResult
    row: dict[str, Any]


def evaluate_entry(entry: Entry, pairs: Pairs) -> Evaluated:
    """Retrieval in both directions, with 95 % intervals from a bootstrap over images."""
    encoded = encode_pairs(entry.model, entry.model, pairs, progress=False)
    result = evaluate_retrieval(
        encoded.image_embed, encoded.text_embed, encoded.image_of_text, captions=encoded.captions
    )
    row: dict[str, Any] = {"role": entry.role, "name": entry.name} | result.as_row()
    row["mean_hit@10"] = (result.image_to_text["hit@10"] + result.text_to_image["hit@10"]) / 2
    row["parameters"] = entry.model.parameter_counts()
    row["unreadable"] = len(encoded.bad)
    for k in (1, 10):
        hits = per_image_hits(result, k)
        row[f"mean_hit@{k}_interval"] = list(bootstrap_interval(hits, seed=0))
        row[f"per_image_hit@{k}"] = [round(float(hit), 4) for hit in hits]
    return Evaluated(entry=entry, encoded=encoded, result=result, row=row)


def per_image_hits(result: RetrievalResult, k: int) -> NDArray[np.float64]:
    """Per image the mean of its own hit@k among captions and its captions' mean hit@k among images: (I,)."""
    image_hits = hit_at_k(result.ranks.image_to_text, k)
    text_hits = hit_at_k(result.ranks.text_to_image, k)
    sums = np.bincount(result.image_of_text, weights=text_hits, minlength=len(image_hits))
    counts = np.bincount(result.image_of_text, minlength=len(image_hits))
    return np.asarray((image_hits + sums / counts) / 2, np.float64)


def write_report(
    config: Run,
    folder: Path,
    evaluated: Mapping[str, Sequence[Evaluated]],
    held_out: Mapping[str, Pairs],
    told: Sequence[str],
) -> Path:
    """Draw `report.html`: figures of all entries on each held-out set, curves, the student's best and worst queries.

    Args:
        config: of the run.
        folder: of the run.
        evaluated: per held-out set its entries, the student first.
        held_out: the sets.
        told: notes on what was trained on.
    """
    notes = [f"{config.train.samples} samples seen, seed {config.seed}.", *told]
    for place, items in evaluated.items():
        result = items[0].result
        notes.append(
            f"Held-out set {place}: {result.images} images and {result.captions} captions, "
            f"{result.duplicate_captions} of them repeats."
        )
    if evaluated:
        notes.append(
            "hit@k: the share of queries with a right answer among the first k, mean of both directions; below it the "
            "95 % interval from a bootstrap over images."
        )
    return write_run_report(
        folder,
        title=folder.name,
        lead="Image-text retrieval with a distilled student." if config.teachers.refs else "Trained without a teacher.",
        settings=flat(to_json(config)),
        metrics_path=folder / "metrics.jsonl",
        tables={source_name(place): result_table(items) for place, items in evaluated.items()},
        galleries=[
            replace(gallery, title=f"{gallery.title}, {source_name(place)}" if len(held_out) > 1 else gallery.title)
            for place, items in evaluated.items()
            for gallery in galleries(items[0], held_out[place])
        ],
        notes=notes,
    )


def result_table(evaluated: Sequence[Evaluated]) -> Table:
    """One row per entry, percent."""
    headers = ("model", "part", "image M", "text M", "hit@1", "hit@10", "image to text hit@1", "text to image hit@1")
    rows: list[list[Value]] = []
    for item in evaluated:
        row = item.row
        estimates = [
            Estimate(value=100 * row[f"mean_hit@{k}"], low=100 * low, high=100 * high)
            for k in (1, 10)
            for low, high in [row[f"mean_hit@{k}_interval"]]
        ]
        sizes = [f"{row['parameters'][side] / 1e6:.2f}" for side in ("image", "text")]
        directions = [f"{100 * row[f'{way}_hit@1']:.1f}" for way in ("image_to_text", "text_to_image")]
        rows.append([item.entry.name, item.entry.role, *sizes, *estimates, *directions])
    teachers = [i for i, item in enumerate(evaluated) if item.entry.role == "teacher"]
    return Table(headers, rows, best={"hit@1": "highest", "hit@10": "highest"}, aside=teachers)


def galleries(evaluated: Evaluated, pairs: Pairs) -> list[Gallery]:
    """The student's best and worst text queries and image queries."""
    scores = similarity(evaluated.encoded)
    row_of = {key: i for i, key in enumerate(pairs.keys)}
    rows = [row_of[key] for key in evaluated.encoded.keys]
    found = []
    for side, ranks in (
        ("captions", evaluated.result.ranks.text_to_image.best),
        ("images", evaluated.result.ranks.image_to_text.best),
    ):
        order = np.argsort(ranks, kind="stable")
        for word, chosen in (("Best", order[:QUERIES]), ("Worst", order[::-1][:QUERIES])):
            make = text_query if side == "captions" else image_query
            items = [make(int(query), scores, int(ranks[query]), evaluated, pairs, rows) for query in chosen]
            found.append(Gallery(title=f"{word} {side}", items=items))
    return found


def similarity(encoded: EncodedPairs) -> Array:
    """Cosines (I, T)."""
    image, text = (normalize(part).numpy() for part in (encoded.image_embed, encoded.text_embed))
    return np.asarray(image @ text.T)


def text_query(query: int, scores: Array, rank: int, item: Evaluated, pairs: Pairs, rows: Sequence[int]) -> TextQuery:
    """The first five images of a caption."""
    column = scores[:, query]
    right = int(item.result.image_of_text[query])

    def tile(i: int) -> RankedImage:
        return RankedImage(image=pairs.image(rows[i], size_hint=160), score=float(column[i]), right=i == right)

    first = [int(i) for i in np.argsort(-column, kind="stable")[:SHOWN]]
    return TextQuery(
        text=item.encoded.captions[query],
        found=[tile(i) for i in first],
        rank=rank + 1,
        gallery_size=len(column),
        missed=None if right in first else tile(right),
    )


def image_query(query: int, scores: Array, rank: int, item: Evaluated, pairs: Pairs, rows: Sequence[int]) -> ImageQuery:
    """The first five captions of an image."""
    line = scores[query]
    own = item.result.image_of_text == query

    def entry(i: int) -> RankedText:
        return RankedText(text=item.encoded.captions[i], score=float(line[i]), right=bool(own[i]))

    first = [int(i) for i in np.argsort(-line, kind="stable")[:SHOWN]]
    best = int(np.flatnonzero(own)[np.argmax(line[own])])
    return ImageQuery(
        image=pairs.image(rows[query], size_hint=160),
        found=[entry(i) for i in first],
        rank=rank + 1,
        gallery_size=len(line),
        missed=None if own[first].any() else entry(best),
    )


def flat(settings: dict[str, Any], prefix: str = "") -> dict[str, str]:
    """Nested settings as `section.key` to text."""
    found: dict[str, str] = {}
    for key, value in settings.items():
        found |= flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: str(value)}
    return found
