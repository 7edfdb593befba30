"""Tiny random models in every format that `vlkd.load` reads, written to a folder in well under a second each."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors.torch import save_file

from vlkd.models.composite import CompositeModel
from vlkd.models.spec import CompositeSpec, build_composite
from vlkd.models.tokenizer import CompactTokenizer, train_tokenizer

CAPTIONS = (
    "A red square above a blue circle",
    "two green triangles and a small yellow star",
    "a blue circle",
    "A large dog runs, on the beach!",
    "the cat's small star is above a red dog",
)
TINY_IMAGE = {"image": "resnet10t", "image_kwargs": '{"channels": [8, 8, 16, 16], "stem_width": 8}'}


def tiny_images(count: int = 4, *, seed: int = 0) -> list[Image.Image]:
    """Noisy RGB images of differing shapes."""
    generator = np.random.default_rng(seed)
    images = []
    for index in range(count):
        small = generator.integers(0, 256, (7 + index % 3, 9, 3), dtype=np.uint8)
        images.append(Image.fromarray(small).resize((60 + 13 * (index % 4), 48 + 7 * (index % 5))))
    return images


def tiny_tokenizer() -> CompactTokenizer:
    """A compact tokenizer trained on `CAPTIONS`."""
    return train_tokenizer(CAPTIONS, vocab_size=120, min_frequency=1)


def tiny_spec(**changes: object) -> CompositeSpec:
    """A composite of a 20 k ResNet at 32 px and a two-layer compact text tower."""
    settings: dict[str, object] = {
        **TINY_IMAGE,
        "image_size": 32,
        "text_width": 32,
        "text_layers": 2,
        "text_heads": 4,
        "context_length": 16,
        "width": 24,
    }
    return CompositeSpec(**(settings | changes))  # type: ignore[arg-type]


def tiny_composite(*, seed: int = 0, **changes: object) -> CompositeModel:
    """A random composite model in evaluation mode, its running statistics random, too."""
    torch.manual_seed(seed)
    model = build_composite(tiny_spec(**changes), tokenizer=tiny_tokenizer(), name="tiny")
    for name, value in model.named_buffers():
        if name.endswith("running_mean"):
            value.normal_(std=0.1)
        if name.endswith("running_var"):
            value.uniform_(0.5, 1.5)
    return model.eval()


def write_open_clip(folder: Path, *, siglip: bool = False, seed: int = 0) -> Path:
    """A folder of open_clip's `local-dir:` scheme: CLIP with open_clip's tokenizer, or SigLIP-like."""
    import open_clip

    torch.manual_seed(seed)
    text: dict[str, object] = {"context_length": 20, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2}
    vision = {"image_size": 32, "layers": 2, "width": 32, "patch_size": 8, "head_width": 16}
    config: dict[str, object] = {"embed_dim": 24, "vision_cfg": vision, "text_cfg": text}
    preprocess = {
        "mean": [0.4, 0.5, 0.6],
        "std": [0.2, 0.3, 0.25],
        "interpolation": "bicubic",
        "resize_mode": "shortest",
    }
    folder.mkdir(parents=True, exist_ok=True)
    if siglip:
        text |= {"hf_tokenizer_name": "local", "vocab_size": 200, "no_causal_mask": True, "pool_type": "last"}
        text |= {"proj_bias": True, "tokenizer_kwargs": {"clean": "canonicalize"}}
        config |= {"custom_text": True, "init_logit_bias": -10}
        preprocess |= {"mean": [0.5] * 3, "std": [0.5] * 3, "resize_mode": "squash"}
        word_tokenizer().save_pretrained(str(folder))
    cls = open_clip.CustomTextCLIP if siglip else open_clip.CLIP
    model = cls(**{key: value for key, value in config.items() if key != "custom_text"})
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": config, "preprocess_cfg": preprocess}))
    save_file({k: v.contiguous() for k, v in model.state_dict().items()}, str(folder / "open_clip_model.safetensors"))
    return folder


def word_tokenizer():
    """A transformers tokenizer over the words of `CAPTIONS`; `</s>` ends texts and pads them, as in SigLIP."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    words = sorted({word for text in CAPTIONS for word in text.lower().replace(",", "").replace("!", "").split()})
    backend = Tokenizer(models.WordLevel({"<unk>": 0, "</s>": 1} | {w: i + 2 for i, w in enumerate(words)}, "<unk>"))
    backend.normalizer = normalizers.Lowercase()
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, unk_token="<unk>", eos_token="</s>", pad_token="</s>", model_max_length=16
    )


def clip_tokenizer():
    """A `CLIPTokenizer` of single bytes, without merges."""
    from open_clip.tokenizer import bytes_to_unicode
    from transformers import CLIPTokenizer

    letters = list(bytes_to_unicode().values())
    pieces = [*letters, *(letter + "</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer(vocab={piece: index for index, piece in enumerate(pieces)}, merges=[])


def write_clip(folder: Path, *, seed: int = 0) -> Path:
    """A transformers CLIP folder."""
    from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel

    torch.manual_seed(seed)
    tokenizer = clip_tokenizer()
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    ids = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    config = CLIPConfig(
        text_config=sizes | ids | {"vocab_size": len(tokenizer), "max_position_embeddings": 40, "pad_token_id": 1},
        vision_config=sizes | {"image_size": 32, "patch_size": 8},
        projection_dim=24,
    )
    CLIPModel(config).save_pretrained(str(folder))
    size, crop = {"shortest_edge": 36}, {"height": 32, "width": 32}
    CLIPImageProcessor(size=size, crop_size=crop).save_pretrained(str(folder))
    tokenizer.save_pretrained(str(folder))
    return folder


def write_siglip(folder: Path, *, seed: int = 0) -> Path:
    """A transformers SigLIP folder; fixed-resolution SigLIP 2 has the same classes."""
    from transformers import SiglipConfig, SiglipImageProcessor, SiglipModel

    torch.manual_seed(seed)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = SiglipConfig(
        text_config=sizes | {"vocab_size": 64, "max_position_embeddings": 16},
        vision_config=sizes | {"image_size": 32, "patch_size": 8},
    )
    SiglipModel(config).save_pretrained(str(folder))
    SiglipImageProcessor(size={"height": 32, "width": 32}).save_pretrained(str(folder))
    word_tokenizer().save_pretrained(str(folder))
    return folder


def write_bert(folder: Path, *, seed: int = 0) -> Path:
    """A transformers BERT folder, as a text tower."""
    from transformers import BertConfig, BertModel

    torch.manual_seed(seed)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    BertModel(BertConfig(vocab_size=64, max_position_embeddings=24, **sizes)).save_pretrained(str(folder))
    word_tokenizer().save_pretrained(str(folder))
    return folder
