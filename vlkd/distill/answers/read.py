"""Reads stored answers by the keys of conversations, through memory maps."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from vlkd.data.conversations import Conversation
from vlkd.distill.answers.format import (
    data_differences,
    differences,
    read_manifest,
    refuse,
    states_of,
    teacher_identity,
)
from vlkd.distill.cache.format import METADATA
from vlkd.errors import UserError
from vlkd.models.generative import GenerativeVLM

COLUMNS = ("indices", "values", "rest")


class StoredAnswers:
    """A teacher's distributions by conversation. It travels to workers, where files are opened anew.

    Args:
        folder: of the shards.
        manifest: what is stored.

    Attributes:
        vocabulary: V of the teacher.
        left_out: conversations that the teacher could not take, and why; they have no answers.
        states: by key, what a conversation was when it was stored.

    Raises:
        UserError: a shard is not there, or another one.
    """

    def __init__(self, folder: Path, manifest: Mapping[str, Any]) -> None:
        self.folder = folder
        self.manifest = dict(manifest)
        self.vocabulary = int(manifest["identity"]["vocabulary"])
        self.left_out: dict[str, str] = dict(manifest["left_out"])
        self.states: dict[str, str] = {}
        self._places: dict[str, tuple[int, int, int]] = {}
        self._opened: dict[int, dict[str, Tensor]] = {}
        for number, entry in enumerate(manifest["shards"]):
            head, counts = self._head(entry)
            first = 0
            for key, state, count in zip(head["keys"], head["states"], counts, strict=True):
                self.states[key] = state
                self._places[key] = (number, first, count)
                first += count

    def __len__(self) -> int:
        return len(self._places)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_opened": {}}

    def answers(self, key: str) -> tuple[Tensor, Tensor, Tensor]:
        """Of a conversation with a answer tokens: ids (a, K) int64 of the K likeliest tokens in falling order, their
        log probabilities (a, K) float32, and the probability (a,) float32 of all others.

        Raises:
            UserError: the conversation is not stored.
        """
        if key not in self._places or key in self.left_out:
            reason = self.left_out.get(key, "it was not there")
            raise UserError(
                f"{self.folder} holds no answers of {key!r} ({reason}); leave that conversation out, or store the "
                "answers again with `vlkd cache answers`."
            )
        number, first, count = self._places[key]
        shard = self._shard(number)
        indices, values, rest = (shard[name][first : first + count] for name in COLUMNS)
        return indices.long(), values.float(), rest.clone()

    def _shard(self, number: int) -> dict[str, Tensor]:
        """A shard's columns, mapped and not read."""
        if number not in self._opened:
            with safe_open(str(self.folder / self.manifest["shards"][number]["file"]), "pt") as file:
                self._opened[number] = {name: file.get_tensor(name) for name in COLUMNS}
        return self._opened[number]

    def _head(self, entry: Mapping[str, Any]) -> tuple[dict[str, Any], list[int]]:
        path = self.folder / entry["file"]
        try:
            with safe_open(str(path), "pt") as file:
                head = json.loads(file.metadata()[METADATA])
                counts = file.get_tensor("counts").tolist()
                shape = file.get_slice("indices").get_shape()
        except (OSError, SafetensorError, KeyError, TypeError, ValueError):
            head, counts, shape = {}, [], []
        sound = shape == [sum(counts), self.manifest["identity"]["top"]] and len(head["keys"]) == len(counts)
        if not sound or head["identity"] != self.manifest["identity"] or path.stat().st_size != entry["bytes"]:
            raise UserError(
                f"{path} is missing, damaged or not the one that the manifest names; remove it and the manifest: "
                "`vlkd cache answers` makes it again."
            )
        return head, counts


def open_answers(folder: Path, teacher: GenerativeVLM, conversations: Sequence[Conversation]) -> StoredAnswers:
    """Open whole stored answers and check them; shards by their heads alone, their content is for `verify_answers`.

    Args:
        folder: where they are.
        teacher: whose they must be; it is only read.
        conversations: which must be among them, as they are now.

    Raises:
        UserError: there are none, or they are those of something else; every difference is named.
    """
    stored = StoredAnswers(folder, read_manifest(folder))
    phrases = differences(stored.manifest["identity"], teacher_identity(teacher))
    phrases += data_differences(stored.states, states_of(conversations))
    if phrases:
        refuse(folder, phrases)
    return stored
