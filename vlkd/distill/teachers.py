"""Where targets come from: a teacher that runs beside the student, or its stored features. One protocol."""

from __future__ import annotations

import bisect
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Protocol

import torch
from torch import Tensor

from vlkd.data.samples import Batch
from vlkd.data.views import View
from vlkd.distill.cache.build import distinct, text_batches
from vlkd.distill.cache.columns import check_embeddings
from vlkd.distill.cache.reader import CacheReader
from vlkd.features import DualEncoder, Preprocessing
from vlkd.models.base import DualEncoderModule, evaluating


class Teacher(Protocol):
    """Gives detached targets for a batch: image features (B, ...), text features (T, ...), scalars ()."""

    name: str
    width: int
    provides: frozenset[str]
    """The features it can give."""
    preprocessing: Preprocessing | None
    """What must be prepared for it in the loader; None where nothing is."""

    def targets(self, batch: Batch, want: Collection[str]) -> dict[str, Tensor]: ...


class OnlineTeacher:
    """A frozen model that sees every view as it comes.

    Args:
        name: its short name in terms and tables.
        model: the teacher.
        texts: text features (T, ...) of all captions of the table, as `text_features` gives them; captions are looked
            up in them, and the text tower runs for other features alone.
    """

    def __init__(self, name: str, model: DualEncoderModule, texts: Mapping[str, Tensor] | None = None) -> None:
        self.name = name
        self.width = model.width
        self.provides = model.provides
        self.preprocessing: Preprocessing | None = model.preprocessing
        self.model: DualEncoder = model.eval().requires_grad_(False)
        self.texts = dict(texts or {})

    @torch.no_grad()
    def targets(self, batch: Batch, want: Collection[str]) -> dict[str, Tensor]:
        """The model's features of the batch."""
        held = {name: self.texts[name][batch.texts].to(batch.captioned.device) for name in want if name in self.texts}
        computed = [name for name in want if name not in held]
        found = trim_blanks(self.model.encode(batch.inputs.get(self.name, {}), computed), batch)
        return found | held


_Read = Callable[[CacheReader, Tensor, Tensor], Tensor]
"""From a part, its own numbers, and their places in the batch, to rows."""


class CachedTeacher:
    """Stored features, one reader per source of the table.

    Args:
        name: its short name in terms and tables.
        width: D.
        parts: readers of the sources, in the order in which their union has them.
    """

    preprocessing: Preprocessing | None = None

    def __init__(self, name: str, width: int, parts: Sequence[CacheReader]) -> None:
        self.name = name
        self.width = width
        self.parts = tuple(parts)
        self.provides = frozenset.intersection(*(part.features.union(part.scalars) for part in parts))
        self.row_ends = torch.tensor([len(part) for part in parts]).cumsum(0)
        self._ends = self.row_ends.tolist()
        self.text_ends = torch.tensor([part.captions for part in parts]).cumsum(0)

    def targets(self, batch: Batch, want: Collection[str]) -> dict[str, Tensor]:
        """Stored features of the batch's views and captions, on its device; scalars ()."""
        device = batch.captioned.device
        found: dict[str, Tensor] = {}
        for name in want:
            if name.startswith("image."):
                value = self._collect(self.row_ends, batch.rows, _image_reader(name, batch.views))
            elif name.startswith("text."):
                value = self._collect(self.text_ends, batch.texts, _text_reader(name))
            else:
                value = self.parts[0].scalar(name)
            found[name] = value.to(device, non_blocking=True)
        return found

    def view(self, row: int, number: int) -> View:
        """The stored view of a row of the table, without colours."""
        part = bisect.bisect_right(self._ends, row)
        return self.parts[part].view(row - (self._ends[part - 1] if part else 0), number)

    def unreadable_rows(self) -> list[int]:
        """Rows of images that could not be decoded: their image features are zeros."""
        first = [0, *self.row_ends.tolist()]
        return [first[i] + row for i, part in enumerate(self.parts) for row in part.unreadable_rows()]

    def _collect(self, ends: Tensor, numbers: Tensor, read: _Read) -> Tensor:
        """What the parts hold of numbers (B,) of their union, in that order."""
        if len(self.parts) == 1:
            return read(self.parts[0], numbers, torch.arange(len(numbers)))
        owner = torch.searchsorted(ends, numbers, right=True)
        places, values = [], []
        for i in torch.unique(owner).tolist() or [0]:
            chosen = owner.eq(i).nonzero()[:, 0]
            own = numbers[chosen] - (ends[i - 1] if i else 0)
            places.append(chosen)
            values.append(read(self.parts[i], own, chosen))
        joined = torch.cat(values)
        found = torch.empty_like(joined)
        found[torch.cat(places)] = joined
        return found


def _image_reader(name: str, views: Tensor) -> _Read:
    return lambda part, rows, chosen: part.image(name, rows, views[chosen])


def _text_reader(name: str) -> _Read:
    return lambda part, texts, _: part.text(name, texts)


def text_features(
    name: str, model: DualEncoderModule, texts: Sequence[str], features: Collection[str]
) -> dict[str, Tensor]:
    """Text features (T, ...) of texts in float32 on the CPU, masks as they are; equal strings are encoded once.

    Args:
        name: the teacher's short name, for errors.
        model: the teacher.
        texts: raw.
        features: names of text features.

    Raises:
        UserError: a feature is not finite, or embeddings are zero or constant.
    """
    unique, order = distinct(texts)
    with torch.no_grad(), evaluating(model):
        batches = [
            {key: (value.float() if value.is_floating_point() else value).cpu() for key, value in found.items()}
            for found in text_batches(model, unique, sorted(features))
        ]
    columns = {key: torch.cat([batch[key] for batch in batches]) for key in sorted(features)}
    check_embeddings(name, columns)
    return {key: value.index_select(0, order) for key, value in columns.items()}


def trim_blanks(features: Mapping[str, Tensor], batch: Batch) -> dict[str, Tensor]:
    """Features in float32, without the row of the blank text or picture that stands in where a batch has none."""
    rows = {"text": len(batch.texts), "image": len(batch.keys)}
    single = {key: value.float() if value.is_floating_point() else value for key, value in features.items()}
    return {
        key: value[: rows[side]] if (side := key.partition(".")[0]) in rows else value for key, value in single.items()
    }
