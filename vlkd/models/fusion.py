"""A small network that reads the tokens of an image and of a text together and judges whether they match.

It is trained beside a dual encoder and dropped afterwards: nothing of it is part of a model folder.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from vlkd.errors import UserError
from vlkd.models.towers import masked_mean


class Stream(nn.Module):
    """One modality's half of a layer: attention to itself, attention to the other modality, an MLP; pre-norm, GELU."""

    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.own_norm = nn.LayerNorm(width)
        self.own = nn.MultiheadAttention(width, heads, dropout, batch_first=True)
        self.cross_norm = nn.LayerNorm(width)
        self.other_norm = nn.LayerNorm(width)
        self.cross = nn.MultiheadAttention(width, heads, dropout, batch_first=True)
        self.mlp = nn.Sequential(
            nn.LayerNorm(width),
            nn.Linear(width, 2 * width),
            nn.GELU(),
            nn.Dropout(dropout),
            nn.Linear(2 * width, width),
        )
        self.dropout = nn.Dropout(dropout)

    def forward(self, own: Tensor, other: Tensor, own_hidden: Tensor | None, other_hidden: Tensor | None) -> Tensor:
        """own (P, N, D), other (P, N', D); hidden (P, N) and (P, N') true where nothing may be read: (P, N, D)."""
        query = self.own_norm(own)
        seen, _ = self.own(query, query, query, key_padding_mask=own_hidden, need_weights=False)
        own = own + self.dropout(seen)
        keys = self.other_norm(other)
        seen, _ = self.cross(self.cross_norm(own), keys, keys, key_padding_mask=other_hidden, need_weights=False)
        own = own + self.dropout(seen)
        result: Tensor = own + self.dropout(self.mlp(own))
        return result


class FusionNetwork(nn.Module):
    """Two streams of cross-attention over the tokens of P pairs, merged into one vector and one match logit.

    In each layer the text's tokens attend to themselves and to the image's, and the image's to themselves and to the
    text's, both from what the layer before gave. The means of both streams, side by side, become the fused vector. What
    comes in is normalised first: a projection sets its scale for cosines, which do not see it. Tokens carry whatever
    order their towers gave them; the network adds none.

    Args:
        width: D, the width of both modalities' tokens.
        heads: attention heads; they must divide the width.
        layers: how often the modalities read each other.
        dropout: on attention weights, inside the MLPs and on what each adds.

    Raises:
        UserError: the heads do not divide the width, or there is no layer.
    """

    def __init__(self, width: int, *, heads: int, layers: int = 1, dropout: float = 0.0) -> None:
        super().__init__()
        if heads < 1 or width % heads:
            raise UserError(f"Found a fusion width of {width} with {heads} heads; choose heads that divide the width.")
        if layers < 1:
            raise UserError(f"Found {layers} fusion layers, expected at least 1.")
        self.width = width
        self.image_norm = nn.LayerNorm(width)
        self.text_norm = nn.LayerNorm(width)
        self.image_streams = nn.ModuleList(Stream(width, heads, dropout) for _ in range(layers))
        self.text_streams = nn.ModuleList(Stream(width, heads, dropout) for _ in range(layers))
        self.merge = nn.Sequential(nn.LayerNorm(2 * width), nn.Linear(2 * width, width), nn.GELU())
        self.match = nn.Linear(width, 1)

    def forward(self, image_tokens: Tensor, text_tokens: Tensor, text_mask: Tensor) -> tuple[Tensor, Tensor]:
        """The fused vectors (P, D) and match logits (P,) of P pairs.

        Args:
            image_tokens: (P, N, D).
            text_tokens: (P, N', D).
            text_mask: (P, N') bool, true on real tokens; a text without any is read whole and adds a mean of zero.
        """
        # Attention over nothing is not a number.
        hidden = ~text_mask & text_mask.any(dim=1, keepdim=True)
        image, text = self.image_norm(image_tokens), self.text_norm(text_tokens)
        for image_stream, text_stream in zip(self.image_streams, self.text_streams, strict=True):
            image, text = image_stream(image, text, None, hidden), text_stream(text, image, hidden, None)
        fused: Tensor = self.merge(torch.cat([image.mean(dim=1), masked_mean(text, text_mask)], dim=1))
        return fused, self.match(fused).squeeze(1)
