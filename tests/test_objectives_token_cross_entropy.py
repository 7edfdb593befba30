"""Cross entropy of answer tokens: torch's own number, in memory for one chunk."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional

from vlkd.errors import UserError
from vlkd.objectives import token_cross_entropy


def inputs(positions: int = 11, vocabulary: int = 17) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(positions, vocabulary, generator=generator, dtype=torch.float64) * 4
    return logits.requires_grad_(), torch.randint(vocabulary, (positions,), generator=generator)


@pytest.mark.parametrize("chunk", [1, 4, 11, 50])
def test_it_is_torchs_own_with_its_gradient(chunk):
    logits, targets = inputs()
    weights = torch.arange(1.0, 12.0, dtype=torch.float64)
    expected = functional.cross_entropy(logits, targets, reduction="none")
    found = token_cross_entropy(logits, targets, chunk=chunk)
    torch.testing.assert_close(found, expected)
    gradients = [torch.autograd.grad((weights * value).sum(), logits)[0] for value in (found, expected)]
    torch.testing.assert_close(*gradients)


def test_half_precision_is_summed_in_single():
    logits, targets = inputs(64, 3000)
    half = logits.detach().to(torch.bfloat16)
    found = token_cross_entropy(half, targets)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, functional.cross_entropy(half.float(), targets, reduction="none"))


def test_no_position_has_no_loss_and_a_gradient_of_its_shape():
    logits = torch.zeros(0, 7, requires_grad=True)
    token_cross_entropy(logits, torch.zeros(0, dtype=torch.int64)).sum().backward()
    assert logits.grad.shape == (0, 7)


@pytest.mark.parametrize(
    ("targets", "words"),
    [
        (torch.tensor([0, 1]), r"expected \(A, V\) and \(A,\)"),
        (torch.tensor([0.0, 1.0, 2.0]), "torch.int64"),
        (torch.tensor([0, 1, -100]), "expected 0 to 4"),
        (torch.tensor([0, 1, 5]), "expected 0 to 4"),
    ],
)
def test_tokens_that_do_not_fit(targets, words):
    with pytest.raises(UserError, match=words):
        token_cross_entropy(torch.zeros(3, 5), targets)
