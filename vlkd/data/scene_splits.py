"""Which colours and nouns the scenes of a split may hold: the rules behind held-out combinations and held-out nouns.

`train`, `val` and `test` hold neither held-out nouns nor held-out pairs and differ in their random streams. Every scene
of `test_combination` has at least one held-out pair, (colour, noun) or (noun, noun), made of nouns that training knows.
In `test_noun` every noun is held out. A noun is held out when one of its *words* is, so that no word of it was ever
read in training ("anchor" and "anchor circle" go together); a plural goes with its singular, a synonym does not.
All of it is decided by a hash of the words alone: by no seed, vocabulary, or order.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Sequence

from vlkd.errors import UserError

SPLITS = ("train", "val", "test", "test_combination", "test_noun")
HELD_OUT_WORDS = 0.1
"""Fraction of words that are held out."""
HELD_OUT_PAIRS = 0.1
"""Fraction of (colour, noun) pairs, and of unordered (noun, noun) pairs, that are held out."""


def check_split(split: str) -> None:
    """Raise `UserError` unless the split is one of `SPLITS`."""
    if split not in SPLITS:
        raise UserError(f"There is no split {split!r}; expected one of {', '.join(SPLITS)}.")


def is_held_out_noun(noun: str) -> bool:
    """Whether the noun occurs in `test_noun` only."""
    return any(_fraction("word", word.rstrip("s")) < HELD_OUT_WORDS for word in noun.split())


def is_held_out_pair(colour: str, noun: str) -> bool:
    """Whether the noun never has this colour outside `test_combination` and `test_noun`."""
    return _fraction("colour", colour, noun) < HELD_OUT_PAIRS


def are_held_out_together(first: str, second: str) -> bool:
    """Whether the two nouns never share a scene outside `test_combination` and `test_noun`; symmetric."""
    return _fraction("nouns", *sorted((first, second))) < HELD_OUT_PAIRS


def fits_split(content: Sequence[tuple[str, str]], split: str) -> bool:
    """Whether a scene of these (colour, noun) pairs, whose nouns suit the split already, belongs to it."""
    if split == "test_noun":
        return True
    nouns = [noun for _, noun in content]
    held_out = any(is_held_out_pair(colour, noun) for colour, noun in content) or any(
        are_held_out_together(first, second) for index, first in enumerate(nouns) for second in nouns[:index]
    )
    return held_out == (split == "test_combination")


@functools.lru_cache(maxsize=65536)
def _fraction(*parts: str) -> float:
    """A number in [0, 1) that depends on the parts alone, on every machine. The salt leaves 2 of the 10 shapes out."""
    digest = hashlib.blake2b("|".join(parts).encode(), digest_size=8, salt=b"vlkd").digest()
    return int.from_bytes(digest, "big") / 2.0**64
