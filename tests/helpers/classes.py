"""A tiny classifier, its batches, and a teacher whose embeddings are known, for tests of what compares them."""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import Tensor

from vlkd.data.samples import Batch
from vlkd.models.classifier import Classifier
from vlkd.models.classifier_spec import ClassifierSpec, build_classifier

CLASSES = ("ant", "bee", "cat", "dog", "eel")
WIDTH, ROWS, SIZE = 12, 40, 24


def tiny_classifier(*, seed: int = 0, heads: str = "two") -> Classifier:
    """A 20 k ResNet at 24 px."""
    torch.manual_seed(seed)
    kwargs = '{"channels": [8, 8, 16, 16], "stem_width": 8}'
    spec = ClassifierSpec(image="resnet10t", image_kwargs=kwargs, image_size=SIZE, heads=heads)  # type: ignore[arg-type]
    return build_classifier(spec, CLASSES)


def image_batch(rows: list[int], *, seed: int = 0) -> Batch:
    """Random pixels of these rows of the table."""
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randint(0, 256, (max(1, len(rows)), 3, SIZE, SIZE), dtype=torch.uint8, generator=generator)
    none = torch.empty(0, dtype=torch.int64)
    return Batch(
        keys=[f"image-{row}" for row in rows],
        rows=torch.tensor(rows, dtype=torch.int64),
        views=torch.zeros(len(rows), dtype=torch.int64),
        captioned=torch.zeros(len(rows), dtype=torch.bool),
        texts=none,
        caption_ids=none,
        own_ids=none.reshape(0, 0),
        inputs={"student": {"pixels": pixels}},
    )


class KnownTeacher:
    """Gives a stored embedding for each row."""

    name = "known"
    width = WIDTH
    provides = frozenset({"image.embed"})
    preprocessing = None

    def __init__(self) -> None:
        self.embed = torch.randn(ROWS, WIDTH, generator=torch.Generator().manual_seed(7))

    def targets(self, batch: Batch, want: Collection[str]) -> dict[str, Tensor]:
        assert set(want) == {"image.embed"}
        return {"image.embed": self.embed[batch.rows]}


def known_vectors() -> Tensor:
    """(C, D) unit class vectors."""
    found = torch.randn(len(CLASSES), WIDTH, generator=torch.Generator().manual_seed(8))
    return found / found.norm(dim=1, keepdim=True)
