"""Labels of conversations against transformers' assistant masks and against explicit tokenisation of prefixes."""

from __future__ import annotations

import copy
import pickle
import re

import pytest
import torch
from helpers.tiny_models import tiny_images
from helpers.tiny_vlms import CHATML, TEXTS, VICUNA, write_llava
from transformers import AutoProcessor

from vlkd.errors import UserError
from vlkd.features import Turn
from vlkd.models.chat_tokenizer import train_chat_tokenizer
from vlkd.models.label_masks import (
    IGNORED,
    answer_positions,
    answer_targets,
    encode_conversation,
    open_chat,
    pad_conversations,
    prompt_ids,
)
from vlkd.models.via_llava import load_llava

TALK = (
    Turn("user", "<image>\nIs there a dog?"),
    Turn("assistant", "no"),
    Turn("user", "How many cups, then?"),
    Turn("assistant", "There are two red cups, and a blue one."),
)
N = 16


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_llava(tmp_path_factory.mktemp("vlm") / "model")


@pytest.fixture(scope="module")
def processor(folder):
    return AutoProcessor.from_pretrained(folder)


def chat_with(processor, template):
    own = copy.copy(processor)
    own.chat_template = template
    if not template:
        own.tokenizer = copy.deepcopy(processor.tokenizer)
        own.tokenizer.chat_template = None
    if "<|im_end|>" in template:
        own.tokenizer = copy.deepcopy(processor.tokenizer)
        own.tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    return open_chat("tiny", own, image_token_id=processor.image_token_id, context_length=0)


def words(chat, labels):
    """The answers as texts, one per run of labels."""
    runs, current = [], []
    for label in [*labels.tolist(), IGNORED]:
        if label != IGNORED:
            current.append(label)
        elif current:
            runs.append(chat.processor.tokenizer.decode(current))
            current = []
    return runs


def test_labels_equal_transformers_assistant_masks(folder):
    vlm, processor = load_llava(folder), AutoProcessor.from_pretrained(folder)
    image = tiny_images(1)[0]
    messages = [
        {"role": "user", "content": [{"type": "image", "image": image}, {"type": "text", "text": "Is there a dog?"}]},
        {"role": "assistant", "content": [{"type": "text", "text": "no"}]},
        {"role": "user", "content": [{"type": "text", "text": "How many cups, then?"}]},
        {"role": "assistant", "content": [{"type": "text", "text": TALK[3].text}]},
    ]
    wanted = processor.apply_chat_template(
        messages, tokenize=True, return_dict=True, return_assistant_tokens_mask=True, return_tensors="pt"
    )
    ids, labels = vlm.preprocessing.encode(TALK)
    assert torch.equal(ids, wanted["input_ids"][0])
    mask = torch.as_tensor(wanted["assistant_masks"][0]).bool()
    assert torch.equal(labels, torch.where(mask, ids, IGNORED))
    assert words(vlm.preprocessing.chat, labels) == [" no</s>", f" {TALK[3].text}</s>"]


@pytest.mark.parametrize("template", ["own", CHATML, VICUNA])
def test_labels_begin_where_the_prompt_ends(processor, template):
    """The ids before each answer are those of the prompt that generation would be given."""
    chat = chat_with(processor, processor.chat_template if template == "own" else template)
    ids, labels = encode_conversation(chat, TALK, visual_tokens=N)
    first = prompt_ids(chat, TALK[:1], visual_tokens=N)
    assert torch.equal(ids[: len(first)], first)
    assert (labels[: len(first)] == IGNORED).all()
    assert labels[len(first)] != IGNORED
    end = {CHATML: "<|im_end|>"}.get(template, "</s>")
    space = "" if template == CHATML else " "
    assert words(chat, labels) == [f"{space}no{end}", f"{space}{TALK[3].text}{end}"]
    assert (ids == processor.image_token_id).sum() == N
    # the second prompt has the first answer in it, closed as it was trained
    second = prompt_ids(chat, TALK[:3], visual_tokens=N)
    assert len(second) > len(first) + 3
    assert torch.equal(ids[: len(second)], second)
    assert labels[len(second) - 1] == IGNORED != labels[len(second)]
    last = int((labels != IGNORED).nonzero()[-1])
    assert chat.processor.tokenizer.decode(ids[last]) == end


def test_an_end_behind_the_last_turn_alone_leaves_the_next_turn_unlabelled(processor):
    own = copy.copy(processor)
    own.tokenizer = copy.deepcopy(processor.tokenizer)
    own.tokenizer.add_special_tokens({"additional_special_tokens": ["<|endoftext|>"]})
    own.chat_template = (
        "{% for m in messages %}{{ '<|' + m['role'] + '|>' + m['content'] }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|assistant|>' }}"
        "{% elif messages[-1]['role'] == 'assistant' %}{{ '<|endoftext|>' }}{% endif %}"
    )
    chat = open_chat("tiny", own, image_token_id=processor.image_token_id, context_length=0)
    _, labels = encode_conversation(chat, TALK, visual_tokens=1)
    assert words(chat, labels) == ["no</s>", f"{TALK[3].text}<|endoftext|>"]


def test_a_last_answer_written_otherwise_is_found_in_each_turn(processor):
    """Qwen 3 puts an empty thought before the last answer alone."""
    thought = "{% if loop.last and message['role'] == 'assistant' %}{{ '<think>\n\n</think>\n\n' }}{% endif %}"
    chat = chat_with(
        processor, CHATML.replace("message['role'] + '\n' + ", f"message['role'] + '\n' }}}}{thought}{{{{ ")
    )
    _, labels = encode_conversation(chat, TALK, visual_tokens=1)
    assert words(chat, labels) == ["no<|im_end|>", f"<think>\n\n</think>\n\n{TALK[3].text}<|im_end|>"]


def test_vicuna_is_closed_as_in_llavas_training(processor):
    chat = chat_with(processor, VICUNA)
    ids, _ = encode_conversation(chat, TALK, visual_tokens=1)
    assert chat.processor.tokenizer.decode(ids) == (
        "USER: <image>\nIs there a dog? ASSISTANT: no</s>USER: How many cups, then? ASSISTANT: "
        "There are two red cups, and a blue one.</s>"
    )


def test_an_answer_that_also_stands_in_the_question_is_labelled_once(processor):
    chat = chat_with(processor, processor.chat_template)
    _, labels = encode_conversation(
        chat, (Turn("user", "<image>\nred or blue, no?"), Turn("assistant", "red")), visual_tokens=N
    )
    assert words(chat, labels) == [" red</s>"]


def test_padding_on_either_side_and_the_shift(processor):
    chat = chat_with(processor, processor.chat_template)
    rows = [encode_conversation(chat, TALK[:2], visual_tokens=N), encode_conversation(chat, TALK, visual_tokens=N)]
    for left in (False, True):
        found = pad_conversations(rows, 0, left=left)
        for row, (ids, labels) in enumerate(rows):
            assert torch.equal(found["ids"][row][found["mask"][row]], ids)
            assert torch.equal(found["labels"][row][found["mask"][row]], labels)
        assert (found["labels"][~found["mask"]] == IGNORED).all()
        assert bool(found["mask"][0, 0]) != left
        keep = answer_positions(found["labels"])
        positions = [(row, at - 1) for row, at in (found["labels"] != IGNORED).nonzero().tolist()]
        assert keep.nonzero().tolist() == [list(place) for place in positions]
        assert answer_targets(found["labels"]).tolist() == [int(found["ids"][row, at + 1]) for row, at in positions]


def test_what_cannot_teach_is_refused_with_its_key(processor):
    chat = chat_with(processor, processor.chat_template)

    def encode(*turns, chat=chat):
        encode_conversation(chat, turns, visual_tokens=N, key="a7")

    with pytest.raises(UserError, match="'a7' has an answer without tokens"):
        encode(TALK[0], Turn("assistant", " "))
    with pytest.raises(UserError, match="'a7' has no answer"):
        encode(TALK[0])
    with pytest.raises(UserError, match="'a7' has 0 image tokens"):
        encode(Turn("user", "Is there?"), TALK[1])
    with pytest.raises(UserError, match="'a7' has 2 image tokens"):
        encode(TALK[0], TALK[1], *TALK[:2])
    short = open_chat("tiny", processor, image_token_id=processor.image_token_id, context_length=20)
    with pytest.raises(UserError, match=r"'a7' has \d+ tokens, 16 of them for the picture, and tiny takes 20"):
        encode(*TALK, chat=short)


@pytest.mark.parametrize("template", [CHATML, VICUNA])
def test_answers_that_are_nothing_or_end_early_are_refused(processor, template):
    chat = chat_with(processor, template)
    # What ends this template's answers, and the tokenizer's own end, at which generation stops as well.
    for token in {CHATML: ("<|im_end|>", "</s>")}.get(template, ("</s>",)):
        for text in (f"{token} no", f"no {token} yes", f"no{token}"):
            with pytest.raises(UserError, match=rf"'a7' has '{re.escape(token)}' inside of an answer, which to tiny"):
                encode_conversation(chat, (TALK[0], Turn("assistant", text)), visual_tokens=N, key="a7")
    for text in ("", "\n\n"):
        with pytest.raises(UserError, match="'a7' has an answer without tokens"):
            encode_conversation(chat, (*TALK[:3], Turn("assistant", text)), visual_tokens=N, key="a7")


@pytest.mark.parametrize(
    ("template", "sentence"),
    [
        ("{% for m in messages %}{{ m['role'] }}{% endfor %}", "does not write <image>"),
        ("", "has no chat template"),
    ],
)
def test_templates_that_lose_the_picture_are_refused(processor, template, sentence):
    with pytest.raises(UserError, match=sentence):
        chat_with(processor, template)


def test_a_template_that_rewrites_the_answer_is_refused(processor):
    chat = chat_with(processor, CHATML.replace("message['content']", "(message['content'] | replace('no', 'yes'))"))
    with pytest.raises(UserError, match="does not continue its own prompt with the answer 'no'"):
        encode_conversation(chat, TALK[:2], visual_tokens=N)


def test_preprocessing_travels_without_weights(folder):
    preprocessing = load_llava(folder).preprocessing
    twin = pickle.loads(pickle.dumps(preprocessing))
    assert torch.equal(twin.encode(TALK)[1], preprocessing.encode(TALK)[1])
    image = tiny_images(1)[0]
    assert torch.equal(twin.image_transform(image), preprocessing.image_transform(image))


def test_a_trained_tokenizer_is_whole_and_equal_each_time():
    one, two = (train_chat_tokenizer(TEXTS, vocab_size=300) for _ in range(2))
    assert one.get_vocab() == two.get_vocab()
    odd = "Größe №5 — naïve?\n\tTabs 数"
    assert one.decode(one(odd)["input_ids"]) == odd
    with pytest.raises(UserError, match="expected at least 262"):
        train_chat_tokenizer(TEXTS, vocab_size=200)
    with pytest.raises(UserError, match="no words"):
        train_chat_tokenizer([], vocab_size=300)
