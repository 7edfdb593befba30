"""A generative model whose vision is any timm model; its folder holds a plain transformers language model.

`model.json` names the tower, `model.safetensors` holds tower and projector, and `language/` is a folder of transformers
with the language model, its tokenizer and the processor.
"""

from __future__ import annotations

import json
from collections import OrderedDict
from collections.abc import Collection, Iterable, Mapping
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any, Self

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from vlkd.errors import UserError
from vlkd.models.base import evaluating
from vlkd.models.folder import MODEL_JSON, WEIGHTS, read_layout, replacing, stored_state
from vlkd.models.generative import GenerativePreprocessing, GenerativeVLM, Part
from vlkd.models.generative_refs import FORMAT
from vlkd.models.golden import SENTENCES, compare_golden, probe_images, store_golden
from vlkd.models.llava_spec import (
    LANGUAGE_FOLDER,
    LlavaSpec,
    build_language,
    build_tokenizer,
    check_target,
    open_pretrained,
)
from vlkd.models.preprocessing import RESAMPLING, timm_settings
from vlkd.models.question_mask import attention_and_positions
from vlkd.models.quiet import without_bars
from vlkd.models.tokenizer import first_line
from vlkd.models.towers import build_image_tower, load_exactly, load_timm_weights, read_safetensors
from vlkd.models.via_llava import checkpointed_layers, prepare

VERSION = 1
PREFIX = "timm:"
"""Before timm's name, in `LlavaSpec.vision`."""


class TimmVLM(GenerativeVLM):
    """A timm tower, a two-layer projector and a causal language model of transformers.

    Running statistics of a tower follow its learning: where no parameter of it learns, they stand still too.

    Args:
        name: the reference, for tables and errors.
        layout: the content of `model.json`.
        tower: a timm model without classifier.
        language_model: a causal language model of transformers.
        processor: its `LlavaProcessor`, whose own count of image tokens is not read.

    Raises:
        UserError: the tower gives no tokens for the processor's pictures, or the processor writes no conversations.
    """

    def __init__(
        self, *, name: str, layout: Mapping[str, Any], tower: nn.Module, language_model: Any, processor: Any
    ) -> None:
        preprocessing, stop_ids = prepare(name, language_model, processor, image_token_id=int(processor.image_token_id))
        tokens, width, idle = _probe(name, tower, preprocessing)
        super().__init__(
            name=name,
            preprocessing=replace(preprocessing, visual_tokens=tokens),
            visual_width=width,
            vocabulary=int(language_model.get_output_embeddings().weight.shape[0]),
            stop_ids=stop_ids,
        )
        self.layout = dict(layout)
        self.tower = tower
        self.projector = make_projector(width, int(language_model.get_input_embeddings().weight.shape[1]))
        self.language_model = language_model
        self._idle = frozenset(f"tower.{key}" for key in idle)
        self.train_only(("vision", "projector", "language"))

    def vision(self, pixels: Tensor) -> Tensor:
        return tower_tokens(self.tower, pixels.to(next(self.tower.parameters()).dtype))

    def project(self, tokens: Tensor) -> Tensor:
        found: Tensor = self.projector(tokens)
        return found

    def embed(self, ids: Tensor) -> Tensor:
        found: Tensor = self.language_model.get_input_embeddings()(ids)
        return found

    def language(self, embeds: Tensor, mask: Tensor, keep: Tensor | None = None) -> Tensor:
        attention, positions = attention_and_positions(mask, embeds.dtype)
        # The model's own forward may scale or cap its logits; only what enters its output layer is chosen here.
        head = self.language_model.get_output_embeddings()
        with nullcontext() if keep is None else head.register_forward_pre_hook(lambda _, found: (found[0][keep],)):
            logits: Tensor = self.language_model(
                inputs_embeds=embeds, attention_mask=attention, position_ids=positions, use_cache=False
            ).logits
        return logits

    def generate(self, ids: Tensor, mask: Tensor, *, max_new_tokens: int, **images: Tensor) -> Tensor:
        embeds = self.merge(self.embed(ids), ids, self.project(self.vision(images["pixels"])))
        # Without ids of a prompt transformers returns the new tokens alone.
        found: Tensor = self.language_model.generate(
            inputs_embeds=embeds,
            attention_mask=mask.long(),
            max_new_tokens=max_new_tokens,
            do_sample=False,
            num_beams=1,
        )
        return found

    def part_of(self, name: str) -> Part:
        if name.startswith("tower."):
            return "vision"
        return "projector" if name.startswith("projector.") else "language"

    def is_idle(self, name: str) -> bool:
        return name in self._idle

    def language_layers(self) -> list[nn.Module]:
        return checkpointed_layers(self.language_model)

    def train_only(self, parts: Collection[Part]) -> None:
        super().train_only(parts)
        self.train(self.training)

    def train(self, mode: bool = True) -> Self:
        """As `GenerativeVLM.train`; a tower of which nothing learns stays in evaluation mode."""
        super().train(mode)
        if not any(value.requires_grad for value in self.tower.parameters()):
            self.tower.eval()
        return self

    def save(self, folder: str | Path) -> None:
        """Write the model's folder, with golden logits; it appears whole or not at all, in place of an older one.

        Raises:
            UserError: the folder exists and is neither empty nor a model of this kind.
        """
        with replacing(folder, FORMAT) as temporary:
            (temporary / MODEL_JSON).write_text(json.dumps(self.layout, indent=2) + "\n", encoding="utf-8")
            own = {key: value for key, value in self.state_dict().items() if self.part_of(key) != "language"}
            save_file(stored_state(own, torch.float32), str(temporary / WEIGHTS))
            with without_bars():
                self.language_model.save_pretrained(str(temporary / LANGUAGE_FOLDER))
            self.processor.save_pretrained(str(temporary / LANGUAGE_FOLDER))
            # What was written is opened once as a user will; the weights that it starts from must not move a run's
            # random numbers.
            with torch.random.fork_rng(devices=[]):
                store_golden(golden_logits(_read(temporary, str(folder))), temporary)


def tower_tokens(tower: Any, pixels: Tensor) -> Tensor:
    """What a timm model's `forward_features` gives, as tokens without class and register tokens: (B, N, C).

    Maps of cells (B, C, h, w), or (B, h, w, C) where the tower's `output_fmt` is NHWC, are read row by row.

    Raises:
        UserError: the features have another form.
    """
    found = tower.forward_features(pixels)
    if isinstance(found, Tensor) and found.ndim == 3:
        return found[:, int(getattr(tower, "num_prefix_tokens", 0)) :]
    if isinstance(found, Tensor) and found.ndim == 4:
        last = str(getattr(tower, "output_fmt", "NCHW")) == "NHWC"
        return found.flatten(1, 2) if last else found.flatten(2).transpose(1, 2)
    form = tuple(found.shape) if isinstance(found, Tensor) else type(found).__name__
    raise UserError(
        f"Found features {form} of {type(tower).__name__}, expected one map or one sequence of tokens; choose another "
        "timm model."
    )


def make_projector(visual_width: int, width: int) -> nn.Sequential:
    """C to E in two layers with GELU between, as LLaVA 1.5 (Liu et al., 2024, arXiv:2310.03744)."""
    layers = [
        ("linear_1", nn.Linear(visual_width, width)),
        ("act", nn.GELU()),
        ("linear_2", nn.Linear(width, width)),
    ]
    return nn.Sequential(OrderedDict(layers))


def build_timm_vlm(spec: LlavaSpec, folder: str | Path, *, texts: Iterable[str] = ()) -> Path:
    """Write the folder of a `TimmVLM`; what has no weights is random, from torch's global generator.

    Args:
        spec: what to build; its `vision` is "timm:NAME".
        folder: a new or empty folder.
        texts: questions and answers, read where a tokenizer is trained.

    Returns:
        The folder.

    Raises:
        UserError: the folder is taken, a part cannot be loaded or does not fit, or there are no texts to train on.
    """
    from transformers import LlavaProcessor, SiglipImageProcessor

    target = check_target(spec, folder)
    timm_name = spec.vision.removeprefix(PREFIX)
    kwargs = _size_argument(timm_name, spec.image_size)
    tower = build_image_tower(timm_name, json.dumps(kwargs))
    if spec.vision_weights:
        load_timm_weights(tower, spec.vision_weights)
    tokenizer, template = build_tokenizer(spec, texts)
    pixels = timm_settings(tower, size=spec.image_size, crop_fraction=1.0, crop_mode="squash")
    images = SiglipImageProcessor(
        size={"height": pixels.size, "width": pixels.size},
        image_mean=list(pixels.mean),
        image_std=list(pixels.std),
        resample=int(RESAMPLING[pixels.interpolation]),
    )
    vlm = TimmVLM(
        name=str(folder),
        layout={"format": FORMAT, "version": VERSION, "vision": {"timm": timm_name, "kwargs": kwargs}},
        tower=tower,
        language_model=build_language(spec, tokenizer),
        processor=LlavaProcessor(image_processor=images, tokenizer=tokenizer, chat_template=template),
    )
    _check_language(spec.language, vlm.eval())
    vlm.save(target)
    return target


def load_timm_vlm(ref: str | Path, *, name: str = "") -> TimmVLM:
    """Read a folder as written by `TimmVLM.save`, in evaluation mode with float32 weights, and compare golden logits.

    Args:
        ref: the folder.
        name: the reference, for tables and errors; the folder by default.

    Raises:
        UserError: a file is missing or damaged, the folder holds another kind of model, the weights do not fit the
            `model.json`, or the golden logits differ.
    """
    vlm = _read(Path(ref), name or str(ref))
    compare_golden(vlm.name, lambda: golden_logits(vlm), ref)
    return vlm


def golden_logits(vlm: GenerativeVLM) -> dict[str, Tensor]:
    """`answer.logits` (B, V) of the first answer token to a fixed sentence about each of `probe_images`."""
    images = probe_images()
    ids = torch.stack([vlm.preprocessing.prompt_ids(SENTENCES[0])] * len(images))
    mask = torch.ones_like(ids, dtype=torch.bool)
    with torch.no_grad(), evaluating(vlm):
        logits = vlm.forward_logits(ids=ids, mask=mask, **vlm.preprocessing.image_inputs(images))
    return {"answer.logits": logits[:, -1].contiguous()}


def _read(folder: Path, name: str) -> TimmVLM:
    """The model of a folder, in evaluation mode; golden logits are not compared."""
    from transformers import AutoModelForCausalLM, LlavaProcessor

    layout = read_layout(folder, FORMAT, VERSION)
    try:
        tower = build_image_tower(layout["vision"]["timm"], json.dumps(layout["vision"]["kwargs"]))
    except (KeyError, TypeError) as error:
        raise UserError(
            f"{folder / MODEL_JSON} lacks or misspells {first_line(error)}; write the model again."
        ) from error
    weights = read_safetensors(folder / WEIGHTS)
    language = folder / LANGUAGE_FOLDER
    model = open_pretrained(AutoModelForCausalLM, str(language), "language model")
    try:
        processor = LlavaProcessor.from_pretrained(str(language), trust_remote_code=False)
    except (OSError, ValueError, KeyError, TypeError, ImportError, AttributeError) as error:
        raise UserError(f"Found no readable processor in {language} ({first_line(error)}); write it again.") from error
    vlm = TimmVLM(name=name, layout=layout, tower=tower, language_model=model, processor=processor)
    kept = {key: value for key, value in vlm.state_dict().items() if vlm.part_of(key) == "language"}
    load_exactly(vlm, weights | kept, str(folder / WEIGHTS))
    vlm.eval()
    return vlm


def _size_argument(name: str, size: int) -> dict[str, int]:
    """What a tower must be told of the size: transformers with positions of their own."""
    import timm

    published = timm.models.get_pretrained_cfg(name)
    return {"img_size": size} if published and published.fixed_input_size else {}


def _probe(name: str, tower: nn.Module, preprocessing: GenerativePreprocessing) -> tuple[int, int, list[str]]:
    """N, C and the names of parameters without influence on the tokens, as autograd finds them."""
    size = preprocessing.image_size
    try:
        with torch.enable_grad(), evaluating(tower):
            tokens = tower_tokens(tower, torch.zeros(1, 3, *size))
            named = list(tower.named_parameters())
            found = torch.autograd.grad(tokens.sum(), [value for _, value in named], allow_unused=True)
    except (RuntimeError, ValueError, AssertionError) as error:
        raise UserError(
            f"{name}: the vision tower refuses pictures of {size[0]} x {size[1]} pixels ({first_line(error)}); choose "
            "another image size."
        ) from error
    idle = [key for (key, _), gradient in zip(named, found, strict=True) if gradient is None]
    return tokens.shape[1], tokens.shape[2], idle


def _check_language(source: str, vlm: TimmVLM) -> None:
    """Raise `UserError` for a language model that answers otherwise in parts than as a whole."""
    ids = torch.arange(8)[None] % len(vlm.tokenizer)
    mask = torch.ones_like(ids, dtype=torch.bool)
    try:
        with torch.no_grad():
            wanted = vlm.language_model(input_ids=ids).logits[mask]
            found = vlm.language(vlm.embed(ids), mask, mask)
    except (RuntimeError, ValueError, TypeError, NotImplementedError) as error:
        raise UserError(
            f"{source}: the language model takes no embeddings with positions ({first_line(error)}); choose another."
        ) from error
    if found.shape != wanted.shape or not torch.allclose(found, wanted, rtol=1e-3, atol=1e-4):
        raise UserError(
            f"{source} ({vlm.language_model.config.model_type}) answers otherwise from embeddings than from token ids; "
            "choose another language model."
        )
