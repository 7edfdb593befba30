"""Zero-shot classification against open_clip's classifier, a numpy transcription and closed forms."""

from __future__ import annotations

import math

import numpy as np
import open_clip
import pytest
import torch
from helpers.pairs import noise
from helpers.tiny_models import tiny_composite, write_open_clip
from PIL import Image

from vlkd.data.labelled import open_labelled
from vlkd.errors import UserError
from vlkd.models.load import load
from vlkd.retrieval.zero_shot import DEFAULT_TEMPLATES, accuracy, class_vectors, zero_shot_figures

NAMES = ("red square", "blue circle", "dog", "cat", "star", "large green triangle", "beach")


@pytest.fixture(params=["clip", "siglip"])
def folder(request, tmp_path):
    return write_open_clip(tmp_path / "model", siglip=request.param == "siglip")


@pytest.mark.parametrize("batch_size", [1, 9, 256])
def test_class_vectors_equal_open_clips_classifier(folder, batch_size):
    model = open_clip.create_model(f"local-dir:{folder}").eval()
    tokenizer = open_clip.get_tokenizer(f"local-dir:{folder}")
    templates = [template.replace("{c}", "{}") for template in DEFAULT_TEMPLATES]
    wanted = open_clip.build_zero_shot_classifier(model, tokenizer, NAMES, templates)
    found = class_vectors(load(str(folder)).encode_text, NAMES, DEFAULT_TEMPLATES, batch_size=batch_size)
    torch.testing.assert_close(found, wanted.T, rtol=0, atol=1e-6)
    positional = class_vectors(load(str(folder)).encode_text, NAMES, templates, batch_size=batch_size)
    assert torch.equal(positional, found)


def test_prompts_of_each_class_win_over_templates(folder):
    """open_clip's classifier of one class with its own sentences as templates, class after class."""
    model = open_clip.create_model(f"local-dir:{folder}").eval()
    tokenizer = open_clip.get_tokenizer(f"local-dir:{folder}")
    own = {"dog": ["it barks", "a {c} as it stands"], "cat": ["it purrs"], "star": ["far", "bright", "in the sky"]}
    wanted = [
        open_clip.build_zero_shot_classifier(model, tokenizer, [name], [lambda _, s=s: s for s in own[name]])[:, 0]
        for name in ("star", "dog", "star", "cat")
    ]
    encode = load(str(folder)).encode_text
    for batch_size in (1, 4, 256):
        found = class_vectors(encode, ("star", "dog", "star", "cat"), (), prompts=own, batch_size=batch_size)
        torch.testing.assert_close(found, torch.stack(wanted), rtol=0, atol=1e-6)
    with pytest.raises(UserError, match=r"1 of 2 classes have no prompts of their own, such as \['Dog'\]"):
        class_vectors(encode, ("star", "Dog"), ("{c}",), prompts=own)


def test_many_prompts_per_forward_and_equal_names_once():
    calls = []

    def encode(prompts):
        calls.append(list(prompts))
        return torch.randn(len(prompts), 4)

    vectors = class_vectors(encode, ["a", "b", "a", "c"], ["{c}", "{c} or {c}"], batch_size=5)
    assert calls == [["a", "a or a", "b", "b or b"], ["c", "c or c"]]
    assert torch.equal(vectors[0], vectors[2])
    assert not torch.equal(vectors[0], vectors[1])


def test_prompts_are_normalised_before_their_mean():
    """Directions 0 and 90 degrees have the mean 45 degrees, however long one of them is."""
    there = {"x a": [1000.0, 0.0], "y a": [0.0, 0.001]}
    vectors = class_vectors(lambda prompts: torch.tensor([there[p] for p in prompts]), ["a"], ["x {c}", "y {c}"])
    torch.testing.assert_close(vectors, torch.full((1, 2), math.sqrt(0.5)))


def test_a_name_is_data_and_no_format():
    seen = []
    class_vectors(lambda p: seen.extend(p) or torch.ones(len(p), 2), ["{c.__class__}{0:>9}"], ["{c} {x} {c!r}"])
    assert seen == ["{c.__class__}{0:>9} {x} {c!r}"]


@pytest.mark.parametrize(
    ("classes", "templates", "value", "sentence"),
    [
        ([], ["{c}"], 1.0, "0 class names and 1 templates"),
        (["a"], [], 1.0, "1 class names and 0 templates"),
        (["a"], ["{x}"], 1.0, r"'\{x\}' has no \{c\} and no \{\}"),
        (["a", "b"], ["{c}"], math.nan, "prompts of the classes 'a' to 'b': row 0 holds NaN"),
        (["a", "b"], ["{c}"], 0.0, "row 0 has length zero"),
    ],
)
def test_class_vectors_refuse(classes, templates, value, sentence):
    with pytest.raises(UserError, match=sentence):
        class_vectors(lambda prompts: torch.full((len(prompts), 3), value), classes, templates)


def test_opposite_prompts_have_no_mean():
    with pytest.raises(UserError, match=r"mean prompts of the classes: row 0 has length zero"):
        class_vectors(lambda prompts: torch.tensor([[1.0, 0.0], [-1.0, 0.0]]), ["a"], ["{c}", "no {c}"])


def test_hand_made_accuracy():
    """On axes: an image's coordinates are its scores up to a factor, so its order of classes can be read off."""
    images = torch.tensor(
        [
            [9.0, 1, 2, 3, 4, 5, 6],  # 0 6 5 4 3 | 2 1
            [9.0, 8, 7, 6, 5, 4, 3],  # 0 1 2 3 4 | 5 6
            [1.0, 2, 3, 4, 5, 6, 7],  # 6 5 4 3 2 | 1 0
            [1.0, 9, 1, 1, 1, 1, 2],  # 1 6 0 2 3 | 4 5, equal ones by their ids
        ]
    )
    found = accuracy(images, torch.eye(7), [0, 0, 6, 4])
    assert found == {
        "acc1": 0.75, "acc5": 0.75, "mean_per_class_recall": pytest.approx((1 + 1 + 0) / 3),
        "images": 4, "classes": 7, "classes_without_images": 4,
    }  # fmt: skip
    found = accuracy(images, torch.eye(7), np.array([4, 5, 1, 3], np.uint8), topk=(3, 4, 5, 6, 7))
    # ranks of the labels: 4th, 6th, 6th, 5th
    assert [found[f"acc{k}"] for k in (1, 3, 4, 5, 6)] == [0, 0, 0.25, 0.5, 1]
    assert "acc7" not in found


@pytest.mark.parametrize(("classes", "kept"), [(2, False), (4, False), (5, False), (6, True)])
def test_acc5_only_where_it_can_fail(classes, kept):
    found = accuracy(torch.eye(classes), torch.eye(classes), range(classes))
    assert found["acc1"] == found["mean_per_class_recall"] == 1
    assert ("acc5" in found) is kept
    assert all(isinstance(value, float) and math.isfinite(value) for value in found.values())


def test_a_collapsed_model_answers_the_first_classes():
    """All scores tie, so class 0 is right in 1 of C balanced classes, and classes 0 to 4 are in 5 of C."""
    classes, each = 50, 13
    labels = np.repeat(np.arange(classes), each)
    point = torch.randn(1, 24)
    found = accuracy(point.repeat(len(labels), 1), point.repeat(classes, 1), labels)
    assert found["acc1"] == found["mean_per_class_recall"] == 1 / classes
    assert found["acc5"] == 5 / classes


def test_mean_per_class_recall_weighs_classes_alike():
    """Nine right in a class of nine, none in a class of one: 0.9 of the images, half of the classes."""
    found = accuracy(torch.eye(3)[[0] * 10], torch.eye(3), [0] * 9 + [1])
    assert found["acc1"] == 0.9
    assert found["mean_per_class_recall"] == 0.5
    assert found["classes_without_images"] == 1


@pytest.mark.parametrize("scale", [1.0, 1e-3])
def test_against_numpy(scale):
    """More images and classes than one tile holds, in float64 by sorting the whole product."""
    generator = np.random.default_rng(1)
    images, classes = generator.normal(size=(517, 16)), generator.normal(size=(2003, 16))
    labels = generator.integers(0, 40, 517)
    images += classes[labels]
    unit = [x / np.linalg.norm(x, axis=1, keepdims=True) for x in (images, classes)]
    order = np.argsort(-(unit[0] @ unit[1].T), axis=1, kind="stable")
    right = order == labels[:, None]
    recalls = [right[labels == label, 0].mean() for label in np.unique(labels)]
    found = accuracy(torch.from_numpy(scale * images), classes.astype(np.float32), torch.from_numpy(labels))
    assert 0.1 < found["acc1"] < found["acc5"] < 0.99
    assert found["acc1"] == pytest.approx(right[:, 0].mean(), abs=1e-12)
    assert found["acc5"] == pytest.approx(right[:, :5].any(axis=1).mean(), abs=1e-12)
    assert found["mean_per_class_recall"] == pytest.approx(np.mean(recalls), abs=1e-12)


@pytest.mark.parametrize("side", [0, 1])
def test_nan_is_refused(side):
    tables = [torch.eye(3), torch.eye(3)]
    tables[side][1, 1] = math.nan
    name = ("image embeddings", "class vectors")[side]
    with pytest.raises(UserError, match=f"{name}: row 1 holds NaN"):
        accuracy(*tables, [0, 1, 2])


@pytest.mark.parametrize(
    ("labels", "sentence"),
    [
        ([0, 1], r"3 images but labels \(2,\)"),
        ([0.0, 1.0, 2.0], "float32; give one class id"),
        ([0, 1, 3], "between 0 and 3; the class ids go from 0 to 2"),
        ([0, 1, -1], "between -1 and 1"),
        (["0", "1", "2"], "<U1; give one class id"),
        ([True, False, True], "bool; give one class id"),
    ],
)
def test_labels_are_checked(labels, sentence):
    with pytest.raises(UserError, match=sentence):
        accuracy(torch.eye(3), torch.eye(3), labels)


def test_one_class_and_impossible_cutoffs_are_refused():
    with pytest.raises(UserError, match="Found 1 classes"):
        accuracy(torch.ones(2, 3), torch.ones(1, 3), [0, 0])
    with pytest.raises(UserError, match="k >= 1"):
        accuracy(torch.eye(3), torch.eye(3), [0, 1, 2], topk=(0, 1))


@pytest.fixture
def labelled_folder(tmp_path):
    for number, name in enumerate(NAMES):
        own = tmp_path / "set" / name.replace(" ", "_")
        own.mkdir(parents=True)
        for i in range(3):
            noise(10 * number + i).save(own / f"{i}.png")
    return tmp_path / "set"


def test_figures_of_a_folder_equal_the_steps_by_hand(labelled_folder):
    model = tiny_composite()
    labelled = open_labelled(str(labelled_folder))
    images = model.encode_image([labelled.image(i) for i in range(len(labelled))], normalize=True)
    texts = [[template.replace("{c}", name) for template in DEFAULT_TEMPLATES] for name in labelled.classes]
    means = torch.stack([model.encode_text(own, normalize=True).mean(0) for own in texts])
    scores = images @ torch.nn.functional.normalize(means, dim=1).T
    order = scores.argsort(dim=1, descending=True).numpy()
    model.train()
    found = zero_shot_figures(model, labelled, batch_size=4)
    assert model.training
    right = order == labelled.labels[:, None]
    assert found["acc1"] == found["mean_per_class_recall"] == pytest.approx(right[:, 0].mean())
    assert found["acc5"] == pytest.approx(right[:, :5].any(axis=1).mean())
    assert found["images"] == 21
    assert found["unreadable"] == 0


KINDS = ("gnu", "yak", "zebra")


class Places:
    """Images and prompts of class i lie on axis i; an image tells its class by its grey value."""

    def __init__(self):
        self.prompts = []

    def encode_image(self, images, *, batch_size=64):
        return torch.stack([torch.eye(3)[image.getpixel((0, 0))[0] // 100] for image in images])

    def encode_text(self, texts, *, batch_size=256):
        self.prompts += texts
        return torch.stack([torch.eye(3)[next(i for i in range(3) if KINDS[i] in text)] for text in texts])


def grey_folder(folder, values):
    for name, own in zip(KINDS, values, strict=True):
        (folder / name).mkdir(parents=True)
        for i, value in enumerate(own):
            Image.new("RGB", (4, 4), (value,) * 3).save(folder / name / f"{i}.png")
    return folder


def test_unreadable_images_are_counted_and_left_out(tmp_path):
    folder = grey_folder(tmp_path, ([100, 0, 0, 0], [100, 0], [200]))
    assert zero_shot_figures(Places(), open_labelled(str(folder)))["acc1"] == pytest.approx(5 / 7)
    # Were a label shifted by the lost image, a yak would count for a gnu.
    (folder / "gnu" / "0.png").write_bytes(b"no picture")
    (folder / "zebra" / "0.png").unlink()
    (folder / "zebra" / "0.png").symlink_to("nowhere")
    found = zero_shot_figures(Places(), open_labelled(str(folder)), batch_size=2)
    assert found == {
        "acc1": pytest.approx(4 / 5), "mean_per_class_recall": pytest.approx((1 + 1 / 2) / 2),
        "images": 5, "classes": 3, "classes_without_images": 1, "unreadable": 2,
    }  # fmt: skip


def test_templates_of_the_data_come_first(tmp_path):
    folder = grey_folder(tmp_path, ([0], [100], [200]))
    model = Places()
    zero_shot_figures(model, open_labelled(str(folder)))
    assert len(model.prompts) == 3 * len(DEFAULT_TEMPLATES)
    (folder / "zeroshot_classification_templates.txt").write_text("my {c}\n")
    model = Places()
    assert zero_shot_figures(model, open_labelled(str(folder)))["acc1"] == 1
    assert model.prompts == ["my gnu", "my yak", "my zebra"]


def test_nothing_readable_ends_in_a_sentence(tmp_path):
    folder = grey_folder(tmp_path, ([0], [100], [200]))
    for path in folder.glob("*/*.png"):
        path.write_bytes(b"")
    with pytest.raises(UserError, match="None of the 3 images can be read"):
        zero_shot_figures(Places(), open_labelled(str(folder)))
