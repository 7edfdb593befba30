from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from helpers import properties, token_references

from vlkd.errors import UserError
from vlkd.objectives import kneedle, kneedle_k


def by_hand(logits, k_min, k_max):
    return [token_references.knee(row, k_min, k_max) for row in logits.detach().double().numpy()]


@pytest.mark.parametrize(("k_min", "k_max"), [(2, 40), (5, 9), (2, 1000)])
def test_the_distance_to_the_chord(k_min, k_max):
    (logits,) = properties.embeddings((12, 40))
    logits = logits.detach() ** 3  # a few stand out
    assert kneedle_k(logits, k_min=k_min, k_max=k_max, chunk=5).tolist() == by_hand(logits, k_min, k_max)
    of_softmax = kneedle_k(logits, k_min=k_min, k_max=k_max, on="probabilities").tolist()
    assert of_softmax == by_hand(logits.softmax(1), k_min, k_max)
    assert of_softmax != by_hand(logits, k_min, k_max) or k_max < 10


def test_the_knee_is_counted_and_lies_below_the_chord():
    # Sorted 10 9 8 1 0.9 .. 0: the fourth is the knee. Few far lower ones are no knee.
    head = torch.tensor([10.0, 9, 8])
    row = torch.cat([head, torch.linspace(1, 0, 20)])[torch.randperm(23)]
    low = torch.cat([row, torch.full((1,), -100.0)])
    assert kneedle_k(row[None], k_max=20).tolist() == [4]
    assert kneedle_k(low[None], k_max=23).item() < 23


@pytest.mark.parametrize("on", ["logits", "probabilities"])
@pytest.mark.parametrize("k_max", [16, 300, 3000])
def test_a_large_vocabulary_as_if_sorted_whole(on, k_max, monkeypatch):
    generator = torch.Generator().manual_seed(3)
    noise = torch.randn(24, 12000, generator=generator)
    # From curves without a knee near the top to a clear one, and some whose knee is near k_max itself.
    power = torch.linspace(0.2, 4, 24)[:, None]
    logits = noise.sign() * noise.abs() ** power
    rank = torch.arange(12000.0)
    for row, knee in enumerate((k_max - 1, k_max, k_max + 1, k_max - 2, 3, k_max // 3, k_max // 2), start=12):
        logits[row] = torch.where(rank < knee, 5 - 4 * rank / knee, 1 - rank / 12000)
    logits[5, 100:] = -math.inf
    logits[6] = 1.0
    masked = torch.rand(24, 12000, generator=generator) < 0.1
    logits[7:12] = logits[7:12].masked_fill(masked[7:12], -math.inf)
    quick = kneedle_k(logits, k_max=k_max, on=on, chunk=7)
    monkeypatch.setattr(kneedle, "SORTED_WHOLE", 10**9)
    assert torch.equal(quick, kneedle_k(logits, k_max=k_max, on=on))
    assert len(set(quick.tolist())) > 3
    if on == "logits":
        assert quick.tolist() == by_hand(logits, 2, k_max)


def test_rows_are_sorted_whole_only_in_doubt(monkeypatch):
    (logits,) = properties.embeddings((30, 20000), dtype=torch.float32)
    widths = []
    plain = torch.Tensor.sort
    monkeypatch.setattr(torch.Tensor, "sort", lambda self, **k: (widths.append(len(self)), plain(self, **k))[1])
    kneedle_k(logits.detach(), k_max=64)
    assert sum(widths) <= 2


def test_rows_without_a_knee():
    rows = torch.stack([torch.zeros(6), torch.tensor([1.0, 2, *[-math.inf] * 4])])
    assert kneedle_k(rows, k_min=3, k_max=5).tolist() == [3, 3]
    assert kneedle_k(torch.randn(4, 2), k_max=5).tolist() == [2] * 4
    assert kneedle_k(torch.randn(0, 7), k_max=5).shape == (0,)
    assert kneedle_k(rows, k_max=5).dtype == torch.int64
    masked = torch.tensor([[9.0, 0, 0.1, 0.2, -math.inf, 0.3]])
    assert kneedle_k(masked, k_max=6).item() == token_references.knee(masked[0].numpy(), 2, 6) == 2


def test_half_precision_and_extremes():
    (logits,) = properties.embeddings((5, 30), dtype=torch.float32)
    halves = logits.detach().bfloat16()
    assert torch.equal(kneedle_k(halves, k_max=30), kneedle_k(halves.double(), k_max=30))
    assert torch.equal(kneedle_k(logits * 1e4, k_max=30), kneedle_k(logits, k_max=30))
    assert np.isin(kneedle_k(logits * 1e30, k_max=30).numpy(), np.arange(2, 31)).all()


@pytest.mark.parametrize("bounds", [{"k_min": 1, "k_max": 4}, {"k_min": 5, "k_max": 4}, {"k_max": 1}])
def test_bounds_that_are_none(bounds):
    with pytest.raises(UserError, match="2 <= k_min <= k_max"):
        kneedle_k(torch.zeros(2, 9), **bounds)


def test_inputs_that_do_not_fit():
    for logits in (torch.zeros(9), torch.zeros(2, 2, 9), torch.zeros(2, 2)):
        with pytest.raises(UserError, match="expected \\(A, V\\) with at least"):
            kneedle_k(logits, k_min=3, k_max=4)
    with pytest.raises(UserError, match="chunk of 0"):
        kneedle_k(torch.zeros(2, 9), k_max=4, chunk=0)
    with pytest.raises(UserError, match="'logits' or 'probabilities'"):
        kneedle_k(torch.zeros(2, 9), k_max=4, on="cosines")
