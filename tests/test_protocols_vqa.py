"""Questions about pictures: verdicts by hand, figures against scikit-learn's, order, batches, unreadable pictures."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest
from helpers.tiny_vlms import write_llava
from PIL import Image

from vlkd.errors import UserError
from vlkd.features import CHOICE_REQUEST
from vlkd.metrics import wilson_interval
from vlkd.models.via_llava import load_llava
from vlkd.protocols.vqa import measure_vqa, prompt_of, too_long


@dataclass(frozen=True)
class Ask:
    """A question, its truth, and what the stand-in says to it."""

    key: str
    text: str
    answer: str
    said: str = ""
    kind: str = ""
    choices: tuple[str, ...] = ()


PETS = ("a cat", "a dog", "a bird")
ASKED = [
    Ask("1", "What colour is the big circle?", "red", "Red.", "colour"),
    Ask("2", "What colour?", "two tones", "the 2 tones", "colour"),
    Ask("3", "What colour is it?", "blue", "dark blue", "colour"),
    Ask("4", "How many?", "3", "!?", "count"),
    Ask("5", "Is there a dog?", "Yes", "yes, a brown one", "there"),
    Ask("6", "Is there a cat on it?", "no", "Yes", "there"),
    Ask("7", "Is there a cup?", "no", "I see none", "there"),
    Ask("8", "Is there any?", "no", "No", ""),
    Ask("9", "What is it?", "B", "(b)", "pet", PETS),
    Ask("10", "What is this?", "a bird", "dog", "pet", PETS),
    Ask("11", "Which?", "cat", "horse", "pet", PETS),
]


class Model:
    """Says what each prompt is written down for, and remembers its batches."""

    def __init__(self, asked=ASKED):
        self.said = {prompt_of(one): one.said for one in asked}
        self.batches = []

    def __call__(self, images, prompts):
        assert len(images) == len(prompts)
        self.batches.append((list(images), list(prompts)))
        return [self.said[prompt] for prompt in prompts]


def picture(place):
    return Image.new("RGB", (1, 1), (place, 0, 0))


def measure(asked=ASKED, look=picture, **settings):
    model = Model(asked)
    return measure_vqa(model, asked, look, progress=False, **settings), model


def test_verdicts_by_hand():
    found, _ = measure(batch_size=4)
    assert [row.key for row in found.rows] == [one.key for one in ASKED]
    assert [(row.form, row.truth, row.parsed, row.right) for row in found.rows] == [
        ("open", "red", "red", True),
        ("open", "2 tones", "2 tones", True),
        ("open", "blue", "dark blue", False),
        ("open", "3", None, False),
        ("yes or no", "yes", "yes", True),
        ("yes or no", "no", "yes", False),
        ("yes or no", "no", None, False),
        ("yes or no", "no", "no", True),
        ("multiple choice", "B", "B", True),
        ("multiple choice", "C", "B", False),
        ("multiple choice", "A", None, False),
    ]
    assert [row.answer for row in found.rows] == [one.said for one in ASKED]
    assert [row.kind for row in found.rows[-5:]] == ["there", "yes or no", "pet", "pet", "pet"]


def test_figures_by_hand():
    found, _ = measure()
    figures = found.measured.metrics
    assert found.measured.score == figures["answer_accuracy"] == pytest.approx(5 / 11)
    assert found.measured.interval == wilson_interval(5, 11)
    assert figures["parse_failures"] == pytest.approx(3 / 11)
    assert figures["exact_match"] == pytest.approx(3 / 8)  # red, two tones, and no; "yes, a brown one" is not "yes"
    assert figures["choice_accuracy"] == figures["choice_unparsed"] == pytest.approx(1 / 3)
    # Kinds have at most: 1 of 3 colours, 1 count, 2 of 3 in `there`, 1 without a kind, 1 of 3 pets.
    assert figures["commonest_answer"] == pytest.approx(6 / 11)
    kinds = {name: (own.right, own.questions, own.unparsed) for name, own in found.kinds.items()}
    assert kinds == {
        "colour": (2, 3, 0),
        "count": (0, 1, 1),
        "pet": (1, 3, 1),
        "there": (1, 3, 1),
        "yes or no": (1, 1, 0),
    }
    assert found.measured.per_class == {name: own.accuracy for name, own in found.kinds.items()}
    correct, label = (found.measured.per_item[name] for name in ("correct", "label"))
    for place, name in enumerate(found.kinds):
        assert correct[label == place].sum() == kinds[name][0]


def test_the_yes_ratio_is_of_the_predictions():
    truths = [True] * 3 + [False] * 7
    said = [True] * 9 + [False]
    asked = [
        Ask(str(n), f"Is it {n}?", "yes" if truth else "no", "yes" if answer else "no")
        for n, (truth, answer) in enumerate(zip(truths, said, strict=True))
    ]
    figures = measure(asked)[0].measured.metrics
    assert figures["yes_no_yes_ratio"] == pytest.approx(0.9)
    sklearn = pytest.importorskip("sklearn.metrics")
    wanted = {
        "accuracy": sklearn.accuracy_score(truths, said),
        "precision": sklearn.precision_score(truths, said),
        "recall": sklearn.recall_score(truths, said),
        "f1": sklearn.f1_score(truths, said),
    }
    assert {name: figures[f"yes_no_{name}"] for name in wanted} == pytest.approx(wanted)


@pytest.mark.parametrize(("size", "calls"), [(1, 11), (3, 4), (4, 3), (64, 1)])
def test_questions_are_asked_in_batches_the_longest_first(size, calls):
    found, model = measure(batch_size=size, workers=3)
    assert found.rows == measure(batch_size=2)[0].rows
    assert [len(images) for images, _ in model.batches] == [size] * (calls - 1) + [len(ASKED) - size * (calls - 1)]
    lengths = [len(prompt) for _, prompts in model.batches for prompt in prompts]
    assert lengths == sorted(lengths, reverse=True)
    place = {prompt_of(one): place for place, one in enumerate(ASKED)}
    for images, prompts in model.batches:
        assert [image.getpixel((0, 0))[0] for image in images] == [place[prompt] for prompt in prompts]


def test_questions_without_a_picture_are_left_out_and_listed():
    def look(place):
        if place in (0, 4):
            raise OSError("gone") if place else UserError("cut off")
        return picture(place)

    found, model = measure(look=look, batch_size=4)
    assert found.unreadable == (("1", "cut off"), ("5", "gone"))
    assert [row.key for row in found.rows] == [one.key for one in ASKED if one.key not in ("1", "5")]
    assert found.total.questions == sum(len(images) for images, _ in model.batches) == 9
    assert found.rows == tuple(row for row in measure()[0].rows if row.key not in ("1", "5"))


def test_truths_that_no_answer_can_reach_are_told():
    tokens = [5 if one.key in ("2", "5", "9") else 2 for one in ASKED]
    assert too_long(ASKED, tokens, 5) == ""
    told = too_long(ASKED, tokens, 4)  # of yes and no, and of options, the first word counts
    assert told.startswith("1 of 11 questions have true answers of more than 4 tokens, up to 5, first '2'")


def test_how_options_are_asked():
    wanted = f"What is it?\nA. a cat\nB. a dog\nC. a bird\n{CHOICE_REQUEST}"
    assert prompt_of(ASKED[8]) == wanted
    assert prompt_of(ASKED[0]) == ASKED[0].text
    own = "What is it?\nA. a cat\nB. a dog\nC. a bird\nSay a letter."
    assert prompt_of(Ask("k", own, "A", choices=PETS)) == own
    assert prompt_of(Ask("k", "What is it?\nA. a cat", "A", choices=PETS)).count("A. a cat") == 2


@pytest.mark.parametrize(
    ("asked", "sentence"),
    [
        ([], "no question"),
        ([ASKED[0], ASKED[0]], "the key '1' for two questions"),
        ([Ask("k", "What?", "a horse", choices=PETS)], "'k' is 'a horse', expected the letter or the words"),
        ([Ask("k", "What?", "E", choices=PETS)], "'k' is 'E'"),
        ([Ask("k", "What?", "A", choices=("cat",))], "'k' has 1 options"),
    ],
)
def test_bad_questions_are_refused(asked, sentence):
    with pytest.raises(UserError, match=sentence):
        measure(asked)


def test_no_picture_at_all_and_a_wrong_number_of_answers_are_refused():
    def broken(place):
        raise UserError("cut off")

    with pytest.raises(UserError, match="None of the pictures of 11 questions can be read; the first: 1: cut off"):
        measure(look=broken)
    with pytest.raises(UserError, match="1 answers to 4 questions"):
        measure_vqa(lambda images, prompts: ["red"], ASKED, picture, batch_size=4, progress=False)


def test_a_models_answers_do_not_depend_on_the_batch(tmp_path):
    model = load_llava(write_llava(tmp_path / "m"))
    calls = []
    generate = model.generate
    model.generate = lambda ids, mask, **more: calls.append(len(ids)) or generate(ids, mask, **more)
    rng = np.random.default_rng(0)
    pictures = [Image.fromarray(rng.integers(0, 256, (40, 30 + n, 3), np.uint8)) for n in range(13)]
    asked = [Ask(str(n), "What colour is the circle? " * (1 + n % 3), "red") for n in range(13)]
    found = {}
    for size in (1, 3, 8):
        calls.clear()
        answers = measure_vqa(
            lambda images, prompts, size=size: model.answer(images, prompts, batch_size=size, max_new_tokens=16),
            asked,
            pictures.__getitem__,
            batch_size=size,
            progress=False,
        )
        found[size] = [row.answer for row in answers.rows]
        assert len(calls) == -(-13 // size)
        assert sum(calls) == 13
    alone = [
        model.answer([image], [one.text], max_new_tokens=16)[0] for image, one in zip(pictures, asked, strict=True)
    ]
    assert found[1] == found[3] == found[8] == alone
    assert len(set(alone)) > 6
