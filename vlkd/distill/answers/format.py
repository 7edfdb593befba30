"""What stored answers must be, what their manifest tells, and the sentence that refuses others."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NoReturn, get_args

import torch

from vlkd.data.conversations import Conversation
from vlkd.data.files import strict_json
from vlkd.data.sources import row_state
from vlkd.distill.cache.format import MANIFEST, Precision
from vlkd.distill.gates import probe_conversation
from vlkd.errors import UserError
from vlkd.models.generative import GenerativeVLM

FORMAT, VERSION = "vlkd-teacher-answers", 2

StorageType = Literal["float32", "float16"]


@dataclass(frozen=True, kw_only=True)
class AnswerSpec:
    """How answers are stored.

    Args:
        top: K, the tokens kept of each distribution.
        precision: of the pass.
        dtype: of the log probabilities.

    Raises:
        UserError: a value is outside its range.
    """

    top: int = 32
    precision: Precision = "fp32"
    dtype: StorageType = "float16"

    def __post_init__(self) -> None:
        if self.top < 1 or self.precision not in get_args(Precision) or self.dtype not in get_args(StorageType):
            raise UserError(
                f"Found answers with top {self.top}, precision {self.precision!r} and dtype {self.dtype!r}; expected 1 "
                f"or more, one of {', '.join(get_args(Precision))}, and one of {', '.join(get_args(StorageType))}."
            )

    @property
    def storage(self) -> torch.dtype:
        """The dtype of the log probabilities."""
        return torch.float16 if self.dtype == "float16" else torch.float32


def teacher_identity(teacher: GenerativeVLM) -> dict[str, Any]:
    """Everything of the teacher on which its answers depend."""
    vocabulary = sorted(teacher.tokenizer.get_vocab().items())
    ids, labels = probe_conversation(teacher)
    return {
        "weights": teacher.fingerprint(),
        "vocabulary": teacher.vocabulary,
        "tokenizer": hashlib.sha256(repr(vocabulary).encode()).hexdigest()[:16],
        "template": hashlib.sha256(repr((ids.tolist(), labels.tolist())).encode()).hexdigest()[:16],
    }


def identity(teacher: GenerativeVLM, spec: AnswerSpec) -> dict[str, Any]:
    """Everything but the data on which what is stored depends."""
    own = {"version": VERSION, "top": spec.top, "precision": spec.precision, "dtype": spec.dtype}
    return own | teacher_identity(teacher)


WORDS = {
    "version": "in another format version",
    "weights": "by a teacher with other weights or preprocessing",
    "vocabulary": "for another vocabulary",
    "tokenizer": "with another tokenizer",
    "template": "with another chat template",
    "top": "with another top",
    "precision": "with another precision",
    "dtype": "with another dtype",
}


def differences(found: Mapping[str, Any], expected: Mapping[str, Any]) -> list[str]:
    """In words, where what is stored is not as expected; what `expected` lacks may be anything."""
    return [
        f"{words} (found {found.get(name)}, expected {expected[name]})"
        for name, words in WORDS.items()
        if name in expected and found.get(name) != expected[name]
    ]


def states_of(conversations: Sequence[Conversation]) -> dict[str, str]:
    """By key a hash of each conversation's turns, of the place of its picture and of 256 bytes of that."""
    return {
        talk.key: row_state(
            talk.key, (f"alone: {talk.alone}", *(f"{turn.role}: {turn.text}" for turn in talk.turns)), talk.image
        )
        for talk in conversations
    }


def data_differences(found: Mapping[str, str], expected: Mapping[str, str]) -> list[str]:
    """In words, which of the expected conversations are stored as they are now; there may be more."""
    wrong = [key for key, state in expected.items() if found.get(key) != state]
    if not wrong:
        return []
    here = len(expected) - len(wrong)
    return [f"from other data (found {here} of {len(expected)} conversations as they are now; not {wrong[0]!r})"]


def refuse(folder: Path, phrases: Collection[str]) -> NoReturn:
    """Raise `UserError` with every difference named."""
    raise UserError(
        f"The answers in {folder} were stored {', '.join(phrases)}; store them again with `vlkd cache answers` in "
        "another folder, or remove this one."
    )


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of whole stored answers.

    Raises:
        UserError: there is none, or another one.
    """
    path = folder / MANIFEST
    if not path.is_file():
        half = any(folder.glob("*.safetensors"))
        raise UserError(
            f"{folder} holds {'half of the' if half else 'no'} stored answers; {'continue' if half else 'store'} them "
            f"with `vlkd cache answers --teacher REF --data DATA --out {folder}`."
        )
    try:
        manifest = strict_json(path.read_text(encoding="utf-8"))
        known = manifest["format"] == FORMAT and manifest["identity"]["version"] == VERSION
        files = [entry["file"] for entry in manifest["shards"]]
        whole = all(Path(name).name == name for name in files) and isinstance(manifest["left_out"], dict)
    except (ValueError, KeyError, TypeError, AttributeError):
        known = whole = False
    if not known or not whole:
        raise UserError(
            f"{path} is no manifest of stored answers of format version {VERSION}; remove the folder and store them "
            "again with `vlkd cache answers`."
        )
    return dict(manifest)


def head_of(own: Mapping[str, Any], states: Mapping[str, str]) -> dict[str, Any]:
    """What a shard tells of itself: the identity, and keys and states of its conversations, as JSON gives it back."""
    return dict(json.loads(json.dumps({"identity": own, "keys": list(states), "states": list(states.values())})))
