"""The settings every recipe shares; a recipe adds a section of its own by subclassing `Run`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from vlkd.data.views import ViewSettings
from vlkd.errors import UserError
from vlkd.models.spec import CompositeSpec


@dataclass(frozen=True, kw_only=True)
class Data:
    """What is read.

    Args:
        train: sources (`PATH` or `PATH#SPLIT`); images without captions take part in the terms that need none.
        val: captioned sources on which the run is watched, each on its own.
        test: captioned sources for the final tables, read once when training has ended; without any, those of `val`.
        stream: read folders of shards through the index that `vlkd prep scan` makes, instead of holding a table in
            memory: for data larger than memory, and for remote shards.
        weights: of the sources of `train` in the mixture, each of which then has epochs of its own; () takes every
            sample of all sources once per epoch.
        shuffle_shards: streamed shards of a source whose samples are mixed at a time; so many are read at any moment,
            twice as many where a batch lies across two blocks. Shards whose samples are alike want many of them.
        copies: folder in which remote shards are kept.
        copies_gb: its limit; what was not used for longest goes first.
        zero_shot: folders PATH/CLASS/*.jpg on which zero-shot classification is watched.
        keep_short_side: hold all training images in memory, reduced to this short side; 0 decodes anew each time.
        workers: processes that decode training images.
    """

    train: tuple[str, ...] = ()
    val: tuple[str, ...] = ()
    test: tuple[str, ...] = ()
    stream: bool = False
    weights: tuple[float, ...] = ()
    shuffle_shards: int = 8
    copies: str = "runs/shard_copies"
    copies_gb: float = 50.0
    zero_shot: tuple[str, ...] = ()
    keep_short_side: int = 0
    workers: int = 0

    def __post_init__(self) -> None:
        check_range("data", self, shuffle_shards=(1, None), copies_gb=(0, None), keep_short_side=(0, None))
        check_range("data", self, workers=(0, None))


@dataclass(frozen=True, kw_only=True)
class Teachers:
    """Who is matched.

    Args:
        refs: references of dual encoders; () trains without a teacher.
        weights: one per teacher; () is uniform.
        views: train from the teachers' stored features of this many views of each image; 0 runs them beside the
            student, on a new view at every epoch.
        folder: the cache of stored features, as `vlkd cache embeddings --out` writes it; what is missing is computed.
        dtype: how features are stored.
        batch_size: for the pass that computes them.
        bank: class vectors: a seeded sample of so many captions and images; 0 takes the batch's.
    """

    refs: tuple[str, ...] = ()
    weights: tuple[float, ...] = ()
    views: int = 4
    folder: str = "runs/teacher_features"
    dtype: Literal["float32", "float16", "bfloat16", "int8"] = "float16"
    batch_size: int = 64
    bank: int = 0

    def __post_init__(self) -> None:
        check_range("teachers", self, views=(0, None), batch_size=(1, None), bank=(0, None))


@dataclass(frozen=True, kw_only=True)
class Student:
    """What is trained, beyond the model's own specification.

    Args:
        start: a vlkd model folder to continue from, in place of building `model`.
        vocab_size: of the tokenizer trained on the captions, for a compact text tower without `model.tokenizer`.
        frozen_towers: train the projections alone, on tower features computed once.
        dtype: how the exported weights are stored.
    """

    start: str = ""
    vocab_size: int = 4000
    frozen_towers: bool = False
    dtype: Literal["float32", "float16"] = "float32"


@dataclass(frozen=True, kw_only=True)
class Train:
    """How it is trained.

    Args:
        samples: student samples seen; an epoch is as many as there are training images.
        batch_size: of all ranks together.
        local_loss: each rank compares its own rows with those of all ranks, instead of the whole batch with itself: the
            same loss and gradients for a part of the memory.
        shard: split weights, gradients and optimiser state among the ranks (FSDP2) instead of copying them.
        accumulate: parts in which each rank's batch passes the towers, to save memory; losses and teacher weights are
            those of the whole batch, at the price of a second forward pass (BatchNorm sees the parts).
        lr: peak learning rate of AdamW; behind it a cosine to zero.
        weight_decay: on matrices alone, never on biases, norms, embeddings of one dimension or the logit scale.
        warmup: share of all steps in which the rate rises to its peak.
        clip: largest norm of the gradient; 0 does not clip.
        ema: decay of the averaged weights that are evaluated and exported; 0 keeps none.
        max_logit_scale: the logit scale is clamped to it after each step.
        spike_factor: skip and report an update whose gradient is longer than so many times the median of the last 128,
            or not finite; 0 takes every update and ends at the first loss that is not finite.
        channels_last: image towers in the layout that convolutions prefer.
        compile: compile the student's towers with torch.compile; the first steps take a minute.
        precision: "bf16" runs towers, heads and objectives' own networks under autocast; objectives are float32.
        log_steps: between lines of metrics.jsonl.
        eval_samples: between evaluations on `data.val`; 0 evaluates only at the end.
        save_minutes: between checkpoints; 0 saves after every step.
        save_steps: between checkpoints, whichever comes first; 0 goes by minutes alone.
        device: "auto", "cpu" or "cuda".
        trackers: names known to accelerate, for instance tensorboard or wandb.
    """

    samples: int = 200_000
    batch_size: int = 256
    local_loss: bool = False
    shard: bool = False
    accumulate: int = 1
    lr: float = 1e-3
    weight_decay: float = 0.1
    warmup: float = 0.05
    clip: float = 1.0
    ema: float = 0.0
    max_logit_scale: float = 100.0
    spike_factor: float = 0.0
    channels_last: bool = True
    compile: bool = False
    precision: Literal["fp32", "bf16"] = "fp32"
    log_steps: int = 20
    eval_samples: int = 0
    save_minutes: float = 5.0
    save_steps: int = 0
    device: Literal["auto", "cpu", "cuda"] = "auto"
    trackers: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        counts = dict.fromkeys(("samples", "batch_size", "accumulate", "log_steps"), (1, None))
        check_range("train", self, **counts, lr=(1e-12, None), weight_decay=(0, None), warmup=(0, 1), clip=(0, None))
        check_range("train", self, ema=(0, 0.999999), max_logit_scale=(1e-6, None), eval_samples=(0, None))
        check_range("train", self, save_minutes=(0, None), save_steps=(0, None))
        if self.spike_factor and not self.spike_factor > 1:
            raise UserError(f"train.spike_factor={self.spike_factor}: expected 0, or more than 1.")


@dataclass(frozen=True, kw_only=True)
class Report:
    """What stands beside the student in the final table.

    Args:
        teachers: evaluate the teachers, too.
        compare: references of further models, for instance the same student trained without a teacher.
        asymmetric: also export the student's image tower beside each teacher's text encoder, where a head leads there.
    """

    teachers: bool = True
    compare: tuple[str, ...] = ()
    asymmetric: bool = False


@dataclass(frozen=True, kw_only=True)
class Job:
    """What every run has, whatever it trains.

    Args:
        out: the folder of everything it writes; the same command continues there.
        seed: of weights, order and captions.
        smoke: three small steps on drawn images, on the CPU, to see that everything fits.
    """

    out: str = "runs/run"
    seed: int = 0
    smoke: bool = False


@dataclass(frozen=True, kw_only=True)
class Run(Job):
    """The run of a dual encoder."""

    data: Data = field(default_factory=Data)
    views: ViewSettings = field(default_factory=ViewSettings)
    model: CompositeSpec = field(default_factory=CompositeSpec)
    student: Student = field(default_factory=Student)
    teachers: Teachers = field(default_factory=Teachers)
    train: Train = field(default_factory=Train)
    report: Report = field(default_factory=Report)

    @property
    def teacher_names(self) -> tuple[str, ...]:
        """A short unique name per teacher."""
        return teacher_names(self.teachers.refs)


def check_range(section: str, settings: object, **ranges: tuple[float, float | None]) -> None:
    """Raise `UserError` for the first setting outside its (lowest, highest); None has no limit."""
    for name, (low, high) in ranges.items():
        value = getattr(settings, name)
        if not low <= value <= (float("inf") if high is None else high):
            limit = "or more" if high is None else f"to {high:g}"
            raise UserError(f"{section}.{name}={value}: expected {low:g} {limit}.")


def teacher_names(refs: Sequence[str]) -> tuple[str, ...]:
    """A short name per reference, by which caches are found: it does not depend on the order.

    The last part of the path, of a run's `student` folder the run's; as many parts in front of it as make it unique.
    The same reference twice is numbered, and so is one that would be called as the student is.
    """
    parts = [_name_parts(ref) for ref in refs]
    depth = 1
    while depth < max(map(len, parts), default=1) and len({tuple(one[-depth:]) for one in parts}) < len(set(refs)):
        depth += 1
    names: list[str] = []
    for one in parts:
        clash = sum(one[-1] == other[-1] for other in parts) > 1
        name = "-".join(one[-depth:] if clash else one[-1:]) or "teacher"
        number = 1
        while name in ("student", *names):
            name, number = f"{name.removesuffix(f'-{number - 1}')}-{number}", number + 1
        names.append(name)
    return tuple(names)


def _name_parts(ref: str) -> list[str]:
    path = Path(ref.partition("@")[0])
    path = path.parent if path.name == "student" and path.parent.name else path
    return [part.replace(":", "-").replace(".", "-") for part in path.parts if part != "/"] or ["teacher"]
