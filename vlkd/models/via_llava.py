"""LLaVA and LLaVA-NeXT by transformers, from the hub or a local folder."""

from __future__ import annotations

import json
import re
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from vlkd.errors import UserError
from vlkd.features import IMAGE_PLACEHOLDER, Turn
from vlkd.models.folder import read_format, written_whole
from vlkd.models.generative import GenerativePreprocessing, GenerativeVLM, Part
from vlkd.models.label_masks import Chat, encode_conversation, open_chat
from vlkd.models.question_mask import attention_and_positions
from vlkd.models.quiet import without_bars
from vlkd.models.tokenizer import TransformersTokenizer, first_line
from vlkd.models.via_transformers import cannot_load, check_whole

FAMILIES = ("llava", "llava_next")
VISION, PROJECTOR = "model.model.vision_tower.", "model.model.multi_modal_projector."


class LlavaVLM(GenerativeVLM):
    """A `LlavaForConditionalGeneration`; `model` is the transformers model, whose submodules the parts are."""

    def __init__(
        self, *, name: str, model: Any, preprocessing: GenerativePreprocessing, stop_ids: tuple[int, ...]
    ) -> None:
        layers = model.config.vision_feature_layer
        super().__init__(
            name=name,
            preprocessing=preprocessing,
            visual_width=int(model.config.vision_config.hidden_size) * (1 if isinstance(layers, int) else len(layers)),
            vocabulary=int(model.get_output_embeddings().weight.shape[0]),
            stop_ids=stop_ids,
        )
        self.model = model
        self.train_only(("vision", "projector", "language"))

    def vision(self, pixels: Tensor) -> Tensor:
        config, tower = self.model.config, self.model.model.vision_tower
        dtype = next(tower.parameters()).dtype
        states = tower(pixel_values=pixels.to(dtype), output_hidden_states=True, return_dict=True).hidden_states
        layers = config.vision_feature_layer
        chosen = [states[layer] for layer in ([layers] if isinstance(layers, int) else layers)]
        if config.vision_feature_select_strategy == "default":
            chosen = [state[:, 1:] for state in chosen]
        return torch.cat(chosen, dim=-1)

    def project(self, tokens: Tensor) -> Tensor:
        found: Tensor = self.model.model.multi_modal_projector(tokens)
        return found

    def embed(self, ids: Tensor) -> Tensor:
        found: Tensor = self.model.get_input_embeddings()(ids)
        return found

    def language(self, embeds: Tensor, mask: Tensor, keep: Tensor | None = None) -> Tensor:
        attention, positions = attention_and_positions(mask, embeds.dtype)
        hidden = self.model.model.language_model(
            inputs_embeds=embeds, attention_mask=attention, position_ids=positions, use_cache=False, return_dict=True
        ).last_hidden_state
        logits: Tensor = self.model.get_output_embeddings()(hidden if keep is None else hidden[keep])
        return logits

    def generate(self, ids: Tensor, mask: Tensor, *, max_new_tokens: int, **images: Tensor) -> Tensor:
        inputs = {"pixel_values" if key == "pixels" else key: value for key, value in images.items()}
        found: Tensor = self.model.generate(
            input_ids=ids,
            attention_mask=mask.long(),
            **inputs,
            max_new_tokens=max_new_tokens,
            do_sample=False,
            num_beams=1,
        )
        return found[:, ids.shape[1] :]

    def part_of(self, name: str) -> Part:
        if name.startswith(VISION):
            return "vision"
        return "projector" if name.startswith(PROJECTOR) else "language"

    def is_idle(self, name: str) -> bool:
        if not name.startswith(VISION):
            return False
        layers, count = self.model.config.vision_feature_layer, int(self.model.config.vision_config.num_hidden_layers)
        # hidden_states has the embeddings first, so that entry i is what i layers made.
        used = max(layer % (count + 1) for layer in ([layers] if isinstance(layers, int) else layers))
        rest = name.removeprefix(VISION)
        block = re.search(r"\blayers\.(\d+)\.", rest)
        return int(block[1]) >= used if block else bool(re.search(r"(^|\.)(post_layernorm|head)\.", rest))

    def language_layers(self) -> list[nn.Module]:
        return checkpointed_layers(self.model.model.language_model)

    def save(self, folder: str | Path) -> None:
        """Write the model's transformers folder; it appears whole or not at all, in place of an older one.

        Raises:
            UserError: the folder exists and is neither empty nor a LLaVA's.
        """
        target = Path(folder).absolute()
        taken = target.is_file() or (target.is_dir() and any(target.iterdir()))
        if taken and config_family(target) not in FAMILIES:
            raise UserError(f"{folder} exists and is no LLaVA; choose a new folder, or remove it yourself.")
        with written_whole(target) as temporary:
            with without_bars():
                self.model.save_pretrained(str(temporary))
            self.processor.save_pretrained(str(temporary))


class LlavaNextVLM(LlavaVLM):
    """A `LlavaNextForConditionalGeneration`: it cuts pictures by their size, so its parts are not run one by one."""

    switchable = False

    def vision(self, pixels: Tensor) -> Tensor:  # noqa: ARG002 - refused whatever the pixels
        raise UserError(f"{self.name} is a LLaVA-NeXT, whose vision cannot be switched; take a LLaVA.")

    def project(self, tokens: Tensor) -> Tensor:  # noqa: ARG002
        raise UserError(f"{self.name} is a LLaVA-NeXT, whose projector cannot be switched; take a LLaVA.")

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
        """As `GenerativeVLM.forward_logits`, with pixels (B, tiles, 3, H, W) and `image_sizes` (B, 2)."""
        if visual is not None or pixels is None:
            raise UserError(f"{self.name} is a LLaVA-NeXT, which takes pixels alone; take a LLaVA for visual tokens.")
        attention, positions = attention_and_positions(mask, self.model.dtype)
        found = self.model.model(
            input_ids=ids,
            attention_mask=attention,
            position_ids=positions,
            pixel_values=pixels,
            image_sizes=images["image_sizes"],
            use_cache=False,
        )
        hidden = found.last_hidden_state
        logits: Tensor = self.model.get_output_embeddings()(hidden if keep is None else hidden[keep])
        return logits


def load_llava(ref: str | Path, *, device: str | torch.device = "cpu") -> LlavaVLM:
    """Load a LLaVA or LLaVA-NeXT in evaluation mode, with float32 weights; no code from it is run.

    Args:
        ref: a transformers folder with config.json, safetensors weights, processor and chat template, or hf:OWNER/NAME.
        device: where the model goes.

    Raises:
        UserError: there is no such folder, it holds something else, its weights are pickled or incomplete, or its
            processor and its weights disagree about the number of visual tokens.
    """
    from transformers import AutoConfig, AutoProcessor, LlavaForConditionalGeneration, LlavaNextForConditionalGeneration

    ref = str(ref)
    source = _source(ref)
    try:
        config = AutoConfig.from_pretrained(source, trust_remote_code=False)
        if config.model_type not in FAMILIES:
            raise UserError(
                f"{ref!r} is of the family {config.model_type!r}, expected one of {', '.join(FAMILIES)}: a vision "
                "tower, a projector and a language model."
            )
        kind = LlavaForConditionalGeneration if config.model_type == "llava" else LlavaNextForConditionalGeneration
        with without_bars() if Path(source).is_dir() else nullcontext():
            model, info = kind.from_pretrained(
                source,
                config=config,
                use_safetensors=True,
                trust_remote_code=False,
                dtype=torch.float32,
                output_loading_info=True,
            )
        processor = AutoProcessor.from_pretrained(source, trust_remote_code=False)
    except UserError:
        raise
    except (OSError, RuntimeError, ValueError, KeyError, TypeError, ImportError, AttributeError) as error:
        raise cannot_load(ref, error) from error
    check_whole(ref, info["missing_keys"])
    return wrap_llava(ref, model, processor).eval().to(device)


def wrap_llava(name: str, model: Any, processor: Any) -> LlavaVLM:
    """The adapter of a transformers model and its processor.

    Its generation settings are replaced by plain greedy ones, with every id that ends an answer.

    Raises:
        UserError: see `load_llava`.
    """
    if getattr(processor, "tokenizer", None) is None or getattr(processor, "image_processor", None) is None:
        raise UserError(f"{name} has no processor of pictures and texts; add its processor_config.json and tokenizer.")
    tiled = model.config.model_type == "llava_next"
    preprocessing, stop_ids = prepare(name, model, processor, image_token_id=int(model.config.image_token_id))
    if not tiled:
        count = _visual_tokens(name, model, processor, preprocessing.image_size)
        preprocessing = replace(preprocessing, visual_tokens=count)
    kind = LlavaNextVLM if tiled else LlavaVLM
    return kind(name=name, model=model, preprocessing=preprocessing, stop_ids=stop_ids)


def prepare(
    name: str, model: Any, processor: Any, *, image_token_id: int
) -> tuple[GenerativePreprocessing, tuple[int, ...]]:
    """How a model of transformers prepares its input, `visual_tokens` yet 0, and the ids that end an answer.

    Args:
        name: for messages.
        model: whatever generates; its generation settings are replaced by plain greedy ones.
        processor: of pictures and texts.
        image_token_id: the id where the picture stands.

    Raises:
        UserError: see `vlkd.models.label_masks.open_chat`.
    """
    from transformers import GenerationConfig

    context = int(getattr(model.config.get_text_config(), "max_position_embeddings", 0) or 0)
    chat = open_chat(name, processor, image_token_id=image_token_id, context_length=context)
    tokenizer = processor.tokenizer
    stop_ids = _stop_ids(model, chat)
    pad_id = stop_ids[0] if tokenizer.pad_token_id is None else int(tokenizer.pad_token_id)
    preprocessing = GenerativePreprocessing(
        image_size=_pixel_size(processor),
        context_length=context,
        processor=processor.image_processor,
        tokenizer=TransformersTokenizer(tokenizer),
        chat=chat,
        pad_id=pad_id,
        visual_tokens=0,
    )
    model.generation_config = GenerationConfig(
        eos_token_id=list(stop_ids), pad_token_id=pad_id, bos_token_id=tokenizer.bos_token_id
    )
    return preprocessing, stop_ids


def checkpointed_layers(language_model: nn.Module) -> list[nn.Module]:
    """The blocks of a transformers language model, in order."""
    from transformers.modeling_layers import GradientCheckpointingLayer

    return [layer for layer in language_model.modules() if isinstance(layer, GradientCheckpointingLayer)]


def config_family(folder: Path) -> str:
    """What transformers' config.json calls its model; "" for none. That of a run has no such entry."""
    try:
        found = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return ""
    return str(found.get("model_type", "")) if isinstance(found, dict) else ""


def _source(ref: str) -> str:
    """The folder or hub name of a reference."""
    folder = Path(ref)
    if not ref or not folder.is_dir():
        family, _, rest = ref.partition(":")
        if family == "hf" and rest:
            return rest
        raise UserError(f"Found no folder {ref!r}; expected a transformers folder of a LLaVA, or hf:OWNER/NAME.")
    if (folder / "config.json").is_file():
        return ref
    if (folder / "student" / "config.json").is_file():
        raise UserError(f"{ref!r} is a run's folder, expected a model; its model is {str(folder / 'student')!r}.")
    form = read_format(folder)
    found = f"a model.json of {form}" if form else "no config.json"
    raise UserError(f"The folder {ref!r} holds {found}, expected a transformers folder of a LLaVA; check the path.")


def _pixel_size(processor: Any) -> tuple[int, int]:
    """Height and width of what the processor makes of a picture, of each tile where it cuts."""
    pixels = processor.image_processor(images=Image.new("RGB", (96, 64)), return_tensors="pt")["pixel_values"][0]
    return int(pixels.shape[-2]), int(pixels.shape[-1])


def _visual_tokens(name: str, model: Any, processor: Any, size: tuple[int, int]) -> int:
    """N as the weights give it; transformers counts it from the processor's settings, which must give the same."""
    tower, config = model.model.vision_tower, model.config
    try:
        with torch.no_grad():
            found = tower(pixel_values=torch.zeros(1, 3, *size)).last_hidden_state.shape[1]
    except (RuntimeError, ValueError, TypeError) as error:
        raise UserError(
            f"{name}: the processor makes pictures of {size[0]} x {size[1]} pixels, which the vision tower refuses "
            f"({first_line(error)}); mend preprocessor_config.json."
        ) from error
    dropped = config.vision_feature_select_strategy == "default"
    count = int(found) - int(dropped)
    if not processor.patch_size:
        return count
    told = (size[0] // processor.patch_size) * (size[1] // processor.patch_size)
    told += processor.num_additional_image_tokens - (processor.vision_feature_select_strategy == "default")
    if told != count:
        raise UserError(
            f"{name}: the vision tower gives {count} tokens and the processor writes {told} places for them; mend "
            "patch_size, num_additional_image_tokens and vision_feature_select_strategy in processor_config.json."
        )
    return count


def _stop_ids(model: Any, chat: Chat) -> tuple[int, ...]:
    """What ends an answer: the token behind answers in the chat template, and what model and tokenizer name."""
    turns = (Turn("user", f"{IMAGE_PLACEHOLDER}\nWhat is it?"), Turn("assistant", "a cat"))
    _, labels = encode_conversation(chat, turns, visual_tokens=1)
    told = model.generation_config.eos_token_id
    listed = told if isinstance(told, list) else [told]
    return tuple(
        dict.fromkeys(
            int(value)
            for value in (labels[labels >= 0][-1], chat.processor.tokenizer.eos_token_id, *listed)
            if value is not None
        )
    )
