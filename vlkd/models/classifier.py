"""The vlkd classifier folder: an image trunk under one head for labels and one for a teacher, which answer together.

`model.json` names the trunk, the classes, the mix and the preprocessing, `model.safetensors` holds every weight.
Building a classifier from its folder needs nothing else and executes no recipe.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from vlkd.errors import UserError
from vlkd.models.folder import MODEL_JSON, WEIGHTS, read_format, read_layout, replacing, storage_dtype, stored_state
from vlkd.models.heads import stack_heads
from vlkd.models.preprocessing import CompositePreprocessing, PixelSettings
from vlkd.models.tokenizer import first_line
from vlkd.models.towers import build_image_tower, image_tower_width, load_exactly, read_safetensors

FORMAT, VERSION = "vlkd-classifier", 1
HEADS = ("two", "one")
SHORTEST = 1e-6
"""Features shorter than this are divided by it, not by their length, so that the gradient at zero stays bounded."""


class CosineHead(nn.Linear):
    r"""Scaled cosines with one trainable vector per class, without bias: (B, F) to (B, C).

    .. math:: h_c(z) = \frac{1}{\zeta} \cos(z, w_c)

    Equation 10 of DHO (Kang et al., 2025, arXiv:2505.07675), the form of a zero-shot teacher's own logits. The authors'
    public code leaves the w_c at their length and keeps a bias; this is the paper's.

    Args:
        width: F.
        classes: C.
        zeta: the temperature, above 0.
    """

    def __init__(self, width: int, classes: int, zeta: float) -> None:
        super().__init__(width, classes, bias=False)
        self.zeta = zeta

    def forward(self, features: Tensor) -> Tensor:
        # Autocast would run the product in half precision, where 1 / zeta turns rounding into whole logits.
        with torch.autocast(features.device.type, enabled=False):
            unit = nn.functional.normalize(_wide(features), dim=-1, eps=SHORTEST)
            rows = nn.functional.normalize(self.weight, dim=-1, eps=SHORTEST)
            return nn.functional.linear(unit, rows.to(unit.dtype)) / self.zeta


@dataclass(frozen=True)
class NoTokenizer:
    """In the place of a tokenizer where there is no text tower: every text is empty."""

    def tokenize(self, texts: Sequence[str], context_length: int) -> dict[str, Tensor]:  # noqa: ARG002 - as the others
        """`ids` and `mask` (B, 0)."""
        ids = torch.empty(len(texts), 0, dtype=torch.int64)
        return {"ids": ids, "mask": ids.bool()}

    def save(self, folder: Path) -> None:
        """Nothing to write."""


class Classifier(nn.Module):
    """A trunk g from pixels to features z (B, F) under a label head and a teacher head, both (B, C).

    Args:
        name: the reference, for tables and errors.
        layout: the content of `model.json`.
        tower: the timm model without classifier that `layout["image"]` names.

    Attributes:
        preprocessing: uint8 pixels; there is no text.
        classes: C names, in the order of the columns.
        trunk: the tower and a projection after it, which is empty unless the trunk was a dual encoder's.
        label_head: linear.
        teacher_head: linear or `CosineHead`; None where one head serves as both.
        alpha: the label head's share of the mix, in [0, 1]; 1 where there is one head.
        beta: the teacher head's temperature in the mix, above 0; 1 where there is one head.
        notes: anything that json can write, kept in `model.json`.

    Raises:
        UserError: a value of the layout is outside its range.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, *, name: str, layout: Mapping[str, Any], tower: nn.Module) -> None:
        super().__init__()
        check_layout(layout)
        self.name = name
        self.layout = dict(layout)
        self.classes: tuple[str, ...] = tuple(layout["classes"])
        self.notes: dict[str, Any] = dict(layout["notes"])
        pixels = layout["preprocessing"]
        settings = PixelSettings(**{**pixels, "mean": tuple(pixels["mean"]), "std": tuple(pixels["std"])})
        self.preprocessing = CompositePreprocessing(settings, NoTokenizer(), 0)
        image = layout["image"]
        in_width = image_tower_width(tower)
        self.width = int(image["projection"][-1][1]) if image["projection"] else in_width
        self.trunk = nn.Sequential()
        self.trunk.add_module("tower", tower)
        self.trunk.add_module("projection", stack_heads(image, in_width, self.width))
        self.dropout = nn.Dropout(layout["dropout"])
        self.label_head = nn.Linear(self.width, len(self.classes))
        self.teacher_head: nn.Linear | None = None
        if layout["heads"] == "two":
            sizes = (self.width, len(self.classes))
            self.teacher_head = CosineHead(*sizes, layout["zeta"]) if layout["align"] else nn.Linear(*sizes)
        self.alpha, self.beta = layout["alpha"], layout["beta"]
        self.register_buffer("mean", torch.tensor(settings.mean)[:, None, None], persistent=False)
        self.register_buffer("std", torch.tensor(settings.std)[:, None, None], persistent=False)

    @property
    def alpha(self) -> float:
        return self._alpha

    @alpha.setter
    def alpha(self, value: float) -> None:
        check_mix(alpha=value)
        self._check_single("alpha", value)
        self._alpha = float(value)

    @property
    def beta(self) -> float:
        return self._beta

    @beta.setter
    def beta(self, value: float) -> None:
        check_mix(beta=value)
        self._check_single("beta", value)
        self._beta = float(value)

    def _check_single(self, key: str, value: float) -> None:
        if self.teacher_head is None and value != 1:
            raise UserError(
                f"{self.name} has a single head, which is mixed with nothing; found {key} {value}, expected 1."
            )

    @property
    def device(self) -> torch.device:
        """Where the parameters are."""
        return next(self.parameters()).device

    def normalised(self, pixels: Tensor) -> Tensor:
        """uint8 pixels as (pixels / 255 - mean) / std; float pixels as they are."""
        if pixels.dtype != torch.uint8:
            return pixels
        return (pixels.float() / 255 - self.mean) / self.std

    def features(self, pixels: Tensor) -> Tensor:
        """z (B, F) of pixels (B, 3, H, W), uint8 or normalised."""
        found: Tensor = self.trunk(self.normalised(pixels))
        return found

    def logits(self, features: Tensor) -> dict[str, Tensor]:
        """`label` and `teacher` (B, C) of features (B, F); one tensor under both names where there is one head."""
        kept = self.dropout(features)
        label = self.label_head(kept)
        return {"label": label, "teacher": label if self.teacher_head is None else self.teacher_head(kept)}

    def probabilities(self, pixels: Tensor) -> dict[str, Tensor]:
        """`label`, `teacher` and `mix` (B, C) of pixels (B, 3, H, W), rows that sum to 1.

        The teacher head's are those at temperature beta, so that mix = alpha label + (1 - alpha) teacher.
        """
        found = self.logits(self.features(pixels))
        label, teacher = found["label"], found["teacher"]
        return {
            "label": _wide(label).softmax(dim=1),
            "teacher": (_wide(teacher) / self.beta).softmax(dim=1),
            "mix": mixed_probabilities(label, teacher, alpha=self.alpha, beta=self.beta),
        }

    def forward(self, pixels: Tensor) -> Tensor:
        """The mix (B, C) of pixels (B, 3, H, W), uint8 or normalised."""
        found = self.logits(self.features(pixels))
        return mixed_probabilities(found["label"], found["teacher"], alpha=self.alpha, beta=self.beta)

    def trunk_parameters(self) -> Iterator[nn.Parameter]:
        """The parameters that both heads share."""
        return self.trunk.parameters()

    def head_parameters(self, which: Literal["label", "teacher"]) -> Iterator[nn.Parameter]:
        """The parameters of a head; those of the only one under both names where there is one."""
        second = self.label_head if self.teacher_head is None else self.teacher_head
        return {"label": self.label_head, "teacher": second}[which].parameters()

    def parameter_counts(self) -> dict[str, int]:
        """The number of parameters under `image`, the heads included."""
        return {"image": sum(value.numel() for value in self.parameters())}

    def save(self, folder: str | Path, dtype: str = "float32") -> None:
        """Write the classifier's folder; it appears whole or not at all, in place of an older classifier.

        Args:
            folder: the new folder.
            dtype: "float32" or "float16" on disk; vectors stay float32.

        Raises:
            UserError: the folder exists and is neither empty nor a classifier, or the dtype is unknown.
        """
        kept = storage_dtype(dtype)
        layout = self.layout | {"alpha": self.alpha, "beta": self.beta, "notes": self.notes}
        with replacing(folder, FORMAT) as temporary:
            text = json.dumps(layout, indent=2, allow_nan=False) + "\n"
            (temporary / MODEL_JSON).write_text(text, encoding="utf-8")
            save_file(stored_state(self.state_dict(), kept), str(temporary / WEIGHTS))


def mixed_probabilities(label_BC: Tensor, teacher_BC: Tensor, *, alpha: float, beta: float) -> Tensor:
    r"""Class probabilities from both heads: (B, C), rows that sum to 1.

    .. math:: p_b = \alpha\, \mathrm{softmax}(l_b) + (1 - \alpha)\, \mathrm{softmax}(t_b / \beta)

    Equation 8 of DHO (Kang et al., 2025, arXiv:2505.07675). alpha = 1 is the label head alone, alpha = 0 the teacher
    head alone at temperature beta. By its theorem 1, alpha = lambda and beta = 1 come close to what a single head would
    learn under that lambda.

    Args:
        label_BC: l, the label head's logits, (B, C).
        teacher_BC: t, the teacher head's logits of the same images, (B, C).
        alpha: the label head's share, in [0, 1].
        beta: the teacher head's temperature, above 0; below 1 it sharpens.

    Raises:
        UserError: the shapes differ, alpha lies outside [0, 1], or beta is not above 0.
    """
    check_mix(alpha=alpha, beta=beta)
    # Anything else would broadcast to plausible probabilities.
    if label_BC.ndim != 2 or label_BC.shape != teacher_BC.shape:
        raise UserError(
            f"The label head's logits are {tuple(label_BC.shape)} and the teacher head's {tuple(teacher_BC.shape)}; "
            "expected one shape (B, C): pair the rows and use one list of classes."
        )
    return alpha * _wide(label_BC).softmax(dim=1) + (1 - alpha) * (_wide(teacher_BC) / beta).softmax(dim=1)


def check_mix(*, alpha: float = 1.0, beta: float = 1.0) -> None:
    """Raise `UserError` for an alpha outside [0, 1] or a beta that is not a number above 0."""
    if not 0 <= alpha <= 1:
        raise UserError(f"Found alpha {alpha}, expected 0 (the teacher head alone) to 1 (the label head alone).")
    if not 0 < beta < math.inf:
        raise UserError(f"Found beta {beta}, the teacher head's temperature; expected a number above 0.")


def check_layout(layout: Mapping[str, Any]) -> None:
    """Raise `UserError` for what no classifier can be built from; mixes and pixels are checked where they are used."""
    classes, heads = layout["classes"], layout["heads"]
    if isinstance(classes, str) or len(classes) < 2 or not all(isinstance(name, str) for name in classes):
        raise UserError(f"Found the classes {classes!r}, expected a list of at least two names.")
    if heads not in HEADS:
        raise UserError(f"Found heads {heads!r}, expected one of {', '.join(HEADS)}.")
    if layout["align"] and heads == "one":
        raise UserError("Found align with heads 'one', expected 'two': a teacher's head is aligned, not the labels'.")
    if not 0 < layout["zeta"] < math.inf:
        raise UserError(f"Found zeta {layout['zeta']}, the teacher's temperature; expected a number above 0.")
    if not 0 <= layout["dropout"] < 1:
        raise UserError(f"Found dropout {layout['dropout']}, expected at least 0 and less than 1.")


def is_classifier(ref: str | Path) -> bool:
    """Whether a folder carries the `model.json` of a classifier."""
    return read_format(Path(ref)) == FORMAT


def load_classifier(ref: str | Path, device: str | torch.device = "cpu") -> Classifier:
    """Read a classifier's folder, in evaluation mode, with float32 weights.

    Args:
        ref: a folder as written by `Classifier.save`.
        device: where the classifier goes.

    Raises:
        UserError: a file is missing or damaged, the folder holds another kind of model, the weights do not fit the
            `model.json`, or there is no such device.
    """
    folder = Path(ref)
    layout = read_layout(folder, FORMAT, VERSION)
    try:
        tower = build_image_tower(layout["image"]["timm"], json.dumps(layout["image"]["kwargs"]))
        model = Classifier(name=str(ref), layout=layout, tower=tower)
    except UserError:
        raise
    except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
        raise UserError(
            f"{folder / MODEL_JSON} lacks or misspells {first_line(error)}; write the classifier again."
        ) from error
    load_exactly(model, read_safetensors(folder / WEIGHTS), str(folder / WEIGHTS))
    try:
        return model.to(device).eval()
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"The device {device} cannot be used ({first_line(error)}); name another one.") from None


def _wide(values: Tensor) -> Tensor:
    """In float32 where autocast gave half precision; float64 stays float64."""
    return values.to(torch.promote_types(values.dtype, torch.float32))
