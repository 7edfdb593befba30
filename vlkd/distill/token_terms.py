"""A method for generative models is data: a tuple of terms over answer tokens and pictures."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from torch import Tensor

from vlkd.errors import UserError

PER_TOKEN = {
    "answer.logits": "(A, V), the student's at the answer tokens; of its whole width where the term reads no teacher",
    "answer.labels": "(A,), the answer tokens themselves",
    "switch.logits": "(A, V), of the teacher's projector and language model behind the student's vision tower",
    "teacher.answer.logits": "(A, V), the teacher's of its own vision tower, constant",
}
PER_IMAGE = {
    "image.tokens": "(B, N, C), what enters the student's projector",
    "visual.tokens": "(B, N, E), what leaves it",
    "teacher.image.tokens": "(B, N, C), the same of the teacher, constant",
    "teacher.visual.tokens": "(B, N, E), the same of the teacher, constant",
}
PROGRESS = "progress"
"""Share of the stage that is done, a number from 0 to 1."""

SWITCH = "switch.logits"
TEACHER_ANSWERS = "teacher.answer.logits"


@dataclass(frozen=True, kw_only=True)
class TokenTerm:
    """One objective with its weight and the features it reads.

    Args:
        name: how it is logged; one per method.
        objective: a pure function of the features, in their order; it gives a value per answer token (A,), per picture
            (B,), or one of all of them (), which counts by their number.
        features: keys of `PER_TOKEN` or of `PER_IMAGE`, of one of the two alone, and `progress`.
        weight: its factor in the total.

    Raises:
        UserError: a feature is not known, or those of tokens and of pictures are mixed.
    """

    name: str
    objective: Callable[..., Tensor]
    features: tuple[str, ...]
    weight: float = 1.0

    def __post_init__(self) -> None:
        known = (*PER_TOKEN, *PER_IMAGE, PROGRESS)
        wrong = [feature for feature in self.features if feature not in known]
        if wrong:
            raise UserError(f"Term {self.name!r} reads {wrong[0]!r}; expected some of {', '.join(known)}.")
        kinds = {feature in PER_TOKEN for feature in self.features if feature != PROGRESS}
        if len(kinds) != 1:
            raise UserError(
                f"Term {self.name!r} reads {', '.join(self.features) or 'nothing'}; expected features of answer tokens "
                f"({', '.join(PER_TOKEN)}) or of pictures ({', '.join(PER_IMAGE)}), of one of the two alone."
            )

    @property
    def per_token(self) -> bool:
        """Whether it is a mean over answer tokens; else over pictures."""
        return any(feature in PER_TOKEN for feature in self.features)

    @property
    def taught(self) -> bool:
        """Whether it compares with logits over the teacher's vocabulary."""
        return SWITCH in self.features or TEACHER_ANSWERS in self.features


def features_read(terms: Iterable[TokenTerm]) -> frozenset[str]:
    """All features that the terms read."""
    return frozenset(feature for term in terms for feature in term.features)


def check_token_terms(terms: Sequence[TokenTerm]) -> None:
    """Raise `UserError` unless there are terms with different names and weights of 0 or more."""
    names = [term.name for term in terms]
    if not terms or len(set(names)) < len(names):
        raise UserError(
            f"Found the terms {names}, expected at least one and no name twice; check the weights of the recipe."
        )
    for term in terms:
        if not term.weight >= 0:
            raise UserError(f"Term {term.name!r} has the weight {term.weight}, expected 0 or more.")
