"""Samples by their position in the endless sequence, and the batches that they make.

Position p holds the row that the plan gives; how often its source was passed before is the number of the augmented
view. Nothing depends on workers or ranks.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from PIL import Image as pictures
from PIL.Image import Image
from torch import Tensor
from torch.utils.data import Dataset, default_collate

from vlkd.data.decoded import Decoded
from vlkd.data.images import BadImage
from vlkd.data.plan import Plan
from vlkd.data.table import Table
from vlkd.data.views import View, ViewSettings, colors, draws, geometry, view_of
from vlkd.features import Preprocessing

BLANK = pictures.new("RGB", (8, 8))
SMALL_BYTES = 1 << 18
"""Tensors of a batch up to this size travel between processes inside of its message."""


class Travelling:
    """A batch whose small tensors travel from a worker inside of its message."""

    def __getstate__(self) -> dict[str, Any]:
        return {name: _packed(value) for name, value in self.__dict__.items()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update({name: _unpacked(value) for name, value in state.items()})


@dataclass(frozen=True)
class Batch(Travelling):
    """One rank's part of a step.

    Attributes:
        keys: B keys.
        rows: (B,) the samples' rows in the table.
        views: (B,) the numbers of their views.
        captioned: (B,) bool, true where a caption was drawn; T of them are.
        texts: (T,) the drawn captions' numbers among all captions of the table, in the order of their images.
        caption_ids: (T,) int64, a hash of the caption's string: equal for equal strings.
        own_ids: (T, P) those of all captions of each captioned image, -1 after the last; P is the largest number of
            captions that any image of the table has.
        inputs: per model name its `pixels`, `ids` and `mask`; image rows are B, text rows are T, or one blank text
            where T = 0 and one blank picture where B = 0, so that such a rank runs (and gathers) what the others do.
        bad: what was left out because it cannot be read or decoded: key to reason.
    """

    keys: list[str]
    rows: Tensor
    views: Tensor
    captioned: Tensor
    texts: Tensor
    caption_ids: Tensor
    own_ids: Tensor
    inputs: dict[str, dict[str, Tensor]]
    bad: dict[str, str] = field(default_factory=dict)

    def to(self, device: torch.device) -> Batch:
        """The same on another device."""
        if device.type == "cpu":
            return self
        moved = {
            name: {key: value.to(device, non_blocking=True) for key, value in part.items()}
            for name, part in self.inputs.items()
        }
        return replace(
            self,
            captioned=self.captioned.to(device),
            caption_ids=self.caption_ids.to(device),
            own_ids=self.own_ids.to(device),
            inputs=moved,
        )


def _packed(value: Any) -> Any:
    """Small tensors as arrays: each tensor that travels takes a file, and a connection to hand it over."""
    if isinstance(value, dict):
        return {name: _packed(part) for name, part in value.items()}
    small = isinstance(value, Tensor) and value.is_cpu and value.nbytes <= SMALL_BYTES
    return value.numpy() if small else value


def _unpacked(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _unpacked(part) for name, part in value.items()}
    return torch.from_numpy(value) if isinstance(value, np.ndarray) else value


@dataclass(frozen=True, kw_only=True)
class Consumer:
    """What a model needs of each sample: pixels, text, both; and whether it is the student, who alone sees colours.

    Each is decoded at a size that depends on its own input alone, so that its pixels do not depend on who else runs:
    stored features are those of the very pixels that the model would see beside the student.
    """

    preprocessing: Preprocessing
    image: bool
    text: bool
    student: bool = False


@dataclass(frozen=True)
class Sample:
    key: str
    row: int
    view: int
    text: int = -1
    caption: str = ""
    own_ids: tuple[int, ...] = ()
    pixels: Mapping[str, Tensor] = field(default_factory=dict)
    problem: str = ""


class SampleSequence(Dataset[Sample]):
    """The endless sequence of samples, by position.

    Args:
        table: the data.
        consumers: per model name what it needs.
        settings: how views are drawn.
        seed: of captions, and of the order without a plan.
        plan: the order; without one, a permutation of all rows for each epoch.
        view_seed: of the views themselves, apart from `seed` so that stored teacher views serve many runs.
        view_cycle: after so many epochs the views come round again (as many as are stored); 0 never.
        decoded: images in memory, for the student; teachers see those of the files.
        stored_view: gives the stored view of a row and a view number, applied again in place of a drawn one; colours
            are drawn all the same.
        unusable: rows that are left out like pictures that cannot be decoded, known from an earlier pass.
    """

    def __init__(
        self,
        table: Table,
        consumers: Mapping[str, Consumer],
        settings: ViewSettings,
        *,
        seed: int,
        plan: Plan | None = None,
        view_seed: int = 0,
        view_cycle: int = 0,
        decoded: Decoded | None = None,
        stored_view: Callable[[int, int], View] | None = None,
        unusable: Collection[int] = (),
    ) -> None:
        self.table = table
        self.consumers = dict(consumers)
        self.settings = settings
        self.seed = seed
        self.plan = plan or Plan([[len(table)]], seed=seed)
        self.view_seed = view_seed
        self.view_cycle = view_cycle
        self.decoded = decoded
        self.stored_view = stored_view
        self.unusable = frozenset(unusable)
        self.most_captions = table.most_captions

    def row_and_view(self, position: int) -> tuple[int, int]:
        """The table row at a position, and the number of its view."""
        row, epoch = self.plan.row(position)
        return row, epoch % self.view_cycle if self.view_cycle else epoch

    def __getitem__(self, position: int) -> Sample:
        row, epoch = self.plan.row(position)
        number = epoch % self.view_cycle if self.view_cycle else epoch
        key = self.table.key(row)
        if row in self.unusable:
            return Sample(key, row, number, problem="it was unreadable when the teachers' features were stored")
        try:
            captions = self.table.captions_of(row)
            pixels = self._pixels(row, key, number)
        except BadImage as error:
            return Sample(key, row, number, problem=str(error))
        if not captions:
            return Sample(key, row, number, pixels=pixels)
        choice = int(draws(self.seed, key, epoch, "caption")[0] * len(captions))
        return Sample(
            key,
            row,
            number,
            text=self.table.first_text(row) + choice,
            caption=captions[choice],
            own_ids=tuple(map(caption_id, captions)),
            pixels=pixels,
        )

    def _pixels(self, row: int, key: str, number: int) -> dict[str, Tensor]:
        """Each model's pixels of a view; raises `BadImage` where the picture cannot be used."""
        wanting = {name: item for name, item in self.consumers.items() if item.image}
        if not wanting:
            return {}
        view = view_of(self.settings, self.view_seed, key, number)
        if self.stored_view is not None:
            view = replace(self.stored_view(row, number), color=view.color)
        pictures: dict[int, Image] = {}
        pixels = {}
        for name, item in wanting.items():
            in_memory = self.decoded is not None and item.student
            hint = 0 if in_memory else 2 * max(item.preprocessing.image_size)
            if hint not in pictures:
                pictures[hint] = geometry(self._picture(row, hint), view)
            seen = pictures[hint]
            pixels[name] = item.preprocessing.view_transform(colors(seen, view) if item.student else seen)
        return pixels

    def _picture(self, row: int, hint: int) -> Image:
        """Decoded for inputs of half that size; 0 takes the one in memory."""
        if hint or self.decoded is None:
            return self.table.image(row, size_hint=hint)
        return self.decoded.image(row)

    def collate(self, samples: Sequence[Sample]) -> Batch:
        """Stack samples, tokenising their captions once per model."""
        good = [sample for sample in samples if not sample.problem]
        captioned = [sample for sample in good if sample.text >= 0]
        texts = [sample.caption for sample in captioned]
        inputs: dict[str, dict[str, Tensor]] = {}
        for name, item in self.consumers.items():
            part: dict[str, Tensor] = {}
            if item.image:
                pixels = [sample.pixels[name] for sample in good]
                # In a worker it stacks into the memory that the batch travels in.
                part["pixels"] = default_collate(pixels or [item.preprocessing.view_transform(BLANK)])
            if item.text:
                part |= item.preprocessing.tokenize(texts or [""])
            inputs[name] = part
        own_ids = [[*sample.own_ids, *[-1] * (self.most_captions - len(sample.own_ids))] for sample in captioned]
        return Batch(
            keys=[sample.key for sample in good],
            rows=torch.tensor([sample.row for sample in good], dtype=torch.int64),
            views=torch.tensor([sample.view for sample in good], dtype=torch.int64),
            captioned=torch.tensor([sample.text >= 0 for sample in good], dtype=torch.bool),
            texts=torch.tensor([sample.text for sample in captioned], dtype=torch.int64),
            caption_ids=torch.tensor([caption_id(text) for text in texts], dtype=torch.int64),
            own_ids=torch.from_numpy(np.array(own_ids, dtype=np.int64).reshape(len(captioned), self.most_captions)),
            inputs=inputs,
            bad={sample.key: sample.problem for sample in samples if sample.problem},
        )


def caption_id(caption: str) -> int:
    """63 bits of a hash: two different captions of a billion share one with a probability of 5 %."""
    return int.from_bytes(hashlib.blake2b(caption.encode(), digest_size=8).digest(), "little") >> 1
