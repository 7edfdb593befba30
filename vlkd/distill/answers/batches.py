"""The batches in which a teacher answers: each conversation once, those of like length together."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch.utils.data import DataLoader

from vlkd.data.conversation_sequence import ConversationBatch, ConversationSample, ConversationSequence
from vlkd.data.conversations import Conversation
from vlkd.data.loader import plain_errors
from vlkd.data.plan import Plan
from vlkd.distill.token_distiller import TEACHER
from vlkd.models.generative import GenerativeVLM


class _InOrder(Plan):
    """Each row at its own place."""

    def row(self, position: int) -> tuple[int, int]:
        return position, 0


def answer_batches(
    teacher: GenerativeVLM,
    conversations: Sequence[Conversation],
    parts: Sequence[range],
    workers: int,
    batch_size: int,
) -> Iterator[ConversationBatch]:
    """Batches of each part, none across two, those of like length together so that little is padding."""
    sequence = ConversationSequence(
        conversations,
        {TEACHER: teacher.preprocessing},
        seed=0,
        plan=_InOrder([[len(conversations)]], seed=0),
    )
    lengths = [sum(len(turn.text) for turn in talk.turns) for talk in conversations]
    sampler = []
    for part in parts:
        rows = sorted(part, key=lambda row: lengths[row])
        sampler += [rows[start : start + batch_size] for start in range(0, len(rows), batch_size)]
    loader: DataLoader[ConversationSample] = DataLoader(
        sequence,
        batch_sampler=sampler,
        collate_fn=sequence.collate,
        num_workers=workers,
        prefetch_factor=4 if workers else None,
        # The global generator stays as it was, as for a run that finds its answers stored.
        generator=torch.Generator(),
    )
    with plain_errors():
        yield from loader


def autocast_of(teacher: GenerativeVLM, precision: str) -> torch.autocast:
    """The context of a pass in "fp32" or "bf16"."""
    return torch.autocast(teacher.device.type, torch.bfloat16, enabled=precision == "bf16")
