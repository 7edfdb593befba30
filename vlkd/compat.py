"""Work around a torchvision wheel whose compiled operators do not match the installed torch.

A CPU build of torch next to the registry's CUDA build of torchvision is a common pair: torchvision's extension then
cannot load, and its import fails on one line that registers shape functions for `nms` without checking that the
operator is there. timm and open_clip import torchvision for its Python transforms alone, which work without the
extension.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path

import torch

_KEEP_ALIVE: list[torch.library.Library] = []


def allow_torchvision_without_operators() -> None:
    """Declare the schemas of torchvision's `nms` if its extension cannot load, so that it can be imported."""
    spec = importlib.util.find_spec("torchvision")
    if spec is None or spec.origin is None or _KEEP_ALIVE:
        return
    for extension in Path(spec.origin).parent.glob("_C*.so"):
        try:
            torch.ops.load_library(str(extension))  # type: ignore[no-untyped-call]
        except OSError:
            library = torch.library.Library("torchvision", "FRAGMENT")  # type: ignore[no-untyped-call]
            for operator in ("nms", "qnms"):
                schema = f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
                library.define(schema)  # type: ignore[no-untyped-call]
            _KEEP_ALIVE.append(library)
            return
