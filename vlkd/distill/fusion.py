"""Image-text matching through a feature-fusion network, for the preparation of teachers."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from vlkd.errors import UserError
from vlkd.models.fusion import FusionNetwork
from vlkd.objectives.embedding import cosines
from vlkd.objectives.matching import hard_negatives, image_text_matching


class FusionMatching(nn.Module):
    """A term's objective: whether a fusion network tells the pairs of a batch from hard negatives.

    AMMKD (Li et al., 2025, arXiv:2509.00039) prepares its two CLIP teachers with a "feature fusion network" that draws
    and merges what is telling in both modalities. Its abstract says no more, neither how the network is built nor where
    it is attached, and the paper could not be read. Our reading, AMMKD-style and no reproduction:

    - The network is `FusionNetwork`, a few layers of cross-attention in both directions.
    - It reads tokens *through the projections that make the joint embedding*. With frozen towers these are all that is
      trained, so a loss on the fused tokens can reach them by this way alone; fed with the towers' own tokens, the
      network would learn beside the teacher and leave it as it was.
    - Its loss is image-text matching as in ALBEF (Li et al., 2021, arXiv:2107.07651, section 3.2): the B pairs against,
      for each image, a caption drawn by similarity among those that do not match it, and for each caption such an
      image. The contrastive loss on the embeddings stands beside it as a term of its own (`info_nce`).
    - It is dropped afterwards: the teacher remains a dual encoder, whose texts can be encoded once and stored.

    The network's parameters belong to the term: trained with the student, never part of what is exported. Draws come
    from torch's generator. Under data parallelism every rank judges the global batch, with draws of its own generator:
    those of one rank where ranks were seeded alike, a mean over more draws where they were not.

    Args:
        width: D, the joint width.
        layers: of the fusion network.
        dropout: inside it.

    Raises:
        UserError: there is no layer.
    """

    def __init__(self, width: int, *, layers: int = 1, dropout: float = 0.1) -> None:
        super().__init__()
        self.network = FusionNetwork(width, heads=math.gcd(width, 4), layers=layers, dropout=dropout)

    def forward(
        self,
        image_token_embeds: Tensor,
        text_token_embeds: Tensor,
        text_mask: Tensor,
        image_embed: Tensor,
        text_embed: Tensor,
        logit_scale: Tensor,
        *,
        match: Tensor,
    ) -> Tensor:
        """Mean matching loss over the B pairs and the up to 2 B negatives: ().

        Args:
            image_token_embeds: (B, N, D).
            text_token_embeds: (B, N', D), row i belonging to image i.
            text_mask: (B, N'), true or 1 on real tokens.
            image_embed: (B, D), for the similarities that choose negatives; constant.
            text_embed: (B, D), likewise.
            logit_scale: the factor on their cosines, (), constant.
            match: (B, B) bool, true where image i and text j belong together; the diagonal counts as true. An image or
                caption that matches the whole batch has no negative and gives none.

        Raises:
            UserError: the tokens are not of the network's width.
        """
        if image_token_embeds.shape[2] != self.network.width:
            raise UserError(
                f"The fusion network has width {self.network.width} and found tokens of width "
                f"{image_token_embeds.shape[2]}; set model.width to the joint width of the model."
            )
        with torch.no_grad():
            images, texts, labels = matching_pairs(logit_scale * cosines(image_embed, text_embed), match)
        mask = text_mask.bool()
        # Tokens come padded to the context length, of which most captions fill a small part.
        length = 1 + int((mask.any(dim=0) * torch.arange(mask.shape[1], device=mask.device)).max())
        text_tokens = text_token_embeds[:, :length]
        _, logits = self.network(image_token_embeds[images], text_tokens[texts], mask[texts, :length])
        return image_text_matching(logits, labels).mean()


def matching_pairs(similarities_BB: Tensor, match: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The rows of images and of texts of P pairs to be judged, and whether they match: (P,), (P,), (P,) bool.

    First the B pairs themselves, then each image that has a negative with its hard caption, then each such caption with
    its hard image.

    Args:
        similarities_BB: scaled cosines, images by texts, (B, B).
        match: (B, B) bool, images by texts.
    """
    rows = torch.arange(len(match), device=match.device)
    captions = hard_negatives(similarities_BB, match)
    images = hard_negatives(similarities_BB.T, match.T)
    with_caption, with_image = captions >= 0, images >= 0
    image_rows = torch.cat([rows, rows[with_caption], images[with_image]])
    text_rows = torch.cat([rows, captions[with_caption], rows[with_image]])
    labels = torch.arange(len(image_rows), device=match.device) < len(rows)
    return image_rows, text_rows, labels
