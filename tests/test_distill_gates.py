"""What is refused before a teacher teaches: other vocabularies, parts that do not fit, a teacher that does not look."""

from __future__ import annotations

import pytest
import torch
from helpers.tiny_conversations import blank_batch, colour_batch
from helpers.tiny_vlms import VICUNA, write_llava, write_llava_next
from torch.nn import functional as F

from vlkd.distill.gates import check_sees, check_switch, check_vocabulary, other_answers
from vlkd.distill.token_distiller import answer_logits
from vlkd.errors import UserError
from vlkd.models.chat_tokenizer import train_chat_tokenizer
from vlkd.models.label_masks import answer_targets
from vlkd.models.via_llava import load_llava

NAMES = ["red", "blue", "green", "a white one", "blue", "red"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_llava(tmp_path_factory.mktemp("gates") / "teacher", seed=1)


@pytest.fixture
def teacher(folder):
    return load_llava(folder)


@pytest.fixture
def student(folder):
    return load_llava(folder)


@pytest.fixture(scope="module")
def sighted(folder):
    """Taught to name colours for a few steps, on top of weights that hardly look."""
    torch.manual_seed(0)
    model = load_llava(folder)
    with torch.no_grad():
        for value in model.parameters():
            if value.ndim > 1:
                value.mul_(0.3)
    inputs = colour_batch(NAMES, teacher=model).inputs["teacher"]
    targets = answer_targets(inputs["labels"])
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    for _ in range(60):
        loss = F.cross_entropy(answer_logits(model, inputs), targets)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < 0.1
    return model.eval()


def test_one_tokenizer_and_two_widths_share_the_smaller(student, teacher):
    assert check_vocabulary(student, teacher) == teacher.vocabulary
    student.model.resize_token_embeddings(student.vocabulary + 16)
    student.vocabulary += 16
    assert check_vocabulary(student, teacher) == check_vocabulary(teacher, student) == teacher.vocabulary


def test_added_tokens_of_one_end_the_shared_part(student, teacher):
    known = len(teacher.tokenizer)
    student.tokenizer.add_tokens(["<box>"], special_tokens=True)
    student.model.resize_token_embeddings(known + 64)
    student.vocabulary = teacher.vocabulary = known + 64
    assert check_vocabulary(student, teacher) == known


def test_other_tokenizers_are_refused(tmp_path, student, teacher):
    more = load_llava(write_llava(tmp_path / "more", vocab_size=290))
    assert len(more.tokenizer) < len(teacher.tokenizer)
    with pytest.raises(UserError, match=r"alone has \d+ tokens, such as .* and would cut texts otherwise"):
        check_vocabulary(more, teacher)
    other = train_chat_tokenizer(("zebras graze quietly",) * 3, vocab_size=300)
    assert len(other) == len(teacher.tokenizer) or len(other) < 300
    student.processor.tokenizer = other
    with pytest.raises(UserError, match=r"The id \d+ is '.*' for the student"):
        check_vocabulary(student, teacher)


def test_another_end_of_answers_is_refused(student, teacher):
    # LLaVA 1.5's template ends answers by the tokenizer's end token, here another one.
    student.processor.chat_template = VICUNA
    assert check_vocabulary(student, teacher) == teacher.vocabulary
    student.tokenizer.eos_token = "<pad>"
    with pytest.raises(UserError, match=r"writes the answers of one conversation as \d+ tokens"):
        check_vocabulary(student, teacher)


def test_the_switch_needs_parts_that_fit(tmp_path, student, teacher):
    check_switch(student, teacher, ("vision", "language"))
    with pytest.raises(UserError, match=r"what learns is language, projector; add vision"):
        check_switch(student, teacher, ("projector", "language"))
    with pytest.raises(UserError, match=r"both vision towers are 16 wide; leave the bridge out"):
        check_switch(student, teacher, ("vision",), bridge=True)
    wide = load_llava(write_llava(tmp_path / "wide", vision_width=24))
    with pytest.raises(UserError, match=r"is 24 wide and that of .* 16; the switch needs equal widths"):
        check_switch(wide, teacher, ("vision",))
    check_switch(wide, teacher, ("vision",), bridge=True)
    coarse = load_llava(write_llava(tmp_path / "coarse", patch_size=16))
    with pytest.raises(UserError, match=r"has 4 tokens for a picture and .* has 16"):
        check_switch(coarse, teacher, ("vision",), bridge=True)
    tiled = load_llava(write_llava_next(tmp_path / "next"))
    with pytest.raises(UserError, match="cuts pictures by their size, so its parts cannot be switched"):
        check_switch(student, tiled, ("vision",))


def test_a_teacher_that_names_colours_is_seen_to_look(sighted):
    batches = [colour_batch(NAMES[:4], teacher=sighted), colour_batch(NAMES[2:], teacher=sighted)]
    before = sighted.fingerprint()
    found = check_sees(sighted, batches)
    assert found["nll"] < 0.2
    assert min(found["blank_kl"], found["shuffled_kl"], found["shuffled_nll_rise"]) > 0.3
    # By hand: the loss of wrong pictures less that of the right ones, over all tokens of samples that were moved.
    rises, tokens = [], 0
    with torch.no_grad():
        for batch in batches:
            inputs = batch.inputs["teacher"]
            partner = other_answers(inputs)
            targets = answer_targets(inputs["labels"])
            for pixels, sign in ((inputs["pixels"][partner], 1), (inputs["pixels"], -1)):
                log = answer_logits(sighted, {**inputs, "pixels": pixels}).log_softmax(dim=1)
                rises.append(-sign * log[torch.arange(len(targets)), targets].sum())
            tokens += len(targets)
    assert found["shuffled_nll_rise"] == pytest.approx(float(sum(rises)) / tokens, rel=1e-4)
    assert found["tokens"] == found["shuffled_tokens"] == tokens
    assert sighted.fingerprint() == before


def test_a_blind_teacher_is_refused(sighted, folder):
    blind = load_llava(folder)
    blind.load_state_dict(sighted.state_dict())
    with torch.no_grad():
        for value in blind.part_parameters("projector"):
            value.zero_()
    with pytest.raises(UserError, match="does not look at pictures: its answers move by 0 nats"):
        check_sees(blind, [colour_batch(NAMES, teacher=blind)])


def test_a_teacher_without_numbers_is_refused(teacher):
    with torch.no_grad():
        next(teacher.part_parameters("language")).fill_(float("nan"))
    with pytest.raises(UserError, match="does not look at pictures: its answers move by nan nats"):
        check_sees(teacher, [colour_batch(NAMES, teacher=teacher)])


def test_without_an_answer_nothing_can_be_seen(teacher):
    with pytest.raises(UserError, match="Found no answer on which to see"):
        check_sees(teacher, [blank_batch(teacher=teacher)])


def test_pictures_move_between_other_answers_of_one_size_alone(teacher):
    inputs = colour_batch(["red", "red", "blue", "red"], teacher=teacher).inputs["teacher"]
    assert other_answers(inputs).tolist() == [2, 2, 3, 2]
    alike = colour_batch(["red", "red"], teacher=teacher)
    assert other_answers(alike.inputs["teacher"]).tolist() == [0, 1]
    found = check_sees(teacher, [alike])
    assert found["shuffled_tokens"] == found["shuffled_nll_rise"] == 0
    sizes = torch.tensor([[32, 64], [32, 64], [64, 32], [32, 64]])
    assert other_answers({**inputs, "image_sizes": sizes}).tolist() == [0, 1, 2, 3]


def test_a_tiled_teacher_is_looked_at_too(tmp_path):
    tiled = load_llava(write_llava_next(tmp_path / "next"))
    assert check_sees(tiled, [colour_batch(NAMES, teacher=tiled)])["blank_kl"] > 0
