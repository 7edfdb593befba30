"""Students written by `build_llava`, opened by plain transformers."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from helpers.tiny_models import tiny_images, write_bert
from helpers.tiny_vlms import TEXTS, tiny_llava_spec, write_causal, write_clip, write_llava, write_siglip
from safetensors.torch import load_file
from transformers import (
    AutoModelForCausalLM,
    AutoProcessor,
    CLIPVisionModel,
    LlavaForConditionalGeneration,
    SiglipVisionModel,
)

from vlkd.errors import UserError
from vlkd.features import Turn
from vlkd.models.llava_spec import build_llava
from vlkd.models.via_llava import load_llava

TALK = (Turn("user", "<image>\nIs there a dog?"), Turn("assistant", "no"))


def test_round_trip_through_plain_transformers(tmp_path):
    """Trained here, saved, opened and saved by transformers, loaded again: the same answers and weights."""
    vlm = load_llava(write_llava(tmp_path / "built"))
    with torch.no_grad():
        for value in vlm.parameters():
            value.add_(0.01)
    vlm.save(tmp_path / "saved")
    model = LlavaForConditionalGeneration.from_pretrained(tmp_path / "saved")
    processor = AutoProcessor.from_pretrained(tmp_path / "saved")
    assert type(processor).__name__ == "LlavaProcessor"
    model.save_pretrained(tmp_path / "again")
    processor.save_pretrained(tmp_path / "again")
    again = load_llava(tmp_path / "again")
    questions = ["What colour is the circle?", "no?"]
    assert again.answer(tiny_images(2), questions) == vlm.answer(tiny_images(2), questions)
    assert again.fingerprint() == vlm.fingerprint()


def test_a_save_is_whole_or_nothing(tmp_path, monkeypatch):
    vlm = load_llava(write_llava(tmp_path / "model"))
    before = {path.name: path.read_bytes() for path in (tmp_path / "model").iterdir()}
    with torch.no_grad():
        for value in vlm.parameters():
            value.add_(0.01)

    def broken(folder):
        (Path(folder) / "half.json").write_text("{")
        raise OSError("disk full")

    with monkeypatch.context() as patched:
        patched.setattr(vlm.processor, "save_pretrained", broken)
        for folder in ("model", "new"):
            with pytest.raises(OSError, match="disk full"):
                vlm.save(tmp_path / folder)
    assert {path.name: path.read_bytes() for path in (tmp_path / "model").iterdir()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    vlm.save(tmp_path / "model")
    assert load_llava(tmp_path / "model").fingerprint() == vlm.fingerprint()
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("keep")
    with pytest.raises(UserError, match="exists and is no LLaVA; choose a new folder"):
        vlm.save(tmp_path / "mine")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mine", "model"]


@pytest.mark.parametrize(("vision", "tokens"), [("clip", 16), ("siglip", 16)])
@pytest.mark.parametrize("tied", [False, True])
def test_numbers_make_the_model_they_say(tmp_path, vision, tokens, tied):
    torch.manual_seed(0)
    spec = tiny_llava_spec(vision=vision, language="qwen2", tie_embeddings=tied, language_layers=3)
    vlm = load_llava(build_llava(spec, tmp_path / "model", texts=TEXTS))
    assert (vlm.visual_tokens, vlm.visual_width) == (tokens, 16)
    assert vlm.vocabulary == len(vlm.tokenizer) <= 300
    assert len(vlm.language_layers()) == 3
    assert vlm.preprocessing.image_transform(tiny_images(1)[0]).shape == (3, 32, 32)
    weights = load_file(tmp_path / "model" / "model.safetensors")
    assert ("language_model.lm_head.weight" in weights or "lm_head.weight" in weights) != tied
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model"]


def test_equal_seeds_make_equal_students(tmp_path):
    folders = []
    for name in ("one", "two"):
        torch.manual_seed(5)
        folders.append(build_llava(tiny_llava_spec(), tmp_path / name, texts=TEXTS))
    assert load_llava(folders[0]).fingerprint() == load_llava(folders[1]).fingerprint()


@pytest.mark.parametrize("kind", ["clip", "siglip"])
def test_a_vision_tower_from_a_folder_keeps_its_weights(tmp_path, kind):
    write, own = (write_clip, CLIPVisionModel) if kind == "clip" else (write_siglip, SiglipVisionModel)
    source = write(tmp_path / "source")
    vlm = load_llava(build_llava(tiny_llava_spec(vision=str(source)), tmp_path / "model", texts=TEXTS))
    pixels = vlm.preprocessing.image_inputs(tiny_images(2))["pixels"]
    with torch.no_grad():
        state = own.from_pretrained(source).eval()(pixels, output_hidden_states=True).hidden_states[-1]
        torch.testing.assert_close(vlm.vision(pixels), state[:, int(kind == "clip") :])
    assert vlm.visual_tokens == 16


@pytest.mark.parametrize("kind", ["qwen2", "llama"])
def test_a_language_model_from_a_folder_answers_as_alone(tmp_path, kind):
    source = write_causal(tmp_path / "source", kind=kind)
    vlm = load_llava(build_llava(tiny_llava_spec(language=str(source)), tmp_path / "model"))
    assert vlm.vocabulary == 320 > len(vlm.tokenizer)
    ids = vlm.tokenizer("Is there a dog?", return_tensors="pt")["input_ids"]
    with torch.no_grad():
        alone = AutoModelForCausalLM.from_pretrained(source).eval()(ids).logits
        inside = vlm.language(vlm.embed(ids), torch.ones_like(ids, dtype=torch.bool))
    torch.testing.assert_close(inside, alone, rtol=0, atol=1e-5)
    # its own chat template, whose contents are strings, and the token that ends its turns
    ends = vlm.tokenizer.convert_tokens_to_ids("<|im_end|>")
    _, labels = vlm.preprocessing.encode(TALK)
    assert labels[labels >= 0][-1] == ends
    assert ends in vlm.stop_ids
    saved = LlavaForConditionalGeneration.from_pretrained(tmp_path / "model")
    assert ends in saved.generation_config.eos_token_id
    assert len(vlm.answer(tiny_images(1), ["Is there a dog?"], max_new_tokens=3)) == 1


def test_a_student_takes_its_teachers_tokenizer(tmp_path):
    teacher = load_llava(write_llava(tmp_path / "teacher"))
    spec = tiny_llava_spec(language="qwen2", language_width=16, tokenizer=str(tmp_path / "teacher"))
    student = load_llava(build_llava(spec, tmp_path / "student"))
    assert student.vocabulary == teacher.vocabulary
    assert student.tokenizer.get_vocab() == teacher.tokenizer.get_vocab()
    for one, two in zip(student.preprocessing.encode(TALK), teacher.preprocessing.encode(TALK), strict=True):
        assert torch.equal(one, two)


def test_a_language_model_that_does_more_than_a_llava_holds_is_refused(tmp_path):
    source = write_causal(tmp_path / "source", kind="granite", logits_scaling=4.0)
    with pytest.raises(UserError, match=r"\(granite\) does more behind its last layer"):
        build_llava(tiny_llava_spec(language=str(source)), tmp_path / "model")
    assert not (tmp_path / "model").exists()


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"vision": "resnet"}, "vision tower 'resnet', expected clip or siglip"),
        ({"language": "gpt"}, "no folder 'gpt'; expected a local transformers folder, or llama"),
        ({"patch_size": 7}, "32 pixels in patches of 7"),
        ({"language_heads": 3}, "language width of 32 with 3 heads"),
        ({"feature_layer": 3}, "feature_layer 3"),
        ({"tokenizer": "nowhere"}, "no folder 'nowhere'"),
    ],
)
def test_what_cannot_be_built_is_refused(tmp_path, changes, sentence):
    with pytest.raises(UserError, match=sentence):
        build_llava(tiny_llava_spec(**changes), tmp_path / "model", texts=TEXTS)


def test_other_folders_are_refused(tmp_path):
    bert = str(write_bert(tmp_path / "bert"))
    with pytest.raises(UserError, match="family 'bert', expected a vision tower"):
        build_llava(tiny_llava_spec(vision=bert), tmp_path / "model", texts=TEXTS)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("keep")
    with pytest.raises(UserError, match="not empty"):
        build_llava(tiny_llava_spec(), tmp_path / "full", texts=TEXTS)
    with pytest.raises(UserError, match="no words to train"):
        build_llava(tiny_llava_spec(), tmp_path / "model")
