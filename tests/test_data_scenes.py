"""Scenes: same seed, same bytes; splits keep their promises; boxes and sentences are true of the pixels."""

from __future__ import annotations

import importlib.util
import io
import itertools
import json
import re
import subprocess
import sys
from collections.abc import Sequence
from random import Random

import numpy as np
import pytest
from PIL import Image

from vlkd.data import icons
from vlkd.data.scene_splits import SPLITS, are_held_out_together, is_held_out_noun, is_held_out_pair
from vlkd.data.scene_words import COLOURS, SceneObject, captions
from vlkd.data.scenes import Kind, generate_scenes, paste
from vlkd.data.shapes import SHAPES, shape_mask
from vlkd.data.shards import RawSample
from vlkd.errors import UserError

needs_icons = pytest.mark.skipif(importlib.util.find_spec("qtawesome") is None, reason="qtawesome is not installed")
KINDS = [pytest.param("shapes"), pytest.param("icons", marks=needs_icons)]


def scenes(kind: Kind, split: str, count: int, seed: int = 0, vocabulary: int | None = None) -> list[RawSample]:
    vocabulary = vocabulary if kind == "icons" else None
    return list(generate_scenes(kind, count=count, seed=seed, split=split, image_size=64, vocabulary=vocabulary))


def content(sample: RawSample) -> list[tuple[str, str]]:
    return [(thing["colour"], thing["noun"]) for thing in sample.extra["objects"]]  # type: ignore[attr-defined]


def texts(sample: RawSample) -> str:
    """Everything readable of a sample, captions and questions."""
    return " ".join([*sample.captions, json.dumps(sample.extra["questions"])])


@pytest.mark.parametrize("kind", KINDS)
def test_a_scene_depends_on_seed_split_and_index_alone(kind: Kind) -> None:
    first = scenes(kind, "train", 12)
    assert first == scenes(kind, "train", 12)
    assert first[:5] == scenes(kind, "train", 5)
    images = {
        sample.image
        for seed in (0, 1)
        for split in ("train", "val", "test")
        for sample in scenes(kind, split, 40, seed)
    }
    assert len(images) == 6 * 40
    keys = {sample.key for seed in (0, 1) for split in SPLITS for sample in scenes(kind, split, 3, seed)}
    assert len(keys) == 2 * len(SPLITS) * 3


def test_scenes_do_not_depend_on_the_process() -> None:
    """Python's own string hash differs from process to process; nothing here may use it."""
    code = (
        "import hashlib\nfrom vlkd.data.scenes import generate_scenes\n"
        "scenes = generate_scenes('shapes', count=5, seed=3, split='test_combination')\n"
        "print(hashlib.sha256(repr([(s.image, s.captions, s.extra) for s in scenes]).encode()).hexdigest())"
    )
    digests = {
        subprocess.run(
            [sys.executable, "-c", code],
            env={"PYTHONHASHSEED": seed, "PYTHONPATH": ":".join(sys.path)},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in ("1", "2")
    }
    assert len(digests) == 1


@pytest.mark.parametrize("kind", KINDS)
def test_held_out_combinations_never_occur_in_training(kind: Kind) -> None:
    """Compared as sets of what is seen, without the rule that made them."""

    def pairs(samples: Sequence[RawSample]) -> set[tuple[str, ...]]:
        found: set[tuple[str, ...]] = set()
        for sample in samples:
            found.update(content(sample))
            found.update(itertools.combinations(sorted(noun for _, noun in content(sample)), 2))
        return found

    known = set().union(*(pairs(scenes(kind, split, 1500, vocabulary=40)) for split in ("train", "val", "test")))
    known_nouns = {noun for pair in known for noun in pair}
    tests = scenes(kind, "test_combination", 300, vocabulary=40)
    for sample in tests:
        assert pairs([sample]) - known, sample.captions
        assert {noun for _, noun in content(sample)} <= known_nouns
    assert any(len(content(sample)) == 3 for sample in tests)


@pytest.mark.parametrize("kind", KINDS)
def test_held_out_nouns_never_occur_in_training(kind: Kind) -> None:
    """No word of a held-out noun is shown, said, or asked about in any other split."""
    held_out = {
        word
        for sample in scenes(kind, "test_noun", 300)
        for _, noun in content(sample)
        for word in noun.split()
        if is_held_out_noun(word)
    }
    assert held_out >= ({"heart", "diamond"} if kind == "shapes" else set())
    for split in ("train", "val", "test", "test_combination"):
        for sample in scenes(kind, split, 500):
            assert not held_out & set(re.findall(r"[a-z]+", texts(sample)))
    for sample in scenes(kind, "test_noun", 100):
        assert all(held_out & set(noun.split()) for _, noun in content(sample))


def test_rules_are_symmetric_and_hold_out_about_a_tenth() -> None:
    assert [shape for shape in SHAPES if is_held_out_noun(shape)] == ["heart", "diamond"]
    names = [f"thing{number}" for number in range(400)]
    pairs = list(itertools.combinations(names[:60], 2))
    assert all(are_held_out_together(a, b) == are_held_out_together(b, a) for a, b in pairs)
    for share in (
        np.mean([is_held_out_noun(name) for name in names]),
        np.mean([is_held_out_pair(colour, name) for colour in COLOURS for name in names]),
        np.mean([are_held_out_together(a, b) for a, b in pairs]),
    ):
        assert 0.06 < share < 0.14
    assert is_held_out_noun("hearts")
    assert is_held_out_noun("heart circle")


@pytest.mark.parametrize("noun", SHAPES)
@pytest.mark.parametrize("centre", [None, (0.27, 0.74)])
def test_boxes_enclose_the_drawn_pixels(noun: str, centre: tuple[float, float] | None) -> None:
    for trial in range(5):
        image = Image.new("RGB", (96, 96), (250, 250, 250))
        side = (20, 30, 44)[trial % 3]
        box = paste(image, shape_mask(noun), "red", side, centre, Random(trial))
        changed = np.abs(np.asarray(image, dtype=int) - 250).max(axis=2) > 3
        rows, columns = np.flatnonzero(changed.any(axis=1)), np.flatnonzero(changed.any(axis=0))
        seen = (columns[0], rows[0], columns[-1] + 1, rows[-1] + 1)
        np.testing.assert_allclose(box, seen, atol=1)
        assert box[0] <= seen[0] and box[1] <= seen[1] and box[2] >= seen[2] and box[3] >= seen[3]  # noqa: PT018
        assert abs(max(box[2] - box[0], box[3] - box[1]) - side) <= 1


@pytest.mark.parametrize("kind", KINDS)
def test_boxes_hold_the_named_colour_and_stay_apart(kind: Kind) -> None:
    """In the decoded JPEG, the named colour is nearest to many pixels of the box, and to none outside the boxes."""
    values = np.array(list(COLOURS.values()))
    for sample in scenes(kind, "train", 40):
        pixels = np.asarray(Image.open(io.BytesIO(sample.image)).convert("RGB"), dtype=int)
        drawn = pixels.min(axis=2) < 140  # no background goes below 180
        nearest = np.abs(pixels[:, :, None] - values).sum(axis=3).argmin(axis=2)
        outside = np.ones(pixels.shape[:2], dtype=bool)
        for thing in sample.extra["objects"]:  # type: ignore[attr-defined]
            x0, y0, x1, y1 = thing["box"]
            assert 0 <= x0 < x1 <= 64
            assert 0 <= y0 < y1 <= 64
            inside = (nearest == list(COLOURS).index(thing["colour"])) & drawn
            assert inside[y0:y1, x0:x1].mean() > 0.08, sample.captions
            outside[y0:y1, x0:x1] = False
        assert (drawn & outside).mean() < 0.01


@pytest.mark.parametrize("kind", KINDS)
def test_first_captions_are_true_of_the_boxes(kind: Kind) -> None:
    """Read "A RELATION B" back from the sentence and compare with the pixels' boxes."""
    axes = {"to the left of": (0, -1), "to the right of": (0, 1), "above": (1, -1), "below": (1, 1)}
    seen = set()
    for sample in scenes(kind, "train", 150):
        things = sample.extra["objects"]
        assert 2 <= len(set(sample.captions)) == len(sample.captions) <= 3
        for caption in sample.captions:
            assert all(f"{thing['colour']} {thing['noun']}" in caption for thing in things)  # type: ignore[attr-defined]
        if len(things) == 1:  # type: ignore[arg-type]
            continue
        centres = [np.array(thing["box"]).reshape(2, 2).mean(axis=0) for thing in things]  # type: ignore[attr-defined]
        name = next(name for name in axes if f" {name} " in sample.captions[0])
        axis, sign = axes[name]
        seen.add(name)
        for other in centres[1:]:
            difference = centres[0] - other
            assert np.abs(difference).argmax() == axis
            assert np.sign(difference[axis]) == sign
    assert seen == set(axes)


def test_questions_are_answered_by_the_objects() -> None:
    for sample in scenes("shapes", "test", 60):
        shown = content(sample)
        for pair in sample.extra["questions"]:  # type: ignore[attr-defined]
            question, answer = pair["question"], pair["answer"]
            if question.startswith("How many"):
                assert answer == str(len(shown))
            elif question.startswith("What colour"):
                assert (answer, question.removeprefix("What colour is the ").removesuffix("?")) in shown
            elif question.startswith("Is there"):
                colour, noun = re.fullmatch(r"Is there an? (\w+) (\w+)\?", question).groups()  # type: ignore[union-attr]
                assert answer == ("yes" if (colour, noun) in shown else "no")
            else:
                assert answer in {noun for _, noun in shown}


def test_articles_and_places() -> None:
    thing = SceneObject(noun="star", colour="orange", size=None, box=(2, 2, 20, 20))
    said = {caption for seed in range(20) for caption in captions([thing], "mint", 96, Random(seed))}
    assert said == {
        "an orange star",
        "a picture of an orange star",
        "an orange star on a mint background",
        "an orange star in the top left",
    }


@needs_icons
def test_icon_names_are_clean_and_many() -> None:
    nouns = list(icons.catalogue())
    assert len(nouns) > 3000
    assert len(set(nouns)) == len(nouns)
    assert all(re.fullmatch(r"[a-z]{2,}( [a-z]{2,}){0,2}", noun) for noun in nouns)
    assert {"anchor", "coffee", "umbrella", "bicycle"} <= set(nouns)
    assert not {"orange", "github", "account off"} & set(nouns)
    assert not any(set(noun.split()) & set(COLOURS) for noun in nouns)
    assert len(icons.catalogue()["anchor"]) >= 3


def test_nouns_of_names() -> None:
    assert icons.noun_of("account-circle-outline", ("outline",)) == "account circle"
    assert icons.noun_of("food-croissant") == "croissant"
    for name in ("bell-off", "numeric-3-box", "alpha-a", "orange", "github", "home-8", "a-very-long-name"):
        assert icons.noun_of(name) is None


@needs_icons
def test_glyphs_are_drawn_and_differ() -> None:
    """A missing glyph would show as the same box for many names."""
    nouns = list(icons.catalogue())[::40]
    masks = {noun: icons.icon_mask(noun, Random(0)) for noun in nouns}
    assert all(mask.mode == "L" and max(mask.size) > 24 for mask in masks.values())
    assert len({mask.tobytes() for mask in masks.values()}) == len(nouns)


def test_refusals(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match="no split 'dev'"):
        scenes("shapes", "dev", 1)
    with pytest.raises(UserError, match="expected shapes or icons"):
        scenes("blobs", "train", 1)  # type: ignore[arg-type]
    with pytest.raises(UserError, match="at least 32"):
        list(generate_scenes("shapes", count=1, seed=0, split="train", image_size=8))
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    with pytest.raises(UserError, match=r'pip install "vlkd\[demo\]"'):
        icons.font_folder()


@needs_icons
def test_a_vocabulary_without_held_out_nouns_is_refused() -> None:
    with pytest.raises(UserError, match="enlarge it"):
        scenes("icons", "test_noun", 1, vocabulary=2)


@needs_icons
def test_qt_is_not_imported() -> None:
    code = (
        "import sys\nfrom vlkd.data.scenes import generate_scenes\n"
        "next(generate_scenes('icons', count=1, seed=0, split='train'))\n"
        "sys.exit(bool({'qtawesome', 'qtpy', 'torch'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], env={"PYTHONPATH": ":".join(sys.path)}).returncode == 0
