"""A batch in parts gives the losses, teacher weights and gradients of the whole one."""

from __future__ import annotations

import pytest
import torch
from accelerate import Accelerator
from helpers.distilling import CONTRASTIVE, TEXTS, batch_of, class_terms, sequence_of, tiny_student, tiny_teachers
from helpers.pairs import picture_pairs
from torch import nn

from vlkd.distill.distiller import Distiller
from vlkd.distill.teachers import OnlineTeacher
from vlkd.distill.term import Term
from vlkd.engine.step import backward_step, split
from vlkd.errors import UserError
from vlkd.models.spec import CompositeSpec, build_composite
from vlkd.models.tokenizer import train_tokenizer
from vlkd.weighting import GradientBalanced

ALL = tuple(range(8))
TERMS = (CONTRASTIVE, *class_terms("one", "two"))


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    return picture_pairs(tmp_path_factory.mktemp("pictures"), TEXTS)


@pytest.fixture(scope="module")
def accelerator():
    return Accelerator(cpu=True)


def stepped(pairs, accelerator, parts, student=None, rows=ALL):
    models = {"student": student or tiny_student()} | tiny_teachers()
    torch.manual_seed(5)
    sources = {name: OnlineTeacher(name, model) for name, model in models.items() if name != "student"}
    distiller = Distiller(models["student"], TERMS, sources).train()
    torch.manual_seed(6)
    step = backward_step(
        distiller,
        batch_of(sequence_of(pairs, models), rows),
        GradientBalanced(0.9, normalised=True),
        accelerator,
        parts,
    )
    return step, {name: value.grad for name, value in distiller.named_parameters()}, distiller


@pytest.mark.parametrize("parts", [2, 3, 8, 20])
def test_parts_are_the_whole(parts, pairs, accelerator):
    whole, expected, _ = stepped(pairs, accelerator, 1)
    found, gradients, _ = stepped(pairs, accelerator, parts)
    # Quotients of differences between gradients: rounding shows in them several times as much as in losses.
    assert found.balance.weights == pytest.approx(whole.balance.weights, abs=5e-5)
    assert set(found.losses) == {term.name for term in TERMS}
    for name, loss in whole.losses.items():
        torch.testing.assert_close(found.losses[name], loss, rtol=1e-5, atol=1e-6)
    for name, gradient in expected.items():
        assert (gradients[name] - gradient).abs().max() <= 1e-5 * gradient.abs().max(), name
    # The two teachers do not get the same weight, so that a weight per part would show.
    assert abs(whole.balance.weights["one/image"] - 0.5) > 0.01


def test_a_weight_per_part_would_differ(pairs, accelerator):
    whole, *_ = stepped(pairs, accelerator, 1)
    first, *_ = stepped(pairs, accelerator, 1, rows=(0, 1, 2, 3))
    assert first.balance.weights["one/image"] != pytest.approx(whole.balance.weights["one/image"], abs=1e-3)


def test_random_draws_are_replayed(pairs, accelerator):
    """With dropout the second pass must see the first one's features: replaying gives each part the same draws."""
    student = tiny_student()
    for module in student.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.5
    seen = []
    encode = student.encode
    student.encode = lambda inputs, want: seen.append(found := encode(inputs, want)) or found  # type: ignore[method-assign]
    stepped(pairs, accelerator, 2, student)
    assert len(seen) == 4
    for first, second in ((0, 2), (1, 3)):
        torch.testing.assert_close(seen[first]["text.embed"], seen[second]["text.embed"], rtol=0, atol=0)


def test_running_statistics_forget_once(pairs, accelerator):
    spec = CompositeSpec(image="test_resnet", image_size=32, text_width=16, text_layers=1, text_heads=2, width=12)
    torch.manual_seed(0)
    student = build_composite(spec, tokenizer=train_tokenizer(["a dog", "a red square"], vocab_size=60))
    *_, distiller = stepped(pairs, accelerator, 2, student)
    norms = [m for m in distiller.student.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    assert all(norm.track_running_stats and norm.momentum == 0.1 for norm in norms)
    # Two updates that each keep sqrt(0.9) keep 0.9 of the first mean, 0, and variance, 1: what one update keeps.
    torch.manual_seed(0)
    again = build_composite(spec, tokenizer=train_tokenizer(["a dog", "a red square"], vocab_size=60))
    *_, whole = stepped(pairs, accelerator, 1, again)
    first, other = (next(m for m in d.modules() if isinstance(m, nn.BatchNorm2d)) for d in (distiller, whole))
    torch.testing.assert_close(first.running_mean, other.running_mean, rtol=0.05, atol=1e-3)
    assert int(first.num_batches_tracked) == 2


def test_captions_follow_their_images(pairs):
    batch = batch_of(sequence_of(pairs, {"student": tiny_student()}), ALL)
    parts = list(split(batch, 3))
    assert [key for part in parts for key in part.keys] == batch.keys
    assert torch.equal(torch.cat([part.texts for part in parts]), batch.texts)
    for part in parts:
        assert int(part.captioned.sum()) == len(part.texts) == len(part.own_ids)
        assert len(part.inputs["student"]["ids"]) == max(1, len(part.texts))
        assert len(part.inputs["student"]["pixels"]) == len(part.keys)
    alone = next(part for part in split(batch, 8) if not len(part.texts))
    assert alone.inputs["student"]["ids"].shape[0] == 1


def test_a_loss_that_is_not_finite_names_term_and_samples(pairs, accelerator):
    student = tiny_student()
    with torch.no_grad():
        student.image_projection[0].weight.fill_(float("nan"))
    with pytest.raises(UserError, match=r"contrastive = nan.*p0"):
        stepped(pairs, accelerator, 1, student)


def test_objectives_that_draw_draw_anew_at_every_step(pairs, accelerator):
    """With parts, replaying the towers' draws must not take back the draws of an objective."""
    drawn = []

    def noisy(image):
        drawn.append(torch.rand(3))
        return image.square().sum(dim=1)

    term = Term(name="noisy", objective=noisy, features=("student.image.embed",))
    distiller = Distiller(tiny_student(), (term,), {}).train()
    batch = batch_of(sequence_of(pairs, {"student": distiller.student}), ALL)
    torch.manual_seed(0)
    for _ in range(3):
        backward_step(distiller, batch, GradientBalanced(), accelerator, 2)
    assert not torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[1], drawn[2])


def test_a_batch_of_unreadable_pictures_has_no_loss_and_no_gradient(tmp_path, accelerator):
    broken = picture_pairs(tmp_path, TEXTS, broken=ALL)
    models = {"student": tiny_student()} | tiny_teachers()
    sources = {name: OnlineTeacher(name, model) for name, model in models.items() if name != "student"}
    distiller = Distiller(models["student"], TERMS, sources).train()
    batch = batch_of(sequence_of(broken, models), ALL)
    assert batch.keys == []
    for parts in (1, 2):
        distiller.zero_grad()
        step = backward_step(distiller, batch, GradientBalanced(), accelerator, parts)
        assert step.losses == {}
        assert step.total.item() == 0
        assert all(value.grad is None or not value.grad.any() for value in distiller.parameters())
