"""What a classifier is compared with: DHO's loss in numpy, who gets whose gradient, the teacher's cache of shots."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from helpers.classes import CLASSES, ROWS, KnownTeacher, image_batch, known_vectors, tiny_classifier

from vlkd import recipes
from vlkd.config import override
from vlkd.distill.class_distiller import ClassDistiller
from vlkd.distill.class_teacher import SHARPNESSES, WEIGHTS, ClassTeacher, ShotCache, choose_cache, shot_logits
from vlkd.distill.class_terms import ClassTerm
from vlkd.errors import UserError

ZETA, ETA = 0.05, 2.0
LABELS = torch.arange(ROWS) % len(CLASSES)
BATCHES = {"labelled": image_batch([0, 3, 7, 11], seed=1), "pool": image_batch([3, 20, 21, 30, 31, 32], seed=2)}


def distiller(*words: str, heads: str = "two") -> ClassDistiller:
    recipe = recipes.load(recipes.find("tasks", "dho"))
    config = override(recipe.config(), ["teacher.ref=known", *words])
    teacher = ClassTeacher(KnownTeacher(), known_vectors(), ZETA)
    return ClassDistiller(tiny_classifier(heads=heads), recipe.terms(config), LABELS, teacher)


def softmax(x):
    e = np.exp(x - x.max(1, keepdims=True))
    return e / e.sum(1, keepdims=True)


def numpy_loss(found: ClassDistiller) -> float:
    """lambda CE + (1 - lambda)(KL_labelled + KL_pool), each a mean over its own images, the KL times eta^2."""
    student = found.student
    with torch.no_grad():
        pixels = torch.cat([batch.inputs["student"]["pixels"] for batch in BATCHES.values()])
        logits = student.logits(student.features(pixels))
    label, teacher = (logits[name].double().numpy() for name in ("label", "teacher"))
    rows = torch.cat([batch.rows for batch in BATCHES.values()]).numpy()
    embed = KnownTeacher().embed.double().numpy()[rows]
    embed /= np.linalg.norm(embed, axis=1, keepdims=True)
    target = softmax(embed @ known_vectors().double().numpy().T / ZETA / ETA)
    kl = ETA**2 * (target * (np.log(target) - np.log(softmax(teacher / ETA)))).sum(1)
    n = len(BATCHES["labelled"].keys)
    ce = -np.log(softmax(label)[np.arange(n), LABELS.numpy()[rows[:n]]])
    return float(0.5 * ce.mean() + 0.5 * (kl[:n].mean() + kl[n:].mean()))


@pytest.mark.parametrize("heads", ["two", "one"])
def test_the_loss_is_the_papers(heads):
    found = distiller(heads=heads)
    total = sum(found.sums(found(BATCHES)).values()).detach()
    assert float(total) == pytest.approx(numpy_loss(found), rel=1e-5)


def test_each_head_gets_its_own_gradient_and_the_trunk_both():
    found = distiller()
    sums = found.sums(found(BATCHES))
    student = found.student
    trunk, label, teacher = (
        list(part)
        for part in (student.trunk_parameters(), student.head_parameters("label"), student.head_parameters("teacher"))
    )
    for group, own, other in (("supervised", label, teacher), ("distillation", teacher, label)):
        found.zero_grad()
        sums[group].backward(retain_graph=True)
        assert all(one.grad is not None and one.grad.abs().sum() > 0 for one in own)
        assert all(one.grad is None or not one.grad.any() for one in other)
        assert sum(float(one.grad.abs().sum()) for one in trunk if one.grad is not None) > 0


def test_labels_alone_and_the_teacher_alone_read_one_part():
    recipe = recipes.load(recipes.find("tasks", "dho"))
    alone = recipe.terms(override(recipe.config(), ["method.distillation=0"]))
    assert [term.part for term in alone] == ["labelled"]
    taught = recipe.terms(override(recipe.config(), ["method.supervised=0", "teacher.ref=x"]))
    assert [term.part for term in taught] == ["pool"]


@pytest.mark.parametrize("words", [["teacher.ref=x", "method.distillation=0"], [], ["teacher.ref=x", "method.eta=0"]])
def test_a_recipe_that_contradicts_itself_is_refused(words):
    recipe = recipes.load(recipes.find("tasks", "dho"))
    with pytest.raises(UserError, match=r"teacher\.ref|eta"):
        recipe.terms(override(recipe.config(), words))


def test_features_are_matched_through_a_head_to_the_teachers_width():
    found = distiller("method.match=features", heads="one")
    losses = found(BATCHES)
    with torch.no_grad():
        pixels = torch.cat([batch.inputs["student"]["pixels"] for batch in BATCHES.values()])
        seen = found.projection(found.student.features(pixels)).numpy()[4:]
    embed = KnownTeacher().embed[BATCHES["pool"].rows].numpy()
    cosine = (seen * embed).sum(1) / np.linalg.norm(seen, axis=1) / np.linalg.norm(embed, axis=1)
    assert float(losses["teacher/pool"].detach()) == pytest.approx(float((1 - cosine).mean()), rel=1e-5)


def test_a_part_without_a_readable_image_has_no_loss():
    found = distiller()
    losses = found({"labelled": image_batch([]), "pool": BATCHES["pool"]})
    assert set(losses) == {"teacher/pool"}


def test_cached_shots_add_tip_adapters_term():
    generator = torch.Generator().manual_seed(0)
    keys = torch.randn(6, 8, generator=generator)
    keys /= keys.norm(dim=1, keepdim=True)
    labels = torch.tensor([0, 1, 2, 0, 3, 3])
    queries = torch.randn(5, 8, generator=generator)
    cache = ShotCache(keys=keys, labels=labels, weight=2.0, sharpness=5.5)
    unit = queries.double().numpy() / np.linalg.norm(queries.double().numpy(), axis=1, keepdims=True)
    affinity = np.exp(-5.5 * (1 - unit @ keys.double().numpy().T))
    expected = 2.0 * affinity @ np.eye(5)[labels.numpy()]
    np.testing.assert_allclose(shot_logits(queries, cache, 5).numpy(), expected, rtol=1e-5)


def test_the_cache_is_chosen_on_validation_images_and_left_out_where_it_does_not_help():
    vectors = torch.eye(4)
    val, labels = vectors.repeat(5, 1), torch.arange(4).repeat(5)
    cache, accuracy = choose_cache(vectors.roll(1, 0), torch.arange(4), vectors, 0.1, val, labels)
    assert (cache.weight, accuracy) == (WEIGHTS[0], 1.0)
    # A teacher whose class vectors are exchanged is put right by its shots.
    cache, accuracy = choose_cache(vectors, torch.arange(4), vectors.roll(1, 0), 0.1, val, labels)
    assert accuracy == 1.0
    assert cache.weight > 10 * (1 - np.exp(-cache.sharpness)) ** -1 * 0.9
    assert cache.sharpness in SHARPNESSES


@pytest.mark.parametrize(
    ("features", "words"),
    [
        (("pool.labels",), "the pool has no labels"),
        (("labelled.label_logits", "pool.target_logits"), "one part alone"),
        (("both.features",), "expected labelled or pool"),
    ],
)
def test_a_term_of_nonsense_is_refused(features, words):
    with pytest.raises(UserError, match=words):
        ClassTerm(name="x", objective=torch.add, features=features, group="supervised")


def test_terms_that_read_a_teacher_need_one():
    recipe = recipes.load(recipes.find("tasks", "dho"))
    terms = recipe.terms(override(recipe.config(), ["teacher.ref=x"]))
    with pytest.raises(UserError, match=r"set teacher\.ref"):
        ClassDistiller(tiny_classifier(), terms, LABELS)


def test_autocast_does_not_round_the_targets():
    teacher = ClassTeacher(KnownTeacher(), known_vectors(), 0.01)
    expected = teacher.targets(BATCHES["pool"])["target_logits"]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = teacher.targets(BATCHES["pool"])["target_logits"]
    assert found.dtype == torch.float32
    assert torch.equal(found, expected)
