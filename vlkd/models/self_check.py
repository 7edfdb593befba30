"""The start-up check of a model: does it see what it was trained on, and does it match images with their captions?"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from PIL import Image
from torch import Tensor

from vlkd.errors import UserError
from vlkd.models.base import DualEncoderModule, evaluating
from vlkd.models.golden import SENTENCES, probe_images

PAIRS_TO_REFUSE = 64
LEAST_Z = 3.0
"""One-sided p of about 0.001: a working model is far above, a shuffled pairing almost never."""


@dataclass(frozen=True, kw_only=True)
class SelfCheckReport:
    """What the check found in a model that passed.

    Args:
        name: the model's reference.
        pairs: number of image-caption pairs.
        matched: mean cosine of the pairs.
        mismatched: mean cosine of all other combinations.
        z: how many standard deviations the matched mean lies above a random pairing's.
        warnings: sentences for the user; empty when all is well.
    """

    name: str
    pairs: int
    matched: float
    mismatched: float
    z: float
    warnings: tuple[str, ...]


def self_check(model: DualEncoderModule, images: Sequence[Image.Image], captions: Sequence[str]) -> SelfCheckReport:
    """Check preprocessing, finiteness, that both inputs matter, and paired captions against shuffled ones.

    Args:
        model: the model; it is only read.
        images: decoded RGB images.
        captions: one per image, in the same order.

    Raises:
        UserError: the preprocessing is not the library's, an output is not finite, zero or constant, or, from 64 pairs
            up, paired captions are not closer than shuffled ones.
    """
    if len(images) != len(captions) or not images:
        raise UserError(
            f"Self-check of {model.name}: found {len(images)} images and {len(captions)} captions, "
            "expected one caption per image and at least one pair."
        )
    check_preprocessing(model)
    check_outputs(f"{model.name}: image.embed", model.encode_image([*probe_images(), Image.new("RGB", (64, 64))]))
    check_outputs(f"{model.name}: text.embed", model.encode_text(SENTENCES))
    image_embed = model.encode_image(images).double().cpu()
    text_embed = model.encode_text(captions).double().cpu()
    check_finite(f"{model.name}: image.embed", image_embed)
    check_finite(f"{model.name}: text.embed", text_embed)
    similarity = torch.nn.functional.normalize(image_embed, dim=1) @ torch.nn.functional.normalize(text_embed, dim=1).T
    matched, mismatched, z = pairing_statistic(similarity)
    warnings = []
    if not z >= LEAST_Z:
        sentence = (
            f"{model.name}: the mean cosine of {len(images)} pairs is {matched:.3f}, of other combinations "
            f"{mismatched:.3f}, z = {z:.1f}; expected at least {LEAST_Z:g}: the captions may belong to other images, "
            "or the model's preprocessing or tokenizer may be wrong."
        )
        if len(images) >= PAIRS_TO_REFUSE:
            raise UserError(sentence + " Check the data's pairs, or choose another teacher.")
        warnings.append(sentence + f" With {PAIRS_TO_REFUSE} pairs this would be refused.")
    return SelfCheckReport(
        name=model.name, pairs=len(images), matched=matched, mismatched=mismatched, z=z, warnings=tuple(warnings)
    )


def pairing_statistic(similarity: Tensor) -> tuple[float, float, float]:
    """Mean of the diagonal, mean off the diagonal, and the z of the diagonal's sum among all pairings.

    For a random permutation p of n columns, the sum of a[i, p(i)] has mean n * mean(a) and variance
    sum(d^2) / (n - 1), with d the doubly centred matrix (Hoeffding 1951, "A combinatorial central limit theorem").

    Args:
        similarity: (B, B), cosines, row image and column text; z is 0 for a single pair.
    """
    count = similarity.shape[0]
    matched = float(similarity.diagonal().mean())
    if count == 1:
        return matched, matched, 0.0
    mismatched = float((similarity.sum() - similarity.diagonal().sum()) / (count * (count - 1)))
    centred = similarity - similarity.mean(dim=0) - similarity.mean(dim=1, keepdim=True) + similarity.mean()
    deviation = float((centred.square().sum() / (count - 1)).sqrt())
    excess = float(similarity.diagonal().sum() - count * similarity.mean())
    return matched, mismatched, excess / deviation if deviation > 1e-9 else 0.0


def check_finite(what: str, embeddings: Tensor) -> None:
    """Raise `UserError` for NaN, infinity or a vector of length zero in (B, D)."""
    bad = int((~torch.isfinite(embeddings).all(dim=1)).sum())
    if bad:
        raise UserError(f"{what} has {bad} of {len(embeddings)} rows with NaN or infinity; the weights are damaged.")
    if bool((embeddings.norm(dim=1) == 0).any()):
        raise UserError(f"{what} has a vector of length zero, which has no cosine; the weights are damaged.")


def check_outputs(what: str, embeddings: Tensor) -> None:
    """Raise `UserError` unless (B, D) of differing inputs is finite and its rows differ in direction."""
    check_finite(what, embeddings)
    directions = torch.nn.functional.normalize(embeddings.double(), dim=1)
    if float((directions - directions[:1]).abs().max()) < 1e-6:
        raise UserError(f"{what} is the same for differing inputs; expected it to depend on them, check the weights.")


def measured_normalisation(model: DualEncoderModule) -> tuple[Tensor, Tensor]:
    """The mean and std (3,) that black and white images reveal, from pixels in [0, 1].

    Black enters the tower as -mean / std and white as (1 - mean) / std.
    """
    with torch.no_grad(), evaluating(model):
        black, white = (
            model.normalised(model.preprocessing.image_transform(Image.new("RGB", (300, 260), colour)).to(model.device))
            .double()
            .mean(dim=(1, 2))
            .cpu()
            for colour in ("black", "white")
        )
    std = 1 / (white - black)
    return -black * std, std


def check_preprocessing(model: DualEncoderModule) -> None:
    """Compare what the model does to an image with what its library says; models nobody else trained pass.

    Raises:
        UserError: size, mean, std or interpolation differ.
    """
    expected = model.library_configuration()
    height, width = model.preprocessing.image_size
    for kind in ("image_transform", "view_transform"):
        shape = tuple(getattr(model.preprocessing, kind)(Image.new("RGB", (300, 260))).shape)
        if shape != (3, height, width):
            raise UserError(
                f"{model.name}: {kind} gives {shape}, expected {(3, height, width)}; check its preprocessing."
            )
    if expected is None:
        return
    mean, std = measured_normalisation(model)
    found = {
        "size": (height, width),
        "mean": tuple(round(float(value), 4) for value in mean),
        "std": tuple(round(float(value), 4) for value in std),
    }
    settings = getattr(model.preprocessing, "settings", None)
    if settings is not None:
        found["interpolation"] = settings.interpolation
    for key, value in found.items():
        wanted = getattr(expected, key)
        close = value == wanted
        if key in ("mean", "std"):
            close = bool(torch.allclose(torch.tensor(value), torch.tensor(wanted), atol=1e-3))
        if not close:
            raise UserError(
                f"{model.name}: its preprocessing has {key} {value}, but its image tower was trained with {wanted}; "
                "correct the preprocessing, features would be silently wrong."
            )
