"""Trainable views of features: projections of a model, and heads that a distiller owns."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from vlkd.errors import UserError

HEAD_KINDS = ("linear", "mlp", "none")


class LinearHead(nn.Linear):
    """x W^T without bias, W initialised orthogonal so that cosines survive the first step.

    Shapes: (B, in_width) to (B, out_width).
    """

    def __init__(self, in_width: int, out_width: int) -> None:
        super().__init__(in_width, out_width, bias=False)

    def reset_parameters(self) -> None:
        nn.init.orthogonal_(self.weight)


class MlpHead(nn.Module):
    """p + W2 dropout(gelu(W1 p)) with p = W0 x: a linear head with a residual correction that starts at zero.

    Shapes: (B, in_width) to (B, out_width).
    """

    def __init__(self, in_width: int, out_width: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.linear = LinearHead(in_width, out_width)
        self.inner = nn.Linear(out_width, out_width)
        self.dropout = nn.Dropout(dropout)
        self.outer = nn.Linear(out_width, out_width)
        nn.init.zeros_(self.outer.weight)
        nn.init.zeros_(self.outer.bias)

    def forward(self, features: Tensor) -> Tensor:
        projected: Tensor = self.linear(features)
        correction: Tensor = self.outer(self.dropout(nn.functional.gelu(self.inner(projected))))
        return projected + correction


def make_head(kind: str, in_width: int, out_width: int, *, dropout: float = 0.0) -> nn.Module:
    """A head of one of `HEAD_KINDS`.

    Raises:
        UserError: the kind is unknown, or "none" stands between different widths.
    """
    if kind == "linear":
        return LinearHead(in_width, out_width)
    if kind == "mlp":
        return MlpHead(in_width, out_width, dropout)
    if kind != "none":
        raise UserError(f"Found the projection {kind!r}, expected one of {', '.join(HEAD_KINDS)}.")
    if in_width != out_width:
        raise UserError(
            f"Projection 'none' found a tower of width {in_width} before a joint width of {out_width}; "
            "make them equal or choose 'linear'."
        )
    return nn.Identity()


def stack_heads(side: Mapping[str, Any], in_width: int, width: int) -> nn.Sequential:
    """The projection of one side of a layout, a list of [kind, width] from the tower to the joint width.

    Raises:
        UserError: a kind is unknown, or the last width is not the joint width.
    """
    heads, last = [], in_width
    for kind, out_width in side["projection"]:
        heads.append(make_head(kind, last, out_width, dropout=side["projection_dropout"]))
        last = out_width
    if last != width:
        raise UserError(f"A projection ends at width {last}, expected the joint width {width}; check the model.json.")
    return nn.Sequential(*heads)
