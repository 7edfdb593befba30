"""CLIP, SigLIP and fixed-resolution SigLIP 2 by transformers, from the hub or a local folder."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor

from vlkd.errors import UserError
from vlkd.models.base import DualEncoderModule, ImageConfiguration
from vlkd.models.preprocessing import RESAMPLING, TransformersPreprocessing
from vlkd.models.tokenizer import TransformersTokenizer, first_line

FAMILIES = ("clip", "siglip")


class TransformersModel(DualEncoderModule):
    """A `CLIPModel` or `SiglipModel`.

    SigLIP has no projections, so there the pooled features and the embeddings are the same; its text tower was trained
    without a mask on texts padded to the context length, and is run so.
    """

    image_prefixes = ("model.vision_model.", "model.visual_projection.")

    def __init__(self, *, name: str, model: Any, processor: Any, tokenizer: Any) -> None:
        config = model.config
        self_masking = config.model_type == "siglip"
        features = {"image.embed", "text.embed", "image.pooled", "text.pooled", "logit_scale"}
        size = int(config.vision_config.image_size)
        # SigLIP 2 was trained on lower case, which Google's own fixed-resolution folders leave to the caller.
        lower_case = self_masking and type(tokenizer).__name__.startswith("Gemma")
        super().__init__(
            name=name,
            width=int(config.text_config.projection_size if self_masking else config.projection_dim),
            provides=frozenset(features | {"logit_bias"} if self_masking else features),
            preprocessing=TransformersPreprocessing(
                image_size=(size, size),
                context_length=int(config.text_config.max_position_embeddings),
                processor=processor,
                tokenizer=TransformersTokenizer(tokenizer, max_length_padding=self_masking, lower_case=lower_case),
            ),
        )
        self.model = model
        self.processor = processor
        self.self_masking = self_masking

    def image_features(self, pixels: Tensor) -> dict[str, Tensor]:
        pooled = self.model.vision_model(pixel_values=pixels).pooler_output
        embed = pooled if self.self_masking else self.model.visual_projection(pooled)
        return {"image.pooled": pooled, "image.embed": embed}

    def text_features(self, ids: Tensor, mask: Tensor) -> dict[str, Tensor]:
        if self.self_masking:
            pooled = self.model.text_model(input_ids=ids).pooler_output
            return {"text.pooled": pooled, "text.embed": pooled}
        pooled = self.model.text_model(input_ids=ids, attention_mask=mask.long()).pooler_output
        return {"text.pooled": pooled, "text.embed": self.model.text_projection(pooled)}

    def scale_features(self) -> dict[str, Tensor]:
        found = {"logit_scale": self.model.logit_scale.exp().reshape(())}
        if self.self_masking:
            found["logit_bias"] = self.model.logit_bias.reshape(())
        return found

    def library_configuration(self) -> ImageConfiguration:
        """Mean, std and interpolation of the processor's configuration, the size of the model's."""
        size = int(self.model.config.vision_config.image_size)
        names = {int(value): name for name, value in RESAMPLING.items()}
        return ImageConfiguration(
            size=(size, size),
            mean=tuple(self.processor.image_mean),
            std=tuple(self.processor.image_std),
            interpolation=names[int(self.processor.resample)],
        )


def load_transformers(ref: str, source: str) -> TransformersModel:
    """Load a hub name or a folder with `config.json`, safetensors weights, processor and tokenizer.

    Args:
        ref: the reference as the user wrote it, for the model's name.
        source: the hub name or the folder.

    Raises:
        UserError: no network, another family, pickled or incomplete weights, a missing processor or tokenizer.
    """
    from transformers import AutoConfig, AutoImageProcessor, AutoModel, AutoTokenizer

    try:
        config = AutoConfig.from_pretrained(source, trust_remote_code=False)
        check_family(ref, config.model_type)
        model, info = AutoModel.from_pretrained(
            source,
            config=config,
            use_safetensors=True,
            trust_remote_code=False,
            dtype=torch.float32,
            output_loading_info=True,
        )
        processor = AutoImageProcessor.from_pretrained(source, trust_remote_code=False)
        tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=False)
    except UserError:
        raise
    except (OSError, RuntimeError, ValueError, KeyError, TypeError, ImportError) as error:
        raise cannot_load(ref, error) from error
    check_whole(ref, info["missing_keys"])
    return TransformersModel(name=ref, model=model.eval(), processor=processor, tokenizer=tokenizer)


def cannot_load(ref: str, error: Exception) -> UserError:
    """What to say where transformers fails on a folder or a name on the hub."""
    return UserError(
        f"transformers cannot load {ref!r} ({first_line(error)}); check the spelling and the network, or download the "
        "model elsewhere, with safetensors weights, and pass its folder."
    )


def check_whole(ref: str, missing: Collection[str]) -> None:
    """Raise `UserError` where the weights of a model lack some."""
    if missing:
        names = ", ".join(sorted(missing)[:3])
        raise UserError(f"The weights of {ref!r} lack {names}; expected those of its config.json, fetch them again.")


def check_family(ref: str, model_type: str) -> None:
    """Raise `UserError` unless the family has an adapter."""
    if model_type == "siglip2":
        raise UserError(
            f"{ref!r} is a variable-resolution (NaFlex) SigLIP 2, expected a fixed resolution; "
            "choose its sibling with a resolution in the name, such as google/siglip2-base-patch16-224."
        )
    if model_type not in FAMILIES:
        raise UserError(
            f"{ref!r} is of the family {model_type!r}, expected a dual encoder of one of {', '.join(FAMILIES)}; "
            "text encoders alone serve as the text tower of a composite model."
        )
