"""The vocabulary that models speak, and the protocols behind which they stand.

Legend of letters, everywhere in vlkd: B batch, N tokens, C channels, D joint width, K classes or class vectors,
R regions, A answer tokens, V vocabulary, M teachers; H and W pixels; tau is a temperature.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, Protocol, runtime_checkable

from vlkd.errors import UserError

if TYPE_CHECKING:
    from PIL.Image import Image
    from torch import Tensor

Features = Mapping[str, "Tensor"]
"""Named tensors; every name is a key of `FEATURES`."""

FEATURES: Mapping[str, str] = {
    "image.embed": "(B, D), not normalised, from dual encoders",
    "text.embed": "(B, D), not normalised, from dual encoders",
    "image.pooled": "(B, C), the image tower's output before its projection",
    "text.pooled": "(B, C), the text tower's output before its projection",
    "image.tokens": "(B, N, C), the image tower's cells before pooling and projection",
    "text.tokens": "(B, N, C), the text tower's tokens before pooling and projection, N the context length",
    "text.mask": "(B, N) bool, true on the text's real tokens",
    "image.token_embeds": "(B, N, D), each of `image.tokens` through the projection of `image.embed`",
    "text.token_embeds": "(B, N, D), each of `text.tokens` through the projection of `text.embed`",
    "logit_scale": "(), the factor on cosines, already exponentiated",
    "logit_bias": "(), added to scaled cosines (SigLIP)",
}


def check_features(wanted: Collection[str], available: Collection[str], owner: str) -> None:
    """Raise `UserError` unless every wanted feature is a known name that `owner` can produce."""
    for name in wanted:
        if name not in FEATURES:
            raise UserError(f"{owner}: no feature is called {name!r}; the vocabulary is {', '.join(FEATURES)}.")
        if name not in available:
            raise UserError(f"{owner} cannot produce {name!r}; it has {', '.join(sorted(available))}.")


IMAGE_PLACEHOLDER = "<image>"
"""Stands for the picture in a turn's text, whatever token a model itself has for it."""

IGNORED = -100
"""The label of a position that is no part of an answer."""


CHOICE_REQUEST = "Answer with the option's letter from the given choices directly."
"""What stands behind the options, as LLaVA-1.5 asks (https://github.com/haotian-liu/LLaVA, docs/Evaluation.md)."""


def with_choices(text: str, choices: Sequence[str]) -> str:
    """The words of a question with options, which training and evaluation ask alike.

    Behind it stand a line `A. FIRST`, `B. SECOND` and so on for each of them, and `CHOICE_REQUEST`; a question whose
    own text has all these lines already, or that has no options, is asked as it is.
    """
    lines = [f"{chr(ord('A') + place)}. {words}" for place, words in enumerate(choices)]
    if all(line in text.split("\n") for line in lines):
        return text
    return "\n".join([text, *lines, CHOICE_REQUEST])


@dataclass(frozen=True)
class Turn:
    """What one side says in a conversation; `<image>` in the user's text is where the picture stands."""

    role: Literal["user", "assistant"]
    text: str


@runtime_checkable
class Preprocessing(Protocol):
    """How a model prepares its own input: the half without weights, which travels to worker processes.

    A decoded image is a PIL image in mode RGB. Pixels are either uint8, which the model normalises in `encode`,
    or float, which it takes as they are.
    """

    @property
    def image_size(self) -> tuple[int, int]:
        """Height and width of the pixels."""
        ...

    @property
    def context_length(self) -> int:
        """The largest number of tokens of one text."""
        ...

    def image_transform(self, image: Image) -> Tensor:
        """A whole image as in evaluation (the model's own resize and crop): (3, H, W)."""
        ...

    def view_transform(self, image: Image) -> Tensor:
        """A view that is already cropped, squashed to the input size without any further crop: (3, H, W)."""
        ...

    def tokenize(self, texts: Sequence[str]) -> dict[str, Tensor]:
        """`ids` (B, N) int64 and `mask` (B, N) bool, true on real tokens; longer texts are truncated."""
        ...


class ConversationPreprocessing(Protocol):
    """How a generative model prepares pictures and conversations; it travels to worker processes."""

    @property
    def image_size(self) -> tuple[int, int]:
        """Height and width of the pixels, or of a tile."""
        ...

    @property
    def visual_tokens(self) -> int:
        """N, the places of a picture in a conversation; 0 where they depend on its size."""
        ...

    def image_inputs(self, images: Sequence[Image]) -> dict[str, Tensor]:
        """Of B pictures `pixels`, and `image_sizes` where pictures are tiled."""
        ...

    def encode(self, turns: Sequence[Turn], *, image: Image | None = None, key: str = "") -> tuple[Tensor, Tensor]:
        """ids (T,) and labels (T,) int64, `IGNORED` but on answers; raises `TooLong` beyond the context."""
        ...

    def encode_questions(
        self, turns: Sequence[Turn], *, image: Image | None = None, key: str = ""
    ) -> tuple[Tensor, Tensor, Tensor]:
        """As `encode` of questions that do not see each other, and the number of each token's question (T,)."""
        ...

    def pad(self, rows: Sequence[tuple[Tensor, ...]]) -> dict[str, Tensor]:
        """`ids`, `labels` (B, T) int64 and `mask` (B, T), bool or numbers, of what was encoded, T the longest."""
        ...


@runtime_checkable
class DualEncoder(Protocol):
    """A model with an image tower and a text tower that share one joint space."""

    @property
    def name(self) -> str:
        """The reference it was loaded from, for tables and errors."""
        ...

    @property
    def provides(self) -> frozenset[str]:
        """The features `encode` can produce."""
        ...

    @property
    def width(self) -> int:
        """D, the joint width."""
        ...

    @property
    def preprocessing(self) -> Preprocessing: ...

    def encode(self, inputs: Mapping[str, Tensor], want: Collection[str]) -> dict[str, Tensor]:
        """Only the features in `want`.

        Args:
            inputs: `pixels` (B, 3, H, W) for image features; `ids` and `mask` (B, N) for text features.
            want: names from `FEATURES`.
        """
        ...
