"""Tiny random generative models, written to a folder in about a second each."""

from __future__ import annotations

from pathlib import Path

import torch
from helpers.tiny_models import write_clip, write_siglip

from vlkd.models.chat_tokenizer import CHAT_TEMPLATE, train_chat_tokenizer
from vlkd.models.llava_spec import LlavaSpec, build_llava
from vlkd.models.timm_vlm import build_timm_vlm, load_timm_vlm

TEXTS = (
    "What colour is the circle?",
    "red",
    "How many cups are on the table?",
    "There are two red cups, and a blue one.",
    "Is there a dog?",
    "no",
) * 2
VICUNA = (
    "{% for message in messages %}{{ message['role'].upper() + ': ' }}"
    "{% for part in message['content'] if part['type'] == 'image' %}{{ '<image>\n' }}{% endfor %}"
    "{% for part in message['content'] if part['type'] == 'text' %}{{ part['text'] + ' ' }}{% endfor %}"
    "{% endfor %}{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)
"""The shape of LLaVA 1.5's template in transformers: pictures first, and no token ends an answer."""
CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
"""Qwen's form: contents are strings, and a line break follows the token that ends an answer."""


def tiny_llava_spec(**changes: object) -> LlavaSpec:
    """Vision of 2 layers of width 16 at 32 px in patches of 8, language of 2 layers of width 32."""
    settings: dict[str, object] = {
        "image_size": 32,
        "patch_size": 8,
        "vision_width": 16,
        "vision_layers": 2,
        "vision_heads": 2,
        "language_width": 32,
        "language_layers": 2,
        "language_heads": 2,
        "context_length": 128,
        "vocab_size": 300,
    }
    return LlavaSpec(**(settings | changes))  # type: ignore[arg-type]


def write_llava(folder: Path, *, seed: int = 0, **changes: object) -> Path:
    """A LLaVA of random weights, large enough that its answers depend on the picture."""
    torch.manual_seed(seed)
    build_llava(tiny_llava_spec(**changes), folder, texts=TEXTS)
    sharpen(folder, seed)
    return folder


def sharpen(folder: Path, seed: int = 0) -> None:
    """Matrices drawn wider than at the start of training, so that logits are far apart."""
    from safetensors import safe_open
    from safetensors.torch import save_file

    generator = torch.Generator().manual_seed(seed)
    with safe_open(folder / "model.safetensors", framework="pt") as file:
        state, metadata = {key: file.get_tensor(key) for key in file.keys()}, file.metadata()  # noqa: SIM118
    for key, value in state.items():
        if value.ndim > 1:
            state[key] = torch.randn(value.shape, generator=generator) * 0.2
    save_file(state, folder / "model.safetensors", metadata=metadata)


def write_timm_vlm(folder: Path, *, seed: int = 0, **changes: object) -> Path:
    """A model with timm's `test_efficientnet` at 64 px (N 4, C 256), its answers as far apart as `write_llava`'s."""
    torch.manual_seed(seed)
    build_timm_vlm(
        tiny_llava_spec(**({"vision": "timm:test_efficientnet", "image_size": 64} | changes)), folder, texts=TEXTS
    )
    vlm = load_timm_vlm(folder)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, value in vlm.named_parameters():
            if value.ndim > 1 and vlm.part_of(name) != "vision":
                value.normal_(std=0.2, generator=generator)
        for _ in range(8):  # running statistics of what really arrives
            vlm.train().vision(torch.randn(8, 3, *vlm.preprocessing.image_size, generator=generator))
    vlm.save(folder)
    return folder


def write_llava_next(folder: Path) -> Path:
    """A LLaVA-NeXT that cuts pictures into tiles of 32 px."""
    from transformers import (
        CLIPVisionConfig,
        LlamaConfig,
        LlavaNextConfig,
        LlavaNextForConditionalGeneration,
        LlavaNextImageProcessor,
        LlavaNextProcessor,
    )

    tokenizer = train_chat_tokenizer(TEXTS, vocab_size=300)
    sizes = {"num_hidden_layers": 2, "num_attention_heads": 2}
    pinpoints = [[32, 64], [64, 32], [64, 64]]
    config = LlavaNextConfig(
        vision_config=CLIPVisionConfig(hidden_size=16, intermediate_size=32, image_size=32, patch_size=8, **sizes),
        text_config=LlamaConfig(
            vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, max_position_embeddings=256, **sizes
        ),
        image_token_index=tokenizer.image_token_id,
        image_grid_pinpoints=pinpoints,
        vision_feature_layer=-1,
    )
    LlavaNextForConditionalGeneration(config).save_pretrained(folder)
    LlavaNextProcessor(
        image_processor=LlavaNextImageProcessor(
            size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}, image_grid_pinpoints=pinpoints
        ),
        tokenizer=tokenizer,
        patch_size=8,
        vision_feature_select_strategy="default",
        chat_template=CHAT_TEMPLATE,
        num_additional_image_tokens=1,
    ).save_pretrained(folder)
    sharpen(folder)
    return folder


def write_causal(folder: Path, *, kind: str = "qwen2", template: str = CHATML, **changes: object) -> Path:
    """A causal language model with a tokenizer of its own, its embeddings padded beyond it."""
    from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=train_chat_tokenizer(TEXTS, vocab_size=300).backend_tokenizer,
        eos_token="</s>",
        extra_special_tokens=["<|im_start|>", "<|im_end|>"],
    )
    tokenizer.chat_template = template
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = AutoConfig.for_model(
        kind, vocab_size=320, num_key_value_heads=2, max_position_embeddings=128, pad_token_id=0, **sizes, **changes
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


__all__ = [
    "CHATML",
    "TEXTS",
    "VICUNA",
    "tiny_llava_spec",
    "write_causal",
    "write_clip",
    "write_llava",
    "write_siglip",
    "write_timm_vlm",
]
