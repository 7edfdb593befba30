"""Building a LLaVA from settings: a CLIP or SigLIP vision tower, an MLP projector and a causal language model."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from vlkd.errors import UserError
from vlkd.features import IMAGE_PLACEHOLDER
from vlkd.models.chat_tokenizer import CHAT_TEMPLATE, train_chat_tokenizer
from vlkd.models.folder import MODEL_JSON, written_whole
from vlkd.models.label_masks import open_chat
from vlkd.models.quiet import without_bars
from vlkd.models.tokenizer import first_line
from vlkd.models.via_llava import load_llava, wrap_llava

VISION = ("clip", "siglip")
LANGUAGE = ("llama", "qwen2")
LANGUAGE_FOLDER = "language"
"""Inside the folder of a model with a timm vision."""


@dataclass(frozen=True, kw_only=True)
class LlavaSpec:
    """What to build, in strings and numbers alone.

    Args:
        vision: "clip" or "siglip" at random from the numbers below, a transformers folder of one with its weights, or
            "timm:NAME", for which of the numbers `image_size` alone is read.
        vision_weights: for "timm:NAME" safetensors with timm's keys, or a vlkd folder whose timm tower is taken, such
            as a classifier's; "" starts at random.
        image_size: pixels of a side; pictures are squashed to it, since a crop could lose what is asked about.
        patch_size: pixels of a visual token's side.
        vision_width: C; Switch-KD needs the teacher's.
        vision_layers: its layers.
        vision_heads: its attention heads.
        feature_layer: the entry of hidden_states that enters the projector; -2 (LLaVA 1.5) spares the last layer of a
            contrastive tower, -1 uses every layer of one that starts at random.
        language: "llama" or "qwen2" at random from the numbers below, or a transformers folder of any causal language
            model with its weights and tokenizer.
        language_width: E.
        language_layers: its layers.
        language_heads: its attention heads.
        context_length: the largest number of tokens, a picture's included.
        tie_embeddings: the output layer is the token embeddings; for "llama" and "qwen2".
        tokenizer: a transformers folder, such as the teacher's, whose tokenizer and chat template are taken; "" takes
            those of a language folder, or trains one on the given texts. Of a folder with a timm vision, here and in
            `language`, the plain transformers folder inside is meant.
        vocab_size: the largest V of a tokenizer that is trained.
    """

    vision: str = "clip"
    vision_weights: str = ""
    image_size: int = 96
    patch_size: int = 16
    vision_width: int = 256
    vision_layers: int = 6
    vision_heads: int = 4
    feature_layer: int = -1
    language: str = "llama"
    language_width: int = 256
    language_layers: int = 6
    language_heads: int = 4
    context_length: int = 512
    tie_embeddings: bool = True
    tokenizer: str = ""
    vocab_size: int = 4000


def build_llava(spec: LlavaSpec, folder: str | Path, *, texts: Iterable[str] = ()) -> Path:
    """Write a LLaVA folder that plain transformers opens; what has no weights is random, from torch's global generator.

    Args:
        spec: what to build.
        folder: a new or empty folder.
        texts: questions and answers, read where a tokenizer is trained.

    Returns:
        The folder.

    Raises:
        UserError: the folder is taken, a part cannot be loaded or does not fit, or there are no texts to train on.
    """
    if spec.vision_weights:
        raise UserError(
            f"Found vision_weights for the vision tower {spec.vision!r}, expected timm:NAME beside them; "
            "a folder has its own weights."
        )
    target = check_target(spec, folder)
    vision, images = _vision(spec)
    tokenizer, template = build_tokenizer(spec, texts)
    language = build_language(spec, tokenizer)
    model = _joined(spec, vision, language, tokenizer)
    wrapped = wrap_llava(str(folder), model, _processor(model, images, tokenizer, template))
    with written_whole(target) as temporary:
        wrapped.save(temporary)
        # What was written is opened once as a user will, before it takes its name.
        load_llava(temporary)
    return target


def check_target(spec: LlavaSpec, folder: str | Path) -> Path:
    """The folder to write; raises `UserError` where it is taken, or one that the spec names is not there."""
    target = Path(folder).absolute()
    if target.exists() and (target.is_file() or any(target.iterdir())):
        raise UserError(f"{folder} exists and is not empty; choose a new folder, or remove it yourself.")
    for folder_of, known in ((spec.language, LANGUAGE), (spec.tokenizer, ("",))):
        if folder_of not in known and not Path(folder_of).is_dir():
            raise UserError(
                f"Found no folder {folder_of!r}; expected a local transformers folder, or {_listed(known)}."
            )
    return target


def plain_folder(folder: str) -> str:
    """The transformers folder of a language model: this one, or the one inside of a folder with a timm vision."""
    inside = Path(folder) / LANGUAGE_FOLDER
    return str(inside) if (Path(folder) / MODEL_JSON).is_file() and inside.is_dir() else folder


def _vision(spec: LlavaSpec) -> tuple[Any, Any]:
    """The tower and its image processor."""
    from transformers import (
        AutoImageProcessor,
        CLIPImageProcessor,
        CLIPVisionConfig,
        CLIPVisionModel,
        SiglipImageProcessor,
        SiglipVisionConfig,
        SiglipVisionModel,
    )

    kinds = {"clip": (CLIPVisionConfig, CLIPVisionModel), "siglip": (SiglipVisionConfig, SiglipVisionModel)}
    if spec.vision in kinds:
        _divides(spec.vision_width, spec.vision_heads, "vision")
        if spec.patch_size < 1 or spec.image_size % spec.patch_size:
            raise UserError(
                f"Found {spec.image_size} pixels in patches of {spec.patch_size}; choose a size they divide."
            )
        settings, kind = kinds[spec.vision]
        more = {"vision_use_head": False} if spec.vision == "siglip" else {}
        config = settings(
            hidden_size=spec.vision_width,
            intermediate_size=4 * spec.vision_width,
            num_hidden_layers=spec.vision_layers,
            num_attention_heads=spec.vision_heads,
            image_size=spec.image_size,
            patch_size=spec.patch_size,
            **more,
        )
        size = {"height": spec.image_size, "width": spec.image_size}
        crop = {"do_center_crop": False, "crop_size": size} if spec.vision == "clip" else {}
        return kind(config), (CLIPImageProcessor if crop else SiglipImageProcessor)(size=size, **crop)
    family = _family(spec.vision, VISION, "vision tower")
    tower = open_pretrained(kinds[family][1], spec.vision, "vision tower")
    try:
        return tower, AutoImageProcessor.from_pretrained(spec.vision, trust_remote_code=False)
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise UserError(f"Found no image processor in {spec.vision} ({first_line(error)}); add its file.") from error


def build_language(spec: LlavaSpec, tokenizer: Any) -> Any:
    """The causal language model, its embeddings at least as many as the tokenizer's ids.

    Raises:
        UserError: its folder cannot be loaded, or the widths do not fit.
    """
    from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

    kinds = {"llama": (LlamaConfig, LlamaForCausalLM), "qwen2": (Qwen2Config, Qwen2ForCausalLM)}
    if spec.language not in kinds:
        source = plain_folder(spec.language)
        _family(source, (), "language model")
        model = open_pretrained(AutoModelForCausalLM, source, "language model")
        # Published embeddings are often padded beyond the tokenizer: they keep their rows.
        if len(tokenizer) > model.get_input_embeddings().weight.shape[0]:
            model.resize_token_embeddings(len(tokenizer))
        return model
    _divides(spec.language_width, spec.language_heads, "language")
    settings, kind = kinds[spec.language]
    config = settings(
        vocab_size=len(tokenizer),
        hidden_size=spec.language_width,
        # Llama's own proportion of a gated MLP, in whole eights.
        intermediate_size=-(-8 * spec.language_width // 24) * 8,
        num_hidden_layers=spec.language_layers,
        num_attention_heads=spec.language_heads,
        num_key_value_heads=spec.language_heads,
        max_position_embeddings=spec.context_length,
        tie_word_embeddings=spec.tie_embeddings,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    return kind(config)


def build_tokenizer(spec: LlavaSpec, texts: Iterable[str]) -> tuple[Any, str]:
    """The tokenizer, with `<image>` and padding, and its chat template.

    Raises:
        UserError: its folder has none, or there are no texts to train one on.
    """
    from transformers import AutoTokenizer

    source = spec.tokenizer or ("" if spec.language in LANGUAGE else spec.language)
    if not source:
        return train_chat_tokenizer(texts, vocab_size=spec.vocab_size), CHAT_TEMPLATE
    source = plain_folder(source)
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=False)
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise UserError(f"Found no readable tokenizer in {source} ({first_line(error)}); add its files.") from error
    if not getattr(tokenizer, "image_token", None):
        added = {"extra_special_tokens": [IMAGE_PLACEHOLDER]}
        tokenizer.add_special_tokens(added, replace_extra_special_tokens=False)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    template = _template(source, tokenizer)
    if not template:
        raise UserError(f"The tokenizer of {source} has no chat template; take one that says how turns are written.")
    return tokenizer, template


def _template(source: str, tokenizer: Any) -> str:
    """A LLaVA's template is the processor's, a language model's is the tokenizer's."""
    from transformers import AutoProcessor

    try:
        found = getattr(AutoProcessor.from_pretrained(source, trust_remote_code=False), "chat_template", None)
    except (OSError, ValueError, KeyError, ImportError, AttributeError):
        found = None
    return str(found or getattr(tokenizer, "chat_template", None) or "")


def _joined(spec: LlavaSpec, vision: Any, language: Any, tokenizer: Any) -> Any:
    """The transformers model of both towers and a random projector; its language model answers as it did alone."""
    from transformers import LlavaConfig, LlavaForConditionalGeneration

    if language.get_output_embeddings().bias is not None:
        raise UserError(f"{spec.language} has a bias on its output layer, which a LLaVA lacks; choose another model.")
    is_clip = vision.config.model_type == "clip_vision_model"
    config = LlavaConfig(
        vision_config=vision.config,
        text_config=language.config,
        image_token_index=tokenizer.convert_tokens_to_ids(getattr(tokenizer, "image_token", IMAGE_PLACEHOLDER)),
        image_seq_length=(vision.config.image_size // vision.config.patch_size) ** 2,
        vision_feature_layer=spec.feature_layer,
        vision_feature_select_strategy="default" if is_clip else "full",
        tie_word_embeddings=bool(language.config.tie_word_embeddings),
    )
    if not -vision.config.num_hidden_layers <= spec.feature_layer <= vision.config.num_hidden_layers:
        raise UserError(
            f"Found feature_layer {spec.feature_layer}, expected a layer of the vision tower, which has "
            f"{vision.config.num_hidden_layers}."
        )
    model = LlavaForConditionalGeneration(config).eval()
    model.model.vision_tower.load_state_dict(vision.state_dict())
    model.model.language_model.load_state_dict(language.base_model.state_dict())
    model.get_output_embeddings().weight.data.copy_(language.get_output_embeddings().weight.data)
    probe = torch.arange(8)[None] % len(tokenizer)
    with torch.no_grad():
        alone, inside = language.eval()(input_ids=probe).logits, model(input_ids=probe).logits
    if not torch.allclose(alone, inside, rtol=1e-3, atol=1e-4):
        raise UserError(
            f"{spec.language} ({language.config.model_type}) does more behind its last layer than a LLaVA can hold, "
            "and would answer otherwise; choose another model."
        )
    return model


def _processor(model: Any, images: Any, tokenizer: Any, template: str) -> Any:
    from transformers import LlavaProcessor

    vision = model.config.vision_config
    strategy = model.config.vision_feature_select_strategy
    processor = LlavaProcessor(
        image_processor=images,
        tokenizer=tokenizer,
        patch_size=vision.patch_size,
        vision_feature_select_strategy=strategy,
        chat_template=template,
        num_additional_image_tokens=int(strategy == "default"),
    )
    open_chat("The student", processor, image_token_id=model.config.image_token_id, context_length=0)
    return processor


def open_pretrained(kind: Any, folder: str, what: str) -> Any:
    """The model of a local folder with its weights, in float32.

    Raises:
        UserError: it cannot be read, or its weights are pickled or incomplete.
    """
    try:
        with without_bars():
            model, info = kind.from_pretrained(
                folder, use_safetensors=True, trust_remote_code=False, dtype=torch.float32, output_loading_info=True
            )
    except (OSError, RuntimeError, ValueError, KeyError, TypeError, ImportError) as error:
        raise UserError(
            f"transformers cannot load the {what} of {folder!r} ({first_line(error)}); expected its config.json and "
            "safetensors weights."
        ) from error
    if info["missing_keys"]:
        missing = ", ".join(sorted(info["missing_keys"])[:3])
        raise UserError(f"The weights of {folder!r} lack {missing}; expected those of a {what}, fetch them again.")
    return model


def _family(folder: str, known: tuple[str, ...], what: str) -> str:
    """The family of a local folder without "_vision_model"; raises `UserError` for none, or one that is not known."""
    from transformers import AutoConfig

    if not (Path(folder) / "config.json").is_file():
        names = _listed((*VISION, "timm:NAME") if known else LANGUAGE)
        raise UserError(f"Found the {what} {folder!r}, expected {names}, or a transformers folder with config.json.")
    try:
        found = str(AutoConfig.from_pretrained(folder, trust_remote_code=False).model_type)
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"{folder}/config.json cannot be read ({first_line(error)}); fetch it again.") from error
    family = found.removesuffix("_vision_model")
    if known and family not in known:
        raise UserError(f"{folder!r} is of the family {found!r}, expected a {what} of one of {', '.join(known)}.")
    return family


def _listed(names: tuple[str, ...]) -> str:
    return " or ".join(name or '""' for name in names)


def _divides(width: int, heads: int, what: str) -> None:
    if heads < 1 or width % heads or (width // heads) % 2:
        raise UserError(f"Found a {what} width of {width} with {heads} heads; choose an even number for each head.")
