"""The settings that recipes of classifiers share; a recipe adds a section of its own by subclassing `ClassifierRun`."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from vlkd.data.pool import PoolData
from vlkd.data.views import ViewSettings
from vlkd.engine.settings import Job, check_range, teacher_names
from vlkd.models.classifier_spec import ClassifierSpec


@dataclass(frozen=True, kw_only=True)
class ClassTeaching:
    """The dual encoder that teaches, as a classifier of the same classes.

    Args:
        ref: its reference; "" trains from labels alone.
        zeta: its temperature: logits are cosines / zeta. 0 takes 1 / the model's own logit scale (0.01 for CLIP).
        few_shot: add a Tip-Adapter cache of the labelled images to its logits, its two constants chosen on validation
            images.
        views: train from its stored features of this many views of each image; 0 runs it beside the student, on a new
            view at every epoch.
        folder: of the stored features; what is missing is computed.
        dtype: how features are stored.
        batch_size: for the pass that computes them.
    """

    ref: str = ""
    zeta: float = 0.0
    few_shot: bool = False
    views: int = 4
    folder: str = "runs/teacher_features"
    dtype: Literal["float32", "float16", "bfloat16", "int8"] = "float16"
    batch_size: int = 64

    def __post_init__(self) -> None:
        check_range("teacher", self, zeta=(0, None), views=(0, None), batch_size=(1, None))

    @property
    def name(self) -> str:
        """A short name, by which stored features are found."""
        return teacher_names((self.ref,))[0]

    @property
    def place(self) -> Path:
        """The folder of everything that is stored of it."""
        return Path(self.folder) / self.name


@dataclass(frozen=True, kw_only=True)
class Mix:
    """How two heads' probabilities become one: alpha softmax(label head) + (1 - alpha) softmax(teacher head / beta).

    Args:
        tune: choose alpha and beta on validation images, each time these are looked at; else the values below are
            taken. Test images never choose anything.
        alpha: the label head's share.
        beta: the temperature of the teacher head.
    """

    tune: bool = True
    alpha: float = 0.5
    beta: float = 1.0

    def __post_init__(self) -> None:
        check_range("mix", self, alpha=(0, 1), beta=(1e-6, None))


@dataclass(frozen=True, kw_only=True)
class ClassifierTrain:
    """How it is trained.

    Args:
        samples: student samples seen, labelled ones and those of the pool together.
        batch_size: of both together, and of all ranks together; half of it is labelled where a recipe compares both.
        lr: peak learning rate of AdamW; behind it a cosine to zero.
        weight_decay: on matrices alone, never on biases and norms.
        warmup: share of all steps in which the rate rises to its peak.
        clip: largest norm of the gradient; 0 does not clip.
        channels_last: the trunk in the layout that convolutions prefer.
        precision: "bf16" runs the student under autocast; objectives are float32.
        conflicts: log the cosine between the gradients of the labels' and the teacher's losses, in the trunk and in
            the heads, at every logged step; it costs two more backward passes there.
        log_steps: between lines of metrics.jsonl.
        validations: how often validation images are looked at, evenly over the run; the last time at its end.
        choose: keep the weights of the look with the highest accuracy instead of the last ones.
        save_minutes: between checkpoints; 0 saves after every step.
        save_steps: between checkpoints, whichever comes first; 0 goes by minutes alone.
        device: "auto", "cpu" or "cuda".
    """

    samples: int = 60_000
    batch_size: int = 128
    lr: float = 1e-3
    weight_decay: float = 0.01
    warmup: float = 0.0
    clip: float = 0.0
    channels_last: bool = True
    precision: Literal["fp32", "bf16"] = "fp32"
    conflicts: bool = False
    log_steps: int = 20
    validations: int = 8
    choose: bool = True
    save_minutes: float = 5.0
    save_steps: int = 0
    device: Literal["auto", "cpu", "cuda"] = "auto"

    def __post_init__(self) -> None:
        check_range("train", self, samples=(1, None), batch_size=(2, None), log_steps=(1, None), validations=(1, None))
        check_range("train", self, lr=(1e-12, None), weight_decay=(0, None), warmup=(0, 1), clip=(0, None))
        check_range("train", self, save_minutes=(0, None), save_steps=(0, None))


@dataclass(frozen=True, kw_only=True)
class ClassifierReport:
    """What stands beside the student in the final table.

    Args:
        teacher: evaluate the teacher, too.
        compare: folders of further classifiers of the same classes, for instance of a run from labels alone.
    """

    teacher: bool = True
    compare: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class ClassifierRun(Job):
    """The run of a classifier."""

    data: PoolData = field(default_factory=PoolData)
    views: ViewSettings = field(default_factory=ViewSettings)
    model: ClassifierSpec = field(default_factory=ClassifierSpec)
    teacher: ClassTeaching = field(default_factory=ClassTeaching)
    mix: Mix = field(default_factory=Mix)
    train: ClassifierTrain = field(default_factory=ClassifierTrain)
    report: ClassifierReport = field(default_factory=ClassifierReport)
