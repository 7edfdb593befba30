"""What the three model families share: the DualEncoder protocol as a module, and encoding of whole lists."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

import torch
from torch import Tensor, nn

from vlkd.errors import UserError
from vlkd.features import Preprocessing, check_features

if TYPE_CHECKING:
    from PIL.Image import Image

Item = TypeVar("Item")
Module = TypeVar("Module", bound=nn.Module)


@dataclass(frozen=True, kw_only=True)
class ImageConfiguration:
    """How a library says that its pretrained image tower must be fed."""

    size: tuple[int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    interpolation: str


class DualEncoderModule(nn.Module):
    """A `DualEncoder` as a torch module; the families fill in the two towers.

    Args:
        name: the reference it was loaded from.
        width: D, the joint width.
        provides: the features that `encode` can produce.
        preprocessing: the half without weights.
    """

    image_prefixes: tuple[str, ...] = ()
    """Beginnings of the names of the image tower's parameters, its projection included."""

    def __init__(self, *, name: str, width: int, provides: frozenset[str], preprocessing: Preprocessing) -> None:
        super().__init__()
        self.name = name
        self.width = width
        self.provides = provides
        self.preprocessing = preprocessing

    @abstractmethod
    def image_features(self, pixels: Tensor) -> dict[str, Tensor]:
        """All image features of `normalised` pixels (B, 3, H, W)."""

    @abstractmethod
    def text_features(self, ids: Tensor, mask: Tensor) -> dict[str, Tensor]:
        """All text features of ids and mask (B, N)."""

    @abstractmethod
    def scale_features(self) -> dict[str, Tensor]:
        """`logit_scale`, already exponentiated, and `logit_bias` where the model has one; both ()."""

    @abstractmethod
    def library_configuration(self) -> ImageConfiguration | None:
        """What the library that published the image tower says about its input; None if nobody else trained it."""

    def normalised(self, pixels: Tensor) -> Tensor:
        """What enters the image tower: float pixels as they are."""
        return pixels

    def encode(self, inputs: Mapping[str, Tensor], want: Collection[str]) -> dict[str, Tensor]:
        """Only the features in `want`; a tower whose features are not wanted does not run.

        Raises:
            UserError: a wanted feature is unknown or this model cannot produce it.
        """
        check_features(want, self.provides, self.name)
        found: dict[str, Tensor] = {}
        if any(name.startswith("image.") for name in want):
            found |= self.image_features(self.normalised(inputs["pixels"]))
        if any(name.startswith("text.") for name in want):
            found |= self.text_features(inputs["ids"], inputs["mask"])
        if any(name.startswith("logit_") for name in want):
            found |= self.scale_features()
        return {name: found[name] for name in want}

    @property
    def device(self) -> torch.device:
        """Where the parameters are."""
        return next(self.parameters()).device

    def encode_image(self, images: Sequence[Image], *, batch_size: int = 64, normalize: bool = False) -> Tensor:
        """`image.embed` (B, D) float32 of decoded RGB images, prepared as in evaluation, on the model's device.

        Raises:
            UserError: the list is empty.
        """

        def prepare(batch: Sequence[Image]) -> dict[str, Tensor]:
            return {"pixels": torch.stack([self.preprocessing.image_transform(image) for image in batch])}

        return self._encode_list(images, prepare, "image.embed", batch_size, normalize)

    def encode_text(self, texts: Sequence[str], *, batch_size: int = 256, normalize: bool = False) -> Tensor:
        """`text.embed` (B, D) float32 of raw texts, on the model's device.

        Raises:
            UserError: the list is empty.
        """
        return self._encode_list(texts, self.preprocessing.tokenize, "text.embed", batch_size, normalize)

    def _encode_list(
        self,
        items: Sequence[Item],
        prepare: Callable[[Sequence[Item]], dict[str, Tensor]],
        feature: str,
        batch_size: int,
        normalize: bool,
    ) -> Tensor:
        if len(items) == 0 or isinstance(items, str):
            raise UserError(f"{self.name}: found {items!r} to encode, expected a list with at least one item.")
        parts = []
        with torch.no_grad(), evaluating(self):
            for start in range(0, len(items), batch_size):
                inputs = {
                    key: value.to(self.device) for key, value in prepare(items[start : start + batch_size]).items()
                }
                parts.append(self.encode(inputs, (feature,))[feature].float())
        embeddings = torch.cat(parts)
        return nn.functional.normalize(embeddings, dim=-1) if normalize else embeddings

    def image_tower_parameters(self) -> Iterator[nn.Parameter]:
        """The parameters behind `image.embed`, the projection included."""
        return (value for name, value in self.named_parameters() if name.startswith(self.image_prefixes))

    def text_tower_parameters(self) -> Iterator[nn.Parameter]:
        """The parameters behind `text.embed`, the projection included."""
        for name, value in self.named_parameters():
            if not name.startswith(self.image_prefixes) and "logit_" not in name:
                yield value

    def parameter_counts(self) -> dict[str, int]:
        """Numbers of parameters of the two towers, `image` and `text`, each with its projection."""
        return {
            "image": sum(value.numel() for value in self.image_tower_parameters()),
            "text": sum(value.numel() for value in self.text_tower_parameters()),
        }


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Evaluation mode inside; afterwards every submodule has the mode it had (a frozen tower stays in evaluation)."""
    modes = [(child, child.training) for child in module.modules()]
    module.eval()
    try:
        yield
    finally:
        for child, training in modes:
            child.training = training


def channels_last(model: Module) -> Module:
    """The model in the layout that convolutions prefer: on a CPU a step in fp32 takes about two thirds of the time."""
    return model.to(memory_format=torch.channels_last)  # type: ignore[call-overload, no-any-return]


def batch_norms(model: nn.Module) -> list[nn.Module]:
    """Its batch norms, of whatever dimension and with timm's fused activations."""
    return [module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
