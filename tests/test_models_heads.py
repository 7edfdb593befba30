"""Projections and heads."""

from __future__ import annotations

import pytest
import torch

from vlkd.errors import UserError
from vlkd.models.heads import LinearHead, MlpHead, make_head, stack_heads


@pytest.mark.parametrize(("in_width", "out_width"), [(12, 8), (8, 12), (8, 8)])
def test_linear_head_starts_orthogonal(in_width, out_width):
    weight = LinearHead(in_width, out_width).weight
    small = min(in_width, out_width)
    gram = weight @ weight.T if out_width <= in_width else weight.T @ weight
    torch.testing.assert_close(gram, torch.eye(small), rtol=0, atol=1e-5)


def test_widening_keeps_cosines():
    features = torch.randn(5, 8)
    found = LinearHead(8, 12)(features)
    cosine = torch.nn.functional.cosine_similarity
    torch.testing.assert_close(cosine(found[:1], found), cosine(features[:1], features), rtol=0, atol=1e-5)


def test_mlp_starts_as_its_linear_part_and_follows_its_formula():
    head, features = MlpHead(6, 4), torch.randn(3, 6)
    torch.testing.assert_close(head(features), features @ head.linear.weight.T)
    torch.nn.init.normal_(head.outer.weight)
    projected = features @ head.linear.weight.T
    inner = torch.nn.functional.gelu(projected @ head.inner.weight.T + head.inner.bias)
    torch.testing.assert_close(head(features), projected + inner @ head.outer.weight.T + head.outer.bias)


def test_wrong_kinds_and_widths():
    with pytest.raises(UserError, match="expected one of linear, mlp, none"):
        make_head("conv", 4, 4)
    with pytest.raises(UserError, match="tower of width 4 before a joint width of 5"):
        make_head("none", 4, 5)
    with pytest.raises(UserError, match="ends at width 5, expected the joint width 6"):
        stack_heads({"projection": [["linear", 5]], "projection_dropout": 0.0}, 4, 6)
