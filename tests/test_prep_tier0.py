"""The offline suite's data: the same bytes for the same seed, labels and captions that are true."""

from __future__ import annotations

import hashlib
import itertools
import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from vlkd.cli.main import main
from vlkd.data.eval_set import EvalSet, open_eval_set
from vlkd.data.scene_words import COLOURS
from vlkd.data.shapes import SHAPES
from vlkd.suite.declaration import load_suite
from vlkd.suite.presence import presence


def made(out: Path, *words: str) -> Path:
    assert not main(["prep", "tier0", "--out", str(out), "--image-size", "48", *words])
    return out


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return made(tmp_path_factory.mktemp("tier0") / "root")


def opened(root: Path, name: str, split: str = "test") -> EvalSet:
    found = open_eval_set(root / name, split=split)
    assert not found.problems
    return found


def digest(root: Path) -> str:
    files = sorted(path for path in root.rglob("*") if path.is_file())
    return hashlib.sha256(b"".join(str(p.relative_to(root)).encode() + p.read_bytes() for p in files)).hexdigest()


def test_the_suite_finds_everything_as_declared(root: Path) -> None:
    for found in presence(load_suite("tier0"), root):
        assert found.path is not None
        assert not found.problem
        data = open_eval_set(found.path, split=found.entry.split)
        assert (data.kind, len(data)) == (found.entry.kind, found.images)


def test_the_suite_finds_it_in_a_folder_of_its_name(tmp_path: Path, root: Path) -> None:
    (tmp_path / "tier0").symlink_to(root)
    assert not any(found.problem for found in presence(load_suite("tier0"), tmp_path))


def test_the_seed_alone_decides(root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    again = made(tmp_path / "again", "--json")
    told = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert digest(again) == digest(root)
    assert digest(made(tmp_path / "other", "--seed", "1")) != digest(root)
    assert told["pictures"] == {
        "shapes_retrieval": 100, "shapes_classes": 300, "shapes_multilabel": 128, "shapes_choices": 100,
    }  # fmt: skip
    with pytest.raises(SystemExit):
        main(["prep", "tier0", "--out", str(again)])
    assert "already holds files" in capsys.readouterr().err


def test_classes_are_balanced_and_splits_differ(root: Path) -> None:
    train, test = opened(root, "shapes_classes", "train"), opened(root, "shapes_classes")
    for data, each in ((train, 20), (test, 10)):
        assert data.classes == SHAPES
        assert data.labels is not None
        assert np.bincount(data.labels).tolist() == [each] * 10
    (colours,) = test.groups.values()
    assert set(colours.tolist()) == set(range(len(COLOURS)))
    pictures = [file.read() for data in (train, test) for file in data.files]
    assert len(set(pictures)) == 300


def test_a_picture_shows_its_colour(root: Path) -> None:
    """The ground is pale, so the pixel farthest from the corner's colour belongs to the shape."""
    data = opened(root, "shapes_classes")
    (colours,) = data.groups.values()
    values = np.array(list(COLOURS.values()), dtype=np.float64)
    for row, colour in enumerate(colours.tolist()):
        pixels = np.asarray(data.image(row), dtype=np.float64)
        apart = np.linalg.norm(pixels - pixels[0, 0], axis=-1)
        inside = np.median(pixels[apart > 0.8 * apart.max()], axis=0)
        assert int(np.linalg.norm(values - inside, axis=1).argmin()) == colour


def test_every_shape_occurs_among_several_labels(root: Path) -> None:
    data = opened(root, "shapes_multilabel")
    assert data.labels is not None
    assert data.labels.dtype == bool
    assert data.labels.any(axis=0).all()
    assert not data.labels.all(axis=0).any()
    assert set(data.labels.sum(axis=1).tolist()) == {1, 2, 3}


def test_captions_of_retrieval_belong_to_one_picture(root: Path) -> None:
    data = opened(root, "shapes_retrieval")
    owners = Counter(caption for captions in data.captions for caption in set(captions))
    assert set(owners.values()) == {1}
    assert {len(captions) for captions in data.captions} == {2, 3}


def words(caption: str) -> Counter[str]:
    return Counter(word for word in caption.split() if word not in ("a", "an"))


def test_wrong_captions_use_the_same_words_in_another_order(root: Path) -> None:
    data = opened(root, "shapes_choices")
    assert Counter(choice.group for choice in data.choices) == {"swap_att": 50, "swap_obj": 50}
    assert len({choice.images for choice in data.choices}) == 100
    for choice in data.choices:
        true, wrong = choice.captions
        assert true != wrong
        assert words(true) == words(wrong)
        swapped = [word for word, other in zip(true.split(), wrong.split(), strict=True) if word != other]
        kinds = {"swap_att": set(COLOURS), "swap_obj": set(SHAPES)}[choice.group]
        assert len(swapped) == 2
        assert set(swapped) <= kinds


def test_no_choice_is_settled_by_another_item(root: Path) -> None:
    """A model that only reads cannot know: as many wrong captions are true elsewhere as chance has it, not most."""
    choices = opened(root, "shapes_choices").choices
    true, wrong = (Counter(choice.captions[side] for choice in choices) for side in (0, 1))
    both = sum(wrong[caption] for caption in true)
    assert both < len(choices) / 2
    assert max(itertools.chain(true.values(), wrong.values())) <= 3
