"""One model's image side beside another's text side, for asymmetric search between two models of one joint space."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor

from vlkd.errors import UserError
from vlkd.features import Preprocessing
from vlkd.models.base import DualEncoderModule, ImageConfiguration

if TYPE_CHECKING:
    from PIL.Image import Image


@dataclass(frozen=True, kw_only=True)
class JoinedPreprocessing:
    """Pixels as `images` prepares them, tokens as `texts` does."""

    images: Preprocessing
    texts: Preprocessing

    @property
    def image_size(self) -> tuple[int, int]:
        """Height and width of the pixels."""
        return self.images.image_size

    @property
    def context_length(self) -> int:
        """The largest number of tokens of one text."""
        return self.texts.context_length

    def image_transform(self, image: Image) -> Tensor:
        """A whole image as in evaluation: (3, H, W)."""
        return self.images.image_transform(image)

    def view_transform(self, image: Image) -> Tensor:
        """A view that is already cropped: (3, H, W)."""
        return self.images.view_transform(image)

    def tokenize(self, texts: Sequence[str]) -> dict[str, Tensor]:
        """`ids` and `mask` (B, N)."""
        return self.texts.tokenize(texts)


class JoinedModel(DualEncoderModule):
    """The image embeddings of one model, the text embeddings and the scale of another.

    Args:
        image_side: encodes the images.
        text_side: encodes the texts.

    Raises:
        UserError: the joint widths differ.
    """

    image_prefixes = ("image_side.",)

    def __init__(self, image_side: DualEncoderModule, text_side: DualEncoderModule) -> None:
        if image_side.width != text_side.width:
            raise UserError(
                f"{image_side.name} has width {image_side.width} but the text model {text_side.name} has "
                f"{text_side.width}; asymmetric search needs one joint space: give the text model that the image tower "
                "was trained towards."
            )
        super().__init__(
            name=f"{image_side.name} + {text_side.name}",
            width=image_side.width,
            provides=frozenset({"image.embed", "text.embed", *text_side.provides & {"logit_scale", "logit_bias"}}),
            preprocessing=JoinedPreprocessing(images=image_side.preprocessing, texts=text_side.preprocessing),
        )
        self.image_side, self.text_side = image_side, text_side

    def normalised(self, pixels: Tensor) -> Tensor:
        return self.image_side.normalised(pixels)

    def image_features(self, pixels: Tensor) -> dict[str, Tensor]:
        return self.image_side.image_features(pixels)

    def text_features(self, ids: Tensor, mask: Tensor) -> dict[str, Tensor]:
        return self.text_side.text_features(ids, mask)

    def scale_features(self) -> dict[str, Tensor]:
        return self.text_side.scale_features()

    def library_configuration(self) -> ImageConfiguration | None:
        """That of the image side."""
        return self.image_side.library_configuration()
