"""Batches in a deterministic order, with a state that continues it.

Position p of the endless sample sequence lies in epoch p // N; the epoch's order is a permutation drawn from
(seed, epoch), and its number is the number of the augmented view. Neither depends on workers or ranks, and the
remainder of an epoch carries over into the next batch.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from vlkd.data.decoded import Decoded
from vlkd.data.images import BadImage
from vlkd.data.sources import MAX_BAD_SHARE, Pairs
from vlkd.data.views import ViewSettings, colors, draws, geometry, view_of
from vlkd.errors import UserError
from vlkd.features import Preprocessing


@dataclass(frozen=True)
class Batch:
    """One rank's part of a step.

    Attributes:
        keys: B keys.
        rows: (B,) the samples' rows in the table.
        views: (B,) the numbers of their views.
        captioned: (B,) bool, true where a caption was drawn; T of them are.
        texts: (T,) the drawn captions' numbers among all captions of the table, in the order of their images.
        caption_ids: (T,) equal for equal strings.
        inputs: per model name its `pixels`, `ids` and `mask`; image rows are B, text rows are T, or one blank text
            where T = 0, so that a rank without captions runs (and gathers) what the others do.
        bad: keys of images that could not be decoded and were left out.
    """

    keys: list[str]
    rows: Tensor
    views: Tensor
    captioned: Tensor
    texts: Tensor
    caption_ids: Tensor
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
        return replace(self, captioned=self.captioned.to(device), caption_ids=self.caption_ids.to(device), inputs=moved)


@dataclass(frozen=True, kw_only=True)
class Consumer:
    """What a model needs of each sample: pixels, text, both; and whether it is the student, who alone sees colours."""

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
        decoded: images in memory.
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
        unusable: Collection[int] = (),
    ) -> None:
        self.pairs = pairs
        self.consumers = dict(consumers)
        self.settings = settings
        self.seed = seed
        self.view_seed = view_seed
        self.view_cycle = view_cycle
        self.decoded = decoded
        self.unusable = frozenset(unusable)
        self.first_text = np.cumsum([0, *(len(captions) for captions in pairs.captions)])
        self.size_hint = max((max(item.preprocessing.image_size) for item in consumers.values()), default=1) * 2
        # A plain attribute, because a sequence with a cached method could not travel to a spawned worker.
        self._latest: tuple[int, np.ndarray[Any, np.dtype[np.int64]]] | None = None

    def _order(self, epoch: int) -> np.ndarray[Any, np.dtype[np.int64]]:
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
        try:
            image = self.decoded.image(row) if self.decoded else self.pairs.image(row, size_hint=self.size_hint)
        except BadImage:
            return None
        view = view_of(self.settings, self.view_seed, key, number)
        seen = geometry(image, view)
        return {
            name: item.preprocessing.view_transform(colors(seen, view) if item.student else seen)
            for name, item in wanting.items()
        }

    def collate(self, samples: Sequence[_Sample]) -> Batch:
        """Stack samples, tokenising their captions once per model."""
        good = [sample for sample in samples if sample.pixels is not None]
        captioned = [sample for sample in good if sample.text >= 0]
        texts = [sample.caption for sample in captioned]
        inputs: dict[str, dict[str, Tensor]] = {}
        for name, item in self.consumers.items():
            part: dict[str, Tensor] = {}
            if item.image and good:
                part["pixels"] = torch.stack([sample.pixels[name] for sample in good if sample.pixels is not None])
            if item.text:
                part |= item.preprocessing.tokenize(texts or [""])
            inputs[name] = part
        number = {text: i for i, text in enumerate(dict.fromkeys(texts))}
        ids = [int(draws(0, text, 0, "id").integers(2**62)) for text in number]
        return Batch(
            keys=[sample.key for sample in good],
            rows=torch.tensor([sample.row for sample in good], dtype=torch.int64),
            views=torch.tensor([sample.view for sample in good], dtype=torch.int64),
            captioned=torch.tensor([sample.text >= 0 for sample in good], dtype=torch.bool),
            texts=torch.tensor([sample.text for sample in captioned], dtype=torch.int64),
            caption_ids=torch.tensor([ids[number[text]] for text in texts], dtype=torch.int64),
            inputs=inputs,
            bad=[sample.key for sample in samples if sample.pixels is None],
        )


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
