"""The columns of a teacher cache: number formats, what storing costs, and embeddings that cannot teach."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping

import torch
from torch import Tensor

from vlkd.distill.cache.format import StorageType
from vlkd.errors import UserError

SCALE = ".scale"
"""Ends the name of the column that holds an int8 column's scales."""
LEAST_DISTANCE = 1e-6


def pack(name: str, value: Tensor, dtype: StorageType) -> dict[str, Tensor]:
    """A float32 column as it is stored, under its name and, for int8, with scales under NAME.scale.

    int8 is symmetric per vector: scale s = max |x| / 127 over the last dimension, codes round(x / s), half to even.
    Booleans and integers stay as they are.

    Args:
        name: of the feature.
        value: (..., C).
        dtype: of storage.
    """
    if not value.is_floating_point():
        return {name: value}
    if dtype != "int8":
        return {name: value.to(getattr(torch, dtype))}
    scale = value.abs().amax(dim=-1) / 127
    codes = (value / torch.where(scale > 0, scale, 1.0)[..., None]).round().clamp(-127, 127)
    return {name: codes.to(torch.int8), name + SCALE: scale}


def unpack(column: Tensor, scale: Tensor | None) -> Tensor:
    """What was stored, as float32; booleans and integers without a scale as they are."""
    if scale is not None:
        return column.float() * scale[..., None]
    return column.float() if column.is_floating_point() else column


def storage_error(value: Tensor, stored: Tensor) -> Tensor:
    """The largest cosine distance 1 - cos and the largest relative error |stored - value| / |value|, (2,) float64.

    Args:
        value: (..., C), vectors of the last dimension; zeros are passed over.
        stored: the same after a round trip through storage.
    """
    value, stored = value.double(), stored.double()
    length = value.norm(dim=-1)
    counted = length > 0
    safe = torch.where(counted, length, 1.0)
    cosine = (value * stored).sum(dim=-1) / (safe * stored.norm(dim=-1)).clamp_min(torch.finfo(torch.float64).tiny)
    relative = (stored - value).norm(dim=-1) / safe
    largest = [torch.where(counted, error, 0.0).amax() for error in (1 - cosine, relative)]
    return torch.stack(largest).clamp_min(0.0)


def check_embeddings(name: str, features: Mapping[str, Tensor]) -> None:
    """Refuse a teacher whose features cannot teach.

    Args:
        name: of the teacher.
        features: (B, ...) by name, of distinct inputs.

    Raises:
        UserError: a feature is not finite, or one called `*.embed` has a row of zeros, or all its rows, two or more,
            have one direction (cosine distance to the first below 1e-6).
    """
    for feature, value in features.items():
        bad = (~value.isfinite()).flatten(1).any(dim=1)
        if bad.any():
            raise UserError(
                f"Teacher {name}: found {feature} that is not finite in {int(bad.sum())} of {len(value)} rows; "
                "check its weights with `vlkd doctor`."
            )
        if not feature.endswith(".embed") or not len(value):
            continue
        rows = value.double()
        zero = int(rows.norm(dim=-1).eq(0).sum())
        if zero:
            raise UserError(
                f"Teacher {name}: found {feature} of length zero in {zero} of {len(rows)} rows, expected none; "
                "check its weights with `vlkd doctor`."
            )
        unit = torch.nn.functional.normalize(rows, dim=-1)
        if len(unit) > 1 and float((1 - unit @ unit[0]).amax()) < LEAST_DISTANCE:
            raise UserError(
                f"Teacher {name}: found one and the same direction of {feature} for all {len(rows)} inputs, expected "
                "different ones; check its weights and preprocessing with `vlkd doctor`."
            )


def check_lengths(name: str, columns: Mapping[str, Tensor]) -> None:
    """Refuse embeddings of length zero, those of unreadable pictures aside."""
    for feature, column in columns.items():
        if feature.endswith(".embed"):
            zero = column.eq(0).all(dim=-1)
            if feature.startswith("image."):
                zero = zero[columns["readable"].bool()]
            if zero.any():
                raise UserError(
                    f"Teacher {name}: found {feature} of length zero in {int(zero.sum())} of {zero.numel()} rows, "
                    "expected none; check its weights with `vlkd doctor`, or store them as bfloat16."
                )


class Columns:
    """Columns of one shard, batch by batch, as they are stored, and what storing costs."""

    def __init__(self, dtype: StorageType) -> None:
        self.dtype: StorageType = dtype
        self.parts: dict[str, list[Tensor]] = defaultdict(list)
        self.errors: dict[str, list[Tensor]] = defaultdict(list)
        self.finite: dict[str, list[Tensor]] = defaultdict(list)

    def add(self, name: str, value: Tensor) -> None:
        """Take the next rows of a feature; they are measured where they are, and checked once at the end."""
        if value.is_floating_point():
            # Metal has no float64.
            value = value.float() if value.device.type != "mps" else value.float().cpu()
        packed = pack(name, value, self.dtype)
        if value.is_floating_point():
            stored = unpack(packed[name], packed.get(name + SCALE))
            self.errors[name].append(storage_error(value, stored))
            self.finite[name].append(torch.stack([value.isfinite().all(), stored.isfinite().all()]))
        for column, part in packed.items():
            self.parts[column].append(part.cpu())

    def joined(self, teacher: str) -> dict[str, Tensor]:
        """The columns; raises `UserError` where a value is not finite or does not fit the dtype."""
        for name, flags in self.finite.items():
            finite, fits = torch.stack(flags).all(dim=0).tolist()
            if not finite:
                raise UserError(
                    f"Teacher {teacher}: found {name} that is not finite; check its weights with `vlkd doctor`."
                )
            if not fits:
                raise UserError(f"Teacher {teacher}: {name} is too large for {self.dtype}; store it as bfloat16.")
        # Autocast knows no joining of halves.
        with torch.autocast("cpu", enabled=False):
            return {name: torch.cat(parts) for name, parts in self.parts.items()}

    def error(self) -> dict[str, list[float]]:
        """Per feature the largest cosine distance and the largest relative error."""
        return {name: torch.stack(errors).amax(dim=0).tolist() for name, errors in self.errors.items()}
