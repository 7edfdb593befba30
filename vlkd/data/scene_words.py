"""The sentences of a scene: captions in several wordings, and questions with true answers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from random import Random

COLOURS = {
    "red": (212, 38, 40),
    "orange": (244, 128, 24),
    "yellow": (240, 196, 20),
    "green": (42, 150, 62),
    "blue": (36, 92, 214),
    "purple": (128, 54, 172),
    "pink": (240, 108, 176),
    "black": (32, 32, 36),
}
"""Names and sRGB values; close neighbours such as brown are left out so that a name is never in doubt."""

_OPPOSITE = {
    "above": "below",
    "below": "above",
    "to the left of": "to the right of",
    "to the right of": "to the left of",
}


@dataclass(frozen=True, kw_only=True)
class SceneObject:
    """One drawn thing; `box` is (x0, y0, x1, y1) in pixels, half-open, tight; `size` is "small", "large" or None."""

    noun: str
    colour: str
    size: str | None
    box: tuple[int, int, int, int]

    @property
    def centre(self) -> tuple[float, float]:
        """Middle of the box, (x, y) in pixels."""
        x0, y0, x1, y1 = self.box
        return (x0 + x1) / 2, (y0 + y1) / 2

    @property
    def phrase(self) -> str:
        """ "a small red circle" """
        return _with_article(" ".join(word for word in (self.size, self.colour, self.noun) if word))


def _with_article(words: str) -> str:
    return f"{'an' if words[0] in 'aeiou' else 'a'} {words}"


def relation(first: SceneObject, second: SceneObject) -> str:
    """Where `first` lies as seen from `second`, along the axis on which their centres differ most."""
    dx, dy = (a - b for a, b in zip(first.centre, second.centre, strict=True))
    if abs(dx) >= abs(dy):
        return "to the left of" if dx < 0 else "to the right of"
    return "above" if dy < 0 else "below"


def captions(objects: Sequence[SceneObject], background: str, image_size: int, rng: Random) -> tuple[str, ...]:
    """Two or three different true sentences; the first always names every object and how they lie."""
    ground = f"on a {background} background"
    if len(objects) == 1:
        phrase = objects[0].phrase
        first = phrase
        others = [f"a picture of {phrase}", f"{phrase} {ground}", f"{phrase} {_place(objects[0], image_size)}"]
    elif len(objects) == 2:
        (one, two), how = objects, relation(objects[0], objects[1])
        first = f"{one.phrase} {how} {two.phrase}"
        others = [
            f"{two.phrase} {_OPPOSITE[how]} {one.phrase}",
            f"{two.phrase} and {one.phrase} {ground}",
            f"a picture of {one.phrase} and {two.phrase}",
        ]
    else:
        one, two, three = objects
        how, pair = relation(one, two), relation(two, three)
        first = f"{one.phrase} {how} {two.phrase} and {three.phrase}"
        others = [
            f"{two.phrase} {pair} {three.phrase}, both {_OPPOSITE[how]} {one.phrase}",
            f"{three.phrase}, {one.phrase} and {two.phrase}",
            f"{two.phrase}, {three.phrase} and {one.phrase} {ground}",
        ]
    return (first, *rng.sample(others, rng.choice((1, 2))))


def _place(thing: SceneObject, image_size: int) -> str:
    """ "in the top left", "at the bottom", "on the right", or "in the middle" """
    x, y = (value / image_size for value in thing.centre)
    vertical = "top" if y < 0.38 else "bottom" if y > 0.62 else ""
    horizontal = "left" if x < 0.38 else "right" if x > 0.62 else ""
    if vertical and horizontal:
        return f"in the {vertical} {horizontal}"
    if vertical:
        return f"at the {vertical}"
    return f"on the {horizontal}" if horizontal else "in the middle"


def questions(objects: Sequence[SceneObject], absent: str | None, rng: Random) -> list[dict[str, str]]:
    """How many, which colour, is there (yes and, with an `absent` noun, no), and what lies where.

    The nouns of a scene are all different, so every answer is the only true one.
    """
    thing = rng.choice(objects)
    pairs = [
        ("How many objects are there?", str(len(objects))),
        (f"What colour is the {thing.noun}?", thing.colour),
        (f"Is there {_with_article(f'{thing.colour} {thing.noun}')}?", "yes"),
    ]
    if absent:
        pairs.append((f"Is there {_with_article(f'{thing.colour} {absent}')}?", "no"))
    if len(objects) == 2:
        one, two = objects
        pairs.append((f"What is {relation(one, two)} the {two.noun}?", one.noun))
    return [{"question": question, "answer": answer} for question, answer in pairs]
