"""The compact tokenizer and padding."""

from __future__ import annotations

import pickle
import random
import subprocess
import sys

import pytest
import torch
from helpers.tiny_models import CAPTIONS, tiny_tokenizer
from tokenizers import Tokenizer
from tokenizers.processors import TemplateProcessing

from vlkd.errors import UserError
from vlkd.models.tokenizer import CompactTokenizer, train_tokenizer


def test_words_are_found_again_whatever_their_case_and_width():
    tokenizer = tiny_tokenizer()
    vocabulary = tokenizer.backend.get_vocab()
    found = tokenizer.tokenize(["A RED ｓｑｕａｒｅ"], 16)
    assert found["ids"].tolist() == [[2, vocabulary["▁a"], vocabulary["▁red"], vocabulary["▁square"]]]
    assert tokenizer.tokenize(["🦉"], 16)["ids"].tolist() == [[2, vocabulary["▁"], 1]]


def test_words_by_themselves_are_the_text_as_a_whole():
    """Also with other spaces, marks that combine, letters of several cases, and names of special tokens."""
    tokenizer = train_tokenizer([*CAPTIONS, "Straße, ÉTÉ σΣς [x] don't"], vocab_size=120, min_frequency=1)
    characters = [
        chr(code) for code in (*range(0x180), *range(0x300, 0x310), *range(0x2000, 0x2070), *range(0xFB00, 0xFB10))
    ]
    parts = [
        *characters,
        *["a", "red", "DOG", "σΣς", " ", "  ", "\u3000", "[CLS]", "[PAD]", "[UNK]", "\u2581", "¨", "🦉"] * 30,
    ]
    draw = random.Random(0)
    for _ in range(3000):
        text = "".join(draw.choices(parts, k=draw.randrange(12)))
        assert tokenizer.ids(text) == tokenizer.backend.encode(text).ids, ascii(text)


def test_another_pipeline_sees_the_whole_text():
    tokenizer = tiny_tokenizer()
    backend = Tokenizer.from_str(tokenizer.backend.to_str())
    backend.post_processor = TemplateProcessing(single="[CLS] $A [UNK]", special_tokens=[("[CLS]", 2), ("[UNK]", 1)])
    assert CompactTokenizer(backend).ids("a red dog") == [*tokenizer.ids("a red dog"), 1]


def test_no_more_words_are_remembered_than_said(monkeypatch):
    monkeypatch.setattr("vlkd.models.tokenizer.REMEMBERED", 3)
    tokenizer = tiny_tokenizer()
    for number in range(20):
        tokenizer.ids(f"a red dog{number} {'x' * 100}")
        assert len(tokenizer._words) <= 3
    assert tokenizer.ids("a red dog") == tokenizer.backend.encode("a red dog").ids


def test_padding_and_truncation():
    found = tiny_tokenizer().tokenize(["", "a red dog", "a " * 40], 6)
    assert found["ids"].shape == (3, 6)
    assert found["mask"].sum(dim=1).tolist() == [1, 4, 6]
    assert not found["ids"][~found["mask"]].any()
    assert tiny_tokenizer().tokenize(["a red dog"], 6)["ids"].shape == (1, 4)
    assert found["ids"].dtype == torch.int64
    assert found["mask"].dtype == torch.bool


def test_vocabulary_size_is_kept():
    assert train_tokenizer(CAPTIONS * 3, vocab_size=60, min_frequency=1).vocab_size == 60


def test_training_is_deterministic_across_processes():
    code = (
        "from vlkd.models.tokenizer import train_tokenizer\n"
        f"print(train_tokenizer({CAPTIONS!r}, vocab_size=120, min_frequency=1).backend.to_str())"
    )
    other = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert other.stdout.strip() == tiny_tokenizer().backend.to_str()


def test_save_load_and_pickle(tmp_path):
    tokenizer = tiny_tokenizer()
    tokenizer.save(tmp_path)
    for copy in (CompactTokenizer.load(tmp_path / "tokenizer.json"), pickle.loads(pickle.dumps(tokenizer))):
        assert torch.equal(copy.tokenize(CAPTIONS, 16)["ids"], tokenizer.tokenize(CAPTIONS, 16)["ids"])


def test_bad_files(tmp_path):
    with pytest.raises(UserError, match="Found no tokenizer"):
        CompactTokenizer.load(tmp_path / "tokenizer.json")
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(UserError, match=r"is not a tokenizer\.json"):
        CompactTokenizer.load(tmp_path / "tokenizer.json")
    with pytest.raises(UserError, match="no words"):
        train_tokenizer([])
