"""Selection scores against a transcription of Winoground's inequalities, and the collapsed model."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from vlkd.errors import UserError
from vlkd.protocols.selection import ChoiceRows, associations, selection


def unit(x):
    return x / np.linalg.norm(x, axis=1, keepdims=True)


def test_winograd_pairs_against_the_four_inequalities():
    rng = np.random.default_rng(0)
    meaning = rng.normal(size=(700, 16))
    images, texts = meaning + 2 * rng.normal(size=(700, 16)), meaning + 2 * rng.normal(size=(700, 16))
    choices = [ChoiceRows(images=(i, i + 1), texts=(i, i + 1)) for i in range(0, 700, 2)]
    text, image = [], []
    for i in range(0, 700, 2):
        s = unit(images)[i : i + 2] @ unit(texts)[i : i + 2].T
        text.append(s[0, 0] > s[0, 1] and s[1, 1] > s[1, 0])
        image.append(s[0, 0] > s[1, 0] and s[1, 1] > s[0, 1])
    found = selection(images, texts, choices)
    assert found.metrics == {
        "text_acc": pytest.approx(np.mean(text)), "image_acc": pytest.approx(np.mean(image)),
        "acc": pytest.approx(np.mean(np.array(text) & np.array(image))),
    }  # fmt: skip
    assert 0.2 < found.score < found.metrics["text_acc"] < 0.9
    np.testing.assert_array_equal(found.per_item["correct"], np.array(text) & np.array(image))
    assert ((found.per_item["margin"] > 0) == (found.per_item["correct"] == 1)).all()
    assert found.random_score == 1 / 6
    assert selection(images, texts, choices, main_metric="text_acc").random_score == 1 / 4
    assert found.interval[0] < found.score < found.interval[1]


def test_random_scores_by_simulation():
    """300,000 tables of independent scores; a standard error is below 0.001."""
    rng = np.random.default_rng(0)
    s = rng.random((300_000, 2, 2))
    text = (s[:, 0, 0] > s[:, 0, 1]) & (s[:, 1, 1] > s[:, 1, 0])
    image = (s[:, 0, 0] > s[:, 1, 0]) & (s[:, 1, 1] > s[:, 0, 1])
    pair = ([ChoiceRows(images=(0, 1), texts=(0, 1))], torch.eye(2))
    for main, hits in (("text_acc", text), ("image_acc", image), ("acc", text & image)):
        assert selection(pair[1], pair[1], pair[0], main_metric=main).random_score == pytest.approx(
            hits.mean(), abs=0.004
        )


def test_one_image_and_many_captions_have_no_image_score():
    rng = np.random.default_rng(1)
    images, texts = rng.normal(size=(300, 8)), rng.normal(size=(1500, 8))
    choices = [ChoiceRows(images=(i,), texts=tuple(range(5 * i, 5 * i + 5)), group="xyz"[i % 3]) for i in range(300)]
    scores = np.einsum("id,ijd->ij", unit(images), unit(texts).reshape(300, 5, 8))
    right = scores.argmax(1) == 0
    found = selection(images, texts, choices)
    by_group = {group: right[i::3].mean() for i, group in enumerate("xyz")}
    assert found.metrics == pytest.approx(
        {
            "text_acc": right.mean(), "acc": right.mean(), "acc_mean_of_groups": np.mean(list(by_group.values())),
            **{f"acc_group_{group}": value for group, value in by_group.items()},
        }
    )  # fmt: skip
    assert found.per_class == pytest.approx(by_group)
    assert found.random_score == pytest.approx(1 / 5)


@pytest.mark.parametrize(("images", "texts"), [(1, 2), (2, 2), (1, 5), (3, 1)])
def test_a_collapsed_model_chooses_nothing(images, texts):
    """An argmax would prefer the first caption, which is the true one, and give 1."""
    point = torch.randn(1, 20, generator=torch.Generator().manual_seed(0))
    choices = [ChoiceRows(images=tuple(range(images)), texts=tuple(range(i, i + texts))) for i in range(300)]
    found = selection(point.repeat(images, 1), point.repeat(300 + texts, 1), choices)
    assert set(found.metrics.values()) == {0.0}
    assert found.counts["ties"] == 300


def test_one_equal_caption_is_an_error():
    images = torch.tensor([[1.0, 0.2], [0.2, 1.0]])
    texts = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
    choices = [ChoiceRows(images=(0,), texts=(0, 1)), ChoiceRows(images=(0,), texts=(0, 2))]
    found = selection(images, texts, choices)
    assert found.per_item["correct"].tolist() == [0, 1]
    assert found.counts["ties"] == 1


def test_shapes_may_be_mixed():
    """A figure is over the items that ask for it: 1 x 2 asks no image, 2 x 1 no caption."""
    eye = torch.eye(3)
    choices = [
        ChoiceRows(images=(0,), texts=(0, 1)),
        ChoiceRows(images=(1, 0), texts=(0,)),
        ChoiceRows(images=(2, 1), texts=(2, 1)),
    ]
    found = selection(eye, eye, choices)
    assert found.metrics == {"text_acc": 1.0, "image_acc": 0.5, "acc": pytest.approx(2 / 3)}
    assert found.random_score == pytest.approx((1 / 2 + 1 / 2 + 1 / 6) / 3)
    assert found.interval is not None


def test_an_item_is_scored_alike_in_any_order_and_company():
    rng = np.random.default_rng(2)
    images, texts = rng.normal(size=(500, 24)), rng.normal(size=(1000, 24))
    choices = [ChoiceRows(images=(i,), texts=(2 * i, 2 * i + 1)) for i in range(500)]
    found = selection(images, texts, choices).per_item["margin"]
    order = rng.permutation(500)
    np.testing.assert_array_equal(
        selection(images, texts, [choices[i] for i in order]).per_item["margin"], found[order]
    )
    for i in (0, 77, 499):
        assert selection(images, texts, [choices[i]]).per_item["margin"][0] == found[i]


def drawn_associations(sizes, seed=3):
    """Items of some of 60 images and one of 20 texts, between 1 and all but one of them gold."""
    rng = np.random.default_rng(seed)
    return [
        ChoiceRows(
            images=tuple(rng.permutation(60)[:size].tolist()),
            texts=(int(rng.integers(20)),),
            gold=tuple(rng.permutation(size)[: rng.integers(1, size)].tolist()),
        )
        for size in sizes
    ]


def test_associations_against_scikit_learns_jaccard():
    metrics = pytest.importorskip("sklearn.metrics")
    rng = np.random.default_rng(4)
    images, texts = rng.normal(size=(60, 6)), rng.normal(size=(20, 6))
    sizes = np.array([5, 6, 7, 10, 12, 5, 10] * 30)
    choices = drawn_associations(sizes)
    wanted = []
    for choice in choices:
        scores = unit(images)[list(choice.images)] @ unit(texts)[choice.texts[0]]
        truth = np.isin(np.arange(len(scores)), choice.gold)
        wanted.append(metrics.jaccard_score(truth, np.isin(np.arange(len(scores)), np.argsort(scores)[-truth.sum() :])))
    wanted = np.array(wanted)
    found = associations(images, texts, choices, main_metric="jaccard_score_10-12")
    np.testing.assert_allclose(found.per_item["correct"], wanted, rtol=1e-12)
    assert found.metrics == pytest.approx(
        {
            "avg_jaccard_score": wanted.mean(), "jaccard_score_10-12": wanted[sizes >= 10].mean(),
            "jaccard_score_5-6": wanted[sizes <= 6].mean(),
            **{f"jaccard_score_{size}": wanted[sizes == size].mean() for size in (5, 6, 7, 10, 12)},
        }
    )  # fmt: skip
    assert found.interval[0] < found.score < found.interval[1]
    assert (found.counts["items"], found.counts["main_metric_items"]) == (210, 90)
    small = associations(images, texts, [choices[0]])
    assert set(small.metrics) == {"avg_jaccard_score", "jaccard_score_5", "jaccard_score_5-6"}


def test_random_associations_by_simulation():
    """The closed form is the mean score of 4,000 random rankings; a standard error is about 0.004."""
    choices = [ChoiceRows(images=tuple(range(10)), texts=(i,), gold=(1, 4, 8)) for i in range(4000)]
    rng = np.random.default_rng(5)
    found = associations(np.eye(10), rng.normal(size=(4000, 10)), choices)
    assert found.random_score == pytest.approx(found.score, abs=0.016)
    one = [ChoiceRows(images=(0, 1, 2, 3), texts=(0,), gold=(2,))]
    assert associations(np.eye(4), np.ones((1, 4)), one).random_score == 1 / 4


def test_of_equal_cosines_the_distractor_is_chosen():
    """5 images at one point: the 3 distractors, and of the 4 gold ones only those there is no way around."""
    point = torch.ones(5, 3)
    for gold, wanted in (((0,), 0.0), ((0, 1), 0.0), ((0, 1, 2, 3), 3 / 5), ((0, 1, 2, 3, 4), 1.0)):
        item = ChoiceRows(images=(0, 1, 2, 3, 4), texts=(0,), gold=gold)
        assert associations(point, point[:1], [item]).score == wanted


@pytest.mark.parametrize(
    ("item", "sentence"),
    [
        (ChoiceRows(images=(0, 1), texts=(0, 1), gold=(0,)), "Item 0 has 2 captions"),
        (ChoiceRows(images=(0, 1), texts=(0,)), r"the gold images \[\] of 2"),
        (ChoiceRows(images=(0, 1), texts=(0,), gold=(2,)), r"the gold images \[2\] of 2"),
        (ChoiceRows(images=(0, 9), texts=(0,), gold=(0,)), r"expected .* rows 0 to 2"),
    ],
)
def test_bad_associations_are_refused(item, sentence):
    with pytest.raises(UserError, match=sentence):
        associations(torch.eye(3), torch.eye(3), [item])


def test_a_figure_over_no_item_is_refused_as_the_main_metric():
    item = ChoiceRows(images=(0, 1), texts=(0,), gold=(0,))
    with pytest.raises(UserError, match="No figure 'jaccard_score_10-12'"):
        associations(torch.eye(3), torch.eye(3), [item], main_metric="jaccard_score_10-12")


@pytest.mark.parametrize(
    ("choices", "sentence"),
    [
        ([], "no item"),
        ([ChoiceRows(images=(0,), texts=(0, 3))], r"Item 0 has the captions \[0, 3\]; expected .* rows 0 to 2"),
        ([ChoiceRows(images=(-1,), texts=(0, 1))], r"the images \[-1\]"),
        ([ChoiceRows(images=(), texts=(0, 1))], r"the images \[\]"),
        ([ChoiceRows(images=(0,), texts=(0,))], "one image and one caption"),
    ],
)
def test_bad_items_are_refused(choices, sentence):
    with pytest.raises(UserError, match=sentence):
        selection(torch.eye(3), torch.eye(3), choices)


def test_bad_embeddings_and_figures_are_refused():
    choices = [ChoiceRows(images=(0,), texts=(0, 1))]
    with pytest.raises(UserError, match="image embeddings: row 1 holds NaN"):
        selection(torch.tensor([[1.0], [math.nan]]), torch.ones(2, 1), choices)
    with pytest.raises(UserError, match="text embeddings: row 0 has length zero"):
        selection(torch.ones(1, 1), torch.zeros(2, 1), choices)
    with pytest.raises(UserError, match="No figure 'image_acc'"):
        selection(torch.eye(2), torch.eye(2), choices, main_metric="image_acc")
