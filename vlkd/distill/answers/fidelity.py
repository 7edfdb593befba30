"""How far stored answers are from the teacher's: the error of storing, and a sample computed anew."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch

from vlkd.data.conversation_sequence import ConversationBatch
from vlkd.data.conversations import Conversation
from vlkd.data.sources import file_sha256, spread
from vlkd.distill.answers.batches import answer_batches, autocast_of
from vlkd.distill.answers.dense import densify, rounded, sparsify
from vlkd.distill.answers.format import AnswerSpec
from vlkd.distill.answers.read import StoredAnswers
from vlkd.distill.cache.format import MANIFEST
from vlkd.distill.token_distiller import TEACHER, answer_logits
from vlkd.errors import UserError
from vlkd.models.base import evaluating
from vlkd.models.generative import GenerativeVLM
from vlkd.objectives import dbild, token_kl

TEMPERATURES = (1.0, 3.0)


def measured_error(teacher: GenerativeVLM, batches: Iterable[ConversationBatch], spec: AnswerSpec) -> dict[str, float]:
    """What storing K of V log probabilities changes, means over the answer tokens of some batches.

    A loss needs a student: the teacher with a blank picture stands for it.

    Returns:
        `kept`: the probability of the kept tokens. `kl`: KL from the full distribution to the stored one. Per loss
        `value` with full logits, and `difference`, the mean absolute change by stored ones.
    """
    sums: dict[str, float] = {}
    for batch in batches:
        if not batch.keys:
            continue
        inputs = batch.to(teacher.device).inputs[TEACHER]
        full = answer_logits(teacher, inputs).float()
        student = answer_logits(teacher, {**inputs, "pixels": torch.zeros_like(inputs["pixels"])}).float()
        indices, values, rest = sparsify(full, spec.top)
        dense = densify(indices, rounded(values, spec.storage), rest, teacher.vocabulary)
        values_A = {"tokens": torch.ones_like(rest), "kept": 1 - rest, "kl": token_kl(full, dense, tau=1.0)}
        losses = [(f"token_kl at tau {tau:g}", tau) for tau in TEMPERATURES]
        pairs = {name: [token_kl(z, student, tau=tau) for z in (full, dense)] for name, tau in losses}
        pairs["dbild"] = [dbild(z, student, k_min=3) for z in (full, dense)]
        for name, (value, other) in pairs.items():
            values_A |= {f"{name}/value": value, f"{name}/difference": (value - other).abs()}
        for name, value in values_A.items():
            sums[name] = sums.get(name, 0.0) + float(value.sum())
    tokens = sums.pop("tokens", 0.0)
    return {"tokens": tokens, **{name: value / tokens for name, value in sums.items()}}


def error_in_words(error: Mapping[str, float]) -> str:
    """One line from `measured_error`: by how much of its value each loss was changed, "" where none was measured."""
    names = sorted({name.partition("/")[0] for name in error if "/" in name})
    shares = {name: error[f"{name}/difference"] / error[f"{name}/value"] for name in names if error[f"{name}/value"]}
    return ", ".join(f"{name} by {share:.1%}" for name, share in shares.items())


def verify_answers(
    stored: StoredAnswers, teacher: GenerativeVLM, conversations: Sequence[Conversation], *, sample: int = 64
) -> dict[str, float]:
    """Compare every shard with the hash in the manifest, and a sample with answers computed anew.

    Args:
        stored: from `open_answers`.
        teacher: theirs.
        conversations: those it was opened with.
        sample: so many of them, evenly spread.

    Returns:
        `kl`, the largest KL of a token from what is computed to what is stored, both of K tokens and a rest; and
        `tokens`, how many were compared.

    Raises:
        UserError: a shard's content has changed, or nothing can be compared.
    """
    for entry in stored.manifest["shards"]:
        path = stored.folder / entry["file"]
        found = file_sha256(path)
        if found != entry["sha256"]:
            raise UserError(
                f"{path} has changed since it was written (sha256 {found[:12]}, expected {entry['sha256'][:12]}); "
                f"remove it and {MANIFEST}: the same command without --verify makes it again."
            )
    usable = [talk for talk in conversations if talk.key not in stored.left_out]
    chosen = [usable[row] for row in spread(len(usable), sample)] if usable else []
    own, tokens, largest = stored.manifest["identity"], 0, 0.0
    with torch.no_grad(), evaluating(teacher), autocast_of(teacher, own["precision"]):
        for batch in answer_batches(teacher, chosen, [range(len(chosen))], 0, 16) if chosen else ():
            if not batch.keys:
                continue
            logits = answer_logits(teacher, batch.to(teacher.device).inputs[TEACHER])
            anew = densify(*sparsify(logits, own["top"]), stored.vocabulary).cpu()
            columns = zip(*(stored.answers(key) for key in batch.keys), strict=True)
            indices, values, rest = (torch.cat(column) for column in columns)
            kl = token_kl(anew, densify(indices, values, rest, stored.vocabulary), tau=1.0)
            tokens, largest = tokens + len(kl), max(largest, float(kl.max()))
    if not tokens:
        raise UserError(f"Found no answer in {stored.folder} that can be computed anew; check the data.")
    return {"kl": largest, "tokens": float(tokens)}
