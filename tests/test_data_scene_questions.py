"""Questions about scenes: each answer is computed again from the objects, by other means, and is the only one."""

from __future__ import annotations

import re
from collections import Counter
from itertools import permutations
from random import Random

import pytest

from vlkd.data.scene_questions import describe, place_of, scene_questions
from vlkd.data.scene_splits import is_held_out_noun, is_held_out_pair
from vlkd.data.scene_words import COLOURS, SceneObject
from vlkd.data.scenes import generate_scenes
from vlkd.data.shapes import SHAPES
from vlkd.data.vqa_writer import QA

SIZE = 64
NOUNS = [noun for noun in SHAPES if not is_held_out_noun(noun)]
KINDS = {"presence", "relation", "count", "colour", "object", "size", "position", "neighbour", "description"}


def thing(noun: str, colour: str = "red", x: float = 0.5, y: float = 0.5, size: str | None = "small") -> SceneObject:
    """An object of a tenth of the picture around a place given in fractions."""
    x0, y0 = round(100 * x) - 5, round(100 * y) - 5
    return SceneObject(noun=noun, colour=colour, size=size, box=(x0, y0, x0 + 10, y0 + 10))


def ask(objects: list[SceneObject], seed: int = 0, present: bool = True, related: bool = True) -> tuple[QA, ...]:
    return scene_questions(objects, 100, NOUNS, Random(seed), present=present, related=related)


@pytest.fixture(scope="module")
def asked() -> list[tuple[list[SceneObject], tuple[QA, ...]]]:
    scenes = []
    for index, scene in enumerate(generate_scenes("shapes", count=600, seed=3, split="train", image_size=SIZE)):
        objects = [SceneObject(**entry) for entry in scene.extra["objects"]]  # type: ignore[attr-defined]
        truths = {"present": index % 2 == 0, "related": index % 4 < 2}
        scenes.append((objects, scene_questions(objects, SIZE, NOUNS, Random(index), **truths)))
    return scenes


def on_side(first: SceneObject, second: SceneObject, side: str) -> bool:
    """Whether the middle of the first box lies that way from the second's, and there first of all."""
    (ax, ay), (bx, by) = first.centre, second.centre
    wide = abs(ax - bx) > abs(ay - by)
    return {
        "to the left of": wide and ax < bx,
        "to the right of": wide and ax > bx,
        "above": not wide and ay < by,
        "below": not wide and ay > by,
    }[side]


def answers(question: str, objects: list[SceneObject]) -> set[str]:
    """Every answer that is true, from the words of the question alone."""
    by_noun = {o.noun: o for o in objects}
    sides = "(to the left of|to the right of|above|below)"
    if question == "How many objects are there?":
        return {str(len(objects))}
    if found := re.fullmatch(r"What colour is the (.+)\?", question):
        return {by_noun[found[1]].colour}
    if found := re.fullmatch(r"What is the (\w+) object\?", question):
        return {o.noun for o in objects if o.colour == found[1]}
    if found := re.fullmatch(r"Is the (.+) small or large\?", question):
        return {by_noun[found[1]].size or ""}
    if found := re.fullmatch(r"Is there an? (\w+) (.+)\?", question):
        return {"yes" if any((o.colour, o.noun) == found.groups() for o in objects) else "no"}
    if found := re.fullmatch(rf"Is the (\w+) {sides} the (\w+)\?", question):
        return {"yes" if on_side(by_noun[found[1]], by_noun[found[3]], found[2]) else "no"}
    if found := re.fullmatch(rf"What is {sides} the (\w+) (\w+)\?", question):
        reference = by_noun[found[3]]
        assert reference.colour == found[2]
        return {o.phrase for o in objects if o is not reference and on_side(o, reference, found[1])}
    if found := re.fullmatch(r"Where is the (.+)\?", question):
        x, y = (value / SIZE for value in by_noun[found[1]].centre)
        words = [word for value, low, high in ((y, "top", "bottom"), (x, "left", "right"))
                 for word in ((low,) if value < 0.38 else (high,) if value > 0.62 else ())]  # fmt: skip
        if len(words) == 1:
            return {("at the " if words[0] in ("top", "bottom") else "on the ") + words[0]}
        return {f"in the {' '.join(words) or 'middle'}"}
    assert question == "Describe the picture."
    return {answer for answer in (describe(list(order), SIZE) for order in permutations(objects)) if answer}


def test_every_answer_is_the_only_true_one(asked):
    for objects, questions in asked:
        for qa in questions:
            assert answers(qa.question, objects) == {qa.answer}, (qa, objects)


def test_every_kind_is_asked_and_none_is_rare(asked):
    kinds = Counter(qa.kind for _, questions in asked for qa in questions)
    assert set(kinds) == KINDS
    assert min(kinds.values()) > 0.25 * len(asked)
    assert kinds["description"] == kinds["count"] == len(asked)
    for _, questions in asked:
        assert max(Counter(qa.kind for qa in questions).values()) == 1
        assert questions[-1].kind == "description"


def test_some_answers_have_several_words(asked):
    lengths = [len(qa.answer.split()) for _, questions in asked for qa in questions if qa.kind == "neighbour"]
    assert set(lengths) == {4}


def test_yes_is_as_common_as_no_and_the_words_do_not_tell(asked):
    for kind in ("presence", "relation"):
        pairs = [(qa.question, qa.answer) for _, questions in asked for qa in questions if qa.kind == kind]
        yes = sum(answer == "yes" for _, answer in pairs)
        assert abs(yes / len(pairs) - 0.5) < 0.08
        # What one half of the questions teaches, colours aside, does not help with the other half.
        texts = [re.sub(rf" ({'|'.join(COLOURS)}) ", " ", text) for text, _ in pairs]
        half = len(pairs) // 2
        votes: Counter[str] = Counter()
        for text, (_, answer) in zip(texts[:half], pairs[:half], strict=True):
            votes[text] += 1 if answer == "yes" else -1
        right = [(votes[text] > 0) == (a == "yes") for text, (_, a) in zip(texts[half:], pairs[half:], strict=True)]
        assert 0.38 < sum(right) / len(right) < 0.62


def test_no_answer_of_presence_betrays_what_is_held_out(asked):
    for _, questions in asked:
        for qa in questions:
            if found := re.fullmatch(r"Is there an? (\w+) (.+)\?", qa.question):
                assert not is_held_out_pair(*found.groups())
                assert not is_held_out_noun(found[2])


def test_no_turn_before_the_description_gives_a_later_answer_away(asked):
    """What is there, and its colour, is not asked for after it was said; that a red circle is not there says little."""
    for objects, questions in asked:
        said = ""
        for qa in questions[:-1]:
            for o in objects:
                whole = f"{o.colour} {o.noun}" in said
                if qa.kind == "colour" and o.noun in qa.question:
                    assert not whole
                if qa.kind == "object" and o.noun == qa.answer:
                    assert not re.search(rf"\b{o.noun}\b", said)
                if qa.kind == "neighbour" and o.phrase == qa.answer:
                    assert not re.search(rf"\b{o.noun}\b", said)
                if qa.kind == "presence" and f"{o.colour} {o.noun}" in qa.question:
                    assert not re.search(rf"\b{o.noun}\b", said)
            if (qa.kind, qa.answer) != ("presence", "no"):
                said += f" {qa.question} {qa.answer}"


def test_ambiguous_places_are_not_asked_for():
    diagonal = [thing("circle", x=0.2, y=0.2), thing("square", "blue", x=0.5, y=0.48)]
    kinds = {qa.kind for seed in range(20) for qa in ask(diagonal, seed)}
    assert not kinds & {"neighbour", "relation", "description"}
    row = [thing("circle", x=0.2), thing("square", "blue", x=0.5), thing("star", "pink", x=0.8)]
    texts = {qa.question for seed in range(60) for qa in ask(row, seed)}
    assert "What is to the right of the blue square?" in texts
    assert "What is to the right of the red circle?" not in texts
    assert place_of(thing("circle", x=0.37, y=0.5), 100) is None
    assert place_of(thing("circle", x=0.2, y=0.5), 100) == "on the left"
    twins = [thing("circle", x=0.2), thing("square", x=0.8)]
    assert "object" not in {qa.kind for seed in range(20) for qa in ask(twins, seed)}


def test_a_noun_that_might_mean_another_is_not_asked_about():
    objects = [thing("anchor", x=0.2, size=None), thing("anchor circle", "blue", x=0.8, size=None)]
    texts = {qa.question for seed in range(40) for qa in ask(objects, seed)}
    assert not any(re.search(r"the (\w+ )?anchor", text) for text in texts)


def test_descriptions_do_not_depend_on_the_order_of_the_objects():
    left, right = thing("circle", x=0.2), thing("square", "blue", x=0.8, size="large")
    wanted = "a small red circle to the left of a large blue square"
    assert describe([left, right], 100) == describe([right, left], 100) == wanted
    low = [thing("star", "pink", x=0.2, y=0.8), thing("heart", "black", x=0.8, y=0.8)]
    top = thing("ring", "orange", x=0.5, y=0.2)
    for order in permutations([top, *low]):
        assert describe(list(order), 100) == (
            "a small orange ring above a small pink star and a small black heart"
        )  # fmt: skip
    assert describe([left], 100) == "a small red circle"


def test_the_truth_that_is_asked_for_is_given():
    pair = [thing("circle", x=0.2), thing("square", "blue", x=0.8)]
    for seed in range(20):
        for truth in (True, False):
            found = {qa.kind: qa.answer for qa in ask(pair, seed, present=truth, related=not truth)}
            assert found.get("presence", "yes" if truth else "no") == ("yes" if truth else "no")
            assert found.get("relation", "no" if truth else "yes") == ("no" if truth else "yes")
    assert ask(pair, 5) == ask(pair, 5)
    assert len({ask(pair, seed) for seed in range(5)}) > 1
