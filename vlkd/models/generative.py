"""Models that answer questions about a picture, in parts that can be recombined: vision, projection, language."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Self

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from vlkd.errors import UserError
from vlkd.features import Turn
from vlkd.models.base import evaluating
from vlkd.models.fingerprint import generative_fingerprint
from vlkd.models.label_masks import Chat, encode_conversation, encode_questions, pad_conversations, prompt_ids
from vlkd.models.preprocessing import TransformersPreprocessing

if TYPE_CHECKING:
    from PIL.Image import Image

Part = Literal["vision", "projector", "language"]
PARTS: tuple[Part, ...] = ("vision", "projector", "language")
"""Of a generative model; its token embeddings and its output layer belong to the language model."""


@dataclass(frozen=True)
class GenerativePreprocessing(TransformersPreprocessing):
    """How a generative model prepares pictures and conversations; it has no weights and travels to worker processes.

    Attributes:
        chat: the model's way with conversations.
        pad_id: the id under padding.
        visual_tokens: N, the places of a picture in a conversation; 0 where they depend on its size.
    """

    chat: Chat
    pad_id: int
    visual_tokens: int

    def image_inputs(self, images: Sequence[Image]) -> dict[str, Tensor]:
        """Of decoded pictures what `forward_logits` and `generate` take: `pixels`, and `image_sizes` for tiled ones."""
        if self.visual_tokens:
            return {"pixels": torch.stack([self.image_transform(image) for image in images])}
        found = self.processor(images=list(images), return_tensors="pt")
        return {"pixels": found["pixel_values"], "image_sizes": found["image_sizes"]}

    def places_of(self, image: Image | None) -> int:
        """N for this picture.

        Raises:
            UserError: N depends on the size of a picture that was not given.
        """
        if self.visual_tokens:
            return self.visual_tokens
        if image is None:
            raise UserError(f"{self.chat.name} cuts pictures by their size; give the picture with its conversation.")
        counted = self.chat.processor._get_num_multimodal_tokens(image_sizes=[(image.height, image.width)])
        return int(counted.num_image_tokens[0])

    def encode(self, turns: Sequence[Turn], *, image: Image | None = None, key: str = "") -> tuple[Tensor, Tensor]:
        """ids (T,) and labels (T,) of a conversation; see `vlkd.models.label_masks.encode_conversation`."""
        return encode_conversation(self.chat, turns, visual_tokens=self.places_of(image), key=key)

    def encode_questions(
        self, turns: Sequence[Turn], *, image: Image | None = None, key: str = ""
    ) -> tuple[Tensor, Tensor, Tensor]:
        """ids, labels and numbers (T,) of questions that do not see each other; see `encode_questions` there."""
        return encode_questions(self.chat, turns, visual_tokens=self.places_of(image), key=key)

    def pad(self, rows: Sequence[tuple[Tensor, ...]]) -> dict[str, Tensor]:
        """`ids`, `labels` and `mask` (B, T) of encoded conversations, padding behind them."""
        return pad_conversations(rows, self.pad_id)

    def prompt_ids(self, turns: Sequence[Turn] | str, *, image: Image | None = None) -> Tensor:
        """ids (T,) up to where the answer begins; a string is a question about the picture."""
        # Where N varies and nothing will be run, one place stands for the picture.
        places = 1 if image is None and not self.visual_tokens else self.places_of(image)
        return prompt_ids(self.chat, turns, visual_tokens=places)


class GenerativeVLM(nn.Module):
    """A vision tower, a projector and a causal language model; z = language(merge(embed(ids), project(vision(x)))).

    Legend: B batch, N visual tokens, C their width before the projector, E the language model's width, T tokens of a
    conversation, A answer tokens, V the width of the logits.

    Attributes:
        name: the reference it was loaded from.
        preprocessing: the half without weights.
        image_token_id: the id at the N places of a picture.
        visual_tokens: N; 0 where it depends on the picture.
        visual_width: C.
        vocabulary: V, which may exceed the tokenizer's length.
        stop_ids: any of these ends an answer.
        switchable: the three parts can be run one by one.
    """

    switchable = True

    def __init__(
        self,
        *,
        name: str,
        preprocessing: GenerativePreprocessing,
        visual_width: int,
        vocabulary: int,
        stop_ids: tuple[int, ...],
    ) -> None:
        super().__init__()
        self.name = name
        self.preprocessing = preprocessing
        self.image_token_id = preprocessing.chat.image_token_id
        self.visual_tokens = preprocessing.visual_tokens
        self.visual_width = visual_width
        self.vocabulary = vocabulary
        self.stop_ids = stop_ids
        self.frozen = False

    @property
    def processor(self) -> Any:
        """The transformers processor."""
        return self.preprocessing.chat.processor

    @property
    def tokenizer(self) -> Any:
        """The transformers tokenizer."""
        return self.processor.tokenizer

    def count_tokens(self, texts: Sequence[str]) -> list[int]:
        """Of each text alone, without the tokens that a tokenizer puts around it."""
        return [len(ids) for ids in self.tokenizer(list(texts), add_special_tokens=False)["input_ids"]] if texts else []

    @property
    def device(self) -> torch.device:
        """Where the parameters are."""
        return next(self.parameters()).device

    @abstractmethod
    def vision(self, pixels: Tensor) -> Tensor:
        """What enters the projector, of the selected layer and without a dropped token: (B, 3, H, W) to (B, N, C)."""

    @abstractmethod
    def project(self, tokens: Tensor) -> Tensor:
        """(B, N, C) to (B, N, E)."""

    @abstractmethod
    def embed(self, ids: Tensor) -> Tensor:
        """Token ids (B, T) to (B, T, E)."""

    @abstractmethod
    def language(self, embeds: Tensor, mask: Tensor, keep: Tensor | None = None) -> Tensor:
        """Logits (B, T, V), or (A, V) at the places that are true in `keep` (B, T), so that no others are computed.

        Args:
            embeds: (B, T, E).
            mask: (B, T) bool, true on real tokens; padding may stand on either side. Or the numbers of
                `vlkd.models.question_mask`.
            keep: (B, T) bool with A true places.
        """

    @abstractmethod
    def generate(self, ids: Tensor, mask: Tensor, *, max_new_tokens: int, **images: Tensor) -> Tensor:
        """Greedy answers (B, at most max_new_tokens) to prompts (B, T) that are padded in front.

        What the model's own generation settings say of sampling and penalties is left aside.
        """

    @abstractmethod
    def part_of(self, name: str) -> Part:
        """The part to which the parameter of this name belongs."""

    @abstractmethod
    def is_idle(self, name: str) -> bool:
        """Whether the parameter of this name has no influence on any logit: what is behind the selected layer."""

    @abstractmethod
    def save(self, folder: str | Path) -> None:
        """Write the model's folder, with the processor, which `load_generative` reads."""

    @abstractmethod
    def language_layers(self) -> list[nn.Module]:
        """The language model's blocks, in order."""

    def merge(self, embeds: Tensor, ids: Tensor, visual: Tensor) -> Tensor:
        """`embeds` (B, T, E) with `visual` (B, N, E) at the places of the image token.

        Raises:
            UserError: a conversation has another number of places than a picture has tokens.
        """
        places = ids == self.image_token_id
        counts = places.sum(dim=1)
        if (counts != visual.shape[1]).any():
            raise UserError(
                f"{self.name}: conversations have {sorted(set(counts.tolist()))} places for a picture of "
                f"{visual.shape[1]} tokens; encode them with this model's own preprocessing."
            )
        return embeds.masked_scatter(places[:, :, None], visual.to(embeds.dtype))

    def forward_logits(
        self,
        pixels: Tensor | None,
        ids: Tensor,
        mask: Tensor,
        *,
        visual: Tensor | None = None,
        keep: Tensor | None = None,
        **images: Tensor,
    ) -> Tensor:
        """Logits of conversations: (B, T, V), or (A, V) with `keep`.

        Args:
            pixels: (B, 3, H, W); not read where `visual` is given.
            ids: (B, T), the image token N times in each row.
            mask: (B, T), see `language`.
            visual: (B, N, E), tokens that were already projected, also those of another model's vision tower.
            keep: (B, T) bool, see `language` and `vlkd.models.label_masks.answer_positions`.
            images: what else `preprocessing.image_inputs` gave.

        Raises:
            UserError: neither pixels nor visual tokens, or `merge`.
        """
        if images:
            raise UserError(f"{self.name}: found the image inputs {', '.join(images)}, expected pixels alone.")
        if visual is None:
            if pixels is None:
                raise UserError(f"{self.name}: found neither pixels nor visual tokens; give one of them.")
            visual = self.project(self.vision(pixels))
        return self.language(self.merge(self.embed(ids), ids, visual), mask, keep)

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """`forward_logits`, for wrappers that go through a module's call."""
        return self.forward_logits(*args, **kwargs)

    def answer(
        self,
        images: Sequence[Image],
        prompts: Sequence[Sequence[Turn] | str],
        *,
        batch_size: int = 16,
        max_new_tokens: int = 16,
    ) -> list[str]:
        """Greedy answers to questions, or to conversations that end with the user, one picture each.

        Raises:
            UserError: the lists are of unequal length.
        """
        if len(images) != len(prompts):
            raise UserError(
                f"{self.name}: found {len(images)} pictures and {len(prompts)} prompts, expected a pair each."
            )
        found: list[str] = []
        for start in range(0, len(images), batch_size):
            stop = start + batch_size
            pictures = list(images[start:stop])
            rows = [
                self.preprocessing.prompt_ids(prompt, image=image)
                for prompt, image in zip(prompts[start:stop], pictures, strict=True)
            ]
            padded = pad_conversations([(row, row) for row in rows], self.preprocessing.pad_id, left=True)
            inputs = {key: value.to(self.device) for key, value in self.preprocessing.image_inputs(pictures).items()}
            ids, mask = padded["ids"].to(self.device), padded["mask"].to(self.device)
            with torch.no_grad(), evaluating(self):
                new = self.generate(ids, mask, max_new_tokens=max_new_tokens, **inputs)
            found += [text.strip() for text in self.tokenizer.batch_decode(new, skip_special_tokens=True)]
        return found

    def part_parameters(self, part: Part) -> Iterator[nn.Parameter]:
        """The parameters of one part, idle ones included."""
        return (value for name, value in self.named_parameters() if self.part_of(name) == part)

    def train_only(self, parts: Collection[Part]) -> None:
        """Let these parts learn and no others; idle parameters never do, so that what learns always has a gradient."""
        for name, value in self.named_parameters():
            value.requires_grad_(self.part_of(name) in parts and not self.is_idle(name))

    def freeze(self) -> Self:
        """No parameter learns, and the mode stays evaluation whatever a parent module does; gradients pass through."""
        self.frozen = True
        self.requires_grad_(False)
        return self.eval()

    def train(self, mode: bool = True) -> Self:
        """As `nn.Module.train`; a frozen model stays in evaluation mode."""
        super().train(mode and not self.frozen)
        return self

    def checkpointing(self, on: bool) -> None:
        """Recompute the language model's blocks in the backward pass instead of holding what is inside them.

        transformers' own switch acts in training mode alone, and a frozen teacher that gradients pass through is in
        evaluation mode.
        """
        for layer in self.language_layers():
            vars(layer).pop("forward", None)
            if on:
                # A partial of a bound method is copied with its layer; a closure would keep pointing to this one.
                layer.forward = partial(_recomputed, layer.forward)

    def fingerprint(self) -> str:
        """16 hexadecimal digits that change with any weight, with the layout, and with the preprocessing."""
        return generative_fingerprint(self)


def _recomputed(forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    if not torch.is_grad_enabled():
        return forward(*args, **kwargs)
    return checkpoint(forward, *args, use_reentrant=False, **kwargs)
