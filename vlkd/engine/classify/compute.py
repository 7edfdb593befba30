"""How much arithmetic a run cost, its teacher's passes included."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from vlkd.engine.classify.settings import ClassifierRun
from vlkd.engine.classify.teaching import Teaching
from vlkd.models.base import evaluating
from vlkd.models.classifier import Classifier

BACKWARD = 2.0
"""A backward pass in forward passes: the gradients of inputs and of weights."""


def compute(
    config: ClassifierRun, student: Classifier, teaching: Teaching | None, pool: int, *, backward: int
) -> dict[str, float]:
    """TFLOP, two for each multiplication with its addition: `student_tflop` of training, `teacher_tflop` of its passes.

    Conflicts that are logged are measured aside and not counted. A teacher whose features are stored passes its views
    of the pool once, for all runs that read them.

    Args:
        config: of the run.
        student: whose forward pass is counted on one image.
        teaching: the teacher, None for none.
        pool: training images.
        backward: backward passes a step.
    """
    forward = forward_flop(student, student, student.preprocessing.image_size)
    own = (1 + BACKWARD * backward) * config.train.samples * forward
    found = {"student_tflop": own / 1e12, "teacher_tflop": 0.0}
    if teaching is not None:
        model = teaching.model
        passes = config.teacher.views * pool if config.teacher.views else config.train.samples

        def embed(pixels: Tensor) -> Tensor:
            return model.encode({"pixels": pixels}, ("image.embed",))["image.embed"]

        found["teacher_tflop"] = passes * forward_flop(model, embed, model.preprocessing.image_size) / 1e12
    return found


def forward_flop(model: torch.nn.Module, call: Callable[[Tensor], Tensor], size: tuple[int, int]) -> float:
    """Of one image of this height and width."""
    device = next(model.parameters()).device
    with torch.no_grad(), evaluating(model), FlopCounterMode(display=False) as counter:
        call(torch.zeros(1, 3, *size, device=device))
    return float(counter.get_total_flops())


def compute_words(found: dict[str, float], config: ClassifierRun) -> str:
    """The same in a sentence."""
    words = f"Arithmetic: the student's training {found['student_tflop']:.3g} TFLOP"
    if not found["teacher_tflop"]:
        return f"{words}."
    once = ", once for all runs that read its stored features" if config.teacher.views else ""
    return f"{words}, the teacher's passes {found['teacher_tflop']:.3g} TFLOP{once}."
