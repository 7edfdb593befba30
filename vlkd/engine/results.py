"""Figures of several models on one held-out set, as rows and as the report's table and galleries."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from vlkd.data.sources import Pairs
from vlkd.engine.settings import Run
from vlkd.metrics import bootstrap_interval, hit_at_k
from vlkd.models.base import DualEncoderModule
from vlkd.retrieval.encode import EncodedPairs, encode_pairs
from vlkd.retrieval.search import RetrievalResult, evaluate_retrieval


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
        low, high = mean_hit_interval(result, k)
        row[f"mean_hit@{k}_interval"] = [low, high]
    return Evaluated(entry=entry, encoded=encoded, result=result, row=row)


def per_image_hits(result: RetrievalResult, k: int) -> np.ndarray[Any, np.dtype[np.float64]]:
    """Per image the mean of its own hit@k among captions and its captions' mean hit@k among images: (I,)."""
    image_hits = hit_at_k(result.ranks.image_to_text, k)
    text_hits = hit_at_k(result.ranks.text_to_image, k)
    sums = np.bincount(result.image_of_text, weights=text_hits, minlength=len(image_hits))
    counts = np.bincount(result.image_of_text, minlength=len(image_hits))
    return np.asarray((image_hits + sums / counts) / 2)


def mean_hit_interval(result: RetrievalResult, k: int) -> tuple[float, float]:
    """95 % interval of the mean of both directions' hit@k, from a bootstrap over images."""
    return bootstrap_interval(per_image_hits(result, k), seed=0)


def write_report(config: Run, folder: Path, evaluated: list[Evaluated], pairs: Pairs | None, images: int) -> Path:
    """Draw `report.html`."""
    return folder
