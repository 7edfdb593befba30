"""A dual encoder as a classifier that teaches: its zero-shot logits, and a cache of labelled images beside them."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from vlkd.data.samples import Batch
from vlkd.distill.teachers import Teacher
from vlkd.errors import UserError


@dataclass(frozen=True, kw_only=True)
class ShotCache:
    """What Tip-Adapter adds to zero-shot logits: the labels of the labelled images that look alike.

    Tip-Adapter (Zhang et al., 2022, arXiv:2111.03930, equations 3 to 5) without training: one key per labelled image.

    Args:
        keys: (L, D) unit embeddings of the labelled images.
        labels: (L,) their class ids.
        weight: its alpha, the cache's share.
        sharpness: its beta.
    """

    keys: Tensor
    labels: Tensor
    weight: float
    sharpness: float


def zero_shot_logits(embed_BD: Tensor, vectors_CD: Tensor, zeta: float) -> Tensor:
    """cos(x, w_c) / zeta: (B, C).

    Args:
        embed_BD: (B, D), not normalised.
        vectors_CD: (C, D) unit class vectors.
        zeta: the temperature, above 0.
    """
    return F.normalize(embed_BD, dim=1) @ vectors_CD.T / zeta


def shot_logits(embed_BD: Tensor, cache: ShotCache, classes: int) -> Tensor:
    r"""Tip-Adapter's addition to the logits: (B, C).

    .. math:: \alpha \sum_l \exp(-\beta (1 - \cos(x, k_l)))\,[y_l = c]

    The original adds it to CLIP's logits, cosines times 100; so do we, whatever zeta is.
    """
    affinity_BL = torch.exp(cache.sharpness * (F.normalize(embed_BD, dim=1) @ cache.keys.T - 1))
    summed = affinity_BL.new_zeros(len(embed_BD), classes)
    return cache.weight * summed.index_add_(1, cache.labels, affinity_BL)


class ClassTeacher:
    """Targets of a batch from a teacher's embeddings, stored or made beside the student.

    Args:
        teacher: gives `image.embed`.
        vectors: (C, D) unit class vectors.
        zeta: see `zero_shot_logits`.
        cache: what is added for labelled images that look alike.

    Raises:
        UserError: zeta is not above 0.
    """

    def __init__(self, teacher: Teacher, vectors: Tensor, zeta: float, cache: ShotCache | None = None) -> None:
        if not (math.isfinite(zeta) and zeta > 0):
            raise UserError(f"The teacher's temperature zeta is {zeta}; expected more than 0: set teacher.zeta.")
        self.teacher = teacher
        self.width = int(vectors.shape[1])
        self.vectors = vectors
        self.zeta = zeta
        self.cache = cache

    def logits(self, embed_BD: Tensor) -> Tensor:
        """(B, C) of embeddings (B, D)."""
        # Autocast would run the products in half precision, where 1 / zeta turns rounding into whole logits.
        with torch.autocast(embed_BD.device.type, enabled=False):
            found = zero_shot_logits(embed_BD, self.vectors, self.zeta)
            return found if self.cache is None else found + shot_logits(embed_BD, self.cache, len(self.vectors))

    @torch.no_grad()
    def targets(self, batch: Batch) -> dict[str, Tensor]:
        """`target_embed` (B, D) and `target_logits` (B, C), float32."""
        embed = self.teacher.targets(batch, ("image.embed",))["image.embed"].float()
        return {"target_embed": embed, "target_logits": self.logits(embed)}

    def to(self, device: torch.device) -> ClassTeacher:
        """The constants on another device."""
        self.vectors = self.vectors.to(device)
        if self.cache is not None:
            self.cache = ShotCache(
                keys=self.cache.keys.to(device),
                labels=self.cache.labels.to(device),
                weight=self.cache.weight,
                sharpness=self.cache.sharpness,
            )
        return self


WEIGHTS = (0.0, 0.25, 0.5, 1.0, 2.0, 4.0, 8.0, 16.0)
SHARPNESSES = (1.0, 2.0, 5.5, 10.0, 20.0)
"""What `choose_cache` tries; the original starts at 1 and 5.5 and searches around them."""


def choose_cache(
    keys: Tensor, labels: Tensor, vectors: Tensor, zeta: float, val_embed: Tensor, val_labels: Tensor
) -> tuple[ShotCache, float]:
    """The cache whose two constants classify validation images best, and its accuracy on them.

    Of equally good ones the smallest weight, then the smallest sharpness: the nearest to the zero-shot teacher.

    Args:
        keys: (L, D) embeddings of the labelled images.
        labels: (L,).
        vectors: (C, D) unit class vectors.
        zeta: the teacher's temperature.
        val_embed: (V, D).
        val_labels: (V,).
    """
    unit = F.normalize(keys, dim=1)
    plain = zero_shot_logits(val_embed, vectors, zeta)
    best, best_accuracy = ShotCache(keys=unit, labels=labels, weight=0.0, sharpness=SHARPNESSES[0]), -1.0
    for weight in WEIGHTS:
        for sharpness in SHARPNESSES:
            cache = ShotCache(keys=unit, labels=labels, weight=weight, sharpness=sharpness)
            found = (plain + shot_logits(val_embed, cache, len(vectors))).argmax(dim=1)
            accuracy = float(found.eq(val_labels).double().mean())
            if accuracy > best_accuracy:
                best, best_accuracy = cache, accuracy
    return best, best_accuracy
