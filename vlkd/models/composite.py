"""The vlkd model folder: a timm image tower, a text tower, projections; our students and prepared teachers.

`model.json` names the towers, widths and preprocessing, `model.safetensors` holds every weight. Building one from its
folder executes no recipe and no remote code.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from vlkd.errors import UserError
from vlkd.features import check_features
from vlkd.models.base import DualEncoderModule, ImageConfiguration
from vlkd.models.folder import MODEL_JSON, WEIGHTS, read_layout, replacing, storage_dtype, stored_state
from vlkd.models.golden import write_golden
from vlkd.models.heads import stack_heads
from vlkd.models.preprocessing import CompositePreprocessing, PixelSettings, timm_settings
from vlkd.models.tokenizer import BorrowedTokenizer, CompactTokenizer, TextTokenizer, TransformersTokenizer, first_line
from vlkd.models.towers import (
    CompactText,
    TransformersText,
    build_image_tower,
    build_transformers_text,
    image_tokens,
    image_tower_width,
    load_exactly,
    read_safetensors,
    set_dropout,
)

FORMAT, VERSION = "vlkd-model", 1
TEXT_FOLDER = "text"
PROJECTED = {"embed": "pooled", "token_embeds": "tokens"}
"""Features behind a projection, each with the tower's feature before it."""


class CompositeModel(DualEncoderModule):
    """A timm image tower and a text tower with projections into one joint space.

    Args:
        name: the reference, for tables and errors.
        layout: the content of `model.json`.
        image_tower: (B, 3, H, W) normalised pixels to (B, C).
        text_tower: ids and mask (B, N) to (B, C); None where the text side is `reference`.
        preprocessing: uint8 pixels, ids.
        reference: another model that lends its text side; it is never trained.
    """

    image_prefixes = ("image_tower.", "image_projection.")
    mean: Tensor
    std: Tensor

    def __init__(
        self,
        *,
        name: str,
        layout: Mapping[str, Any],
        image_tower: nn.Module,
        text_tower: CompactText | TransformersText | None,
        preprocessing: CompositePreprocessing,
        reference: DualEncoderModule | None = None,
    ) -> None:
        features = {"image.embed", "image.pooled", "image.tokens", "image.token_embeds"}
        features |= {"text.embed", "text.pooled", "logit_scale"}
        if text_tower is not None:
            features |= {"text.tokens", "text.mask", "text.token_embeds"}
        if layout["logit_bias"]:
            features.add("logit_bias")
        if reference is not None and "text.pooled" not in reference.provides:
            features.remove("text.pooled")
        width = int(layout["width"])
        super().__init__(name=name, width=width, provides=frozenset(features), preprocessing=preprocessing)
        self.layout = dict(layout)
        self.settings = preprocessing.settings
        self.tokenizer = preprocessing.tokenizer
        self.image_tower = image_tower
        self.image_projection = stack_heads(layout["image"], image_tower_width(image_tower), width)
        self.text_tower = text_tower
        self.text_projection: nn.Module = nn.Identity()
        if text_tower is not None:
            self.text_projection = stack_heads(layout["text"], text_tower.width, width)
        self.reference = reference
        if reference is not None:
            reference.requires_grad_(False)
        self.log_logit_scale = nn.Parameter(torch.zeros(()))
        self.logit_bias = nn.Parameter(torch.zeros(())) if layout["logit_bias"] else None
        self.register_buffer("mean", torch.tensor(self.settings.mean)[:, None, None], persistent=False)
        self.register_buffer("std", torch.tensor(self.settings.std)[:, None, None], persistent=False)

    def train(self, mode: bool = True) -> CompositeModel:
        """Training mode, but never for the model that lends its text side."""
        super().train(mode)
        if self.reference is not None:
            self.reference.eval()
        return self

    def normalised(self, pixels: Tensor) -> Tensor:
        """uint8 pixels as (pixels / 255 - mean) / std; float pixels as they are."""
        if pixels.dtype != torch.uint8:
            return pixels
        return (pixels.float() / 255 - self.mean) / self.std

    def encode(self, inputs: Mapping[str, Tensor], want: Collection[str]) -> dict[str, Tensor]:
        """As in the base class, each tower run once; tokens cost nothing where none is wanted."""
        check_features(want, self.provides, self.name)
        towers = tower_names(want)
        found: dict[str, Tensor] = {}
        if any(name.startswith("image.") for name in towers):
            found |= self.image_features(self.normalised(inputs["pixels"]), tokens="image.tokens" in towers)
        if any(name.startswith("text.") for name in towers):
            tokens = not towers.isdisjoint({"text.tokens", "text.mask"})
            found |= self.text_features(inputs["ids"], inputs["mask"], tokens=tokens)
        if any(name.startswith("logit_") for name in want):
            found |= self.scale_features()
        return {name: found[name] for name in want}

    def image_features(self, pixels: Tensor, *, tokens: bool = False) -> dict[str, Tensor]:
        """Image features of `normalised` pixels (B, 3, H, W), with tokens if asked for."""
        if not tokens:
            pooled = {"image.pooled": self.image_tower(pixels)}
            return pooled | self.project(pooled)
        tower: Any = self.image_tower
        maps = tower.forward_features(pixels)
        found = {"image.pooled": tower.forward_head(maps), "image.tokens": image_tokens(tower, maps)}
        return found | self.project(found)

    def project(self, towers: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """`*.embed` and `*.token_embeds` from tower features that were computed before; `text.mask` is passed over."""
        projections = {"image": self.image_projection, "text": self.text_projection}
        return {
            f"{side}.{kind}": projections[side](towers[f"{side}.{before}"])
            for side in projections
            for kind, before in PROJECTED.items()
            if f"{side}.{before}" in towers
        }

    def text_features(self, ids: Tensor, mask: Tensor, *, tokens: bool = False) -> dict[str, Tensor]:
        """Text features of ids and mask (B, N), with tokens if asked for: zeros up to the context length."""
        if self.reference is not None:
            with torch.no_grad():
                return self.reference.text_features(ids, mask)
        assert self.text_tower is not None
        if not tokens:
            pooled = {"text.pooled": self.text_tower(ids, mask)}
            return pooled | self.project(pooled)
        pad, missing = nn.functional.pad, self.preprocessing.context_length - ids.shape[1]
        own = self.text_tower.tokens(ids, mask)
        found = {"text.pooled": self.text_tower.pool(own, mask), "text.tokens": pad(own, (0, 0, 0, missing))}
        return found | self.project(found) | {"text.mask": pad(mask, (0, missing))}

    def scale_features(self) -> dict[str, Tensor]:
        found = {"logit_scale": self.log_logit_scale.exp()}
        return found if self.logit_bias is None else found | {"logit_bias": self.logit_bias}

    def library_configuration(self) -> ImageConfiguration | None:
        """timm's published values where the image tower started from published weights."""
        if not self.layout["image"]["pretrained"]:
            return None
        own = timm_settings(self.image_tower, size=self.settings.size, crop_fraction=self.settings.crop_fraction)
        return ImageConfiguration(
            size=(own.size, own.size), mean=own.mean, std=own.std, interpolation=own.interpolation
        )

    def text_tower_parameters(self) -> Iterator[nn.Parameter]:
        """The parameters behind `text.embed`; those of the lender where the text side is borrowed."""
        return super().text_tower_parameters() if self.reference is None else self.reference.text_tower_parameters()

    def own_state(self) -> dict[str, Tensor]:
        """The weights that belong into `model.safetensors`: all but those of a model that lends its text side."""
        return {key: value for key, value in self.state_dict().items() if not key.startswith("reference.")}

    def save(self, folder: str | Path, *, dtype: str = "float32", golden: bool = False) -> None:
        """Write the model folder; it appears whole or not at all, in place of an older model.

        Args:
            folder: the new folder.
            dtype: "float32" or "float16" on disk; vectors and scalars stay float32.
            golden: also write golden embeddings, computed by the model read back.

        Raises:
            UserError: the folder exists and is neither empty nor a vlkd model, or the dtype is unknown.
        """
        kept = storage_dtype(dtype)
        with replacing(folder, FORMAT) as temporary:
            self._write(temporary, kept)
            if golden:
                write_golden(load_composite(temporary), temporary)

    def _write(self, folder: Path, dtype: torch.dtype) -> None:
        save_file(stored_state(self.own_state(), dtype), str(folder / WEIGHTS))
        text_folder = folder
        if isinstance(self.text_tower, TransformersText):
            text_folder = folder / TEXT_FOLDER
            text_folder.mkdir()
            self.text_tower.config.save_pretrained(str(text_folder))
        self.tokenizer.save(text_folder)
        (folder / MODEL_JSON).write_text(json.dumps(self.layout, indent=2) + "\n", encoding="utf-8")


def tower_names(want: Collection[str]) -> frozenset[str]:
    """The tower features from which `CompositeModel.project` makes the wanted ones.

    `*.pooled`, `*.tokens` and `text.mask` stand for themselves; `logit_*` comes from no tower and is left out.
    """
    parts = [name.partition(".") for name in want]
    return frozenset(f"{side}.{PROJECTED.get(kind, kind)}" for side, _, kind in parts if kind)


def load_composite(folder: str | Path, *, name: str = "") -> CompositeModel:
    """Read a model folder, in evaluation mode; golden embeddings are not checked here but by `vlkd.models.load`.

    Args:
        folder: as written by `CompositeModel.save`.
        name: the reference, for tables and errors; the folder by default.

    Raises:
        UserError: a file is missing or damaged, or the weights do not fit the `model.json`.
    """
    folder = Path(folder)
    layout = read_layout(folder, FORMAT, VERSION)
    try:
        model = assemble(layout, folder, name or str(folder))
    except (KeyError, TypeError, AttributeError, IndexError) as error:
        raise UserError(
            f"{folder / MODEL_JSON} lacks or misspells {first_line(error)}; write the model again."
        ) from error
    borrowed = {key: value for key, value in model.state_dict().items() if key.startswith("reference.")}
    load_exactly(model, read_safetensors(folder / WEIGHTS) | borrowed, str(folder / WEIGHTS))
    return model.eval()


def assemble(layout: Mapping[str, Any], folder: Path, name: str) -> CompositeModel:
    """The model of a layout with random weights; its text configuration and tokenizer are read from the folder."""
    image, text, pixels = layout["image"], layout["text"], layout["preprocessing"]
    settings = PixelSettings(**{**pixels, "mean": tuple(pixels["mean"]), "std": tuple(pixels["std"])})
    tower: CompactText | TransformersText | None = None
    reference = None
    context_length = int(layout["context_length"])
    if text["kind"] == "compact":
        tokenizer: TextTokenizer = CompactTokenizer.load(folder / "tokenizer.json")
        sizes = {key: int(text[key]) for key in ("vocab_size", "width", "layers", "heads")}
        tower = CompactText(**sizes, context_length=context_length, dropout=float(text["dropout"] or 0.0))
    elif text["kind"] == "transformers":
        tokenizer = TransformersTokenizer.load(folder / TEXT_FOLDER)
        tower = build_transformers_text(folder / TEXT_FOLDER, pooling=text["pooling"], weights=False)
        if text["dropout"] is not None:
            set_dropout(tower, float(text["dropout"]))
    elif text["kind"] == "reference":
        reference = load_reference(text["ref"], folder, int(layout["width"]))
        tokenizer = BorrowedTokenizer(reference.preprocessing)
        context_length = reference.preprocessing.context_length
    else:
        raise UserError(f"{name} has a text side {text['kind']!r}, expected compact, transformers or reference.")
    return CompositeModel(
        name=name,
        layout=layout,
        image_tower=build_image_tower(image["timm"], json.dumps(image["kwargs"])),
        text_tower=tower,
        preprocessing=CompositePreprocessing(settings, tokenizer, context_length),
        reference=reference,
    )


def load_reference(ref: str, folder: Path, width: int) -> DualEncoderModule:
    """The model that lends its text side, by a reference that may be relative to the folder.

    Raises:
        UserError: it cannot be loaded, or its joint width is not `width`.
    """
    from vlkd.models.load import load

    beside = folder / ref
    reference = load(str(beside) if beside.is_dir() else ref)
    if reference.width != width:
        raise UserError(
            f"{reference.name} has joint width {reference.width}, expected {width} to lend its text side; "
            "project the image side to its width first."
        )
    return reference
