"""Stores a teacher's answers: one pass over conversations, shard by shard, continued where it was stopped."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from tqdm import tqdm

from vlkd.data.conversation_sequence import ConversationBatch
from vlkd.data.conversations import Conversation
from vlkd.data.sources import MAX_BAD_SHARE, file_sha256, spread
from vlkd.distill.answers.batches import answer_batches, autocast_of
from vlkd.distill.answers.dense import rounded, sparsify
from vlkd.distill.answers.fidelity import measured_error
from vlkd.distill.answers.format import (
    FORMAT,
    AnswerSpec,
    data_differences,
    differences,
    head_of,
    identity,
    read_manifest,
    refuse,
    states_of,
)
from vlkd.distill.answers.read import StoredAnswers
from vlkd.distill.cache.build import columns_hash, write_shard
from vlkd.distill.cache.format import MANIFEST, METADATA, write_manifest
from vlkd.distill.gates import check_alone
from vlkd.distill.token_distiller import TEACHER, answer_logits
from vlkd.errors import UserError
from vlkd.features import IGNORED
from vlkd.models.base import evaluating
from vlkd.models.generative import GenerativeVLM

SHARD_CONVERSATIONS = 1024
MEASURED = 64
"""Conversations on which the error of storing is measured."""


@dataclass(frozen=True)
class _Shard:
    file: str
    rows: range


def build_answers(
    folder: Path,
    teacher: GenerativeVLM,
    conversations: Sequence[Conversation],
    spec: AnswerSpec,
    *,
    workers: int = 0,
    batch_size: int = 32,
) -> StoredAnswers:
    """Store the answers that are missing, or open them where all are there.

    Args:
        folder: of this teacher and these conversations.
        teacher: it is only read.
        conversations: their keys without repeats.
        spec: how they are stored.
        workers: processes that decode.
        batch_size: conversations per pass.

    Raises:
        UserError: what is there was made from something else, the teacher's logits are not finite, K exceeds the
            vocabulary, or much of the data cannot be used.
    """
    if spec.top > teacher.vocabulary:
        raise UserError(f"Found --top {spec.top} for a vocabulary of {teacher.vocabulary}; give at most that.")
    own, states = identity(teacher, spec), states_of(conversations)
    if (folder / MANIFEST).is_file():
        stored = StoredAnswers(folder, read_manifest(folder))
        phrases = differences(stored.manifest["identity"], own)
        if phrases or len(stored) != len(states):
            refuse(folder, phrases or [f"of {len(stored)} conversations (expected {len(states)})"])
        if phrases := data_differences(stored.states, states):
            refuse(folder, phrases)
        return stored
    check_alone([teacher], conversations)
    folder.mkdir(parents=True, exist_ok=True)
    started = time.perf_counter()
    heads = {shard.file: head_of(own, _part(states, shard)) for shard in _shards(len(states))}
    entries, computed = _write_missing(folder, teacher, conversations, spec, heads, workers, batch_size)
    seconds = time.perf_counter() - started
    chosen = [conversations[row] for row in spread(len(conversations), MEASURED)]
    with torch.no_grad(), evaluating(teacher), autocast_of(teacher, spec.precision):
        error = measured_error(teacher, answer_batches(teacher, chosen, [range(len(chosen))], 0, batch_size), spec)
    left_out = {key: reason for entry in entries for key, reason in entry.pop("left_out").items()}
    manifest = {
        "format": FORMAT,
        "identity": own,
        "teacher": teacher.name,
        "conversations": len(states),
        "tokens": sum(entry["tokens"] for entry in entries),
        "left_out": left_out,
        "shards": entries,
        "error": error,
        "computed": computed,
        "seconds": round(seconds, 3),
    }
    write_manifest(folder, manifest)
    return StoredAnswers(folder, manifest)


def _shards(conversations: int) -> list[_Shard]:
    starts = range(0, conversations, SHARD_CONVERSATIONS)
    return [
        _Shard(f"answers.{number:05d}.safetensors", range(start, min(start + SHARD_CONVERSATIONS, conversations)))
        for number, start in enumerate(starts)
    ]


def _part(states: Mapping[str, str], shard: _Shard) -> dict[str, str]:
    return dict(islice(states.items(), shard.rows.start, shard.rows.stop))


def _write_missing(
    folder: Path,
    teacher: GenerativeVLM,
    conversations: Sequence[Conversation],
    spec: AnswerSpec,
    heads: Mapping[str, dict[str, Any]],
    workers: int,
    batch_size: int,
) -> tuple[list[dict[str, Any]], int]:
    """The manifest's entries of all shards, and how many conversations were computed."""
    foreign = {path.name for path in folder.glob("*.safetensors")} - heads.keys()
    if foreign:
        refuse(folder, [f"from other data (found {min(foreign)}, expected up to {max(heads)})"])
    shards = _shards(len(conversations))
    found = {shard.file: _found_shard(folder / shard.file, heads[shard.file]) for shard in shards}
    missing = [shard for shard in shards if found[shard.file] is None]
    computed = sum(len(shard.rows) for shard in missing)
    left_out = sum(len(entry["left_out"]) for entry in found.values() if entry)
    total = len(conversations)
    with (
        torch.no_grad(),
        evaluating(teacher),
        autocast_of(teacher, spec.precision),
        tqdm(total=total, initial=total - computed, desc=f"{teacher.name}: answers", unit="conversation") as bar,
    ):
        batches = answer_batches(teacher, conversations, [shard.rows for shard in missing], workers, batch_size)
        for shard in missing:
            own = islice(batches, -(-len(shard.rows) // batch_size))
            columns, bad = _shard_columns(teacher, own, shard.rows, spec, bar)
            left_out += len(bad)
            if left_out > max(1, MAX_BAD_SHARE * total):
                key, reason = next(iter(bad.items()))
                raise UserError(
                    f"{left_out} of {total} conversations cannot be used (for instance {key}: {reason}), more than "
                    f"{MAX_BAD_SHARE:.0%}; mend or remove them."
                )
            path, head = folder / shard.file, heads[shard.file]
            write_shard(path, columns, head | {"left_out": bad})
            found[shard.file] = _found_shard(path, head)
    return [entry for entry in found.values() if entry is not None], computed


def _found_shard(path: Path, head: Mapping[str, Any]) -> dict[str, Any] | None:
    """The manifest's entry of a whole shard of this build; None where none or a damaged one is there."""
    if not path.is_file():
        return None
    try:
        with safe_open(str(path), "pt") as file:
            found = json.loads((file.metadata() or {})[METADATA])
            columns = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        if found["columns"] != columns_hash(columns):
            return None
        tokens = int(columns["counts"].sum())
    except (SafetensorError, KeyError, ValueError):
        return None
    phrases = differences(found["identity"], head["identity"])
    phrases = phrases or data_differences(
        dict(zip(found["keys"], found["states"], strict=True)), dict(zip(head["keys"], head["states"], strict=True))
    )
    if phrases:
        refuse(path.parent, phrases)
    if found["keys"] != head["keys"]:
        refuse(path.parent, [f"of other conversations, or in another order (in {path.name})"])
    entry = {"file": path.name, "conversations": len(found["keys"]), "tokens": tokens, "left_out": found["left_out"]}
    return entry | {"bytes": path.stat().st_size, "sha256": file_sha256(path)}


def _shard_columns(
    teacher: GenerativeVLM, batches: Iterator[ConversationBatch], rows: range, spec: AnswerSpec, bar: tqdm[Any]
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """All columns of one shard, its conversations in order; and what could not be used."""
    known: dict[int, tuple[Tensor, ...]] = {}
    left_out: dict[str, str] = {}
    for batch in batches:
        left_out |= batch.bad
        if batch.keys:
            inputs = batch.to(teacher.device).inputs[TEACHER]
            indices, values, rest = sparsify(answer_logits(teacher, inputs), spec.top)
            if not values.isfinite().all():
                raise UserError(
                    f"{teacher.name} gives logits that are not finite on the conversations "
                    f"{', '.join(batch.keys[:4])}, ...; check its weights, or give --precision fp32."
                )
            counts = (inputs["labels"][:, 1:] != IGNORED).sum(dim=1).tolist()
            columns = (indices.int().cpu(), rounded(values, spec.storage).cpu(), rest.cpu())
            known |= zip(
                batch.rows.tolist(), zip(*(torch.split(own, counts) for own in columns), strict=True), strict=True
            )
        bar.update(len(batch.keys) + len(batch.bad))
    none = (torch.empty(0, spec.top, dtype=torch.int32), torch.empty(0, spec.top, dtype=spec.storage), torch.empty(0))
    ordered = [known.get(row, none) for row in rows]
    joined = dict(zip(("indices", "values", "rest"), map(torch.cat, zip(*ordered, strict=True)), strict=True))
    return joined | {"counts": torch.tensor([len(own[2]) for own in ordered], dtype=torch.int32)}, left_out
