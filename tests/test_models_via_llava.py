"""The LLaVA adapter against transformers' own forward, generate and processor on tiny random models."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from helpers.tiny_models import tiny_images, write_clip
from helpers.tiny_vlms import VICUNA, write_llava, write_llava_next
from transformers import AutoProcessor, LlavaForConditionalGeneration, LlavaNextForConditionalGeneration

from vlkd.errors import UserError
from vlkd.features import Turn
from vlkd.models.label_masks import answer_positions, answer_targets, pad_conversations
from vlkd.models.via_llava import load_llava

QUESTIONS = ("What colour is the circle?", "Is there a dog?", "How many cups are there, on the table?", "red", "no?")
TALK = (Turn("user", "<image>\nIs there a dog?"), Turn("assistant", "no"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_llava(tmp_path_factory.mktemp("vlm") / "model")


@pytest.fixture(scope="module")
def siglip(tmp_path_factory):
    return write_llava(
        tmp_path_factory.mktemp("vlm") / "model", vision="siglip", language="qwen2", feature_layer=-2, seed=1
    )


@pytest.fixture(params=["folder", "siglip"])
def either(request):
    return request.getfixturevalue(request.param)


def message(question):
    return [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question}]}]


def own_inputs(folder, *, left):
    """The inputs that transformers' processor makes by itself."""
    processor = AutoProcessor.from_pretrained(folder)
    processor.tokenizer.padding_side = "left" if left else "right"
    texts = [processor.apply_chat_template(message(q), add_generation_prompt=True) for q in QUESTIONS]
    return processor, processor(
        images=tiny_images(5), text=texts, padding=True, return_tensors="pt", add_special_tokens=False
    )


def batch(vlm, *, left=False):
    """Questions and answers of the tiny images, by our own preprocessing."""
    rows = [
        vlm.preprocessing.encode((Turn("user", f"<image>\n{question}"), Turn("assistant", "two red cups")))
        for question in QUESTIONS
    ]
    padded = pad_conversations(rows, vlm.preprocessing.pad_id, left=left)
    return vlm.preprocessing.image_inputs(tiny_images(5)) | padded


def test_inputs_equal_the_processors(either):
    vlm = load_llava(either)
    _, wanted = own_inputs(either, left=True)
    rows = [vlm.preprocessing.prompt_ids(question) for question in QUESTIONS]
    found = pad_conversations([(row, row) for row in rows], vlm.preprocessing.pad_id, left=True)
    assert torch.equal(found["ids"], wanted["input_ids"])
    assert torch.equal(found["mask"].long(), wanted["attention_mask"])
    pixels = vlm.preprocessing.image_inputs(tiny_images(5))["pixels"]
    torch.testing.assert_close(pixels, wanted["pixel_values"], rtol=0, atol=0)


@pytest.mark.parametrize("left", [False, True])
def test_logits_equal_transformers(either, left):
    vlm, model = load_llava(either), LlavaForConditionalGeneration.from_pretrained(either).eval()
    _, inputs = own_inputs(either, left=left)
    mask = inputs["attention_mask"].bool()
    with torch.no_grad():
        wanted = model(**{key: inputs[key] for key in ("input_ids", "attention_mask", "pixel_values")}).logits
        found = vlm.forward_logits(inputs["pixel_values"], inputs["input_ids"], mask)
        kept = vlm.forward_logits(inputs["pixel_values"], inputs["input_ids"], mask, keep=mask)
    torch.testing.assert_close(found[mask], wanted[mask], rtol=0, atol=1e-5)
    torch.testing.assert_close(kept, wanted[mask], rtol=0, atol=1e-5)
    assert found.shape[-1] == vlm.vocabulary == model.config.text_config.vocab_size


def test_parts_equal_transformers_image_features(either):
    vlm, model = load_llava(either), LlavaForConditionalGeneration.from_pretrained(either).eval()
    pixels = vlm.preprocessing.image_inputs(tiny_images(3))["pixels"]
    with torch.no_grad():
        tokens = vlm.vision(pixels)
        wanted = torch.stack(list(model.get_image_features(pixels).pooler_output))
        torch.testing.assert_close(vlm.project(tokens), wanted, rtol=0, atol=1e-6)
    assert tokens.shape == (3, vlm.visual_tokens, vlm.visual_width) == (3, 16, 16)


def test_answers_equal_transformers_generate(either):
    processor, inputs = own_inputs(either, left=True)
    model = LlavaForConditionalGeneration.from_pretrained(either).eval()
    with torch.no_grad():
        new = model.generate(
            **{key: inputs[key] for key in ("input_ids", "attention_mask", "pixel_values")},
            max_new_tokens=8,
            do_sample=False,
        )[:, inputs["input_ids"].shape[1] :]
    wanted = [text.strip() for text in processor.batch_decode(new, skip_special_tokens=True)]
    found = load_llava(either).answer(tiny_images(5), QUESTIONS, max_new_tokens=8)
    assert found == wanted
    assert len(set(found)) > 1


@pytest.mark.parametrize("size", [1, 2, 3])
def test_answers_do_not_depend_on_the_batch_size(either, size):
    vlm = load_llava(either)
    images = tiny_images(5)
    whole = vlm.answer(images, QUESTIONS, batch_size=5, max_new_tokens=12)
    assert vlm.answer(images, QUESTIONS, batch_size=size, max_new_tokens=12) == whole


def test_greedy_whatever_the_folder_says_of_sampling(folder, tmp_path):
    import shutil

    wanted = load_llava(folder).answer(tiny_images(5), QUESTIONS)
    other = tmp_path / "sampling"
    shutil.copytree(folder, other)
    settings = json.loads((other / "generation_config.json").read_text())
    (other / "generation_config.json").write_text(
        json.dumps(settings | {"do_sample": True, "temperature": 9.0, "repetition_penalty": 5.0})
    )
    assert load_llava(other).answer(tiny_images(5), QUESTIONS) == wanted


def test_gradient_of_the_switch_reaches_the_students_vision_alone(folder, siglip, tmp_path):
    teacher = load_llava(folder).freeze().train()
    student = load_llava(write_llava(tmp_path / "student", seed=3, language_width=16)).train()
    assert not teacher.training
    before = teacher.fingerprint()
    inputs = batch(teacher)
    visual = teacher.project(student.vision(inputs["pixels"]))
    keep = answer_positions(inputs["labels"])
    logits = teacher.forward_logits(None, inputs["ids"], inputs["mask"], visual=visual, keep=keep)
    targets = answer_targets(inputs["labels"])
    assert logits.shape == (len(targets), teacher.vocabulary)
    torch.nn.functional.cross_entropy(logits, targets).backward()
    assert all(value.grad is None for value in teacher.parameters())
    for name, value in student.named_parameters():
        learns = student.part_of(name) == "vision" and not student.is_idle(name)
        assert (value.grad is not None and value.grad.abs().sum() > 0) == learns or "k_proj.bias" in name, name
    torch.optim.SGD([value for value in student.parameters() if value.requires_grad], lr=0.1).step()
    assert teacher.fingerprint() == before


def test_whatever_learns_has_a_gradient(either):
    """Idle parameters of the vision tower are found by their names; autograd is the judge."""
    vlm = load_llava(either)
    for value in vlm.parameters():
        value.requires_grad_(True)
    inputs = batch(vlm)
    vlm.forward_logits(inputs["pixels"], inputs["ids"], inputs["mask"]).square().sum().backward()
    without = {name for name, value in vlm.named_parameters() if value.grad is None}
    assert without == {name for name, _ in vlm.named_parameters() if vlm.is_idle(name)}
    assert without
    vlm.train_only(("projector",))
    assert {vlm.part_of(name) for name, value in vlm.named_parameters() if value.requires_grad} == {"projector"}
    counts = [sum(value.numel() for value in vlm.part_parameters(part)) for part in ("vision", "projector", "language")]
    assert sum(counts) == sum(value.numel() for value in vlm.parameters())


@pytest.mark.parametrize("frozen", [False, True])
def test_checkpointing_recomputes_and_changes_no_gradient(folder, frozen):
    vlm = load_llava(folder)
    if frozen:
        vlm.freeze()
    inputs = batch(vlm)
    calls = []
    layer = vlm.language_layers()[0]
    layer.mlp.register_forward_pre_hook(lambda *_: calls.append(1))

    def gradient(model):
        visual = model.project(model.vision(inputs["pixels"])).detach().requires_grad_()
        logits = model.forward_logits(None, inputs["ids"], inputs["mask"], visual=visual)
        logits.square().mean().backward()
        return visual.grad

    plain = gradient(vlm)
    assert len(calls) == 1
    vlm.checkpointing(True)
    torch.testing.assert_close(gradient(vlm), plain)
    assert len(calls) == 3
    twin = copy.deepcopy(vlm)
    assert twin.language_layers()[0].forward.args[0].__self__ is twin.language_layers()[0]
    vlm.checkpointing(False)
    torch.testing.assert_close(gradient(vlm), plain)
    assert "forward" not in vars(layer)


def test_fingerprint_follows_weights_and_preprocessing_alone(folder, siglip):
    vlm = load_llava(folder)
    first = vlm.fingerprint()
    vlm.train().checkpointing(True)
    assert vlm.fingerprint() == first == load_llava(folder).fingerprint()
    assert load_llava(siglip).fingerprint() != first
    with torch.no_grad():
        next(iter(vlm.part_parameters("projector")))[0, 0] += 1e-3
    assert vlm.fingerprint() != first


def test_places_that_do_not_fit_the_picture_are_refused(folder):
    vlm = load_llava(folder)
    inputs = batch(vlm)
    # the total still fits, so that a scatter over the whole batch would shift pictures silently
    place = (inputs["ids"][0] == vlm.image_token_id).nonzero()[0, 0]
    inputs["ids"][0, place] = 7
    inputs["ids"][1, 0] = vlm.image_token_id
    with pytest.raises(UserError, match=r"\[15, 16, 17\] places for a picture of 16 tokens"):
        vlm.forward_logits(inputs["pixels"], inputs["ids"], inputs["mask"])
    with pytest.raises(UserError, match="neither pixels nor visual tokens"):
        vlm.forward_logits(None, inputs["ids"], inputs["mask"])


def test_next_runs_as_a_whole(tmp_path):
    folder = write_llava_next(tmp_path / "next")
    vlm, model = load_llava(folder), LlavaNextForConditionalGeneration.from_pretrained(folder).eval()
    processor = AutoProcessor.from_pretrained(folder)
    processor.tokenizer.padding_side = "left"
    images = tiny_images(5)
    texts = [processor.apply_chat_template(message(q), add_generation_prompt=True) for q in QUESTIONS]
    inputs = processor(images=images, text=texts, padding=True, return_tensors="pt", add_special_tokens=False)
    names = ("input_ids", "attention_mask", "pixel_values", "image_sizes")
    rows = [vlm.preprocessing.prompt_ids(q, image=image) for q, image in zip(QUESTIONS, images, strict=True)]
    found = pad_conversations([(row, row) for row in rows], vlm.preprocessing.pad_id, left=True)
    assert torch.equal(found["ids"], inputs["input_ids"])
    with torch.no_grad():
        wanted = model(**{key: inputs[key] for key in names}).logits
        given = vlm.preprocessing.image_inputs(images)
        logits = vlm.forward_logits(ids=found["ids"], mask=found["mask"], **given)
        new = model.generate(**{key: inputs[key] for key in names}, max_new_tokens=6, do_sample=False, eos_token_id=2)
    torch.testing.assert_close(logits[found["mask"]], wanted[found["mask"]], rtol=0, atol=1e-5)
    decoded = processor.batch_decode(new[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    assert vlm.answer(images, QUESTIONS, max_new_tokens=6) == [text.strip() for text in decoded]
    assert not vlm.switchable
    assert len(vlm.fingerprint()) == 16
    with pytest.raises(UserError, match="cannot be switched"):
        vlm.vision(given["pixels"])
    with pytest.raises(UserError, match="give the picture"):
        vlm.preprocessing.encode(TALK)


def test_wrong_folders_are_refused_in_a_sentence(folder, tmp_path):
    with pytest.raises(UserError, match="Found no folder"):
        load_llava(tmp_path / "nothing")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"no config\.json"):
        load_llava(tmp_path / "empty")
    with pytest.raises(UserError, match="family 'clip', expected one of llava"):
        load_llava(write_clip(tmp_path / "clip"))
    (tmp_path / "empty" / "model.json").write_text('{"format": "vlkd-model"}')
    with pytest.raises(UserError, match="vlkd-model"):
        load_llava(tmp_path / "empty")


def altered(folder, target, file, **changes):
    import shutil

    shutil.copytree(folder, target)
    path = target / file
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    return target


def test_a_processor_that_disagrees_with_the_weights_is_refused(folder, tmp_path):
    other = altered(folder, tmp_path / "other", "processor_config.json", num_additional_image_tokens=0)
    with pytest.raises(UserError, match="gives 16 tokens and the processor writes 15 places"):
        load_llava(other)


def test_pickled_and_incomplete_weights_are_refused(folder, tmp_path):
    import shutil

    from safetensors.torch import load_file, save_file

    other = tmp_path / "other"
    shutil.copytree(folder, other)
    weights = load_file(other / "model.safetensors")
    name = next(name for name in weights if "multi_modal_projector" in name)
    save_file(
        {key: value for key, value in weights.items() if key != name}, other / "model.safetensors", {"format": "pt"}
    )
    with pytest.raises(UserError, match=r"lack .*multi_modal_projector"):
        load_llava(other)
    (other / "model.safetensors").unlink()
    torch.save(weights, other / "pytorch_model.bin")
    with pytest.raises(UserError, match="transformers cannot load"):
        load_llava(other)


def test_a_template_without_an_end_still_stops(folder, tmp_path):
    """LLaVA 1.5's template in transformers ends no answer; the tokenizer's end token is trained and stops."""
    import shutil

    other = tmp_path / "vicuna"
    shutil.copytree(folder, other)
    (other / "chat_template.jinja").write_text(VICUNA)
    vlm = load_llava(other)
    assert vlm.stop_ids == (vlm.tokenizer.eos_token_id,)
    _, labels = vlm.preprocessing.encode(TALK)
    assert vlm.tokenizer.decode(labels[labels >= 0]) == " no</s>"
