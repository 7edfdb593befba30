"""Questions that share a picture in one row, against each question by itself."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from helpers.tiny_models import tiny_images
from helpers.tiny_vlms import write_llava, write_llava_next, write_timm_vlm

from vlkd.cli.main import main
from vlkd.distill.gates import check_alone
from vlkd.distill.token_distiller import answer_logits
from vlkd.errors import TooLong, UserError
from vlkd.features import IGNORED, Turn
from vlkd.models.label_masks import answer_targets, encode_questions
from vlkd.models.load_generative import load_generative
from vlkd.models.question_mask import FIRST_QUESTION, SHARED, attention_and_positions, visible

QUESTIONS = (
    ("What is red?", "the cup"),
    ("Is there a red cup?", "yes"),
    ("What is red?", "the cup"),
    ("How many?", "2"),
)
TURNS = tuple(
    turn
    for number, (asked, answered) in enumerate(QUESTIONS)
    for turn in (Turn("user", ("" if number else "<image>\n") + asked), Turn("assistant", answered))
)
WRITERS = {
    "llava": write_llava,
    "timm": write_timm_vlm,
    "timm with qwen2": lambda folder: write_timm_vlm(folder, language="qwen2"),
    "llava-next": write_llava_next,
}


def single(number):
    asked, answered = QUESTIONS[number]
    return Turn("user", f"<image>\n{asked}"), Turn("assistant", answered)


def inputs_of(vlm, rows, image):
    return vlm.preprocessing.image_inputs([image] * len(rows)) | vlm.preprocessing.pad(rows)


@pytest.fixture(scope="module", params=WRITERS)
def vlm(request, tmp_path_factory):
    return load_generative(WRITERS[request.param](tmp_path_factory.mktemp("vlm") / "model"))


def test_logits_are_those_of_each_question_by_itself(vlm):
    image = tiny_images(1)[0]
    together = [vlm.preprocessing.encode_questions(TURNS, image=image)]
    alone = [vlm.preprocessing.encode(single(number), image=image) for number in range(len(QUESTIONS))]
    with torch.no_grad():
        one, four = inputs_of(vlm, together, image), inputs_of(vlm, alone, image)
        assert torch.equal(answer_targets(one["labels"]), answer_targets(four["labels"]))
        torch.testing.assert_close(answer_logits(vlm, one), answer_logits(vlm, four), rtol=1e-4, atol=1e-5)
        # A dialogue of the same turns has other logits: what is tested can fail.
        talk = inputs_of(vlm, [vlm.preprocessing.encode(TURNS, image=image)], image)
        assert (answer_logits(vlm, talk) - answer_logits(vlm, four)).abs().max() > 1e-4


def test_rows_of_both_kinds_in_one_batch(vlm):
    image = tiny_images(1)[0]
    rows = [
        vlm.preprocessing.encode(TURNS[:4], image=image),
        vlm.preprocessing.encode_questions(TURNS, image=image),
        vlm.preprocessing.encode_questions(single(3), image=image),
    ]
    with torch.no_grad():
        found = answer_logits(vlm, inputs_of(vlm, rows, image))
        wanted = torch.cat([answer_logits(vlm, inputs_of(vlm, [row], image)) for row in rows])
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)


def test_gradients_are_the_sum_of_each_question_by_itself(tmp_path):
    vlm = load_generative(write_llava(tmp_path / "model"))
    image = tiny_images(1)[0]

    def gradients(rows):
        inputs = inputs_of(vlm, rows, image)
        vlm.zero_grad(set_to_none=True)
        targets = answer_targets(inputs["labels"])
        torch.nn.functional.cross_entropy(answer_logits(vlm, inputs), targets, reduction="sum").backward()
        return {name: value.grad.clone() for name, value in vlm.named_parameters() if value.grad is not None}

    found = gradients([vlm.preprocessing.encode_questions(TURNS, image=image)])
    wanted = gradients([vlm.preprocessing.encode(single(number), image=image) for number in range(4)])
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        torch.testing.assert_close(found[name], value, rtol=1e-3, atol=1e-5 * float(value.abs().max()) + 1e-6)


def test_a_later_answer_cannot_be_read_off_an_earlier_one(vlm):
    """Another answer to the first question moves nothing of the others."""
    image = tiny_images(1)[0]
    other = (TURNS[0], Turn("assistant", "a dog"), *TURNS[2:])
    found = []
    for turns in (TURNS, other):
        row = vlm.preprocessing.encode_questions(turns, image=image)
        last = row[1][row[2] > FIRST_QUESTION]
        with torch.no_grad():
            found.append(answer_logits(vlm, inputs_of(vlm, [row], image))[-int((last != IGNORED).sum()) :])
    torch.testing.assert_close(found[0], found[1], rtol=1e-5, atol=1e-6)


def test_who_sees_whom_and_from_where():
    """Against a loop over pairs; 1 is shared, 2 and 3 are questions, 0 is padding."""
    numbers = [0, 1, 1, 2, 2, 2, 3, 3, 0]
    expected = np.array(
        [[key == query or (bool(k and q) and key < query and k in (1, q)) for key, k in enumerate(numbers)]
         for query, q in enumerate(numbers)]
    )  # fmt: skip
    found = visible(torch.tensor([numbers]))[0]
    assert found.numpy().tolist() == expected.tolist()
    attention, positions = attention_and_positions(torch.tensor([numbers]), torch.float32)
    assert (attention[0, 0] == 0).equal(found)
    assert attention[0, 0][~found].unique().tolist() == [torch.finfo(torch.float32).min]
    assert positions[0, 1:8].tolist() == [0, 1, 2, 3, 4, 2, 3]


def test_numbers_of_a_row(vlm):
    image = tiny_images(1)[0]
    ids, labels, numbers = vlm.preprocessing.encode_questions(TURNS, image=image)
    assert len(ids) == len(labels) == len(numbers)
    assert numbers.tolist() == sorted(numbers.tolist())
    assert set(numbers.tolist()) == {SHARED, *range(FIRST_QUESTION, FIRST_QUESTION + 4)}
    assert (numbers[ids == vlm.image_token_id] == SHARED).all()
    assert int((ids == vlm.image_token_id).sum()) == vlm.preprocessing.places_of(image)
    assert (labels[numbers == SHARED] == IGNORED).all()
    ends = [int((numbers == number).nonzero()[-1]) for number in range(FIRST_QUESTION, FIRST_QUESTION + 4)]
    assert all(labels[end] in vlm.stop_ids for end in ends)


def test_a_template_that_asks_before_it_shows_is_refused(tmp_path):
    vlm = load_generative(write_llava(tmp_path / "model"))
    vlm.processor.chat_template = (
        "{% for m in messages %}{{ m['role'] }}:{% for c in m['content'] | sort(attribute='type', reverse=true) %}"
        "{% if c['type'] == 'image' %}<image>{% else %} {{ c['text'] }} {% endif %}{% endfor %}"
        "{% if m['role'] == 'assistant' %}</s>{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}assistant:{% endif %}"
    )
    chat = vlm.preprocessing.chat
    assert chat.listed
    with pytest.raises(UserError, match="writes a question in front of the picture, so the questions of 'a7'"):
        encode_questions(chat, TURNS, visual_tokens=4, key="a7")


def test_only_one_question_must_fit_the_context(tmp_path):
    """All of them share positions."""
    vlm = load_generative(write_llava(tmp_path / "model"))
    longest = max(len(vlm.preprocessing.encode(single(number))[0]) for number in range(4))
    chat = replace(vlm.preprocessing.chat, context_length=longest)
    ids, _, _ = encode_questions(chat, TURNS, visual_tokens=vlm.visual_tokens)
    assert len(ids) > longest
    with pytest.raises(TooLong):
        encode_questions(replace(chat, context_length=longest - 1), TURNS, visual_tokens=vlm.visual_tokens)


class Talk:
    alone, turns = True, TURNS


def test_one_question_a_row_needs_no_mask_of_ours(vlm):
    """And so no language model is refused for it."""
    image = tiny_images(1)[0]
    rows = [vlm.preprocessing.encode_questions(single(number), image=image) for number in range(4)]
    found = vlm.preprocessing.pad(rows)
    assert found["mask"].dtype == torch.bool
    wanted = vlm.preprocessing.pad([vlm.preprocessing.encode(single(number), image=image) for number in range(4)])
    assert torch.equal(answer_targets(found["labels"]), answer_targets(wanted["labels"]))


def test_a_language_model_without_masks_of_ours_is_refused(vlm, monkeypatch):
    check_alone([vlm], [Talk()])
    monkeypatch.setattr(type(vlm), "forward_logits", forgetful(type(vlm).forward_logits))
    with pytest.raises(UserError, match="answers questions otherwise where they share a picture"):
        check_alone([vlm], [Talk()])

    def raises(*_, **__):
        raise ValueError("too many values to unpack")

    monkeypatch.setattr(type(vlm), "forward_logits", raises)
    with pytest.raises(UserError, match=r"cannot answer questions that share a picture \(too many values to unpack\)"):
        check_alone([vlm], [Talk()])


@pytest.mark.parametrize("who", ["student", "teacher", "stored", "doctor"])
def test_every_command_that_reads_such_questions_asks_first(tmp_path, monkeypatch, capsys, who):
    path = tmp_path / "talks.json"
    said = [{"from": "human" if turn.role == "user" else "gpt", "value": turn.text} for turn in TURNS]
    tiny_images(1)[0].save(tmp_path / "a.png")
    talk = {"image": "a.png", "conversations": said, "alone": True}
    path.write_text(json.dumps([{"id": str(number)} | talk for number in range(16)]))
    model = write_llava(tmp_path / "model")
    kind = type(load_generative(model))
    whole, mended = kind.forward_logits, forgetful(kind.forward_logits)
    taught = write_llava(tmp_path / "student", seed=1)
    words = {
        "student": ["train", "vlm", f"start={taught}"],
        "teacher": ["train", "switch_kd", f"start={taught}", f"teacher.ref={model}"],
        "stored": ["cache", "answers", "--teacher", str(model), "--data", str(path), "--out", str(tmp_path / "stored")],
        "doctor": ["doctor", str(model), "--data", str(path)],
    }[who]
    if who in ("student", "teacher"):
        stage = "supervised" if who == "student" else "distilled"
        words += [f"data.train={path}", f"{stage}.samples=16", f"{stage}.batch_size=16", f"out={tmp_path / 'run'}"]
    # Of the two models in a run, it is the teacher alone that forgets.
    blamed = model.name if who == "teacher" else ""
    monkeypatch.setattr(
        kind,
        "forward_logits",
        lambda self, *given, **more: (mended if blamed in self.name else whole)(self, *given, **more),
    )
    with pytest.raises(SystemExit) as stop:
        main(words)
    assert stop.value.code
    captured = capsys.readouterr()
    assert "answers questions otherwise where they share a picture" in captured.err + captured.out


def forgetful(forward):
    """Every token sees what is in front of it."""
    return lambda self, pixels, ids, mask, **more: forward(self, pixels, ids, mask != 0, **more)
