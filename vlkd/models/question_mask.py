"""Which token sees which, where several questions about one picture stand in one row and none sees another.

A row is numbered: `PADDING` under padding, `SHARED` on what every token behind it sees (the picture, or a whole
conversation), and from `FIRST_QUESTION` on the number of the question that a token belongs to.
"""

from __future__ import annotations

import torch
from torch import Tensor

PADDING, SHARED, FIRST_QUESTION = 0, 1, 2


def attention_and_positions(mask: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """What a causal model of transformers takes as attention mask, and the position ids (B, T).

    Padding on either side moves no position, and a question begins right behind what it shares, so that each row of
    logits is that of the question alone.

    Args:
        mask: (B, T) bool, true on real tokens; or int64, the numbers above.
        dtype: of the embeddings.

    Returns:
        The mask, (B, T) int64 of a bool one; else (B, 1, T, T), 0 where the query (third) sees the key (fourth) and the
        smallest number where not.
    """
    if mask.dtype == torch.bool:
        return mask.long(), (mask.long().cumsum(dim=1) - 1).clamp_min(0)
    seen = visible(mask)
    hidden = torch.zeros(seen.shape, dtype=dtype, device=mask.device).masked_fill(~seen, torch.finfo(dtype).min)
    return hidden[:, None], seen.sum(dim=2) - 1


def visible(numbers: Tensor) -> Tensor:
    """Whether a query sees a key, (B, T, T) bool of numbers (B, T); each token sees itself, padding nothing else."""
    query, key = numbers[:, :, None], numbers[:, None, :]
    real = (query != PADDING) & (key != PADDING)
    places = torch.arange(numbers.shape[1], device=numbers.device)
    seen: Tensor = real & ((key == SHARED) | (key == query)) & (places[:, None] >= places)
    return seen | (places[:, None] == places)
