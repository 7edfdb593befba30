"""The settings that recipes of generative models share; a recipe adds stages and a method by subclassing `VlmRun`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from vlkd.engine.settings import Job, check_range
from vlkd.models.llava_spec import LlavaSpec


@dataclass(frozen=True, kw_only=True)
class VlmData:
    """Conversations about pictures.

    Args:
        train: LLaVA files (`FILE.json`, or `FILE.json@FOLDER` where its pictures lie elsewhere) and VQA shards.
        val: the same, whose questions are asked now and then during training.
        test: the same, for the final tables, read once when training has ended; without any, those of `val`.
        window: batches among which conversations are sorted by length, so that little of a batch is padding; 0 takes
            them as they are drawn.
        keep_short_side: hold all training pictures in memory, reduced to this short side; 0 decodes anew each time.
        workers: processes that decode and tokenise.
    """

    train: tuple[str, ...] = ()
    val: tuple[str, ...] = ()
    test: tuple[str, ...] = ()
    window: int = 32
    keep_short_side: int = 0
    workers: int = 0

    def __post_init__(self) -> None:
        check_range("data", self, window=(0, None), keep_short_side=(0, None), workers=(0, None))


@dataclass(frozen=True, kw_only=True)
class StageSettings:
    """One stage of training.

    Args:
        samples: conversations seen, of all ranks together; 0 leaves the stage out.
        data: its own sources; () takes those of `data.train`.
        batch_size: of all ranks together.
        lr: peak learning rate of AdamW; behind it a cosine to zero. A language model that starts at random wants less
            the wider it is: at a width of 256 one never compared words with the picture at 2e-3, and did at 5e-4
            in smaller batches (`docs/evidence.md`). With pretrained weights 2e-5 is usual.
        vision_lr: that of the vision tower; 0 takes `lr`. One with weights forgets at rates that suit a random language
            model; LLaVA-OneVision (Li et al., 2024, arXiv:2408.03326) trains it at a fifth.
        warmup: share of the stage's steps in which the rate rises to its peak.
        parts: what learns, of vision, projector and language.
        freeze_batch_norm: batch norms of the student keep their running statistics, as in evaluation, and their weights
            still learn. For vision towers of convolutions that come with weights: the statistics of a few pictures
            are others than those the projector was trained on. One that starts at random needs those of its batches,
            and a student without batch norms is refused.
    """

    samples: int = 0
    data: tuple[str, ...] = ()
    batch_size: int = 32
    lr: float = 1e-3
    vision_lr: float = 0.0
    warmup: float = 0.03
    parts: tuple[str, ...] = ("vision", "projector", "language")
    freeze_batch_norm: bool = False

    def __post_init__(self) -> None:
        check_range("stage", self, samples=(0, None), batch_size=(1, None), lr=(1e-12, None), warmup=(0, 1))
        check_range("stage", self, vision_lr=(0, None))


@dataclass(frozen=True, kw_only=True)
class VlmTeaching:
    """The larger model.

    Args:
        ref: a LLaVA folder, a vlkd folder, or hf:OWNER/NAME; "" trains without one.
        stored: folder of its answers' distributions, from `vlkd cache answers`; "" runs it beside the student. They
            serve every term but those of the switch path and of visual tokens.
        checkpointing: recompute the blocks of its language model in the backward pass of the switch path, instead of
            holding what is inside them: less memory for one more forward pass.
        see: conversations on which the start-up check shows that its answers depend on the picture; 0 leaves it out.
        bridge: a trained linear map from the student's vision width to the teacher's on the switch path. A departure
            from Switch-KD, which needs equal widths, and refused where they are equal.
    """

    ref: str = ""
    stored: str = ""
    checkpointing: bool = True
    see: int = 64
    bridge: bool = False

    def __post_init__(self) -> None:
        check_range("teacher", self, see=(0, None))


@dataclass(frozen=True, kw_only=True)
class VlmTrain:
    """How every stage is trained.

    Args:
        micro_batch: conversations that pass at a time on each rank, gradients being added up; 0 passes the batch
            whole. Losses are means over the answer tokens of the whole batch either way.
        weight_decay: on matrices alone, never on biases and norms.
        clip: largest norm of the gradient; 0 does not clip.
        channels_last: both vision towers in the layout that convolutions prefer.
        checkpointing: recompute the blocks of the student's language model in the backward pass.
        precision: "bf16" runs both models under autocast; objectives are float32.
        log_steps: between lines of metrics.jsonl.
        validations: how often questions of `data.val` are asked in each stage, the last time at its end.
        val_questions: so many of them, drawn by the seed; 0 takes all.
        max_new_tokens: of an answer, at most; it ends earlier where the model says so.
        eval_batch: questions that are answered at a time.
        save_minutes: between checkpoints; 0 saves after every step.
        save_steps: between checkpoints, whichever comes first; 0 goes by minutes alone.
        device: "auto", "cpu" or "cuda".
    """

    micro_batch: int = 0
    weight_decay: float = 0.05
    clip: float = 1.0
    channels_last: bool = True
    checkpointing: bool = False
    precision: Literal["fp32", "bf16"] = "fp32"
    log_steps: int = 20
    validations: int = 2
    val_questions: int = 400
    max_new_tokens: int = 32
    eval_batch: int = 64
    save_minutes: float = 5.0
    save_steps: int = 0
    device: Literal["auto", "cpu", "cuda"] = "auto"

    def __post_init__(self) -> None:
        check_range("train", self, micro_batch=(0, None), weight_decay=(0, None), clip=(0, None))
        check_range("train", self, log_steps=(1, None), validations=(1, None), val_questions=(0, None))
        check_range("train", self, max_new_tokens=(1, None), eval_batch=(1, None))
        check_range("train", self, save_minutes=(0, None), save_steps=(0, None))


@dataclass(frozen=True, kw_only=True)
class VlmReport:
    """What stands beside the student in the final table.

    Args:
        teacher: ask the teacher, too.
        compare: folders of further models, for instance of a run without a teacher.
    """

    teacher: bool = True
    compare: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class VlmRun(Job):
    """The run of a generative model.

    Args:
        start: a model to go on from, a folder or hf:OWNER/NAME; "" builds one by `model`.
    """

    start: str = ""
    data: VlmData = field(default_factory=VlmData)
    model: LlavaSpec = field(default_factory=LlavaSpec)
    teacher: VlmTeaching = field(default_factory=VlmTeaching)
    train: VlmTrain = field(default_factory=VlmTrain)
    report: VlmReport = field(default_factory=VlmReport)
