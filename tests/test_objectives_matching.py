"""Image-text matching against numpy, and the draw of hard negatives against the softmax it follows."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from vlkd.errors import UserError
from vlkd.objectives import hard_negatives, image_text_matching

IDENTITY = torch.eye(4, dtype=torch.bool)


def test_matching_equals_numpy():
    logits, labels = np.array([2.0, -1.0, 0.0, 0.3, -7.0]), np.array([True, True, False, False, False])
    chance = 1 / (1 + np.exp(-logits))
    wanted = -np.log(np.where(labels, chance, 1 - chance))
    found = image_text_matching(torch.from_numpy(logits), torch.from_numpy(labels))
    torch.testing.assert_close(found, torch.from_numpy(wanted))


def test_matching_is_finite_and_float32_where_logits_are_extreme():
    labels = torch.tensor([True, False, True, False])
    found = image_text_matching(torch.tensor([3e4, 3e4, -3e4, -3e4], dtype=torch.bfloat16), labels)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, torch.tensor([0.0, 3e4, 3e4, 0.0]), rtol=4e-3, atol=0)


def test_negatives_follow_the_softmax_over_what_does_not_match():
    similarities = torch.tensor(
        [[9.0, 1.0, 0.0, 2.0], [0.5, 9.0, 0.5, 9.0], [0.0, 0.0, 0.0, 0.0], [1.0, 2.0, 3.0, 4.0]]
    )
    match = IDENTITY.clone()
    match[1, 3] = match[3, 1] = True
    draws, generator = 4000, torch.Generator().manual_seed(0)
    counts = np.zeros((4, 4))
    for _ in range(draws):
        counts[np.arange(4), hard_negatives(similarities, match, generator=generator).numpy()] += 1
    weights = np.where(match.numpy(), 0, np.exp(similarities.double().numpy()))
    expected = draws * weights / weights.sum(axis=1, keepdims=True)
    assert (counts[match.numpy()] == 0).all()
    open_to_draws = ~match.numpy()
    chi_square = ((counts - expected)[open_to_draws] ** 2 / expected[open_to_draws]).sum()
    # 10 cells in 4 rows leave 6 degrees of freedom, of which 22.5 is the 99.9 % point.
    assert chi_square < 22.5


def test_the_diagonal_is_never_a_negative_and_the_hardest_is_certain_at_a_large_scale():
    cosines = torch.tensor([[1.0, 0.2, 0.9, 0.1], [0.4, 1.0, 0.1, 0.2], [0.3, 0.5, 1.0, 0.9], [0.8, 0.1, 0.1, 1.0]])
    nothing = torch.zeros(4, 4, dtype=torch.bool)
    for _ in range(20):
        assert hard_negatives(1000 * cosines, nothing).tolist() == [2, 0, 3, 0]


def test_a_row_without_negatives_is_marked():
    match = IDENTITY.clone()
    match[2] = True
    found = hard_negatives(torch.randn(4, 4), match)
    assert found[2] == -1
    assert (found[[0, 1, 3]] >= 0).all()
    assert hard_negatives(torch.zeros(1, 1), torch.ones(1, 1, dtype=torch.bool)).tolist() == [-1]


def test_draws_come_from_the_global_generator_or_the_given_one():
    similarities, match = torch.zeros(64, 64), torch.eye(64, dtype=torch.bool)
    torch.manual_seed(3)
    first = hard_negatives(similarities, match)
    torch.manual_seed(3)
    assert torch.equal(hard_negatives(similarities, match), first)
    assert not torch.equal(hard_negatives(similarities, match), first)
    given = [hard_negatives(similarities, match, generator=torch.Generator().manual_seed(5)) for _ in range(2)]
    assert torch.equal(*given)


def test_no_gradient_reaches_the_similarities():
    similarities = torch.randn(4, 4, requires_grad=True)
    assert not hard_negatives(similarities, IDENTITY).requires_grad


def test_wrong_shapes_are_refused():
    with pytest.raises(UserError, match=r"expected one shape \(P,\)"):
        image_text_matching(torch.zeros(3), torch.zeros(3))
    with pytest.raises(UserError, match=r"expected one shape \(P,\)"):
        image_text_matching(torch.zeros(3, 1), torch.zeros(3, 1, dtype=torch.bool))
    for similarities, match in (
        (torch.zeros(3, 4), torch.zeros(3, 4, dtype=torch.bool)),
        (torch.zeros(4, 4), torch.eye(3, dtype=torch.bool)),
        (torch.zeros(4, 4), torch.eye(4)),
    ):
        with pytest.raises(UserError, match=r"expected one shape \(B, B\)"):
            hard_negatives(similarities, match)
