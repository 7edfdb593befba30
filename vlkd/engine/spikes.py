"""The guard against loss spikes: an update that stands out is skipped and reported, never silently taken."""

from __future__ import annotations

import json
import math
from collections import deque
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from torch import Tensor

from vlkd.errors import UserError

WINDOW = 128
FIRST = 32
"""Updates that are taken as they come, before there is a median to speak of; infinite ones are skipped all the same."""
LONGEST_RUN = 20
SHOWN = 64


class SpikeGuard:
    """Judges each update by the length of its gradient against the median of the last ones that were taken.

    Every rank comes to the same judgement, because the gradient is that of all ranks.

    Args:
        factor: longest gradient that is taken, in medians; 0 takes everything.
        log: file of the skipped updates, JSON lines; None on ranks that do not write.
    """

    def __init__(self, factor: float, log: Path | None) -> None:
        self.factor = factor
        self.log = log
        self.norms: deque[float] = deque(maxlen=WINDOW)
        self.skipped = 0
        self.run = 0

    def takes(self, gradient_norm: Tensor, *, step: int, samples: int, keys: Sequence[str]) -> bool:
        """Whether an update is taken; one that is not is reported.

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
        if math.isfinite(norm) and norm <= self.factor * typical:
            self.norms.append(norm)
            self.run = 0
            return True
        self.skipped += 1
        self.run += 1
        if self.log:
            row = {"step": step, "samples": samples, "gradient_norm": str(norm), "median": str(typical)}
            with self.log.open("a", encoding="utf-8") as file:
                file.write(json.dumps({**row, "keys": list(keys[:SHOWN])}) + "\n")
            print(f"skipped step {step}: gradient {norm:.3g}, median {typical:.3g}; see {self.log.name}", flush=True)
        if self.run >= LONGEST_RUN:
            raise UserError(
                f"{self.run} updates in a row were skipped (gradient {norm:.3g}, median {typical:.3g}); go back to an "
                "earlier checkpoint, and lower train.lr or raise train.spike_factor."
            )
        return False

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint holds."""
        return {"norms": list(self.norms), "skipped": self.skipped, "run": self.run}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from a state."""
        self.norms = deque(state["norms"], maxlen=WINDOW)
        self.skipped, self.run = state["skipped"], state["run"]
