"""A method is data: a tuple of terms."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from torch import Tensor

from vlkd.errors import UserError

SOURCES = ("student", "projected", "teacher", "classes")
SIDES = ("image", "text")


@dataclass(frozen=True, kw_only=True)
class Term:
    """One objective with its weight and the features it reads.

    Args:
        name: how it is logged; one per method.
        objective: a pure function of the features, in the order of `features`; what it returns is averaged. A module
            with parameters of its own is trained beside the student and dropped at the end.
        features: `student.NAME`, `projected.NAME` (a student embedding through its head to the teacher's width; the
            head is shared by both modalities, so that matched spaces stay one space), `teacher.NAME`, or `classes.NAME`
            (the teacher's class vectors: its embeddings of the distinct captions or images of the batch, or of a bank),
            where NAME is a key of `vlkd.features.FEATURES`. A term that names a text feature, class vectors aside, sees
            only the captioned samples.
        weight: its factor in the total.
        teacher: whose features `teacher.`, `projected.` and `classes.` mean; "" for none.
        match: pass `match` (B, B) to the objective, true where row i of the first feature and row j of the other
            modality belong together: the text is one of the image's captions, drawn or not.
        by_rows: the objective takes `rows`, a slice(start, stop) of the batch, and then returns the part of these rows
            in its mean over the batch, (), so that the parts add up; with `match` it gets (match[rows], match.T[rows]).
            A distiller may then have each rank compute its own rows alone.
    """

    name: str
    objective: Callable[..., Tensor]
    features: tuple[str, ...]
    weight: float = 1.0
    teacher: str = ""
    match: bool = False
    by_rows: bool = False

    def __post_init__(self) -> None:
        for feature in self.features:
            source = feature.partition(".")[0]
            if source not in SOURCES:
                raise UserError(f"Term {self.name!r}: {feature!r} must begin with one of {', '.join(SOURCES)}.")
            if source != "student" and not self.teacher:
                raise UserError(f"Term {self.name!r} reads {feature!r} but names no teacher.")
            if source in ("projected", "classes") and not feature.endswith(".embed"):
                raise UserError(f"Term {self.name!r} reads {feature!r}; these exist for image.embed and text.embed.")

    @property
    def needs_caption(self) -> bool:
        """Whether it reads any text feature of the samples."""
        return any(".text." in feature and not feature.startswith("classes.") for feature in self.features)

    @property
    def anchor(self) -> tuple[str, ...]:
        """The sides whose shared embedding of the student it reads, where gradients of teachers are compared."""
        own = {feature.partition(".")[2] for feature in self.features if feature.startswith(("student.", "projected."))}
        return tuple(side for side in SIDES if f"{side}.embed" in own)

    @property
    def projects(self) -> bool:
        """Whether it needs a head."""
        return any(feature.startswith("projected.") for feature in self.features)


def wanted(terms: Iterable[Term], source: str, teacher: str = "") -> frozenset[str]:
    """The features that a source must give for all terms; `projected.` is the student's, `classes.` a teacher's.

    Args:
        terms: of the method.
        source: "student" or "teacher".
        teacher: whose, for "teacher".
    """
    prefixes = ("student.", "projected.") if source == "student" else ("teacher.", "classes.")
    return frozenset(
        feature.partition(".")[2]
        for term in terms
        if source == "student" or term.teacher == teacher
        for feature in term.features
        if feature.startswith(prefixes)
    )
