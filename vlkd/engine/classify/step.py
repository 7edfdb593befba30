"""One step's losses and gradients of a classifier, and how far labels and teacher disagree."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor, nn

from vlkd.data.samples import Batch
from vlkd.distill.class_distiller import ClassDistiller
from vlkd.distill.class_terms import GROUPS, ClassTerm
from vlkd.engine.distributed import average_gradients, each_ranks
from vlkd.errors import UserError
from vlkd.weighting import pcgrad_weights

Gradients = dict[str, dict[nn.Parameter, Tensor]]


@dataclass(frozen=True)
class ClassStep:
    """Attributes: losses: by term, whose mean over ranks is that over images. total: their weighted sum, (). figures:
    of the gradients, where asked for."""

    losses: dict[str, Tensor]
    total: Tensor
    figures: dict[str, float]


def backward_step(
    distiller: ClassDistiller,
    batches: Mapping[str, Batch],
    accelerator: Accelerator,
    *,
    surgery: bool = False,
    conflicts: bool = False,
) -> ClassStep:
    """Put the gradient of the weighted losses of all ranks' batches into the parameters.

    Args:
        distiller: student, terms and teacher.
        batches: of this rank, per part.
        accelerator: devices, ranks and precision.
        surgery: combine the gradients of the two groups by PCGrad (`pcgrad_weights`) instead of adding them.
        conflicts: also measure the cosine between the two groups' gradients, `conflict/trunk` and `conflict/heads`.

    Raises:
        UserError: a loss is not finite; the sentence names the term and the samples.
    """
    with accelerator.autocast():
        losses = distiller(batches)
    _check_finite(losses, batches)
    shares = part_shares(batches)
    losses = {term.name: losses[term.name] * shares[term.part] for term in distiller.terms if term.name in losses}
    sums = distiller.sums(losses)
    total = torch.stack(list(sums.values())).sum() if sums else torch.zeros(())
    figures: dict[str, float] = {}
    # By the terms, not by the losses: a rank without a readable image still exchanges what the others do.
    if (surgery or conflicts) and _both_groups(distiller.terms):
        found = group_gradients(distiller, sums)
        if conflicts:
            figures = conflict_figures(distiller, found)
        if surgery:
            _apply(distiller, found)
            return ClassStep(losses, total, figures)
        distiller.zero_grad(set_to_none=True)
    if sums:
        total.backward()  # type: ignore[no-untyped-call]
    average_gradients(distiller)
    return ClassStep(losses, total, figures)


def backward_passes(terms: Sequence[ClassTerm], *, surgery: bool) -> int:
    """Of a step: PCGrad asks for each group's gradient, where there are both."""
    return len(GROUPS) if surgery and _both_groups(terms) else 1


def _both_groups(terms: Iterable[ClassTerm]) -> bool:
    return {term.group for term in terms} == set(GROUPS)


def part_shares(batches: Mapping[str, Batch]) -> dict[str, float]:
    """Per part this rank's images over the mean of all ranks: 1 but where some could not be read.

    A mean of the ranks' means would weigh the images of a rank that has fewer of them more.
    """
    counts = torch.tensor([float(len(batch.keys)) for batch in batches.values()])
    mean = torch.stack(each_ranks(counts)).mean(dim=0).clamp_min(1e-9)
    return dict(zip(batches, (counts / mean).tolist(), strict=True))


def group_gradients(distiller: ClassDistiller, sums: Mapping[str, Tensor]) -> Gradients:
    """Per group the gradient of all ranks' sum, of the parameters that it reaches; the graph is kept."""
    found: Gradients = {}
    for group in GROUPS:
        distiller.zero_grad(set_to_none=True)
        if group in sums:
            sums[group].backward(retain_graph=True)  # type: ignore[no-untyped-call]
        average_gradients(distiller)
        found[group] = {one: one.grad.detach() for one in distiller.parameters() if one.grad is not None}
    return found


def inner(
    first: Mapping[nn.Parameter, Tensor], second: Mapping[nn.Parameter, Tensor], among: Iterable[nn.Parameter]
) -> float:
    """The inner product of two gradients over some parameters; what one of them does not reach counts as zero."""
    products = [(first[one] * second[one]).sum(dtype=torch.float64) for one in among if one in first and one in second]
    return float(torch.stack(products).sum()) if products else 0.0


def conflict_figures(distiller: ClassDistiller, gradients: Gradients) -> dict[str, float]:
    """The cosine between the groups' gradients in the trunk and in the heads; 0 beside a zero gradient, {} without one.

    With two heads each head has one group's gradient alone, so theirs is 0; a shared head shows the conflict.
    """
    if not all(gradients[group] for group in GROUPS):
        return {}
    student = distiller.student
    heads = [*student.head_parameters("label"), *student.head_parameters("teacher")]
    places = {"trunk": list(student.trunk_parameters()), "heads": list(dict.fromkeys(heads))}
    first, second = (gradients[group] for group in GROUPS)
    figures = {}
    for place, among in places.items():
        lengths = inner(first, first, among) * inner(second, second, among)
        figures[f"conflict/{place}"] = inner(first, second, among) / lengths**0.5 if lengths > 0 else 0.0
    return figures


def _apply(distiller: ClassDistiller, gradients: Gradients) -> None:
    """PCGrad of the two groups over all parameters, put into their gradients."""
    every = list(distiller.parameters())
    first, second = (gradients[group] for group in GROUPS)
    cross = inner(first, second, every)
    weights = pcgrad_weights(
        np.array([[inner(first, first, every), cross], [cross, inner(second, second, every)]])
    ).tolist()
    for one in every:
        parts = [weight * own[one] for weight, own in zip(weights, (first, second), strict=True) if one in own]
        one.grad = torch.stack(parts).sum(dim=0).to(one.dtype) if parts else None


def _check_finite(losses: Mapping[str, Tensor], batches: Mapping[str, Batch]) -> None:
    if not losses or torch.isfinite(torch.stack(list(losses.values())).sum()):
        return
    wrong = ", ".join(f"{name} = {value.item()}" for name, value in losses.items() if not value.isfinite())
    keys = [key for batch in batches.values() for key in batch.keys]
    raise UserError(
        f"Found a loss that is not finite ({wrong or 'their sum'}) on the images {', '.join(keys[:8])}, ...; "
        "lower train.lr, or check these images and the teacher."
    )
