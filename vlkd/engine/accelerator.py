"""The devices, ranks and precision of a run."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import timedelta

import torch
from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs

from vlkd.errors import UserError


def accelerator_of(
    device: str, precision: str, *, smoke: bool, trackers: Sequence[str] = (), out: str = ""
) -> Accelerator:
    """Accelerate's view of this machine.

    Args:
        device: "auto", "cpu" or "cuda".
        precision: "fp32" or "bf16".
        smoke: on the CPU in single precision, whatever the two say.
        trackers: names known to accelerate.
        out: folder of the trackers' files.

    Raises:
        UserError: a GPU is asked for and there is none.
    """
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError("train.device=cuda: torch finds no GPU here; set train.device=auto or cpu.")
    return Accelerator(
        cpu=device == "cpu" or smoke,
        mixed_precision="bf16" if precision == "bf16" and not smoke else "no",
        log_with=list(trackers) or None,
        # Ranks wait while the first one stores a teacher's features.
        kwargs_handlers=[InitProcessGroupKwargs(timeout=timedelta(days=7))],
        project_dir=out or None,
    )
