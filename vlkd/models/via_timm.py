"""timm image towers as encoders of images alone: a name with a weights file, or a name on the hub."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from vlkd.errors import UserError
from vlkd.models.base import DualEncoderModule, ImageConfiguration
from vlkd.models.tokenizer import first_line
from vlkd.models.towers import build_image_tower, image_tower_width, load_exactly, load_timm_weights

HUB_FILE = "model.safetensors"


@dataclass(frozen=True)
class TimmPreprocessing:
    """timm's own evaluation transform of a model; pixels are float and normalised. Texts have no place in it.

    Args:
        image_size: height and width.
        transform: the library's evaluation transform.
        squash: the library's transform of the same settings that keeps the whole view.
    """

    image_size: tuple[int, int]
    transform: Callable[[Image.Image], Tensor]
    squash: Callable[[Image.Image], Tensor]
    context_length: int = 0

    def image_transform(self, image: Image.Image) -> Tensor:
        return self.transform(image)

    def view_transform(self, image: Image.Image) -> Tensor:
        return self.squash(image)

    def tokenize(self, texts: Sequence[str]) -> dict[str, Tensor]:
        """Every text cut to the context length, which is 0: `ids` and `mask` (B, 0)."""
        ids = torch.empty(len(texts), 0, dtype=torch.int64)
        return {"ids": ids, "mask": ids.bool()}


class TimmImageEncoder(DualEncoderModule):
    """A timm model without classifier: `image.embed` is its pooled output before the logits, and there is no text.

    Code that needs texts asks for `"text.embed" in model.provides`.
    """

    image_prefixes = ("tower.",)

    def __init__(self, *, name: str, tower: Any) -> None:
        super().__init__(
            name=name,
            width=image_tower_width(tower),
            provides=frozenset({"image.embed"}),
            preprocessing=make_preprocessing(tower),
        )
        self.tower = tower

    def image_features(self, pixels: Tensor) -> dict[str, Tensor]:
        return {"image.embed": self.tower(pixels)}

    def text_features(self, ids: Tensor, mask: Tensor) -> dict[str, Tensor]:  # noqa: ARG002 - there is no text tower
        raise self._no_text()

    def scale_features(self) -> dict[str, Tensor]:
        raise self._no_text()

    def encode_text(self, texts: Sequence[str], *, batch_size: int = 256, normalize: bool = False) -> Tensor:  # noqa: ARG002 - as the other families
        """Always refused.

        Raises:
            UserError: there is no text tower.
        """
        raise self._no_text()

    def _no_text(self) -> UserError:
        return UserError(f"{self.name} is an image tower without a text tower; take a dual encoder to compare texts.")

    def library_configuration(self) -> ImageConfiguration:
        found = library_settings(self.tower)
        return ImageConfiguration(
            size=self.preprocessing.image_size,
            mean=tuple(found["mean"]),
            std=tuple(found["std"]),
            interpolation=found["interpolation"],
        )


def library_settings(tower: Any) -> dict[str, Any]:
    """What timm says of the input of this model: `input_size`, `mean`, `std`, `interpolation`, `crop_pct`, `crop_mode`.

    The values differ between models: EfficientNet-Lite ported from TensorFlow wants mean and std 0.5, not ImageNet's.
    """
    from timm.data import resolve_model_data_config

    found: dict[str, Any] = resolve_model_data_config(tower)
    return found


def make_preprocessing(tower: Any) -> TimmPreprocessing:
    """The weight-free half of a tower."""
    from timm.data import create_transform

    settings = library_settings(tower)
    height, width = settings["input_size"][-2:]
    return TimmPreprocessing(
        image_size=(int(height), int(width)),
        transform=create_transform(**settings, is_training=False),
        squash=create_transform(**(settings | {"crop_pct": 1.0, "crop_mode": "squash"}), is_training=False),
    )


def load_timm(ref: str, source: str) -> TimmImageEncoder:
    """Load `NAME@FILE.safetensors` or `NAME`, whose weights come from the hub; float32, in evaluation mode.

    Args:
        ref: the reference as the user wrote it, for the model's name.
        source: the part after `timm:`.

    Raises:
        UserError: unknown name, no network, weights that are pickled, missing or of another model.
    """
    name, found, path = source.partition("@")
    tower = build_image_tower(name, "")
    if found:
        load_timm_weights(tower, path)
    else:
        load_hub_weights(ref, name, tower)
    return TimmImageEncoder(name=ref, tower=tower.float()).eval()


def load_hub_weights(ref: str, name: str, tower: Any) -> None:
    """Fetch the safetensors that timm publishes under a name and load them into its tower.

    timm loads the file into the whole model, classifier included: without one it would forgive missing keys.

    Raises:
        UserError: timm publishes no safetensors under the name, they cannot be fetched, or they do not fit.
    """
    import timm
    from huggingface_hub import hf_hub_download

    published = timm.models.get_pretrained_cfg(name)
    if not published or not published.hf_hub_id:
        raise UserError(
            f"timm publishes no safetensors for {ref!r}, and vlkd never unpickles; expected a name of "
            f"timm.list_pretrained(), or timm:{name}@FILE.safetensors with weights of your own."
        )
    try:
        path = hf_hub_download(published.hf_hub_id, HUB_FILE)
        overlay = {"file": str(path), "source": "", "custom_load": False}
        whole = timm.create_model(name, pretrained=True, pretrained_cfg_overlay=overlay)
    except Exception as error:  # the hub and timm raise whatever a missing network or a foreign file provokes
        raise UserError(
            f"timm cannot load {ref!r} ({first_line(error)}); check the network, or download {HUB_FILE} of "
            f"{published.hf_hub_id} elsewhere and pass timm:{name}@FILE.safetensors."
        ) from error
    wanted = tower.state_dict().keys()
    load_exactly(tower, {key: value for key, value in whole.state_dict().items() if key in wanted}, ref)
