"""CLIP_benchmark's own reader of its webdataset folders."""

from __future__ import annotations

import importlib.util
import sys
import types
import warnings
from pathlib import Path
from typing import Any

import pytest


def by_clip_benchmark(root: Path, split: str = "test") -> Any:
    """The data set that `build_wds_dataset` makes of a folder; skips the test where the package is not installed."""
    pytest.importorskip("clip_benchmark")
    # Its module of downloads needs `requests`, which reading a local folder does not.
    absent = importlib.util.find_spec("requests") is None
    if absent:
        sys.modules["requests"] = types.ModuleType("requests")
    try:
        from clip_benchmark.datasets.builder import build_wds_dataset
    finally:
        if absent:
            del sys.modules["requests"]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "WebDataset.shardshuffle", UserWarning)
        return build_wds_dataset("any", lambda image: image, split=split, data_dir=str(root))
