"""Questions from labelled boxes that cannot be answered without the picture: presence, count and choice.

Each kind is balanced by the way it is made, per question text:

- presence, "Is there a dog?": for every yes there is a no about the same category. The picture of the no lacks it, and
  among some drawn at random it is the one whose categories most often occur with it (the idea of POPE's popular and
  adversarial negatives, Li et al., 2023, arXiv:2305.10355).
- count, "How many cups are there?": 1 to 4; of a category, no count is asked for more often than the third most common
  one, so that each has at least three answers of equal number. Categories without three counts are not counted.
- choice, "Which of these is in the picture?": four pictures share four options, each has exactly one of them, and each
  letter is right once. Options are chosen to occur together in other pictures.

In one picture no category is asked about twice, so that no turn gives away another. Boxes cover a fixed list of
categories and not what else is there, so "What is left of the dog?" has no sure answer and is not asked.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

from vlkd.data.files import strict_json
from vlkd.data.vqa_writer import QA
from vlkd.errors import UserError

MIN_AREA = 0.005
"""Fraction of the picture that a box covers at least, or nobody is asked to see it (7 x 7 pixels of 96 x 96)."""
MAX_COUNT = 4
LETTERS = "ABCD"
DRAWN = 32
"""From how many random pictures the hardest is taken."""

_PLURALS = {"person": "people", "sheep": "sheep", "knife": "knives", "mouse": "mice"}
_PLURAL_ONLY = {"skis", "scissors"}
_MASS = {"broccoli"}
_UNCOUNTED = _PLURAL_ONLY | _MASS | {"banana"}
"""Pairs, masses and bunches: one box may hold several."""


@dataclass(frozen=True, kw_only=True)
class BoxImage:
    """What the boxes of a picture say.

    Attributes:
        file: name of the picture.
        present: categories with any box.
        visible: those with a box of at least `MIN_AREA` that is no crowd; they may be asked for.
        counts: how often, for those whose boxes all are so, up to `MAX_COUNT`.
    """

    file: str
    present: frozenset[str]
    visible: tuple[str, ...]
    counts: Mapping[str, int]


def read_instances(file: Path) -> list[BoxImage]:
    """The pictures of a COCO instances file, in its order.

    Raises:
        UserError: no file, or not the form of COCO.
    """
    try:
        content = strict_json(file.read_text(encoding="utf-8"))
        names = {entry["id"]: str(entry["name"]) for entry in content["categories"]}
        boxes: dict[Any, list[tuple[str, float, bool]]] = {entry["id"]: [] for entry in content["images"]}
        for entry in content["annotations"]:
            _, _, width, height = entry["bbox"]
            crowd = bool(entry.get("iscrowd", 0))
            boxes[entry["image_id"]].append((names[entry["category_id"]], width * height, crowd))
        return [
            _image(entry["file_name"], boxes[entry["id"]], MIN_AREA * entry["width"] * entry["height"])
            for entry in content["images"]
        ]
    except OSError as error:
        raise UserError(f"{file} cannot be read ({error.strerror}); give COCO's instances_*.json.") from None
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise UserError(
            f"{file} is no COCO instances file ({error!r:.100}); expected images (id, file_name, width, height), "
            "categories (id, name) and annotations (image_id, category_id, bbox, iscrowd)."
        ) from None


def _image(file: object, boxes: Sequence[tuple[str, float, bool]], least: float) -> BoxImage:
    if not isinstance(file, str):
        raise ValueError(f"file_name {file!r:.80}")
    by_category: dict[str, list[bool]] = defaultdict(list)
    for category, area, crowd in boxes:
        by_category[category].append(area >= least and not crowd)
    return BoxImage(
        file=file,
        present=frozenset(by_category),
        visible=tuple(sorted(category for category, seen in by_category.items() if any(seen))),
        counts={
            category: len(seen)
            for category, seen in sorted(by_category.items())
            if all(seen) and len(seen) <= MAX_COUNT and category not in _UNCOUNTED
        },
    )


def presence_text(category: str) -> str:
    """ "Is there an elephant?", "Are there skis?", "Is there broccoli?" """
    if category in _PLURAL_ONLY:
        return f"Are there {category}?"
    if category in _MASS:
        return f"Is there {category}?"
    return f"Is there {'an' if category[0] in 'aeiou' else 'a'} {category}?"


def count_text(category: str) -> str:
    """ "How many people are there?" """
    return f"How many {plural(category)} are there?"


def choice_text(options: Sequence[str]) -> str:
    """The question with a line per lettered option."""
    lines = [f"{letter}. {option}" for letter, option in zip(LETTERS, options, strict=True)]
    return "\n".join(["Which of these is in the picture?", *lines])


def plural(noun: str) -> str:
    """ "buses", "wine glasses", "people" """
    if noun in _PLURALS:
        return _PLURALS[noun]
    return noun + ("es" if noun.endswith(("s", "x", "ch", "sh")) else "s")


def box_questions(images: Sequence[BoxImage], *, per_image: int = 4, seed: int = 0) -> list[tuple[QA, ...]]:
    """Questions of each picture, in random order; some have none.

    Args:
        images: the pictures; that one of them lacks a category is taken from its boxes.
        per_image: questions of a picture at most: half of them presence, the rest choice and count.
        seed: of all that is drawn.
    """
    if per_image < 1:
        raise UserError(f"Found {per_image} questions per picture; expected at least 1.")
    presence = (per_image + 1) // 2
    choice = (per_image - presence + 1) // 2
    desk = _Desk(images, Random(f"box_questions/{seed}"))
    # Counts find the fewest pictures; presence makes two questions of one visible category, choice makes one.
    desk.ask_counts(per_image - presence - choice)
    desk.ask_presence(presence)
    desk.ask_choices(choice)
    for asked in desk.asked:
        desk.rng.shuffle(asked)
    return [tuple(asked) for asked in desk.asked]


class _Desk:
    """What was asked so far, and of which categories."""

    def __init__(self, images: Sequence[BoxImage], rng: Random) -> None:
        self.images = images
        self.rng = rng
        self.asked: list[list[QA]] = [[] for _ in images]
        self.named: list[set[str]] = [set() for _ in images]
        self.alone: Counter[str] = Counter()
        self.together: Counter[tuple[str, str]] = Counter()
        for image in images:
            self.alone.update(image.present)
            self.together.update((a, b) for a in image.present for b in image.present)

    def ask(self, row: int, qa: QA, categories: Sequence[str]) -> None:
        self.asked[row].append(qa)
        self.named[row].update(categories)

    def can_show(self, row: int) -> list[str]:
        """Categories that may be asked for and were not."""
        return [category for category in self.images[row].visible if category not in self.named[row]]

    def lacks(self, row: int, category: str) -> bool:
        """Whether the category is not there, nor asked about."""
        return category not in self.images[row].present and category not in self.named[row]

    def hardness(self, category: str, row: int) -> float:
        """How often the category occurs where those of the picture do, on average."""
        present = sorted(self.images[row].present)
        shares = [self.together[other, category] / self.alone[other] for other in present]
        return sum(shares) / max(1, len(shares))

    def ask_counts(self, quota: int) -> None:
        """As the module says; rare categories first, which find fewer pictures."""
        total = Counter(category for image in self.images for category in image.counts)
        free = [quota] * len(self.images)
        for category in sorted(total, key=lambda name: (total[name], name)):
            rows: dict[int, list[int]] = defaultdict(list)
            for row, image in enumerate(self.images):
                if free[row] and category in image.counts:
                    rows[image.counts[category]].append(row)
            sizes = sorted((len(members) for members in rows.values()), reverse=True)
            for number, members in sorted(rows.items()) if len(sizes) > 2 else ():
                for row in self.rng.sample(members, min(sizes[2], len(members))):
                    qa = QA(question=count_text(category), answer=str(number), kind="count")
                    self.ask(row, qa, [category])
                    free[row] -= 1

    def ask_choices(self, quota: int) -> None:
        """Groups of four pictures; each joins with a category that the others lack, and lacks theirs."""
        slots = _Slots(len(self.images), quota, self.rng)
        for first in slots.turns():
            categories = self.can_show(first)
            if not categories:
                continue
            group = [(first, self.rng.choice(categories))]
            while len(group) < len(LETTERS) and (joining := self._joining(group, slots)):
                group.append(joining)
            if len(group) < len(LETTERS):
                continue
            self.rng.shuffle(group)
            options = tuple(category for _, category in group)
            for letter, (row, _) in zip(LETTERS, group, strict=True):
                slots.take(row)
                self.ask(row, QA(question=choice_text(options), answer=letter, kind="choice", choices=options), options)

    def _joining(self, group: Sequence[tuple[int, str]], slots: _Slots) -> tuple[int, str] | None:
        """The picture and its category that go best with a group, of those drawn."""
        taken = {row for row, _ in group}
        options = [category for _, category in group]
        best, most = None, -1.0
        for row in slots.some(DRAWN):
            if row in taken or not all(self.lacks(row, option) for option in options):
                continue
            for category in self.can_show(row):
                if not all(self.lacks(other, category) for other, _ in group):
                    continue
                score = sum(self.hardness(category, other) for other, _ in group)
                score += sum(self.hardness(option, row) for option in options)
                if score > most:
                    best, most = (row, category), score
        return best

    def ask_presence(self, quota: int) -> None:
        """Pairs of pictures, the first of which has a category that the second lacks."""
        slots = _Slots(len(self.images), quota, self.rng)
        for first in slots.turns():
            categories = self.can_show(first)
            if not categories:
                continue
            category = self.rng.choice(categories)
            lacking = [row for row in slots.some(DRAWN) if row != first and self.lacks(row, category)]
            if not lacking:
                continue
            second = max(lacking, key=lambda row: (self.hardness(category, row), row))
            for row, answer in ((first, "yes"), (second, "no")):
                slots.take(row)
                self.ask(row, QA(question=presence_text(category), answer=answer, kind="presence"), [category])


class _Slots:
    """How many questions of a kind each picture may still get."""

    def __init__(self, pictures: int, quota: int, rng: Random) -> None:
        self.free = [quota] * pictures
        self.open = list(range(pictures)) if quota else []
        self.place = list(range(pictures))
        self.quota = quota
        self.rng = rng

    def turns(self) -> Iterator[int]:
        """Each picture as often as it may get questions, in random order, while it may get one."""
        rows = [row for row in range(len(self.free)) for _ in range(self.quota)]
        self.rng.shuffle(rows)
        yield from (row for row in rows if self.free[row])

    def some(self, count: int) -> list[int]:
        """Up to so many of the pictures that may get one, in random order."""
        return self.rng.sample(self.open, min(count, len(self.open)))

    def take(self, row: int) -> None:
        """One question less."""
        self.free[row] -= 1
        if not self.free[row]:
            last = self.open.pop()
            if last != row:
                self.open[self.place[row]] = last
                self.place[last] = self.place[row]
