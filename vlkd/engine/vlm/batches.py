"""A run's conversations as the batches of its models."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch

from vlkd.data.bucketed_plan import BucketedPlan, text_lengths
from vlkd.data.conversation_sequence import AnswerStore, ConversationBatch, ConversationSequence
from vlkd.data.conversations import Conversation
from vlkd.models.generative import GenerativeVLM


def sequence_of(
    models: Mapping[str, GenerativeVLM],
    conversations: Sequence[Conversation],
    *,
    seed: int,
    batch_size: int = 1,
    window: int = 0,
    stored: AnswerStore | None = None,
    keep_short_side: int = 0,
) -> ConversationSequence:
    """The endless sequence for these models.

    Args:
        models: per name, whose preprocessing is taken.
        conversations: the data.
        seed: of the order.
        batch_size: of all ranks together.
        window: batches among which conversations are sorted by length; 0 does not sort.
        stored: the teacher's answers.
        keep_short_side: of pictures that are held in memory; 0 decodes each time.
    """
    plan = None
    if window:
        plan = BucketedPlan(text_lengths(conversations), batch_size=batch_size, window=window, seed=seed)
    return ConversationSequence(
        conversations,
        {name: model.preprocessing for name, model in models.items()},
        seed=seed,
        plan=plan,
        stored=stored,
        keep_side=keep_short_side,
    )


def batches_of(sequence: ConversationSequence, size: int, device: torch.device) -> Iterator[ConversationBatch]:
    """One pass in the sequence's order, the last batch as large as is left."""
    count = len(sequence.conversations)
    for first in range(0, count, size):
        samples = [sequence[position] for position in range(first, min(first + size, count))]
        yield sequence.collate(samples).to(device)
