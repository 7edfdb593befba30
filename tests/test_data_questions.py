"""Conversations taken apart into single questions."""

from __future__ import annotations

from pathlib import Path

from vlkd.data.conversations import Conversation
from vlkd.data.questions import Question, questions_of
from vlkd.data.sources import ImageFile
from vlkd.features import Turn

IMAGE = ImageFile(Path("x.tar"), 512, 99)


def talk(key, *texts, **more):
    turns = tuple(Turn("assistant" if i % 2 else "user", text) for i, text in enumerate(texts))
    return Conversation(key=key, image=IMAGE, turns=turns, **more)


def test_each_question_stands_alone():
    found = questions_of(
        [
            talk(
                "a", "<image>\nIs there a dog?", "no", "A cat?", "yes", kinds=("dog", ""), choices=((), ("yes", "no"))
            ),
            talk("1:b", "How many? <image>", "two cups"),
        ]
    )
    assert found == [
        Question(key="a#1", image=IMAGE, text="Is there a dog?", answer="no", kind="dog"),
        Question(key="a#2", image=IMAGE, text="A cat?", answer="yes", choices=("yes", "no")),
        Question(key="1:b#1", image=IMAGE, text="How many?", answer="two cups"),
    ]
