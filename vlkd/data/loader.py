"""Batches in a deterministic order, with a state that continues it.

Position p of the endless sample sequence lies in epoch p // N; the epoch's order is a permutation drawn from
(seed, epoch), and its number is the number of the augmented view. Neither depends on workers or ranks, and the
remainder of an epoch carries over into the next batch.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image as pictures
from PIL.Image import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from vlkd.data.decoded import Decoded
from vlkd.data.images import BadImage
from vlkd.data.sources import MAX_BAD_SHARE, Pairs
from vlkd.data.views import View, ViewSettings, colors, draws, geometry, view_of
from vlkd.errors import UserError
from vlkd.features import Preprocessing

Ids = NDArray[np.int64]

BLANK = pictures.new("RGB", (8, 8))


@dataclass(frozen=True)
class Batch:
    """One rank's part of a step.

    Attributes:
        keys: B keys.
        rows: (B,) the samples' rows in the table.
        views: (B,) the numbers of their views.
        captioned: (B,) bool, true where a caption was drawn; T of them are.
        texts: (T,) the drawn captions' numbers among all captions of the table, in the order of their images.
        caption_ids: (T,) the number of the caption's string among the table's distinct ones.
        own_ids: (T, P) those of all captions of each captioned image, -1 after the last; P is the largest number of
            captions that any image of the table has.
        inputs: per model name its `pixels`, `ids` and `mask`; image rows are B, text rows are T, or one blank text
            where T = 0 and one blank picture where B = 0, so that such a rank runs (and gathers) what the others do.
        bad: keys of images that could not be decoded and were left out.
    """

    keys: list[str]
    rows: Tensor
    views: Tensor
    captioned: Tensor
    texts: Tensor
    caption_ids: Tensor
    own_ids: Tensor
    inputs: dict[str, dict[str, Tensor]]
    bad: list[str] = field(default_factory=list)

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
class _Sample:
    key: str
    row: int
    view: int
    text: int
    caption: str
    pixels: dict[str, Tensor] | None


class SampleSequence(Dataset[_Sample]):
    """The endless sequence of samples, by position.

    Args:
        pairs: the table.
        consumers: per model name what it needs.
        settings: how views are drawn.
        seed: of order and captions.
        view_seed: of the views themselves, apart from `seed` so that stored teacher views serve many runs.
        view_cycle: after so many epochs the views come round again (as many as are stored); 0 never.
        decoded: images in memory, for the student; teachers see those of the files.
        stored_view: gives the stored view of a row and a view number, applied again in place of a drawn one; colours
            are drawn all the same.
        unusable: rows that are left out like pictures that cannot be decoded, known from an earlier pass.
    """

    def __init__(
        self,
        pairs: Pairs,
        consumers: Mapping[str, Consumer],
        settings: ViewSettings,
        *,
        seed: int,
        view_seed: int = 0,
        view_cycle: int = 0,
        decoded: Decoded | None = None,
        stored_view: Callable[[int, int], View] | None = None,
        unusable: Collection[int] = (),
    ) -> None:
        self.pairs = pairs
        self.consumers = dict(consumers)
        self.settings = settings
        self.seed = seed
        self.view_seed = view_seed
        self.view_cycle = view_cycle
        self.decoded = decoded
        self.stored_view = stored_view
        self.unusable = frozenset(unusable)
        counts = np.array([len(captions) for captions in pairs.captions], dtype=np.int64)
        self.first_text = np.cumsum(counts) - counts
        self.caption_ids, self.own_ids = _caption_ids(pairs, counts)
        # A plain attribute, because a sequence with a cached method could not travel to a spawned worker.
        self._latest: tuple[int, Ids] | None = None

    def _order(self, epoch: int) -> Ids:
        if self._latest is None or self._latest[0] != epoch:
            self._latest = (epoch, np.random.default_rng([self.seed, epoch]).permutation(len(self.pairs)))
        return self._latest[1]

    def row_and_view(self, position: int) -> tuple[int, int]:
        """The table row at a position, and the number of its view."""
        epoch, step = divmod(position, len(self.pairs))
        return int(self._order(epoch)[step]), epoch % self.view_cycle if self.view_cycle else epoch

    def __getitem__(self, position: int) -> _Sample:
        row, number = self.row_and_view(position)
        key, captions = self.pairs.keys[row], self.pairs.captions[row]
        text, caption = -1, ""
        if captions:
            choice = int(draws(self.seed, key, position // len(self.pairs), "caption").integers(len(captions)))
            text, caption = int(self.first_text[row]) + choice, captions[choice]
        return _Sample(key, row, number, text, caption, self._pixels(row, key, number))

    def _pixels(self, row: int, key: str, number: int) -> dict[str, Tensor] | None:
        """Each model's pixels of a view; None where the picture cannot be used."""
        if row in self.unusable:
            return None
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
                try:
                    pictures[hint] = geometry(self._picture(row, hint), view)
                except BadImage:
                    return None
            seen = pictures[hint]
            pixels[name] = item.preprocessing.view_transform(colors(seen, view) if item.student else seen)
        return pixels

    def _picture(self, row: int, hint: int) -> Image:
        """Decoded for inputs of half that size; 0 takes the one in memory."""
        if hint or self.decoded is None:
            return self.pairs.image(row, size_hint=hint)
        return self.decoded.image(row)

    def collate(self, samples: Sequence[_Sample]) -> Batch:
        """Stack samples, tokenising their captions once per model."""
        good = [sample for sample in samples if sample.pixels is not None]
        captioned = [sample for sample in good if sample.text >= 0]
        texts = [sample.caption for sample in captioned]
        inputs: dict[str, dict[str, Tensor]] = {}
        for name, item in self.consumers.items():
            part: dict[str, Tensor] = {}
            if item.image:
                pixels = [sample.pixels[name] for sample in good if sample.pixels is not None]
                part["pixels"] = torch.stack(pixels or [item.preprocessing.view_transform(BLANK)])
            if item.text:
                part |= item.preprocessing.tokenize(texts or [""])
            inputs[name] = part
        numbers = np.array([sample.text for sample in captioned], dtype=np.int64)
        return Batch(
            keys=[sample.key for sample in good],
            rows=torch.tensor([sample.row for sample in good], dtype=torch.int64),
            views=torch.tensor([sample.view for sample in good], dtype=torch.int64),
            captioned=torch.tensor([sample.text >= 0 for sample in good], dtype=torch.bool),
            texts=torch.from_numpy(numbers),
            caption_ids=torch.from_numpy(self.caption_ids[numbers]),
            own_ids=torch.from_numpy(self.own_ids[[sample.row for sample in captioned]]),
            inputs=inputs,
            bad=[sample.key for sample in samples if sample.pixels is None],
        )


def _caption_ids(pairs: Pairs, counts: Ids) -> tuple[Ids, Ids]:
    """The number of each caption's string among the distinct ones, (T,), and those of each image, (N, P), -1 padded."""
    number: dict[str, int] = {}
    ids = np.array([number.setdefault(text, len(number)) for text in pairs.texts()], dtype=np.int64)
    own = np.full((len(pairs), int(counts.max(initial=0))), -1, dtype=np.int64)
    own[np.arange(own.shape[1]) < counts[:, None]] = ids
    return ids, own


class _RankPositions:
    """For each step from `start` on, this rank's positions of the global batch."""

    def __init__(self, start: int, stop: int, batch_size: int, rank: int, world_size: int) -> None:
        self.range = range(start, stop - batch_size + 1, batch_size)
        self.share = batch_size // world_size
        self.rank = rank

    def __iter__(self) -> Iterator[list[int]]:
        for first in self.range:
            begin = first + self.rank * self.share
            yield list(range(begin, begin + self.share))

    def __len__(self) -> int:
        return len(self.range)


class BatchStream:
    """The batches of one rank, from wherever the state says; iterating advances the state.

    Args:
        sequence: the samples.
        batch_size: of all ranks together.
        samples: where the stream ends.
        workers: processes that decode; 0 decodes in this one.
        rank: of this process.
        world_size: number of ranks.

    Raises:
        UserError: the batch does not divide among the ranks, or is larger than the table.
    """

    def __init__(
        self,
        sequence: SampleSequence,
        *,
        batch_size: int,
        samples: int,
        workers: int = 0,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        if batch_size % world_size:
            raise UserError(f"A batch of {batch_size} does not divide among {world_size} ranks; change the batch size.")
        if batch_size > len(sequence.pairs):
            raise UserError(
                f"A batch of {batch_size} is larger than the {len(sequence.pairs)} training images; "
                "set train.batch_size lower."
            )
        self.sequence = sequence
        self.batch_size = batch_size
        self.samples = samples
        self.workers = workers
        self.rank = rank
        self.world_size = world_size
        self.position = 0
        self.bad: set[str] = set()
        self.fingerprint = sequence.pairs.fingerprint()

    def __iter__(self) -> Iterator[Batch]:
        loader: DataLoader[_Sample] = DataLoader(
            self.sequence,
            batch_sampler=_RankPositions(self.position, self.samples, self.batch_size, self.rank, self.world_size),
            collate_fn=self.sequence.collate,
            num_workers=self.workers,
            prefetch_factor=4 if self.workers else None,
            # Otherwise each iterator draws a seed from torch's global generator, which after a resume would be one draw
            # ahead of an uninterrupted run's: dropout would differ.
            generator=torch.Generator(),
        )
        for batch in loader:
            self.position += self.batch_size
            self._count_bad(batch)
            yield batch

    def _count_bad(self, batch: Batch) -> None:
        self.bad.update(batch.bad)
        if len(self.bad) > max(1, MAX_BAD_SHARE * len(self.sequence.pairs)):
            raise UserError(
                f"{len(self.bad)} images cannot be decoded, more than {MAX_BAD_SHARE:.0%} of the data "
                f"(for instance {sorted(self.bad)[0]}); mend or remove them."
            )

    def state_dict(self) -> dict[str, Any]:
        """Where the stream is, in samples of all ranks, and what it streams."""
        return {"samples": self.position, "seed": self.sequence.seed, "data": self.fingerprint, "bad": sorted(self.bad)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from a state.

        Raises:
            UserError: it belongs to other data or another seed.
        """
        own = self.state_dict()
        for name in ("seed", "data"):
            if state[name] != own[name]:
                raise UserError(
                    f"The checkpoint was made with {name} {state[name]}, found {own[name]}; "
                    "restore the data or start in another output folder."
                )
        self.position = int(state["samples"])
        self.bad = set(state["bad"])
