"""Teachers' weights from gradients at the anchor: by hand, by definition, and who is grouped."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from helpers.distilling import CONTRASTIVE, TEXTS, batch_of, class_terms, sequence_of, tiny_student, tiny_teachers
from helpers.pairs import picture_pairs

from vlkd.distill.balance import balance_teachers, gradient_gramian
from vlkd.distill.distiller import Compared, Distiller
from vlkd.distill.teachers import OnlineTeacher
from vlkd.distill.term import Term
from vlkd.errors import UserError
from vlkd.objectives import class_kl, embedding_mse, info_nce
from vlkd.weighting import Fixed, GradientBalanced, LossRelative, min_norm_weights

ALL = tuple(range(8))


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    return picture_pairs(tmp_path_factory.mktemp("pictures"), TEXTS)


def compared_of(pairs, terms, teachers=None):
    models = {"student": tiny_student()} | (teachers or tiny_teachers())
    torch.manual_seed(5)
    sources = {name: OnlineTeacher(name, model) for name, model in models.items() if name != "student"}
    distiller = Distiller(models["student"], terms, sources)
    return distiller, distiller(batch_of(sequence_of(pairs, models), ALL))


def leaf_losses(*gradients):
    """Losses with exactly these gradients at one anchor."""
    anchor = torch.zeros(2, 2, requires_grad=True)
    wanted = [torch.tensor(gradient, dtype=torch.float32).view(2, 2) for gradient in gradients]
    return [(anchor * gradient).sum() for gradient in wanted], anchor


def test_the_gramian_of_known_gradients():
    rows = [[1.0, 0.0, 2.0, 0.0], [0.0, 3.0, 1.0, 0.0], [-1.0, 0.0, -2.0, 0.0]]
    losses, anchor = leaf_losses(*rows)
    expected = np.array(rows) @ np.array(rows).T
    np.testing.assert_allclose(gradient_gramian(losses, [anchor]).numpy(), expected)


def test_gradients_are_per_sample_and_not_of_the_mean():
    # The two samples' gradients cancel in the mean over the batch; per sample they are long and opposed.
    losses, anchor = leaf_losses([1.0, 0.0, -1.0, 0.0], [-1.0, 0.0, 1.0, 0.0])
    gramian = gradient_gramian(losses, [anchor]).numpy()
    np.testing.assert_allclose(gramian, [[2.0, -2.0], [-2.0, 2.0]])


def test_the_anchor_stands_before_the_heads(pairs):
    """The Gramian by finite differences of the losses in the student's embeddings."""
    terms = class_terms("one", "two")
    distiller, compared = compared_of(pairs, terms)
    anchor = compared.anchors["image"]
    losses = [compared.losses[f"{name}/image"] for name in ("one", "two")]
    found = gradient_gramian(losses, [anchor]).numpy()
    numeric = []
    for name in ("one", "two"):
        teacher = distiller.teachers[name]
        batch = batch_of(sequence_of(pairs, {"student": distiller.student} | tiny_teachers()), ALL)
        targets = teacher.targets(batch, {"image.embed", "text.embed", "logit_scale"})
        first = [list(batch.caption_ids.tolist()).index(i) for i in dict.fromkeys(batch.caption_ids.tolist())]
        head = distiller.heads[name].weight.detach().double()
        rows = anchor.detach().double().requires_grad_()
        loss = class_kl(
            rows @ head.T, targets["image.embed"].double(), targets["text.embed"][first].double(),
            targets["logit_scale"].double(), tau=2.0,
        ).mean()  # fmt: skip
        numeric.append(torch.autograd.grad(loss, rows)[0].flatten())
    stacked = torch.stack(numeric)
    np.testing.assert_allclose(found, (stacked @ stacked.T).numpy(), rtol=1e-3)


def test_the_towers_are_never_entered(pairs):
    distiller, compared = compared_of(pairs, class_terms("one", "two"))
    balance_teachers(distiller.terms, compared, GradientBalanced(0.6))
    assert all(value.grad is None for value in distiller.parameters())


def test_weights_are_of_each_anchor_and_no_gradient_flows_through_them(pairs):
    terms = (CONTRASTIVE, *class_terms("one", "two"))
    distiller, compared = compared_of(pairs, terms)
    balance = balance_teachers(terms, compared, GradientBalanced(0.9))
    assert "contrastive" not in balance.weights
    for side in ("image", "text"):
        losses = [compared.losses[f"{name}/{side}"] for name in ("one", "two")]
        gramian = gradient_gramian(losses, [compared.anchors[side]]).numpy()
        alpha = min_norm_weights(gramian, 0.9)
        assert [balance.weights[f"{name}/{side}"] for name in ("one", "two")] == pytest.approx(list(alpha))
        assert [balance.figures[f"weight/{side}/{name}"] for name in ("one", "two")] == pytest.approx(list(alpha))
        cosine = gramian[0, 1] / np.sqrt(gramian[0, 0] * gramian[1, 1])
        assert balance.figures[f"gradient_cosine/{side}/one~two"] == pytest.approx(cosine)
        assert balance.figures[f"residual/{side}"] < 1e-9
        length = np.sqrt(alpha @ gramian @ alpha) / (alpha @ np.sqrt(np.diag(gramian)))
        assert balance.figures[f"common_descent/{side}"] == pytest.approx(length)
    assert balance.figures["weight/image/one"] != pytest.approx(balance.figures["weight/text/one"], abs=1e-3)
    total = distiller.total(compared.losses, balance.weights)
    by_hand = compared.losses["contrastive"] + sum(
        balance.weights[term.name] * compared.losses[term.name] for term in terms[1:]
    )
    torch.testing.assert_close(total, by_hand)


def test_one_teacher_gets_one_and_identical_teachers_a_half(pairs):
    terms = class_terms("one")
    distiller, compared = compared_of(pairs, terms)
    assert set(balance_teachers(terms, compared, GradientBalanced(0.6)).weights.values()) == {1.0}
    twins = {"one": tiny_teachers()["one"], "two": tiny_teachers()["one"]}
    terms = class_terms("one", "two")
    torch.manual_seed(3)
    models = {"student": tiny_student()} | twins
    sources = {name: OnlineTeacher(name, model) for name, model in twins.items()}
    distiller = Distiller(models["student"], terms, sources)
    distiller.heads["two"].load_state_dict(distiller.heads["one"].state_dict())
    compared = distiller(batch_of(sequence_of(pairs, models), ALL))
    weights = balance_teachers(terms, compared, GradientBalanced(1.0)).weights
    assert weights == pytest.approx(dict.fromkeys(weights, 0.5), abs=1e-6)


def test_several_terms_of_a_teacher_enter_with_their_weighted_sum():
    losses, anchor = leaf_losses([1.0, 0.0, 0.0, 0.0], [0.0, 2.0, 0.0, 0.0], [1.0, 0.0, 0.0, 0.0])
    features = ("projected.image.embed", "teacher.image.embed")
    terms = [
        Term(name="a", objective=embedding_mse, features=features, teacher="one", weight=3.0),
        Term(name="b", objective=embedding_mse, features=features, teacher="one"),
        Term(name="c", objective=embedding_mse, features=features, teacher="two"),
    ]
    compared = Compared(dict(zip("abc", losses, strict=True)), {"image": anchor})
    balance = balance_teachers(terms, compared, GradientBalanced(1.0))
    # g_one = (3, 2, 0, 0), g_two = (1, 0, 0, 0): <g2 - g1, g2> < 0, so all weight goes to the shorter.
    assert balance.weights == {"a": 0.0, "b": 0.0, "c": 1.0}
    assert balance.figures["gradient_norm/image/one"] == pytest.approx(np.sqrt(13))


def test_terms_of_both_sides_are_compared_at_both_anchors():
    image, text = (torch.zeros(1, 2, requires_grad=True) for _ in range(2))
    losses = {"a": (image * 3).sum() + (text * 4).sum(), "b": (text * 1).sum()}
    both = ("student.image.embed", "student.text.embed", "teacher.image.embed")
    terms = [Term(name=name, objective=info_nce, features=both, teacher=name) for name in "ab"]
    balance = balance_teachers(terms, Compared(losses, {"image": image, "text": text}), GradientBalanced(1.0))
    assert balance.figures["gradient_norm/image+text/a"] == pytest.approx(np.sqrt(2 * 9 + 2 * 16))
    assert terms[0].anchor == ("image", "text")


def test_rules_without_gradients_need_none():
    losses = [torch.tensor(4.0), torch.tensor(2.0)]
    features = ("projected.image.embed", "teacher.image.embed")
    terms = [Term(name=name, objective=embedding_mse, features=features, teacher=name) for name in "ab"]
    compared = Compared(dict(zip("ab", losses, strict=True)), {})
    assert balance_teachers(terms, compared, Fixed((1.0, 3.0))).weights == {"a": 0.25, "b": 0.75}
    relative = LossRelative()
    assert balance_teachers(terms, compared, relative).weights == {"a": 0.5, "b": 0.5}
    later = Compared({"a": torch.tensor(2.0), "b": torch.tensor(1.6)}, {})
    # |4 - 2| / 2 = 1 and |2 - 1.6| / 1.6 = 1/4.
    assert balance_teachers(terms, later, relative).weights == pytest.approx({"a": 0.8, "b": 0.2})


def test_a_batch_without_captions_leaves_the_text_terms_out(pairs):
    terms = class_terms("one", "two")
    models = {"student": tiny_student()} | tiny_teachers()
    sources = {name: OnlineTeacher(name, model) for name, model in models.items() if name != "student"}
    compared = Distiller(models["student"], terms, sources)(batch_of(sequence_of(pairs, models), (2, 5, 7)))
    assert not compared.losses
    assert balance_teachers(terms, compared, GradientBalanced(0.6)).weights == {}


def test_gradients_that_all_vanish_have_a_figure(pairs):
    """One class vector makes every distribution certain: no loss, no gradient, and still numbers that JSON can hold."""
    models = {"student": tiny_student()} | tiny_teachers()
    sources = {name: OnlineTeacher(name, model) for name, model in models.items() if name != "student"}
    compared = Distiller(models["student"], class_terms("one", "two"), sources)(
        batch_of(sequence_of(pairs, models), (2, 5, 1))
    )
    for normalised in (False, True):
        balance = balance_teachers(class_terms("one", "two"), compared, GradientBalanced(0.6, normalised))
        assert balance.weights["one/image"] == balance.weights["two/image"] == 0.5
        assert all(np.isfinite(value) for value in balance.figures.values())


def test_terms_without_an_embedding_cannot_be_balanced():
    losses = [torch.tensor(1.0), torch.tensor(2.0)]
    terms = [
        Term(name=name, objective=embedding_mse, features=("student.image.pooled",), teacher=name) for name in "ab"
    ]
    compared = Compared(dict(zip("ab", losses, strict=True)), {})
    assert balance_teachers(terms, compared, Fixed((1.0, 1.0))).weights == {"a": 0.5, "b": 0.5}
    with pytest.raises(UserError, match="read no embedding"):
        balance_teachers(terms, compared, GradientBalanced())
