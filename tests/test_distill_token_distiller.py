"""One pass per tower, the switch, means over tokens of several batches, and what stays untouched."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from functools import partial

import pytest
import torch
from helpers.tiny_conversations import blank_batch, colour_batch
from helpers.tiny_vlms import write_llava, write_llava_next
from torch import nn

from vlkd.distill.answers.dense import sparsify
from vlkd.distill.token_distiller import TokenDistiller
from vlkd.distill.token_terms import TokenTerm
from vlkd.errors import UserError
from vlkd.models.label_masks import answer_positions, answer_targets
from vlkd.models.via_llava import LlavaVLM, load_llava
from vlkd.objectives import cross_entropy, dbild, relation_loss, token_kl, visual_feature_matching

NAMES = ["red", "a white one", "blue", "green"]
CE = TokenTerm(name="answers", objective=cross_entropy, features=("answer.logits", "answer.labels"))
KL = TokenTerm(
    name="align", objective=partial(token_kl, tau=2.0), features=("teacher.answer.logits", "answer.logits"), weight=0.5
)
SWITCH = TokenTerm(
    name="switch", objective=partial(dbild, k_min=3), features=("teacher.answer.logits", "switch.logits")
)
VISUAL = TokenTerm(
    name="visual", objective=visual_feature_matching, features=("image.tokens", "teacher.image.tokens"), weight=2.0
)
RELATION = TokenTerm(name="relation", objective=relation_loss, features=("teacher.visual.tokens", "visual.tokens"))


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    place = tmp_path_factory.mktemp("models")
    teacher = write_llava(place / "teacher", seed=1, language_width=48, feature_layer=-2)
    return {"teacher": teacher, "student": write_llava(place / "student", seed=2)}


@pytest.fixture
def student(folders):
    return load_llava(folders["student"]).train()


@pytest.fixture
def teacher(folders):
    return load_llava(folders["teacher"])


def run(distiller, batch, *, tokens=None, images=None, progress=0.0):
    labels = batch.inputs["student"]["labels"]
    tokens = len(answer_targets(labels)) if tokens is None else tokens
    return distiller(batch, progress=progress, tokens=tokens, images=len(batch.keys) if images is None else images)


def seen(*features):
    """A term that keeps what it is given, and the list it keeps it in."""
    kept = []

    def objective(*inputs):
        kept[:] = inputs
        return inputs[0].float().flatten(1).mean(dim=1)

    return TokenTerm(name="seen", objective=objective, features=features), kept


def test_cross_entropy_is_transformers_own_loss(student):
    batch = colour_batch(NAMES, student=student)
    found = run(TokenDistiller(student, (CE,)), batch)
    inputs = batch.inputs["student"]
    expected = student.model(
        input_ids=inputs["ids"],
        attention_mask=inputs["mask"].long(),
        pixel_values=inputs["pixels"],
        labels=inputs["labels"],
    ).loss
    torch.testing.assert_close(found["answers"], expected, rtol=1e-5, atol=1e-6)


def test_the_three_paths_are_those_of_transformers_modules(student, teacher):
    term, kept = seen("answer.logits", "switch.logits", "teacher.answer.logits", "answer.labels")
    batch = colour_batch(NAMES, student=student, teacher=teacher)
    run(TokenDistiller(student, (term,), teacher), batch)

    def composed(eyes, model, inputs):
        """L(P(V(x))) of plain transformers modules, at the places before answer tokens."""
        states = eyes.model.model.vision_tower(inputs["pixels"], output_hidden_states=True).hidden_states
        tokens = states[eyes.model.config.vision_feature_layer][:, 1:]
        core = model.model.model
        embeds = core.get_input_embeddings()(inputs["ids"])
        places = inputs["ids"] == model.model.config.image_token_id
        embeds = embeds.masked_scatter(places[:, :, None], core.multi_modal_projector(tokens))
        hidden = core.language_model(inputs_embeds=embeds, attention_mask=inputs["mask"].long()).last_hidden_state
        logits = model.model.lm_head(hidden)
        rows = zip(logits, inputs["labels"], strict=True)
        return torch.cat([row[:-1][labels[1:] >= 0] for row, labels in rows])

    own, theirs = batch.inputs["student"], batch.inputs["teacher"]
    expected = [composed(student, student, own), composed(student, teacher, theirs), composed(teacher, teacher, theirs)]
    for value, other in zip(kept[:3], expected, strict=True):
        torch.testing.assert_close(value, other, rtol=1e-4, atol=1e-5)
    assert kept[3].tolist() == [token for row in own["labels"].tolist() for token in row[1:] if token >= 0]
    assert [value.requires_grad for value in kept[:3]] == [True, True, False]
    assert not torch.allclose(kept[1], kept[2], atol=1e-2)


def test_answers_are_found_by_each_path_own_labels(student, teacher):
    batch = colour_batch(NAMES, student=student, teacher=teacher)
    term, kept = seen("teacher.answer.logits", "switch.logits")
    run(TokenDistiller(student, (term,), teacher), batch)
    expected = [value.clone() for value in kept]
    # The teacher's rows are padded in front: every position moves, and no answer.
    pad = torch.zeros(len(NAMES), 3, dtype=torch.int64)
    inputs = batch.inputs["teacher"]
    inputs["ids"] = torch.cat([pad, inputs["ids"]], dim=1)
    inputs["labels"] = torch.cat([pad - 100, inputs["labels"]], dim=1)
    inputs["mask"] = torch.cat([pad.bool(), inputs["mask"]], dim=1)
    run(TokenDistiller(student, (term,), teacher), batch)
    for value, other in zip(kept, expected, strict=True):
        torch.testing.assert_close(value, other, rtol=1e-4, atol=1e-5)
    inputs["labels"][0, -1] = 7
    with pytest.raises(UserError, match=r"Found \d+ answer tokens in teacher.answer.logits and \d+ of the student"):
        run(TokenDistiller(student, (term,), teacher), batch)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_switch_teaches_the_student_vision_tower_alone(student, teacher, checkpointing):
    teacher.checkpointing(checkpointing)
    before = {side: model.fingerprint() for side, model in (("student", student), ("teacher", teacher))}
    batch = colour_batch(NAMES, student=student, teacher=teacher)
    distiller = TokenDistiller(student, (SWITCH,), teacher).train()
    assert not teacher.training
    optimizer = torch.optim.AdamW([value for value in distiller.parameters() if value.requires_grad], lr=0.01)
    distiller.total(run(distiller, batch)).backward()
    parts = {
        student.part_of(name)
        for name, value in student.named_parameters()
        if value.grad is not None and value.grad.abs().sum() > 0
    }
    assert parts == {"vision"}
    assert all(value.grad is None and not value.requires_grad for value in teacher.parameters())
    optimizer.step()
    assert teacher.fingerprint() == before["teacher"]
    assert student.fingerprint() != before["student"]


def test_a_frozen_vision_tower_gets_nothing_from_the_switch(student, teacher):
    student.train_only(("projector", "language"))
    batch = colour_batch(NAMES, student=student, teacher=teacher)
    assert not run(TokenDistiller(student, (SWITCH,), teacher), batch)["switch"].requires_grad


@pytest.mark.parametrize("sizes", [(1, 3), (2, 1, 1)])
def test_parts_of_a_batch_add_up_to_the_whole(student, teacher, sizes):
    terms = (CE, KL, SWITCH, RELATION, VISUAL)
    distiller = TokenDistiller(student.double(), terms, teacher.double())
    whole = colour_batch(NAMES, student=student, teacher=teacher)
    tokens = len(answer_targets(whole.inputs["student"]["labels"]))
    losses = run(distiller, whole)
    distiller.total(losses).backward()
    expected = {name: value.grad.clone() for name, value in student.named_parameters() if value.grad is not None}
    assert len(expected) > 20
    student.zero_grad()
    summed, first = Counter(), 0
    for size in sizes:
        part = colour_batch(NAMES[first : first + size], student=student, teacher=teacher)
        found = run(distiller, part, tokens=tokens, images=len(NAMES))
        distiller.total(found).backward()
        summed.update({name: value.item() for name, value in found.items()})
        first += size
    assert summed == pytest.approx({name: value.item() for name, value in losses.items()}, abs=1e-8)
    for name, value in expected.items():
        torch.testing.assert_close(dict(student.named_parameters())[name].grad, value, rtol=1e-6, atol=1e-6)


def test_a_value_of_all_counts_by_their_number(student):
    whole = TokenTerm(name="whole", objective=lambda logits: logits.new_tensor(3.0), features=("answer.logits",))
    picture = TokenTerm(name="picture", objective=lambda tokens: tokens.new_tensor(5.0), features=("image.tokens",))
    batch = colour_batch(NAMES[:2], student=student)
    own = len(answer_targets(batch.inputs["student"]["labels"]))
    found = run(TokenDistiller(student, (whole, picture)), batch, tokens=2 * own, images=8)
    assert {name: value.item() for name, value in found.items()} == {"whole": 1.5, "picture": 5 * 2 / 8}


def test_a_batch_without_answers_is_zero_and_reaches_every_parameter(student, teacher):
    terms = (CE, KL, SWITCH, RELATION, VISUAL)
    distiller = TokenDistiller(student, terms, teacher)
    losses = run(distiller, blank_batch(student=student, teacher=teacher), tokens=9, images=2)
    assert {name: value.item() for name, value in losses.items()} == dict.fromkeys(losses, 0.0)
    distiller.total(losses).backward()
    for name, value in student.named_parameters():
        if value.requires_grad:
            assert value.grad is not None, name
            assert not value.grad.any(), name
    nothing = {"indices": torch.empty(0, 1, dtype=torch.int64), "values": torch.empty(0, 1), "rest": torch.empty(0)}
    alone = TokenDistiller(student, (CE, KL), stored_vocabulary=teacher.vocabulary)
    losses = run(alone, replace(blank_batch(student=student), stored=nothing), tokens=9, images=2)
    assert [value.item() for value in losses.values()] == [0, 0]


def test_nothing_is_computed_that_no_term_reads(student, teacher, monkeypatch):
    calls = Counter()
    for part in ("vision", "project", "language"):
        real = getattr(LlavaVLM, part)

        def counted(self, *args, part=part, real=real, **kwargs):
            calls[f"{'student' if self is student else 'teacher'}.{part}"] += 1
            return real(self, *args, **kwargs)

        monkeypatch.setattr(LlavaVLM, part, counted)
    batch = colour_batch(NAMES, student=student, teacher=teacher)
    own = {"student.vision": 1, "student.project": 1, "student.language": 1}
    seeing = {"teacher.vision": 1, "teacher.project": 1}
    expected = {
        (CE,): own,
        (CE, KL): own | seeing | {"teacher.language": 1},
        # Both vision towers once: the student's for its own path and the switch.
        (CE, KL, SWITCH): own | {"teacher.vision": 1, "teacher.project": 2, "teacher.language": 2},
        (RELATION,): {"student.vision": 1, "student.project": 1} | seeing,
    }
    for terms, counts in expected.items():
        calls.clear()
        run(TokenDistiller(student, terms, teacher), batch)
        assert dict(calls) == counts


def test_stored_answers_stand_for_the_teacher(student, teacher):
    batch = colour_batch(NAMES, student=student, teacher=teacher)
    online = run(TokenDistiller(student, (CE, KL, SWITCH), teacher), batch)
    inputs = batch.inputs["teacher"]
    with torch.no_grad():
        logits = teacher.forward_logits(
            inputs["pixels"], inputs["ids"], inputs["mask"], keep=answer_positions(inputs["labels"])
        )
    whole = dict(zip(("indices", "values", "rest"), sparsify(logits, teacher.vocabulary), strict=True))
    stored = replace(batch, inputs={"student": batch.inputs["student"]}, stored=whole)
    alone = TokenDistiller(student, (CE, KL), stored_vocabulary=teacher.vocabulary)
    found = run(alone, stored)
    for name in ("answers", "align"):
        torch.testing.assert_close(found[name], online[name], rtol=1e-5, atol=1e-6)
    beside = TokenDistiller(student, (SWITCH,), teacher, stored_vocabulary=teacher.vocabulary)
    found = run(beside, replace(batch, stored=whole))
    torch.testing.assert_close(found["switch"], online["switch"], rtol=1e-4, atol=1e-5)


def test_objectives_are_float32_under_autocast(student, teacher):
    term, kept = seen("answer.logits", "answer.labels", "teacher.answer.logits")
    batch = colour_batch(NAMES, student=student, teacher=teacher)
    distiller = TokenDistiller(student, (CE, KL, SWITCH, RELATION, VISUAL, term), teacher)
    with torch.autocast("cpu", torch.bfloat16):
        found = run(distiller, batch)
    assert kept[0].dtype == torch.bfloat16
    assert all(value.dtype == torch.float32 for value in found.values())
    student_AV, labels_A, teacher_AV = kept[0].double(), kept[1], kept[2].double()
    log_AV = student_AV.log_softmax(dim=1)
    torch.testing.assert_close(found["answers"].double(), -log_AV[torch.arange(len(labels_A)), labels_A].mean())
    left, right = (value.div(2).log_softmax(dim=1) for value in (teacher_AV, student_AV))
    torch.testing.assert_close(found["align"].double(), 4 * (left.exp() * (left - right)).sum(dim=1).mean())
    distiller.total(found).backward()
    assert all(torch.isfinite(value.grad).all() for value in student.parameters() if value.grad is not None)


def test_logits_are_compared_on_the_shared_vocabulary(student, teacher):
    student.model.resize_token_embeddings(student.vocabulary + 16)
    student.vocabulary += 16
    alone, own = seen("answer.logits", "answer.labels")
    taught, both = seen("teacher.answer.logits", "answer.logits")
    batch = colour_batch(NAMES, student=student, teacher=teacher)
    run(TokenDistiller(student, (alone, replace(taught, name="taught")), teacher), batch)
    assert [value.shape[1] for value in both] == [teacher.vocabulary] * 2
    assert own[0].shape[1] == teacher.vocabulary + 16
    torch.testing.assert_close(own[0][:, : teacher.vocabulary], both[1])
    run(TokenDistiller(student, (taught,), teacher, vocabulary=200), batch)
    assert [value.shape[1] for value in both] == [200, 200]


def test_a_bridge_joins_towers_of_two_widths(tmp_path, teacher):
    student = load_llava(write_llava(tmp_path / "wide", vision_width=24))
    bridge = nn.Linear(24, 16)
    distiller = TokenDistiller(student, (SWITCH,), teacher, bridge=bridge)
    distiller.total(run(distiller, colour_batch(NAMES, student=student, teacher=teacher))).backward()
    assert bridge.weight.grad is not None
    assert bridge.weight.grad.any()
    assert {"bridge.weight", "bridge.bias"} <= {name for name, _ in distiller.named_parameters()}
    assert not any("bridge" in name for name in student.state_dict())
    with pytest.raises(UserError, match="no term reads the switch path"):
        TokenDistiller(student, (CE,), teacher, bridge=bridge)


def test_a_tiled_teacher_teaches_by_its_answers_alone(tmp_path, student):
    tiled = load_llava(write_llava_next(tmp_path / "next"))
    batch = colour_batch(NAMES, student=student, teacher=tiled)
    found = run(TokenDistiller(student, (CE, KL), tiled), batch)
    assert found["align"] > 0
    assert found["align"].requires_grad
    for term in (SWITCH, RELATION):
        with pytest.raises(UserError, match="parts are not run one by one"):
            TokenDistiller(student, (term,), tiled)


def test_terms_that_cannot_be_had_are_refused(student):
    with pytest.raises(UserError, match=r"read switch.logits, teacher.answer.logits and no teacher is there"):
        TokenDistiller(student, (SWITCH,))
    with pytest.raises(UserError, match=r"read switch.logits and no teacher"):
        TokenDistiller(student, (SWITCH,), stored_vocabulary=300)
    with pytest.raises(UserError, match="no name twice"):
        TokenDistiller(student, (CE, CE))
    with pytest.raises(UserError, match="weight -1"):
        TokenDistiller(student, (replace(CE, weight=-1.0),))
    with pytest.raises(UserError, match=r"reads 'answer.logit'; expected some of"):
        replace(CE, features=("answer.logit",))
    with pytest.raises(UserError, match="of one of the two alone"):
        replace(CE, features=("answer.logits", "image.tokens"))


def test_progress_reaches_the_objective(student):
    term = TokenTerm(
        name="moving", objective=lambda logits, t: logits.float()[:, 0] * 0 + t, features=("answer.logits", "progress")
    )
    found = run(TokenDistiller(student, (term,)), colour_batch(NAMES, student=student), progress=0.25)
    assert found["moving"].item() == pytest.approx(0.25)
