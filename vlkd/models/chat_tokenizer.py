"""A small tokenizer for conversations about pictures, trained on given texts, with its chat template."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from vlkd.errors import UserError
from vlkd.features import IMAGE_PLACEHOLDER

PAD, BEGIN, END, USER, ASSISTANT = "<pad>", "<s>", "</s>", "<|user|>", "<|assistant|>"
BYTES = 256

# The space before a text gives a word the same pieces at the beginning of a turn as inside it.
CHAT_TEMPLATE = (
    "{{ '<s>' }}"
    "{%- for message in messages %}"
    "{{- '<|' + message['role'] + '|>' }}"
    "{%- if message['role'] == 'assistant' %}"
    "{%- generation %}"
    "{%- for part in message['content'] if part['type'] == 'text' %}{{- ' ' + part['text'] }}{%- endfor %}"
    "{{- '</s>' }}"
    "{%- endgeneration %}"
    "{%- else %}"
    "{%- for part in message['content'] %}"
    "{{- '<image>' if part['type'] == 'image' else ' ' + part['text'] }}"
    "{%- endfor %}"
    "{%- endif %}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|assistant|>' }}{%- endif %}"
)
"""One token opens each turn, `</s>` ends answers; contents are lists of parts. It marks answers for assistant masks."""


def train_chat_tokenizer(texts: Iterable[str], *, vocab_size: int, min_frequency: int = 2) -> Any:
    """A byte-level BPE `PreTrainedTokenizerFast`; equal texts in equal order give an equal tokenizer.

    Every text can be written: what was not seen falls into bytes. Case is kept.

    Args:
        texts: questions and answers of the training split.
        vocab_size: the largest V; fewer if the texts do not hold that many pieces.
        min_frequency: pieces rarer than this are spelled by shorter ones.

    Raises:
        UserError: V has no room for the bytes, or there is no text.
    """
    from transformers import PreTrainedTokenizerFast

    special = [PAD, BEGIN, END, USER, ASSISTANT, IMAGE_PLACEHOLDER]
    if vocab_size < BYTES + len(special):
        raise UserError(
            f"Found a vocabulary of {vocab_size}, expected at least {BYTES + len(special)} for single bytes."
        )
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=min_frequency,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    if backend.get_vocab_size() == BYTES + len(special):
        raise UserError("Found no words to train a tokenizer on, expected questions and answers; check the data.")
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token=PAD,
        bos_token=BEGIN,
        eos_token=END,
        extra_special_tokens={"image_token": IMAGE_PLACEHOLDER, "user_token": USER, "assistant_token": ASSISTANT},
        clean_up_tokenization_spaces=False,
        model_max_length=1 << 20,
    )
