"""Every test starts from the same seed; towers are imported only after the torchvision work-around."""

from __future__ import annotations

import pytest
import torch

import vlkd.models  # noqa: F401


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)
