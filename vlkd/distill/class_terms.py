"""A method for classifiers is data: a tuple of terms over labelled images and a pool of images without labels."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from vlkd.errors import UserError

Part = Literal["labelled", "pool"]
PARTS: tuple[Part, ...] = ("labelled", "pool")
Group = Literal["supervised", "distillation"]
GROUPS: tuple[Group, ...] = ("supervised", "distillation")
HEADS = ("label", "teacher")

CLASS_FEATURES = {
    "labels": "(B,) class ids, of labelled images alone",
    "label_logits": "(B, C), the student's label head",
    "teacher_logits": "(B, C), the student's teacher head; of a student with one head the same as `label_logits`",
    "features": "(B, F), the student's trunk",
    "projected": "(B, D), the trunk through a linear head to the teacher's width",
    "target_logits": "(B, C), the teacher's, over its temperature zeta",
    "target_embed": "(B, D), the teacher's embedding",
}
"""What a term may read, each behind `labelled.` or `pool.`; constant but for the student's."""


@dataclass(frozen=True, kw_only=True)
class ClassTerm:
    """One objective with its weight and the features it reads.

    Args:
        name: how it is logged; one per method.
        objective: a pure function of the features; what it returns is averaged over its images.
        features: `labelled.NAME` or `pool.NAME`, all of one part, NAME a key of `CLASS_FEATURES`.
        group: whether it follows the labels or the teacher: between the two groups gradients may be in conflict.
        weight: its factor in the total.
    """

    name: str
    objective: Callable[..., Tensor]
    features: tuple[str, ...]
    group: Group
    weight: float = 1.0

    def __post_init__(self) -> None:
        for feature in self.features:
            part, _, name = feature.partition(".")
            if part not in PARTS or name not in CLASS_FEATURES or feature == "pool.labels":
                raise UserError(
                    f"Term {self.name!r} reads {feature!r}; expected {' or '.join(PARTS)}, a dot, and one of "
                    f"{', '.join(CLASS_FEATURES)} (the pool has no labels)."
                )
        if len({feature.partition(".")[0] for feature in self.features}) != 1:
            raise UserError(f"Term {self.name!r} reads {self.features}; expected features of one part alone.")

    @property
    def part(self) -> str:
        """Whose images it compares."""
        return self.features[0].partition(".")[0]


def check_class_terms(terms: Sequence[ClassTerm], *, teacher: bool) -> None:
    """Raise `UserError` unless there are terms with different names and weights of 0 or more, and a teacher if read."""
    names = [term.name for term in terms]
    if not terms or len(set(names)) < len(names):
        raise UserError(
            f"Found the terms {names}, expected at least one and no name twice; check `terms` of the recipe."
        )
    for term in terms:
        if not term.weight >= 0:
            raise UserError(f"Term {term.name!r} has the weight {term.weight}, expected 0 or more.")
    if not teacher and reads(terms, ("target_logits", "target_embed", "projected")):
        raise UserError("The terms read a teacher and none is named; set teacher.ref=REF, or a method without one.")


def reads(terms: Iterable[ClassTerm], names: Iterable[str]) -> bool:
    """Whether any term reads one of the features, of either part."""
    wanted = set(names)
    return any(feature.partition(".")[2] in wanted for term in terms for feature in term.features)


def heads_trained(terms: Sequence[ClassTerm]) -> tuple[str, ...]:
    """Those of `HEADS` that some term trains.

    Raises:
        UserError: no head is, so that nothing would classify.
    """
    found = tuple(name for name in HEADS if reads(terms, (f"{name}_logits",)))
    if not found:
        raise UserError(
            f"The terms ({', '.join(term.name for term in terms) or 'none'}) train no head that names classes; "
            "expected one that reads label_logits or teacher_logits: give method.supervised or method.distillation a "
            "weight above 0, with features method.supervised."
        )
    return found


def parts_read(terms: Iterable[ClassTerm]) -> tuple[Part, ...]:
    """The parts whose images must pass the student, in order."""
    found = {term.part for term in terms}
    return tuple(part for part in PARTS if part in found)
