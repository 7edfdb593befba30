"""Short measurements on this machine: seconds per sample, and steps of the training loop itself with what they take."""

from __future__ import annotations

import contextlib
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

import torch
from accelerate import Accelerator
from PIL.Image import Image
from torch import Tensor

from vlkd.data.decoded import Decoded, shrink
from vlkd.data.loader import BatchStream
from vlkd.data.samples import BLANK, Batch, SampleSequence
from vlkd.data.table import Table
from vlkd.distill.distiller import Distiller
from vlkd.distill.teachers import OnlineTeacher
from vlkd.engine.footprint import Peaks, peak_bytes, reset_peak
from vlkd.engine.loop import train
from vlkd.engine.settings import Train
from vlkd.errors import UserError
from vlkd.features import Preprocessing
from vlkd.models.base import DualEncoderModule, evaluating
from vlkd.weighting import Weighting

Result = TypeVar("Result")

CHUNK, MOST_CHUNKS = 16, 32
DATA_SECONDS = 3.0


class StoredTeacher:
    """Stands in for a cached teacher before its cache is built: gives one vector for all rows, of the right shape.

    Args:
        name: of the teacher.
        model: the teacher.
        vectors: one row (1, ...) of each image and text feature, and scalars, as `one_of_each` gives them.
    """

    preprocessing: Preprocessing | None = None

    def __init__(self, name: str, model: DualEncoderModule, vectors: Mapping[str, Tensor]) -> None:
        self.name, self.width = name, model.width
        self.vectors = dict(vectors)
        self.provides = frozenset(vectors)

    def targets(self, batch: Batch, want: Collection[str]) -> dict[str, Tensor]:
        """As many rows as the batch has."""
        rows = {"image": len(batch.keys), "text": len(batch.texts)}
        found = {}
        for name in want:
            value = self.vectors[name].to(batch.captioned.device)
            side = name.partition(".")[0]
            found[name] = value.expand(rows[side], *value.shape[1:]).clone() if side in rows else value
        return found


class TimedTeacher(OnlineTeacher):
    """A teacher beside the student whose calls are timed."""

    def __init__(self, name: str, model: DualEncoderModule, texts: Mapping[str, Tensor] | None = None) -> None:
        super().__init__(name, model, texts)
        self.device = model.device
        self.seconds: list[float] = []

    def targets(self, batch: Batch, want: Collection[str]) -> dict[str, Tensor]:
        """The teacher's."""
        seconds, found = timed(lambda: super(TimedTeacher, self).targets(batch, want), self.device)
        self.seconds.append(seconds)
        return found


class DecodedOnce(Decoded):
    """Pictures held in memory as a run would hold all of them, each from its first use on."""

    def __init__(self, table: Table, short_side: int) -> None:
        self.table, self.short_side = table, short_side
        self.known: dict[int, Image] = {}

    def image(self, i: int) -> Image:
        """Image `i` as RGB; raises `BadImage` where it cannot be decoded."""
        if i not in self.known:
            self.known[i] = shrink(self.table.image(i, size_hint=self.short_side), self.short_side)
        return self.known[i].copy()

    def bytes_per_image(self) -> float:
        """Of those that were used."""
        return statistics.mean(3 * image.width * image.height for image in self.known.values()) if self.known else 0.0


class _EnoughError(Exception):
    pass


class _Repeated(BatchStream[SampleSequence]):
    """A stream that gives one batch a few times, then stops the loop around it."""

    def __init__(self, stream: BatchStream[SampleSequence], batch: Batch, count: int) -> None:
        self.__dict__.update(vars(stream))
        self.batch, self.count = batch, count
        self.batch_size, self.position = len(batch.keys), 0
        self.samples = max(stream.samples, (count + 1) * self.batch_size)

    def __iter__(self) -> Iterator[Batch]:
        for _ in range(self.count):
            self.position += self.batch_size
            yield self.batch
        raise _EnoughError


@dataclass(frozen=True, kw_only=True)
class Brief:
    """A few steps of the training loop.

    Attributes:
        batch_size: b.
        seconds: of a step without its teachers, the median.
        teachers: seconds of all teachers in a step, the median.
        peaks: of memory.
    """

    batch_size: int
    seconds: float
    teachers: float
    peaks: Peaks


def brief(
    distiller: Distiller,
    stream: BatchStream[SampleSequence],
    batch: Batch,
    weighting: Weighting,
    settings: Train,
    accelerator: Accelerator,
    *,
    warmup: int,
    steps: int,
) -> Brief:
    """Run the training loop itself for a few steps on one batch, in a folder that is removed, and without saving."""
    settings = replace(settings, log_steps=1, eval_samples=0, save_minutes=1e9, save_steps=0)
    device = accelerator.device
    if settings.compile:
        torch.compiler.reset()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        before = reset_peak(device)
        with contextlib.suppress(_EnoughError):
            train(
                distiller,
                _Repeated(stream, batch, warmup + steps),
                weighting,
                settings,
                folder,
                accelerator,
                lambda _: {},
            )
        rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()][warmup:]
    intervals = [len(batch.keys) / row["samples_per_second"] for row in rows]
    taught = [row["time/teacher"] * seconds for row, seconds in zip(rows, intervals, strict=True)]
    return Brief(
        batch_size=len(batch.keys),
        seconds=statistics.median(whole - part for whole, part in zip(intervals, taught, strict=True)),
        teachers=statistics.median(taught),
        peaks=Peaks(
            batch_size=len(batch.keys),
            before=before,
            device=peak_bytes(device),
            host=peak_bytes(torch.device("cpu")),
        ),
    )


def prepared(sequence: SampleSequence, distinct: int, count: int) -> Batch:
    """A batch of `count` samples made of the sequence's first `distinct` readable ones, over and over."""
    samples = [sequence[position] for position in range(min(2 * distinct, len(sequence.table)))]
    readable = [sample for sample in samples if not sample.problem][:distinct]
    if not readable:
        raise UserError(f"None of the first {len(samples)} samples can be used ({samples[0].problem}).")
    return sequence.collate([readable[i % len(readable)] for i in range(count)])


def sample_seconds(sequence: SampleSequence, *, threads: int) -> float:
    """Seconds to prepare one sample: read, decode, augment, tokenise, collate; the median over chunks of them.

    Args:
        sequence: the samples.
        threads: of torch: workers have one.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    # What a run holds in memory was decoded before its first step.
    rounds = 2 if isinstance(sequence.decoded, DecodedOnce) else 1
    try:
        for _ in range(rounds):
            found = _chunks(lambda start: sequence.collate([sequence[start + i] for i in range(CHUNK)]))
    finally:
        torch.set_num_threads(before)
    return found / CHUNK


def _chunks(prepare: Callable[[int], object]) -> float:
    """The median seconds of a chunk, the first left out."""
    seconds: list[float] = []
    while len(seconds) < 3 or (sum(seconds) < DATA_SECONDS and len(seconds) < MOST_CHUNKS):
        seconds.append(timed(lambda: prepare(len(seconds) * CHUNK), torch.device("cpu"))[0])
    return statistics.median(seconds[1:])


def repeated_seconds(work: Callable[[], object], device: torch.device, limit: float = 4.0) -> float:
    """The median seconds of a call after a first one: two to seven of them, fewer where they are slow."""
    spent, _ = timed(work, device)
    seconds: list[float] = []
    while len(seconds) < 2 or (spent < limit and len(seconds) < 7):
        seconds.append(timed(work, device)[0])
        spent += seconds[-1]
    return statistics.median(seconds)


def timed(work: Callable[[], Result], device: torch.device) -> tuple[float, Result]:
    """The seconds of a call, with all that it left to a GPU, and its result."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    started = time.perf_counter()
    found = work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - started, found


def one_of_each(model: DualEncoderModule, want: Collection[str], accelerator: Accelerator) -> dict[str, Tensor]:
    """One row (1, ...) of each image and text feature, and the scalars, float32 and masks, on the CPU."""
    transform = model.preprocessing
    inputs = {"pixels": transform.view_transform(BLANK)[None], **transform.tokenize(["a picture"])}
    inputs = {name: value.to(model.device) for name, value in inputs.items()}
    with torch.no_grad(), evaluating(model), accelerator.autocast():
        found = model.encode(inputs, want)
    return {name: (value.float() if value.is_floating_point() else value).cpu() for name, value in found.items()}
