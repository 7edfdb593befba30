"""Short answers in words: one form for equal answers, what they choose, and how many are right."""

from __future__ import annotations

import re
import string
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass

from vlkd.errors import UserError
from vlkd.metrics.bootstrap import wilson_interval

ARTICLES = frozenset({"a", "an", "the"})
NUMBERS = {
    word: str(value)
    for value, words in enumerate(
        ("zero none", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
    )
    for word in words.split()
}
"""The words that VQA's evaluation writes as digits; `none` is 0, and words above ten stay."""

# A form whose bare letters are another word (its, were, well, wed, shell, ill, id, lets) cannot be told apart.
_CONTRACTED = (
    "ain't aren't can't couldn't didn't doesn't don't hadn't hasn't haven't isn't mightn't mustn't needn't oughtn't "
    "shan't shouldn't wasn't weren't won't wouldn't could've might've must've should've would've i've they've we've "
    "what've where've who've you've i'm they're there're what're why're you're he'd how'd it'd there'd they'd where'd "
    "who'd you'd how'll it'll they'll what'll who'll why'll you'll he's how's that's there's what's when's where's "
    "who's why's somebody's someone's something's ma'am o'clock y'all"
)
CONTRACTIONS = {form.replace("'", ""): form for form in _CONTRACTED.split()}
"""Contractions by the way they are written without their apostrophe."""

_LETTER = re.compile(r"\(?([A-Za-z])(?:[).:]+(?:\s|$)|$)")
_KEPT = frozenset(".':")


def normalize_answer(text: str) -> str:
    """One form for answers that count as equal: the processing that VQA's evaluation states, in its order.

    https://visualqa.org/evaluation.html, both for the answer and for the truth:

    1. Lower case; runs of white space are one space.
    2. A comma between digits goes (100,978 is 100978); a period goes unless a digit follows it (2.5 stays).
    3. Every other punctuation mark becomes a space, but for apostrophes (girl's) and colons (2:50).
    4. The number words none and zero to ten become digits (`NUMBERS`).
    5. The articles a, an and the go; a text of nothing else keeps them, so that an answer "A" is no empty one.
    6. A contraction without its apostrophe gets it (dont is don't; `CONTRACTIONS`); one that has it keeps it.

    Where the page leaves a choice: curly apostrophes are straight ones; punctuation is ASCII's and Unicode's, so %, $
    and * become spaces too, which the evaluation's own code leaves; and contractions that without apostrophe are
    another word (its, were, well) stay as they are.
    """
    text = unicodedata.normalize("NFC", text).lower().replace("\u2019", "'").replace("\u2018", "'")
    text = re.sub(r"\.(?!\d)", "", re.sub(r"(?<=\d),(?=\d)", "", text))
    words = [NUMBERS.get(word, word) for word in "".join(" " if _is_mark(sign) else sign for sign in text).split()]
    return " ".join(CONTRACTIONS.get(word, word) for word in [w for w in words if w not in ARTICLES] or words)


def _is_mark(sign: str) -> bool:
    return sign not in _KEPT and (sign in string.punctuation or unicodedata.category(sign).startswith("P"))


def exact_match(answer: str, truth: str) -> bool:
    """Whether the two are equal in the form of `normalize_answer`; what has no word in that form matches nothing."""
    return normalize_answer(answer) == normalize_answer(truth) != ""


def parse_yes_no(text: str) -> bool | None:
    """What an answer says: its first word in the form of `normalize_answer` is `yes` or `no`, else None.

    "Yes, there is a dog." is True, "No." False; "yeah", "nope", "none" and "There is no dog" are None.
    """
    first = normalize_answer(text).partition(" ")[0]
    return {"yes": True, "no": False}.get(first)


def parse_choice(text: str, choices: Sequence[str]) -> int | None:
    """The option that an answer names, else None.

    The answer begins with an option's letter, in either case, and after it comes the end, or one of `)`, `.` and `:`
    with the end or a space behind it: "B", "(b)", "B." and "b) a dog" are 1, whatever the words. Otherwise the whole
    answer is the words of exactly one option, both in the form of `normalize_answer`: "A dog" is the option "dog".

    Args:
        text: the answer.
        choices: the options, whose letters are A, B, C and so on.
    """
    found = _LETTER.match(text.strip())
    if found:
        place = ord(found[1].upper()) - ord("A")
        return place if place < len(choices) else None
    said = normalize_answer(text)
    equal = [place for place, words in enumerate(choices) if normalize_answer(words) == said]
    return equal[0] if said and len(equal) == 1 else None


@dataclass(frozen=True, kw_only=True)
class Tally:
    """How many answers are right.

    Attributes:
        questions: one or more.
        right: of these.
        unparsed: answers that are none of the things they could have been; they are not right.
    """

    questions: int
    right: int
    unparsed: int

    @property
    def accuracy(self) -> float:
        """right / questions."""
        return self.right / self.questions

    @property
    def interval(self) -> tuple[float, float]:
        """95 % of the accuracy, by Wilson's score."""
        return wilson_interval(self.right, self.questions)

    @property
    def parse_failures(self) -> float:
        """unparsed / questions."""
        return self.unparsed / self.questions


def tally(right: Sequence[bool], parsed: Sequence[bool]) -> Tally:
    """Count answers.

    Args:
        right: per question whether its answer is the truth.
        parsed: per question whether its answer could be parsed.

    Raises:
        UserError: there is no question, lengths differ, or an answer is right without being parsed.
    """
    if not right or len(right) != len(parsed):
        raise UserError(f"Found {len(right)} verdicts and {len(parsed)} parses; expected one of each per question.")
    if any(good and not read for good, read in zip(right, parsed, strict=True)):
        raise UserError("An answer that could not be parsed is called right; expected it to be wrong.")
    return Tally(questions=len(right), right=sum(right), unparsed=len(parsed) - sum(parsed))


def tally_by_kind(kinds: Sequence[str], right: Sequence[bool], parsed: Sequence[bool]) -> dict[str, Tally]:
    """`tally` of the questions of each kind, the kinds in alphabetical order.

    Raises:
        UserError: as `tally`.
    """
    if len(kinds) != len(right) or len(right) != len(parsed):
        raise UserError(f"Found {len(kinds)} kinds of {len(right)} questions; expected one kind per question.")
    rows = list(zip(kinds, right, parsed, strict=True))
    return {
        kind: tally([good for own, good, _ in rows if own == kind], [read for own, _, read in rows if own == kind])
        for kind in sorted(set(kinds))
    }
