"""Questions about a drawn scene whose answers follow from its objects alone, and one description of it.

Kinds and answers: presence and relation (yes, no), count ("2"), colour ("red"), object ("circle"), size ("small"),
position ("in the top left"), neighbour ("a small blue square"), description ("a large red circle above a small blue
square and a small pink star"). A question that several answers would suit is not asked.

A conversation never gives an answer away: what earlier questions and answers told is not asked for again. The
description, which comes last, is the exception.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from random import Random

from vlkd.data.scene_splits import are_held_out_together, fits_split
from vlkd.data.scene_words import COLOURS, SceneObject
from vlkd.data.vqa_writer import QA

SIDES = {
    "to the left of": (0, -1),
    "to the right of": (0, 1),
    "above": (1, -1),
    "below": (1, 1),
}
"""The axis and the direction of each relation."""
OPPOSITE = {
    "to the left of": "to the right of",
    "to the right of": "to the left of",
    "above": "below",
    "below": "above",
}

_FAR, _NEAR, _SLOPE = 0.2, 0.08, 1.3
"""An object is clearly on a side from `_FAR` of the picture on, with the other axis `_SLOPE` times less; from `_NEAR`
on someone might say so."""
_THIRDS, _MARGIN = (0.38, 0.62), 0.04
"""Where the picture's thirds meet, and how near to it a place has no sure name; the captions' thirds."""


@dataclass(frozen=True, kw_only=True)
class _Candidate:
    """A question, the facts that its answer is about, and those that it tells."""

    qa: QA
    asks: frozenset[str]
    tells: frozenset[str]


def scene_questions(
    objects: Sequence[SceneObject],
    image_size: int,
    nouns: Sequence[str],
    rng: Random,
    *,
    present: bool,
    related: bool,
) -> tuple[QA, ...]:
    """One question of each kind that the scene allows, in any order; the description comes last.

    Args:
        objects: of the scene, with different nouns.
        image_size: side in pixels.
        nouns: what absent objects may be called; none that is held out.
        rng: decides what is asked about, and in which order.
        present: the answer to the question of presence, true for yes.
        related: the answer to the question of relation.
    """
    named = [thing for thing in objects if not _shares_word(thing.noun, [o.noun for o in objects if o is not thing])]
    of_nouns: list[Callable[[], list[_Candidate]]] = [
        lambda: _presence(objects, nouns, rng, present),
        lambda: [_object(thing) for thing in objects if [o.colour for o in objects].count(thing.colour) == 1],
        lambda: _neighbours(named, objects, image_size),
    ]
    others: list[Callable[[], list[_Candidate]]] = [
        lambda: [_count(objects)],
        lambda: [_colour(thing) for thing in named],
        lambda: [_size(thing) for thing in named if thing.size],
        lambda: [_position(thing, place) for thing in named if (place := place_of(thing, image_size))],
        lambda: _relations(named, image_size, related),
    ]
    rng.shuffle(of_nouns)
    rng.shuffle(others)
    makers = of_nouns + others
    # Nearly every question tells a noun: those that ask for one come first in half of the scenes, or they are rare.
    if rng.random() < 0.5:
        rng.shuffle(makers)
    asked: list[QA] = []
    told: set[str] = set()
    for make in makers:
        possible = [candidate for candidate in make() if not candidate.asks & told]
        if possible:
            chosen = rng.choice(possible)
            asked.append(chosen.qa)
            told |= chosen.tells
    description = describe(objects, image_size)
    if description:
        asked.append(QA(question="Describe the picture.", answer=description, kind="description"))
    return tuple(asked)


def describe(objects: Sequence[SceneObject], image_size: int) -> str | None:
    """The one description of a scene: of two objects the left or upper one first, of three the one apart first.

    None where three objects have none apart, or where it is not clear how they lie.
    """
    if len(objects) == 1:
        return objects[0].phrase
    for first in objects:
        others = [thing for thing in objects if thing is not first]
        for side, (axis, direction) in SIDES.items():
            if not all(is_clear(first, other, side, image_size) for other in others):
                continue
            if len(others) == 1 and direction > 0:
                continue
            others.sort(key=lambda thing: thing.centre[1 - axis])
            return f"{first.phrase} {side} {' and '.join(thing.phrase for thing in others)}"
    return None


def is_clear(first: SceneObject, second: SceneObject, side: str, image_size: int) -> bool:
    """Whether everyone would say that `first` lies on that side of `second`."""
    along, across = _offsets(first, second, side, image_size)
    return along >= _FAR and along >= _SLOPE * across


def place_of(thing: SceneObject, image_size: int) -> str | None:
    """ "in the top left", "at the bottom", "on the right", "in the middle"; None near the border of two places."""
    x, y = (value / image_size for value in thing.centre)
    if min(abs(value - border) for value in (x, y) for border in _THIRDS) < _MARGIN:
        return None
    vertical = "top" if y < _THIRDS[0] else "bottom" if y > _THIRDS[1] else ""
    horizontal = "left" if x < _THIRDS[0] else "right" if x > _THIRDS[1] else ""
    if vertical and horizontal:
        return f"in the {vertical} {horizontal}"
    if vertical:
        return f"at the {vertical}"
    return f"on the {horizontal}" if horizontal else "in the middle"


def neighbour(reference: SceneObject, side: str, objects: Sequence[SceneObject], image_size: int) -> SceneObject | None:
    """The only object on that side of another, None where there is none or where a second might be meant."""
    others = [thing for thing in objects if thing is not reference]
    near = [thing for thing in others if _offsets(thing, reference, side, image_size)[0] >= _NEAR]
    return near[0] if len(near) == 1 and is_clear(near[0], reference, side, image_size) else None


def _offsets(first: SceneObject, second: SceneObject, side: str, image_size: int) -> tuple[float, float]:
    """How far `first` lies on that side of `second`, and how far aside of it, as fractions of the picture."""
    axis, direction = SIDES[side]
    offsets = [(a - b) / image_size for a, b in zip(first.centre, second.centre, strict=True)]
    return direction * offsets[axis], abs(offsets[1 - axis])


def _presence(objects: Sequence[SceneObject], nouns: Sequence[str], rng: Random, present: bool) -> list[_Candidate]:
    """Yes of an object; no of one whose colour or noun, not both, is there. No pair that training never shows.

    With either answer it is about the facts of an object that is there, so that both are left out equally often.
    """
    shown = [thing.noun for thing in objects]
    absent = [
        noun
        for noun in nouns
        if not _shares_word(noun, shown) and not any(are_held_out_together(noun, other) for other in shown)
    ]
    found = []
    for thing in objects:
        if present:
            pairs = [(thing.colour, thing.noun)]
        elif rng.random() < 0.5:
            pairs = [(colour, thing.noun) for colour in COLOURS if colour != thing.colour]
        else:
            pairs = [(thing.colour, noun) for noun in absent]
        pairs = [pair for pair in pairs if fits_split([pair], "train")]
        if pairs:
            colour, noun = rng.choice(pairs)
            question = f"Is there {'an' if colour[0] in 'aeiou' else 'a'} {colour} {noun}?"
            facts = _facts(thing, "noun", "colour")
            qa = QA(question=question, answer=_yes_no(present), kind="presence")
            found.append(_Candidate(qa=qa, asks=facts, tells=facts if present else frozenset()))
    return found


def _count(objects: Sequence[SceneObject]) -> _Candidate:
    qa = QA(question="How many objects are there?", answer=str(len(objects)), kind="count")
    return _Candidate(qa=qa, asks=frozenset(), tells=frozenset())


def _colour(thing: SceneObject) -> _Candidate:
    qa = QA(question=f"What colour is the {thing.noun}?", answer=thing.colour, kind="colour")
    return _Candidate(qa=qa, asks=_facts(thing, "colour"), tells=_facts(thing, "noun", "colour"))


def _object(thing: SceneObject) -> _Candidate:
    qa = QA(question=f"What is the {thing.colour} object?", answer=thing.noun, kind="object")
    return _Candidate(qa=qa, asks=_facts(thing, "noun"), tells=_facts(thing, "noun", "colour"))


def _size(thing: SceneObject) -> _Candidate:
    qa = QA(question=f"Is the {thing.noun} small or large?", answer=thing.size or "", kind="size")
    return _Candidate(qa=qa, asks=_facts(thing, "size"), tells=_facts(thing, "noun", "size"))


def _position(thing: SceneObject, place: str) -> _Candidate:
    qa = QA(question=f"Where is the {thing.noun}?", answer=place, kind="position")
    return _Candidate(qa=qa, asks=frozenset(), tells=_facts(thing, "noun"))


def _neighbours(named: Sequence[SceneObject], objects: Sequence[SceneObject], image_size: int) -> list[_Candidate]:
    found = []
    for reference in named:
        for side in SIDES:
            thing = neighbour(reference, side, objects, image_size)
            if thing is None:
                continue
            question = f"What is {side} the {reference.colour} {reference.noun}?"
            facts = _facts(thing, "noun", "colour", "size")
            found.append(
                _Candidate(
                    qa=QA(question=question, answer=thing.phrase, kind="neighbour"),
                    asks=facts | {_pair(thing, reference)},
                    tells=facts | {_pair(thing, reference)} | _facts(reference, "noun", "colour"),
                )
            )
    return found


def _relations(named: Sequence[SceneObject], image_size: int, related: bool) -> list[_Candidate]:
    """Asked with the true relation, or with its opposite."""
    found = []
    for first in named:
        for second in named:
            for side in SIDES:
                if first is second or not is_clear(first, second, side, image_size):
                    continue
                said = side if related else OPPOSITE[side]
                question = f"Is the {first.noun} {said} the {second.noun}?"
                fact = frozenset({_pair(first, second)})
                found.append(
                    _Candidate(
                        qa=QA(question=question, answer=_yes_no(related), kind="relation"),
                        asks=fact,
                        tells=fact | _facts(first, "noun") | _facts(second, "noun"),
                    )
                )
    return found


def _facts(thing: SceneObject, *names: str) -> frozenset[str]:
    return frozenset(f"{name} of {thing.noun}" for name in names)


def _pair(first: SceneObject, second: SceneObject) -> str:
    return " and ".join(sorted((first.noun, second.noun)))


def _shares_word(noun: str, others: Sequence[str]) -> bool:
    """Whether "the anchor" might mean another: "anchor circle"."""
    words = set(noun.split())
    return any(words & set(other.split()) for other in others)


def _yes_no(truth: bool) -> str:
    return "yes" if truth else "no"
