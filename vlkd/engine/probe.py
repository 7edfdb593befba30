"""Short measurements on this machine: seconds per sample, steps of the training loop itself, and the memory they take."""

from __future__ import annotations

import ctypes
import json
import resource
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from accelerate import Accelerator
from PIL.Image import Image
from torch import Tensor, nn

from vlkd.data.decoded import Decoded, shrink
from vlkd.data.loader import BatchStream
from vlkd.data.samples import BLANK, Batch, SampleSequence
from vlkd.data.table import Table
from vlkd.distill.distiller import Distiller
from vlkd.distill.teachers import OnlineTeacher
from vlkd.engine.loop import train
from vlkd.engine.settings import Train
from vlkd.errors import UserError
from vlkd.features import Preprocessing
from vlkd.models.base import DualEncoderModule, evaluating
from vlkd.weighting import Weighting

CHUNK, MOST_CHUNKS = 16, 32
DATA_SECONDS = 3.0
ODD = 7
"""A batch size that is no width of a model, so that what has it twice is a matrix of the loss."""


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


class _Repeated(BatchStream):
    """A stream that gives one batch a few times, then stops the loop around it."""

    def __init__(self, stream: BatchStream, batch: Batch, count: int) -> None:
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
        before: bytes in use before.
        peak: the most bytes in use, on the device.
        host_peak: the most bytes of the process.
    """

    batch_size: int
    seconds: float
    teachers: float
    before: int
    peak: int
    host_peak: int


def brief(
    distiller: Distiller,
    stream: BatchStream,
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
        try:
            train(
                distiller,
                _Repeated(stream, batch, warmup + steps),
                weighting,
                settings,
                folder,
                accelerator,
                lambda _: {},
            )
        except _EnoughError:
            pass
        rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()][warmup:]
    intervals = [len(batch.keys) / row["samples_per_second"] for row in rows]
    taught = [row["time/teacher"] * seconds for row, seconds in zip(rows, intervals, strict=True)]
    return Brief(
        batch_size=len(batch.keys),
        seconds=statistics.median(whole - part for whole, part in zip(intervals, taught, strict=True)),
        teachers=statistics.median(taught),
        before=before,
        peak=peak_bytes(device),
        host_peak=peak_bytes(torch.device("cpu")),
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


def timed[Result](work: Callable[[], Result], device: torch.device) -> tuple[float, Result]:
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


def loss_matrix_bytes(distiller: Distiller, batch: Batch, accelerator: Accelerator) -> float:
    """Bytes of B x B matrices that comparing a batch keeps for the backward pass, per B * B, the gradient's own added.

    Args:
        distiller: on the device of the accelerator.
        batch: of `ODD` samples.
        accelerator: device and precision.
    """
    batch = batch.to(accelerator.device)
    with torch.no_grad(), evaluating(distiller), accelerator.autocast():
        features = distiller.student_features(batch)
    sides = {len(batch.keys), len(batch.texts)}
    kept: dict[int, int] = {}

    def keep(value: Tensor) -> Tensor:
        if value.dim() == 2 and set(value.shape) <= sides:
            kept[value.untyped_storage().data_ptr()] = value.numel() * value.element_size()
        return value

    leaves = {name: value.clone().requires_grad_(value.is_floating_point()) for name, value in features.items()}
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda value: value), accelerator.autocast():
        # Holding the losses holds what they keep: nothing else can take its place in memory meanwhile.
        compared = distiller.compare(leaves, batch)
    del compared
    return (sum(kept.values()) + max(kept.values(), default=0)) / len(batch.keys) ** 2


def held_bytes(distiller: Distiller, ema: float) -> dict[str, int]:
    """Bytes of what the loop holds beside activations: exact sums over tensors.

    Args:
        distiller: student, heads, objectives.
        ema: decay of the averaged weights; 0 keeps none.
    """
    trained = sum(tensor_bytes(value) for value in distiller.parameters() if value.requires_grad)
    exported = state_bytes(nn.ModuleDict({"student": distiller.student, "heads": distiller.heads}))
    return {
        "weights": state_bytes(distiller),
        "gradients": trained,
        "moments": 2 * trained,
        "averaged weights": exported if ema else 0,
        "copy to evaluate": exported,
    }


def state_bytes(module: nn.Module) -> int:
    """Bytes of all parameters and buffers."""
    return sum(map(tensor_bytes, module.state_dict().values()))


def tensor_bytes(value: Tensor) -> int:
    """Bytes of a tensor's elements."""
    return value.numel() * value.element_size()


def batch_bytes(batch: Batch) -> int:
    """Bytes of what is prepared for the models."""
    return sum(tensor_bytes(value) for part in batch.inputs.values() for value in part.values())


def reset_peak(device: torch.device) -> int:
    """Start counting the peaks of a device and of this process anew; returns the bytes in use on the device."""
    status = Path("/proc/self/clear_refs")
    if sys.platform == "linux" and status.exists():
        # Freed memory that the C library keeps would hide what the next step takes.
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if trim is not None:
            trim(0)
        status.write_text("5")
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return int(torch.cuda.memory_allocated(device))
    return _status("VmRSS") or peak_bytes(device)


def peak_bytes(device: torch.device) -> int:
    """The most bytes in use since `reset_peak`; of a process, where the system cannot start anew, since it began."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    unit = 1 if sys.platform == "darwin" else 1024
    return _status("VmHWM") or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _status(name: str) -> int:
    """A size of this process as Linux tells it, 0 elsewhere."""
    path = Path("/proc/self/status")
    lines: Sequence[str] = path.read_text().splitlines() if path.is_file() else ()
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:")), 0)
