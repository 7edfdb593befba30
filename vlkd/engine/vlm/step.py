"""One step's losses and gradients of a generative model: means over all answer tokens of all ranks' batches."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from accelerate import Accelerator
from torch import Tensor

from vlkd.data.conversation_sequence import ConversationBatch
from vlkd.distill.token_distiller import STUDENT, TokenDistiller
from vlkd.engine.distributed import average_gradients, each_ranks
from vlkd.errors import UserError
from vlkd.models.label_masks import answer_positions
from vlkd.models.question_mask import PADDING


@dataclass(frozen=True)
class VlmStep:
    """Attributes: losses: raw, by term, this rank's part. total: their weighted sum. tokens: of all ranks' answers."""

    losses: dict[str, Tensor]
    total: Tensor
    tokens: float


def backward_step(
    distiller: TokenDistiller, batch: ConversationBatch, accelerator: Accelerator, *, progress: float, micro_batch: int
) -> VlmStep:
    """Put the gradient of the weighted losses of all ranks' batches into the parameters.

    A loss of tokens is a mean over every answer token of the step, whichever rank or micro batch it is in: a mean of
    means would weigh the tokens of short answers more.

    Args:
        distiller: student, terms and teacher.
        batch: of this rank.
        accelerator: devices, ranks and precision.
        progress: share of the stage that is done, 0 to 1.
        micro_batch: conversations that pass at a time; 0 passes all.

    Raises:
        UserError: a loss is not finite; the sentence names the term and the conversations.
    """
    positions = answer_positions(batch.inputs[STUDENT]["labels"])
    counts = torch.tensor([float(positions.sum()), float(positions.any(dim=1).sum())])
    tokens, images = torch.stack(each_ranks(counts)).mean(dim=0).clamp_min(1e-9).tolist()
    losses: dict[str, Tensor] = {}
    total = torch.zeros(())
    for part in parts_of(batch, micro_batch or len(positions)):
        with accelerator.autocast():
            found = distiller(part, progress=progress, tokens=tokens, images=images)
        _check_finite(found, part)
        weighted = distiller.total(found)
        weighted.backward()  # type: ignore[no-untyped-call]
        losses = {name: losses.get(name, 0) + value.detach() for name, value in found.items()}
        total = total + weighted.detach().cpu()
    average_gradients(distiller)
    return VlmStep(losses, total, tokens * accelerator.num_processes)


def parts_of(batch: ConversationBatch, size: int) -> Iterator[ConversationBatch]:
    """The batch in parts of at most `size` conversations, each without the padding that only others needed."""
    rows = len(batch.inputs[STUDENT]["ids"])
    if rows <= size:
        yield batch
        return
    answers = answer_positions(batch.inputs[STUDENT]["labels"]).sum(dim=1).cumsum(dim=0).tolist()
    for first in range(0, rows, size):
        own = slice(first, first + size)
        tokens = slice(answers[first - 1] if first else 0, answers[min(first + size, rows) - 1])
        yield replace(
            batch,
            keys=batch.keys[own],
            rows=batch.rows[own],
            inputs={name: _rows(inputs, own) for name, inputs in batch.inputs.items()},
            stored={name: value[tokens] for name, value in batch.stored.items()},
        )


def _rows(inputs: dict[str, Tensor], own: slice) -> dict[str, Tensor]:
    found = {name: value[own] for name, value in inputs.items()}
    longest = int((found["mask"] != PADDING).sum(dim=1).max())
    return found | {name: found[name][:, :longest] for name in ("ids", "labels", "mask")}


def _check_finite(losses: dict[str, Tensor], batch: ConversationBatch) -> None:
    if torch.isfinite(torch.stack([value.detach() for value in losses.values()]).sum()):
        return
    wrong = ", ".join(f"{name} = {value.item()}" for name, value in losses.items() if not value.isfinite())
    raise UserError(
        f"Found a loss that is not finite ({wrong or 'their sum'}) on the conversations {', '.join(batch.keys[:8])}, "
        "...; lower the stage's lr, or check these conversations and the teacher."
    )
