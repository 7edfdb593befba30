"""AdamW's parameter groups, the learning-rate schedule, averaged weights."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from vlkd.engine.distributed import own_part


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
    """Two groups: matrices decay; biases, norms and the logit scale (all of fewer than two dimensions) do not.

    Two more follow where parameters are sharded, because one kernel does not take sharded and whole ones together.
    """
    trained = [value for value in module.parameters() if value.requires_grad]
    whole = [value for value in trained if not isinstance(value, DTensor)]
    sharded = [value for value in trained if isinstance(value, DTensor)]
    return [
        group
        for values in ((whole, sharded) if sharded else (whole,))
        for group in (
            {"params": [value for value in values if value.dim() >= 2], "weight_decay": weight_decay},
            {"params": [value for value in values if value.dim() < 2], "weight_decay": 0.0},
        )
    ]


class AveragedWeights:
    """An exponential moving average of a module's parameters and floating-point buffers.

    The decay of step t is min(decay, (1 + t) / (10 + t)), so that the random start is forgotten. Of a sharded module
    each rank averages the part it holds. `vlkd.engine.sharding.fill_whole` puts the values into a module.

    Args:
        module: what is averaged, after it was sharded.
        decay: of late steps.
    """

    def __init__(self, module: nn.Module, decay: float) -> None:
        self._values = {name: value.detach().clone() for name, value in module.state_dict().items()}
        self.decay = decay

    def state_dict(self) -> dict[str, Tensor]:
        """The averages themselves under the module's names, not copies."""
        return self._values

    @torch.no_grad()
    def update(self, module: nn.Module, step: int) -> None:
        """Move towards the module's present values after step `step` (from 0)."""
        share = 1 - min(self.decay, (1 + step) / (10 + step))
        present = module.state_dict()
        for name, value in self._values.items():
            own, towards = own_part(value), own_part(present[name])
            if own.is_floating_point():
                own.lerp_(towards.to(own.dtype), share)
            else:
                own.copy_(towards)


@torch.no_grad()
def clamp_logit_scale(log_scale: Tensor, largest: float) -> None:
    """Keep exp(log_scale) at or below `largest` (CLIP, section 2.5: 100)."""
    log_scale.clamp_(max=math.log(largest))
