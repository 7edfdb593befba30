"""Golden values: what a model gave for fixed inputs when it was saved, recomputed when it is loaded."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from vlkd.errors import UserError
from vlkd.models.base import DualEncoderModule

GOLDEN = "golden.safetensors"
TOLERANCE = 1e-3
SENTENCES = ("A brown dog runs along the beach.", "two red cups on a wooden table", "an empty street at night")
PACKAGES = ("vlkd", "torch", "timm", "transformers", "tokenizers", "pillow")


def probe_images() -> list[Image.Image]:
    """A landscape and a portrait in integer arithmetic, equal on every machine, with edges and gradients."""
    images = []
    for width, height, period in ((320, 240, 23), (180, 300, 41)):
        x, y = np.meshgrid(np.arange(width), np.arange(height))
        ring = ((x - width // 2) ** 2 + (y - height // 2) ** 2) // 97 % 256
        stripes = (x // period + y // (2 * period)) % 2 * 255
        images.append(Image.fromarray(np.stack([ring, stripes, (x + 2 * y) % 256], axis=2).astype(np.uint8)))
    return images


def golden_embeddings(model: DualEncoderModule) -> dict[str, Tensor]:
    """`image.embed` of `probe_images` and `text.embed` of `SENTENCES`, float32 on the CPU."""
    return {
        "image.embed": model.encode_image(probe_images()).cpu(),
        "text.embed": model.encode_text(SENTENCES).cpu(),
    }


def write_golden(model: DualEncoderModule, folder: str | Path) -> None:
    """Write `golden.safetensors` with the embeddings and the versions of the packages that shaped them."""
    store_golden(golden_embeddings(model), folder)


def check_golden(model: DualEncoderModule, folder: str | Path) -> None:
    """`compare_golden` of a model's embeddings."""
    compare_golden(model.name, lambda: golden_embeddings(model), folder)


def store_golden(values: Mapping[str, Tensor], folder: str | Path) -> None:
    """Write `golden.safetensors` with these values, on the CPU, and the versions of the packages that shaped them."""
    versions = {name: installed_version(name) for name in PACKAGES}
    save_file(dict(values), str(Path(folder) / GOLDEN), metadata=versions)


def compare_golden(model: str, compute: Callable[[], Mapping[str, Tensor]], folder: str | Path) -> None:
    """Recompute and compare; a folder without golden values passes.

    The measure is ||new - old|| / ||old|| per input, refused above 1e-3.

    Args:
        model: its name, for messages.
        compute: gives the values anew, called where there are stored ones.
        folder: the model's.

    Raises:
        UserError: a value differs, or the file is damaged; the message names the versions that changed.
    """
    path = Path(folder) / GOLDEN
    if not path.is_file():
        return
    found = compute()
    try:
        with safe_open(str(path), framework="pt") as file:
            then = {name: file.get_tensor(name) for name in found}
            versions = file.metadata() or {}
    except Exception as error:  # SafetensorError is no subclass of a standard one
        raise UserError(f"{path} is damaged ({error}); fetch or write the model again.") from error
    for name, now in found.items():
        old = then[name]
        worst = float("inf")
        if old.shape == now.shape:
            worst = float(torch.max((now - old).norm(dim=-1) / old.norm(dim=-1)))
        if not worst <= TOLERANCE:
            changed = [
                f"{package} {versions.get(package, 'unknown')} then, {installed_version(package)} now"
                for package in PACKAGES
                if versions.get(package) != installed_version(package)
            ]
            raise UserError(
                f"{model}: {name} of the golden inputs differs by {worst:.2g} of its length from the saved model, "
                f"expected at most {TOLERANCE:g} ({'; '.join(changed) or 'same package versions'}); "
                "the weights, the preprocessing or a package changed: restore them, or prepare the model again."
            )


def installed_version(package: str) -> str:
    """The version of an installed package, or "none"."""
    try:
        return version(package)
    except PackageNotFoundError:
        return "none"
