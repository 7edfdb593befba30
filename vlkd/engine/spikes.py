"""The guard against loss spikes: an update that stands out is skipped and reported, never silently taken."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

from vlkd.engine.distributed import agreed
from vlkd.engine.log import MetricsLog
from vlkd.errors import UserError

WINDOW = 128
FIRST = 32
"""Updates that are taken as they come, before there is a median to speak of; infinite ones are skipped all the same."""
LONGEST_RUN = 20
SHOWN = 64


class SpikeGuard:
    """Judges each update by the length of its gradient against the median of the last ones that were taken.

    A skipped update leaves no trace: running statistics are put back, too. Rank 0 judges for all ranks.

    Args:
        factor: longest gradient that is taken, in medians; 0 takes everything.
        module: what is trained.
    """

    def __init__(self, factor: float, module: nn.Module) -> None:
        self.factor = factor
        self.buffers = list(module.buffers()) if factor else []
        self.log: MetricsLog | None = None
        self.norms: deque[float] = deque(maxlen=WINDOW)
        self.skipped = 0
        self.run = 0
        self._kept: list[Tensor] = []

    def write_to(self, path: Path, step: int) -> None:
        """Report skipped updates in a file of JSON lines; those behind `step`, of a killed run, are cut off first."""
        if self.factor:
            self.log = MetricsLog(path, step)

    def before(self) -> None:
        """Keep what a forward pass changes."""
        self._kept = [buffer.clone() for buffer in self.buffers]

    def takes(self, gradient_norm: Tensor, *, step: int, samples: int, keys: Sequence[str]) -> bool:
        """Whether an update is taken; one that is not is reported, and what `before` kept is put back.

        Args:
            gradient_norm: (); not finite where the loss was not.
            step: that the update would have made.
            samples: seen so far.
            keys: of this rank's samples.

        Raises:
            UserError: the twentieth update in a row was skipped.
        """
        if not self.factor:
            return True
        norm = float(gradient_norm)
        typical = median(self.norms) if len(self.norms) >= FIRST else math.inf
        if agreed(math.isfinite(norm) and norm <= self.factor * typical):
            # A batch without any sample that a term takes has no gradient, and is no measure.
            if norm:
                self.norms.append(norm)
            self.run = 0
            return True
        with torch.no_grad():
            for buffer, kept in zip(self.buffers, self._kept, strict=True):
                buffer.copy_(kept)
        self.skipped += 1
        self.run += 1
        if self.log:
            figures = {"gradient_norm": str(norm), "median": str(typical), "keys": list(keys[:SHOWN])}
            self.log.write(step, samples, figures)
            print(f"skipped step {step}: gradient {norm:.3g}, median {typical:.3g}; see {self.log.path}", flush=True)
        if self.run >= LONGEST_RUN:
            raise UserError(
                f"{self.run} updates in a row were skipped (gradient {norm:.3g}, median {typical:.3g}); continue with "
                "a higher train.spike_factor, or train anew with a lower train.lr and another out=FOLDER."
            )
        return False

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint holds."""
        return {"norms": list(self.norms), "skipped": self.skipped, "run": self.run}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from a state."""
        self.norms = deque(state["norms"], maxlen=WINDOW)
        self.skipped, self.run = state["skipped"], state["run"]
