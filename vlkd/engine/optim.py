"""AdamW's parameter groups, the learning-rate schedule, averaged weights."""

from __future__ import annotations

import copy
import math
from typing import Generic, TypeVar

import torch
from torch import Tensor, nn

Trained = TypeVar("Trained", bound=nn.Module)


def learning_rate(step: int, *, steps: int, peak: float, warmup: float) -> float:
    """Linear to `peak` over the first `warmup` share of `steps`, then half a cosine to zero.

    Args:
        step: from 0.
        steps: of the whole run.
        peak: highest rate.
        warmup: share of the steps.
    """
    rising = max(1, round(warmup * steps))
    if step < rising:
        return peak * (step + 1) / rising
    return peak * 0.5 * (1 + math.cos(math.pi * (step - rising) / max(1, steps - rising)))


def parameter_groups(module: nn.Module, weight_decay: float) -> list[dict[str, object]]:
    """Two groups: matrices decay; biases, norms and the logit scale (all of fewer than two dimensions) do not."""
    trained = [value for value in module.parameters() if value.requires_grad]
    return [
        {"params": [value for value in trained if value.dim() >= 2], "weight_decay": weight_decay},
        {"params": [value for value in trained if value.dim() < 2], "weight_decay": 0.0},
    ]


class AveragedWeights(Generic[Trained]):
    """An exponential moving average of a module's parameters and floating-point buffers.

    The decay of step t is min(decay, (1 + t) / (10 + t)), so that the random start is forgotten.

    Args:
        module: what is averaged; it is copied.
        decay: of late steps.
    """

    def __init__(self, module: Trained, decay: float) -> None:
        self.module: Trained = copy.deepcopy(module).eval().requires_grad_(False)
        self.decay = decay

    @torch.no_grad()
    def update(self, module: nn.Module, step: int) -> None:
        """Move towards the module's present values after step `step` (from 0)."""
        share = 1 - min(self.decay, (1 + step) / (10 + step))
        present = module.state_dict()
        for name, value in self.module.state_dict().items():
            if value.is_floating_point():
                value.lerp_(present[name].to(value.dtype), share)
            else:
                value.copy_(present[name])


@torch.no_grad()
def clamp_logit_scale(log_scale: Tensor, largest: float) -> None:
    """Keep exp(log_scale) at or below `largest` (CLIP, section 2.5: 100)."""
    log_scale.clamp_(max=math.log(largest))
