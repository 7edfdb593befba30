"""Tokenizers without weights: the compact one, trained on captions, and the wrapper of a transformers tokenizer."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers
from torch import Tensor

from vlkd.errors import UserError
from vlkd.features import Preprocessing

PAD, UNKNOWN, START = "[PAD]", "[UNK]", "[CLS]"
REMEMBERED, REMEMBERED_CHARACTERS = 1 << 16, 64
"""Words whose ids a tokenizer keeps, and their longest."""
NORMALIZER = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])
PRE_TOKENIZER = pre_tokenizers.Sequence(
    [pre_tokenizers.BertPreTokenizer(), pre_tokenizers.Metaspace(prepend_scheme="always")]
)
POST_PROCESSOR = processors.TemplateProcessing(single=f"{START} $A", special_tokens=[(START, 2)])


class TextTokenizer(Protocol):
    """Raw texts to `ids` (B, N) int64 and `mask` (B, N) bool, N the longest text of the batch."""

    def tokenize(self, texts: Sequence[str], context_length: int) -> dict[str, Tensor]: ...

    def save(self, folder: Path) -> None: ...


def pad_ids(rows: Sequence[Sequence[int]], pad_id: int) -> dict[str, Tensor]:
    """`ids` and `mask` (B, N) of rows of unequal length, N the longest."""
    lengths = torch.tensor([len(row) for row in rows])
    longest = int(lengths.max())
    # numpy reads nested lists several times faster than torch does.
    ids = np.array([[*row, *[pad_id] * (longest - len(row))] for row in rows], dtype=np.int64)
    return {"ids": torch.from_numpy(ids), "mask": torch.arange(longest)[None, :] < lengths[:, None]}


class CompactTokenizer:
    """Byte-pair encoding of lower-cased NFKC words; `[PAD]` is 0, `[UNK]` 1, and `[CLS]` 2 begins every text."""

    def __init__(self, backend: Tokenizer) -> None:
        self.backend = backend
        # No piece of a tokenizer made here reaches over a space, so that each word can be encoded by itself.
        parts = (backend.normalizer, backend.pre_tokenizer, backend.post_processor)
        self._by_words = list(map(repr, parts)) == list(map(repr, (NORMALIZER, PRE_TOKENIZER, POST_PROCESSOR)))
        self._words: dict[str, list[int]] = {}

    @classmethod
    def load(cls, path: str | Path) -> CompactTokenizer:
        """Read a `tokenizer.json`.

        Raises:
            UserError: the file is missing, is no tokenizer, or numbers its special tokens otherwise.
        """
        if not Path(path).is_file():
            raise UserError(f"Found no tokenizer at {path}; expected a tokenizer.json written by vlkd, check the path.")
        try:
            backend = Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises bare Exception
            raise UserError(f"{path} is not a tokenizer.json ({error}); train the tokenizer again.") from error
        if [backend.token_to_id(token) for token in (PAD, UNKNOWN, START)] != [0, 1, 2]:
            raise UserError(
                f"{path} does not begin with {PAD}, {UNKNOWN}, {START}; expected a tokenizer trained by vlkd, "
                "or a transformers folder as the text tower."
            )
        return cls(backend)

    @property
    def vocab_size(self) -> int:
        """V, special tokens included."""
        return int(self.backend.get_vocab_size())

    def tokenize(self, texts: Sequence[str], context_length: int) -> dict[str, Tensor]:
        """`ids` (B, N) int64 and `mask` (B, N) bool; N is the longest text, at most `context_length`."""
        return pad_ids([self.ids(text)[:context_length] for text in texts], 0)

    def ids(self, text: str) -> list[int]:
        """Of a text, `[CLS]` first; words are encoded once and remembered."""
        # One by one: encode_batch starts threads, which must not happen before DataLoader workers are forked.
        if not self._by_words:
            return list(self.backend.encode(text).ids)
        found = [2]
        for word in text.split(" "):
            ids = self._words.get(word)
            if ids is None:
                ids = self.backend.encode(word).ids[1:]
                if len(self._words) >= REMEMBERED:
                    self._words.clear()
                if len(word) <= REMEMBERED_CHARACTERS:
                    self._words[word] = ids
            found += ids
        return found

    def save(self, folder: Path) -> None:
        """Write `tokenizer.json` into the folder."""
        self.backend.save(str(folder / "tokenizer.json"))


def train_tokenizer(texts: Iterable[str], *, vocab_size: int = 8000, min_frequency: int = 2) -> CompactTokenizer:
    """Train a `CompactTokenizer`; equal texts in equal order give an equal tokenizer.

    Args:
        texts: captions of the training split.
        vocab_size: the largest V; fewer if the captions do not hold that many pieces.
        min_frequency: pieces rarer than this are spelled by shorter ones.

    Raises:
        UserError: there is no text.
    """
    # Not WordPiece: its trainer numbers the continuing letters in the order of a randomly seeded hash table.
    backend = Tokenizer(models.BPE(unk_token=UNKNOWN))
    backend.normalizer = NORMALIZER
    backend.pre_tokenizer = PRE_TOKENIZER
    backend.post_processor = POST_PROCESSOR
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=min_frequency,
        special_tokens=[PAD, UNKNOWN, START],
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    tokenizer = CompactTokenizer(backend)
    if tokenizer.vocab_size <= 3:
        raise UserError("Found no words to train a tokenizer on, expected captions; check the data's captions.")
    return tokenizer


class TransformersTokenizer:
    """A transformers tokenizer that pads to the longest text.

    Args:
        backend: the loaded tokenizer.
        max_length_padding: pad to `context_length` instead, for models trained without a mask (SigLIP).
        lower_case: lower-case first, for a cased tokenizer in front of a model trained on lower case (SigLIP 2).
    """

    def __init__(self, backend: Any, *, max_length_padding: bool = False, lower_case: bool = False) -> None:
        self.backend = backend
        self.max_length_padding = max_length_padding
        self.lower_case = lower_case

    @classmethod
    def load(cls, folder: str | Path) -> TransformersTokenizer:
        """Read the tokenizer of a transformers folder; no code from the folder is run.

        Raises:
            UserError: the folder holds no tokenizer that can be read.
        """
        from transformers import AutoTokenizer

        try:
            return cls(AutoTokenizer.from_pretrained(str(folder), trust_remote_code=False))
        except (OSError, ValueError, KeyError, ImportError) as error:
            raise UserError(f"Found no readable tokenizer in {folder} ({first_line(error)}); add its files.") from error

    def tokenize(self, texts: Sequence[str], context_length: int) -> dict[str, Tensor]:
        """`ids` (B, N) int64 and `mask` (B, N) bool, true on real tokens."""
        found = self.backend(
            [text.lower() for text in texts] if self.lower_case else list(texts),
            padding="max_length" if self.max_length_padding else "longest",
            truncation=True,
            max_length=context_length,
            return_tensors="pt",
            return_attention_mask=True,
        )
        return {"ids": found["input_ids"], "mask": found["attention_mask"].bool()}

    def save(self, folder: Path) -> None:
        """Write the tokenizer's files into the folder."""
        self.backend.save_pretrained(str(folder))


class BorrowedTokenizer:
    """The tokenizer of another model, with that model's own context length."""

    def __init__(self, lender: Preprocessing) -> None:
        self.lender = lender

    def tokenize(self, texts: Sequence[str], context_length: int) -> dict[str, Tensor]:  # noqa: ARG002 - the lender's own
        """`ids` and `mask` as the lender gives them."""
        return self.lender.tokenize(texts)

    def save(self, folder: Path) -> None:
        """Nothing to write: the lender's folder has it."""


def first_line(error: BaseException) -> str:
    """The first line of a library's message, without its full stop, to quote inside a sentence."""
    lines = re.split(r"[\r\n]+", str(error).strip())
    return lines[0].rstrip(". ") or type(error).__name__
