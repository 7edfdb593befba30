"""Class probabilities of images from any student: a classifier's own classes, or a dual encoder's by their names."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vlkd.data.files import strict_json
from vlkd.data.sources import Pairs
from vlkd.errors import UserError
from vlkd.models.base import DualEncoderModule
from vlkd.models.classifier import is_classifier, load_classifier
from vlkd.models.classifier_images import ClassifierImages
from vlkd.models.load import load
from vlkd.retrieval.encode import encode_images
from vlkd.retrieval.search import normalize
from vlkd.retrieval.zero_shot import DEFAULT_TEMPLATES, class_vectors

if TYPE_CHECKING:
    from PIL.Image import Image

CLIP_SCALE = 100.0
"""CLIP's usual factor on cosines, where a model has none."""


class Student(Protocol):
    """What names classes from images."""

    @property
    def classes(self) -> tuple[str, ...]:
        """(C,) names in the order of the columns."""
        ...

    def encode_image(self, images: Sequence[Image], *, batch_size: int = 64) -> Tensor:
        """(B, F) features."""
        ...

    def probabilities(self, features: Tensor) -> dict[str, Tensor]:
        """(N, C) of features: `mix`, and `label` and `teacher` where there are two heads."""
        ...


@dataclass(frozen=True)
class ZeroShot:
    r"""A dual encoder with names of classes: p = softmax(s cos(z, W)), s its logit scale, W the class vectors.

    Attributes:
        model: the dual encoder.
        classes: C names.
        vectors: W, (C, D), of length 1, on the CPU.
        scale: s.
    """

    model: DualEncoderModule
    classes: tuple[str, ...]
    vectors: Tensor
    scale: float

    def encode_image(self, images: Sequence[Image], *, batch_size: int = 64) -> Tensor:
        """(B, D) of length 1."""
        return self.model.encode_image(images, batch_size=batch_size, normalize=True)

    def probabilities(self, features: Tensor) -> dict[str, Tensor]:
        """`mix` (N, C) float64."""
        return {"mix": (self.scale * (normalize(features) @ self.vectors.T).double()).softmax(dim=1)}


@dataclass(frozen=True, kw_only=True)
class Predictions:
    """What a student says of the M images that could be read.

    Attributes:
        rows: (M,) their rows in the table of images, ascending.
        mix: (M, C) probabilities.
        heads: (M, C) of the label head and the teacher head, under `label` and `teacher`; {} where there is one head.
        features: (M, F) a classifier's trunk features, or embeddings of length 1.
        bad: key and reason of every image that could not be read.
        seconds: of reading and encoding.
    """

    rows: NDArray[np.int64]
    mix: NDArray[np.float32]
    heads: dict[str, NDArray[np.float32]]
    features: NDArray[np.float32]
    bad: tuple[tuple[str, str], ...]
    seconds: float


def open_student(
    ref: str, classes: Sequence[str] = (), templates: Sequence[str] = (), *, device: str = "cpu"
) -> Student:
    """Load a student.

    Args:
        ref: a model folder or any other reference.
        classes: names for a dual encoder; a classifier has its own.
        templates: sentences with `{c}` or `{}` in the place of the name; () for the plain ones.
        device: where it runs.

    Raises:
        UserError: nothing answers to the reference, names are given to a classifier or fewer than two, or one twice,
            to a dual encoder, or a template has no place for the name.
    """
    if is_classifier(ref):
        if classes or templates:
            raise UserError(
                f"{ref} is a classifier, whose classes are part of it; leave --classes and --templates out, or name a "
                "dual encoder."
            )
        return ClassifierImages(load_classifier(ref, device))
    model = load(ref, device=device)
    if len(classes) < 2 or len(set(classes)) < len(classes):
        twice = next((name for name in classes if list(classes).count(name) > 1), "")
        found = f"names {twice!r} twice" if twice else f"has {len(classes)} names" if classes else "is missing"
        raise UserError(
            f"--classes {found}; {ref} is no classifier, so that it needs two or more different names: give "
            "--classes cat,dog or --classes FILE.txt with one a line."
        )
    vectors = class_vectors(model.encode_text, classes, templates or DEFAULT_TEMPLATES, progress=len(classes) > 200)
    scale = CLIP_SCALE
    if "logit_scale" in model.provides:
        with torch.no_grad():
            scale = float(model.encode({}, ("logit_scale",))["logit_scale"])
    return ZeroShot(model, tuple(classes), vectors, scale)


def predict(student: Student, images: Pairs, *, batch_size: int = 64, workers: int = 2) -> Predictions:
    """Look at every image once, with progress; those that cannot be read are listed.

    Args:
        student: of `open_student`.
        images: the images.
        batch_size: images encoded together.
        workers: threads that decode.

    Raises:
        UserError: no image can be read, or a feature or a logit is not finite.
    """
    started = time.perf_counter()
    found = encode_images(student, images, batch_size=batch_size, workers=workers)
    seconds = time.perf_counter() - started
    finite = found.embed.isfinite().all(dim=1)
    if not bool(finite.all()):
        first = images.keys[int(found.index[int(finite.int().argmin())])]
        raise UserError(
            f"{int((~finite).sum())} of {len(finite)} images have features that are not finite, first {first!r}; check "
            "the model's weights."
        )
    tables = {name: table.float().numpy() for name, table in student.probabilities(found.embed).items()}
    return Predictions(
        rows=found.index,
        mix=tables.pop("mix"),
        heads=tables,
        features=found.embed.numpy(),
        bad=found.bad,
        seconds=seconds,
    )


def data_root(ref: str) -> str:
    """The root of the data that a run, or the run of a student's folder, was trained on; "" where nobody says."""
    for folder in (Path(ref), Path(ref).absolute().parent):
        try:
            config = strict_json((folder / "config.json").read_text(encoding="utf-8"))
            root = config["data"]["root"]
        except (OSError, ValueError, KeyError, TypeError):
            continue
        return root if isinstance(root, str) else ""
    return ""
