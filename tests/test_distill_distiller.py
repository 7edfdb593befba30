"""The losses of a batch by hand, who receives gradients, who takes part, and what is refused before the first step."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from helpers.distilling import (
    STUDENT_PAIR,
    TEXTS,
    batch_of,
    by_rows_terms,
    sequence_of,
    terms_of,
    tiny_student,
    tiny_teachers,
)
from helpers.pairs import picture_pairs
from helpers.shapes import Shapes

from vlkd.data.views import ViewSettings
from vlkd.distill.cache import CacheSpec, ensure_cache
from vlkd.distill.distiller import Distiller, among
from vlkd.distill.teachers import CachedTeacher, OnlineTeacher
from vlkd.distill.term import Term
from vlkd.errors import UserError
from vlkd.objectives import embedding_cosine, embedding_mse, info_nce

ALL = tuple(range(8))
CAPTIONED = [0, 1, 3, 4, 6]


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    return picture_pairs(tmp_path_factory.mktemp("pictures"), TEXTS)


@pytest.fixture
def models():
    return {"student": tiny_student()} | tiny_teachers()


def distiller_of(models, terms, **options):
    sources = {name: OnlineTeacher(name, model) for name, model in models.items() if name != "student"}
    return Distiller(models["student"], terms, sources, **options)


def uniform(distiller, losses, weight=0.5):
    """The total under the same weight for every teacher."""
    return distiller.total(losses, {term.name: weight for term in distiller.terms if term.teacher})


def unit(rows):
    return rows / rows.norm(dim=1, keepdim=True)


def even_cross_entropy(logits, target):
    target = target / target.sum(dim=1, keepdim=True)
    return -(target * (logits - logits.exp().sum(dim=1, keepdim=True).log())).sum(dim=1).mean()


def kl(teacher, student):
    teacher, student = (logits.softmax(dim=1) for logits in (teacher, student))
    return (teacher * (teacher / student).log()).sum(dim=1).mean()


def embeddings(model, part):
    """Image embeddings of all samples and text embeddings of the captioned ones, in float64."""
    found = model.encode(part, {"image.embed", "text.embed"})
    return found["image.embed"].double(), found["text.embed"].double()


def test_every_loss_and_the_total_by_hand(pairs, models):
    distiller = distiller_of(models, terms_of("one"))
    batch = batch_of(sequence_of(pairs, models), ALL)
    losses = distiller(batch).losses
    with torch.no_grad():
        image, text = embeddings(models["student"], batch.inputs["student"])
        teacher_image, teacher_text = embeddings(models["one"], batch.inputs["one"])
        head = distiller.heads["one"].weight.double()
        scale, teacher_scale = (float(models[name].log_logit_scale.exp()) for name in ("student", "one"))
        drawn = [pairs.texts()[number] for number in batch.texts]
        same = torch.tensor([[left == right for left in drawn] for right in drawn]).double()
        own = unit(image[CAPTIONED]) @ unit(text).T * scale
        theirs = unit(teacher_image[CAPTIONED]) @ unit(teacher_text).T * teacher_scale
        expected = {
            "contrastive": (even_cross_entropy(own, same) + even_cross_entropy(own.T, same.T)) / 2,
            "images": (unit(image @ head.T) - unit(teacher_image)).square().sum(dim=1).mean(),
            "texts": (unit(text @ head.T) - unit(teacher_text)).square().sum(dim=1).mean(),
            "relations": (kl(theirs, own) + kl(theirs.T, own.T)) / 2,
        }
    assert len(text) == 5
    assert same.sum() > 5
    assert losses.keys() == expected.keys()
    for name, value in expected.items():
        assert losses[name].item() == pytest.approx(float(value), rel=1e-4), name
    by_hand = expected["contrastive"] + 0.25 * (
        2 * expected["images"] + 0.5 * expected["texts"] + expected["relations"]
    )
    assert uniform(distiller, losses, 0.25).item() == pytest.approx(float(by_hand), rel=1e-4)


def test_match_marks_equal_captions_and_equal_rows(pairs, models):
    seen = []

    def objective(image, text, match):
        seen.append(match)
        return (image.square().sum() + text.square().sum()) * 0

    term = Term(name="probe", objective=objective, features=STUDENT_PAIR, match=True)
    # Rows 1 and 4 share their only caption; row 6 has one of row 0's two; row 3 comes twice.
    rows = (0, 1, 2, 3, 4, 3)
    sequence = sequence_of(pairs, {"student": models["student"]})
    position = {sequence.row_and_view(number)[0]: number for number in range(8)}
    later = {sequence.row_and_view(number)[0]: number for number in range(8, 16)}
    samples = [sequence[(later if i == 5 else position)[row]] for i, row in enumerate(rows)]
    Distiller(models["student"], (term,), {})(sequence.collate(samples))
    texts = [sample.caption for sample in samples if sample.caption]
    owners = [0, 1, 3, 4, 3]
    expected = [[a == b or owners[i] == owners[j] for j, b in enumerate(texts)] for i, a in enumerate(texts)]
    assert seen[0].tolist() == expected
    assert expected[1][3]
    assert expected[2][4]
    assert not expected[0][1]


def test_unlabelled_images_take_part_only_without_captions(pairs, models):
    distiller = distiller_of(models, terms_of("one"))
    sequence = sequence_of(pairs, models)
    whole, labelled = (distiller(batch_of(sequence, rows)).losses for rows in (ALL, CAPTIONED))
    for name in ("contrastive", "texts", "relations"):
        torch.testing.assert_close(whole[name], labelled[name], rtol=1e-5, atol=1e-6)
    alone = distiller(batch_of(sequence, (2, 5, 7))).losses
    assert alone.keys() == {"images"}
    # A mean over eight images is made of the means over five and three.
    torch.testing.assert_close(8 * whole["images"], 5 * labelled["images"] + 3 * alone["images"], rtol=1e-5, atol=1e-5)
    assert not torch.allclose(whole["images"], labelled["images"], rtol=1e-4)
    torch.testing.assert_close(uniform(distiller, alone), 0.5 * 2.0 * alone["images"])


def test_two_unlike_teachers_in_one_run(pairs, models):
    second = tuple(replace(term, name=f"{term.name} two", teacher="two") for term in terms_of("two") if term.teacher)
    distiller = distiller_of(models, (*terms_of("one"), *second))
    batch = batch_of(sequence_of(pairs, models), ALL)
    assert {name: tuple(part["pixels"].shape[2:]) for name, part in batch.inputs.items()} == {
        "student": (32, 32),
        "one": (40, 40),
        "two": (48, 48),
    }
    assert len({part["ids"].shape[1] for part in batch.inputs.values()}) >= 2
    assert {name: tuple(head.weight.shape) for name, head in distiller.heads.items()} == {
        "one": (20, 12),
        "two": (9, 12),
    }
    losses = distiller(batch).losses
    assert len(losses) == 7
    uniform(distiller, losses).backward()
    for head in distiller.heads.values():
        assert head.weight.grad.abs().max() > 0


def test_gradients_reach_student_and_heads_and_never_the_teacher(pairs, models):
    distiller = distiller_of(models, terms_of("one"))
    before = {name: value.clone() for name, value in models["one"].state_dict().items()}
    distiller.train()
    uniform(distiller, distiller(batch_of(sequence_of(pairs, models), ALL)).losses).backward()
    for name, value in distiller.named_parameters():
        assert value.grad is not None, name
        assert value.grad.isfinite().all(), name
    for tower in ("image_tower", "text_tower", "image_projection", "text_projection"):
        assert max(float(v.grad.abs().max()) for v in getattr(models["student"], tower).parameters()) > 0
    assert models["student"].log_logit_scale.grad.abs() > 0
    assert all(value.grad is None for name in ("one", "two") for value in models[name].parameters())
    assert not models["one"].training
    assert all(torch.equal(value, before[name]) for name, value in models["one"].state_dict().items())


def test_heads_are_trained_and_saved_but_are_no_part_of_the_student(models):
    distiller = distiller_of(models, terms_of("one"))
    assert set(distiller.heads) == {"one"}
    assert {name for name in distiller.state_dict() if not name.startswith("student.")} == {"heads.one.weight"}
    assert set(models["student"].state_dict()) == {
        name.removeprefix("student.") for name in distiller.state_dict() if name.startswith("student.")
    }
    assert not any("head" in name for name in models["student"].own_state())
    assert any(value is distiller.heads["one"].weight for value in distiller.parameters())


def test_stored_teachers_give_the_losses_of_online_ones(pairs, models, tmp_path):
    terms = terms_of("one")
    online = distiller_of(models, terms)
    want = online.wanted_of_teachers["one"]
    settings = ViewSettings(color=0.3)
    held_names = tuple(name for name in want if "." in name)
    spec = CacheSpec(features=held_names, views=2, view_settings=settings, dtype="float32")
    reader = ensure_cache(tmp_path / "c", "one", models["one"], pairs, spec)
    stored = CachedTeacher("one", models["one"].width, [reader])
    held = Distiller(models["student"], terms, {"one": stored})
    held.heads.load_state_dict(online.heads.state_dict())
    sequence = sequence_of(pairs, models, view_cycle=2, settings=settings)
    for start in (0, 6, 14):
        batch = sequence.collate([sequence[position] for position in range(start, start + 6)])
        expected, found = online(batch).losses, held(batch).losses
        assert found.keys() == expected.keys()
        for name, value in expected.items():
            torch.testing.assert_close(found[name], value, rtol=1e-5, atol=1e-5)


def test_frozen_towers_in_memory_train_the_projections_alone(pairs, models, tmp_path):
    student = models["student"]
    student.image_tower.requires_grad_(False)
    student.text_tower.requires_grad_(False)
    settings = ViewSettings()
    spec = CacheSpec(features=("image.pooled", "text.pooled"), views=1, view_settings=settings, dtype="float32")
    towers = CachedTeacher("towers", student.width, [ensure_cache(tmp_path / "c", "towers", student, pairs, spec)])
    term = Term(name="pooled", objective=lambda pooled: pooled.square().sum(dim=1), features=("student.image.pooled",))
    direct = distiller_of(models, (*terms_of("one"), term))
    held = distiller_of(models, (*terms_of("one"), term), towers=towers)
    held.heads.load_state_dict(direct.heads.state_dict())
    batch = batch_of(sequence_of(pairs, models, view_cycle=1, settings=settings), ALL)
    expected, found = direct(batch).losses, held(batch).losses
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-5, atol=1e-5)
    uniform(held, found).backward()
    moved = {name for name, value in held.named_parameters() if value.grad is not None}
    assert moved == {
        "student.image_projection.0.weight",
        "student.text_projection.0.weight",
        "student.log_logit_scale",
        "heads.one.weight",
    }


MSE = ("student.image.embed", "teacher.image.embed")


@pytest.mark.parametrize(
    ("terms", "message"),
    [
        ((), "expected at least one"),
        ((Term(name="a", objective=info_nce, features=STUDENT_PAIR),) * 2, "no name twice"),
        ((Term(name="a", objective=embedding_mse, features=MSE, teacher="three"),), "'three'; there are one, two"),
        ((Term(name="a", objective=embedding_mse, features=MSE, teacher="one", weight=-1),), "weight -1"),
        ((Term(name="a", objective=embedding_mse, features=MSE, teacher="one", weight=float("nan")),), "weight nan"),
        ((Term(name="a", objective=info_nce, features=("student.image.patches",)),), "no feature is called"),
        (
            (Term(name="a", objective=info_nce, features=("student.logit_bias",)),),
            "student cannot produce 'logit_bias'",
        ),
        (
            (Term(name="a", objective=info_nce, features=("teacher.logit_bias",), teacher="two"),),
            "Teacher two cannot produce 'logit_bias'",
        ),
        (
            (Term(name="a", objective=info_nce, features=("teacher.imag",), teacher="two"),),
            "no feature is called 'imag'",
        ),
    ],
)
def test_impossible_methods_are_refused_at_construction(terms, message, models):
    with pytest.raises(UserError, match=message):
        distiller_of(models, terms)


def test_a_student_of_the_teachers_width_may_be_compared_without_a_head(pairs, models):
    term = Term(name="a", objective=embedding_cosine, features=MSE, teacher="one")
    distiller = distiller_of(models, (term,))
    assert not list(distiller.heads)
    with pytest.raises(UserError, match="project to one width"):
        distiller(batch_of(sequence_of(pairs, models), ALL))


def test_a_nan_teacher_shows_in_the_loss_of_its_term_alone(pairs, models):
    with torch.no_grad():
        models["one"].image_projection[0].weight[0, 0] = float("nan")
    losses = distiller_of(models, terms_of("one"))(batch_of(sequence_of(pairs, models), ALL)).losses
    assert {name for name, value in losses.items() if not value.isfinite()} == {"images", "relations"}


def test_among_is_membership():
    sets = torch.tensor([[3, -1, -1], [5, 3, 0], [7, 7, -1]])
    assert among(torch.tensor([0, 3, 7, 3]), sets).tolist() == [
        [False, True, False, True],
        [True, True, False, True],
        [False, False, True, False],
    ]
    assert among(torch.tensor([1]), sets[:0]).shape == (0, 1)


def third_of_three(rows):
    """Where the last of three ranks with equal batches has its rows."""
    return slice(2 * len(rows), 3 * len(rows)), 3


ALL_BY_ROWS = tuple(
    replace(term, name=f"{term.name} {match}")
    for objective in ("info_nce", "siglip", "interactive")
    for match in (False, True)
    for term in by_rows_terms(objective, match)
)


def test_local_losses_are_the_ranks_times_the_part_of_its_rows(pairs, models):
    """Three ranks with the same batch have equal parts, so that each one's is the whole; captions repeat thrice."""
    models["student"] = tiny_student(logit_bias=-3.0)
    batch = batch_of(sequence_of(pairs, models), ALL)
    options = {"gather": lambda rows: torch.cat([rows] * 3)}
    whole = distiller_of(models, ALL_BY_ROWS, **options)
    local = distiller_of(models, ALL_BY_ROWS, local=True, share=third_of_three, **options)
    local.heads.load_state_dict(whole.heads.state_dict())
    expected, found = whole(batch), local(batch)
    assert expected.local == frozenset()
    assert found.local == found.losses.keys() == {term.name for term in ALL_BY_ROWS}
    torch.testing.assert_close(found.losses, expected.losses)
    # Which rows they are shows in the gradients: one direction has anchors among the own rows alone.
    gradient = torch.autograd.grad(found.losses["one/image~text True"], found.anchors["image"])[0]
    captioned = torch.tensor([row in CAPTIONED for row in ALL] * 3) & (torch.arange(24) >= 16)
    assert torch.equal(gradient.abs().sum(dim=1) > 0, captioned)


def test_local_terms_read_their_own_rows_of_the_match(pairs, models):
    seen = {}

    def probe(name):
        def objective(left, right, match, rows=None):
            seen[name] = match, rows
            return (left.square().sum() + right.square().sum()) * 0

        return objective

    terms = tuple(
        Term(name=name, objective=probe(name), features=features, match=True, by_rows=by_rows)
        for name, features, by_rows in (
            ("whole", STUDENT_PAIR, False),
            ("whole texts", STUDENT_PAIR[::-1], False),
            ("images", STUDENT_PAIR, True),
            ("texts", STUDENT_PAIR[::-1], True),
        )
    )
    options = {"gather": lambda rows: torch.cat([rows] * 3), "local": True, "share": third_of_three}
    batch = batch_of(sequence_of(pairs, {"student": models["student"]}), ALL)
    # The first image also has the third one's caption, which does not have its.
    batch.own_ids[0, 1] = batch.caption_ids[2]
    compared = Distiller(models["student"], terms, {}, **options)(batch)
    assert compared.local == {"images", "texts"}
    whole, own = seen["whole"][0], slice(10, 15)
    assert whole.shape == (15, 15)
    assert not torch.equal(whole, whole.T)
    assert seen["whole"][1] is None
    assert torch.equal(seen["whole texts"][0], whole.T)
    assert (seen["images"][1], seen["texts"][1]) == (own, own)
    for name, (first, second) in (("images", (whole[own], whole.T[own])), ("texts", (whole.T[own], whole[own]))):
        assert torch.equal(seen[name][0][0], first)
        assert torch.equal(seen[name][0][1], second)


def test_reported_losses_are_the_mean_and_keep_the_own_gradient(pairs, models):
    """`mean` decides the value; a loss that is not finite on another rank shows here, too."""
    batch = batch_of(sequence_of(pairs, {"student": models["student"]}), ALL)
    terms = by_rows_terms("info_nce", match=True)
    plain = Distiller(models["student"], terms, {})(batch)
    other = Distiller(models["student"], terms, {}, local=True, mean=lambda losses: losses / 3 + 0.1)(batch)
    torch.testing.assert_close(other.losses["info_nce"], plain.losses["info_nce"] / 3 + 0.1)
    expected, found = (torch.autograd.grad(c.losses["info_nce"], c.anchors["image"])[0] for c in (plain, other))
    torch.testing.assert_close(found, expected)
    broken = Distiller(models["student"], terms, {}, local=True, mean=lambda losses: losses * float("inf"))(batch)
    assert not broken.losses["info_nce"].isfinite()


@pytest.mark.parametrize("local", [False, True])
def test_local_terms_make_no_whole_matrix(local, pairs, models):
    """Neither logits nor matches: with 9 ranks of 5 captions, 5 x 45 at most."""
    models["student"] = tiny_student(logit_bias=-3.0)
    batch = batch_of(sequence_of(pairs, models), ALL)
    distiller = distiller_of(
        models,
        ALL_BY_ROWS,
        local=local,
        gather=lambda rows: torch.cat([rows] * 9),
        share=lambda rows: (slice(0, len(rows)), 9),
    )
    features = distiller.student_features(batch)
    with Shapes() as made:
        uniform(distiller, distiller.compare(features, batch).losses).backward()
    assert ((5, 45) in made.seen) == local
    assert any(shape.count(45) > 1 for shape in made.seen) != local
