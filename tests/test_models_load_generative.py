"""One loader and one builder for both families of generative models."""

from __future__ import annotations

import shutil

import pytest
import torch
from helpers.tiny_models import tiny_composite, tiny_images, write_clip
from helpers.tiny_vlms import TEXTS, tiny_llava_spec, write_llava, write_timm_vlm

from vlkd.errors import UserError
from vlkd.features import Turn
from vlkd.models.classifier_spec import ClassifierSpec, build_classifier
from vlkd.models.load import load
from vlkd.models.load_generative import build_vlm, load_generative
from vlkd.models.timm_vlm import TimmVLM
from vlkd.models.via_llava import LlavaVLM, load_llava

TALK = (Turn("user", "<image>\nIs there a dog?"), Turn("assistant", "no"))


@pytest.fixture(scope="module")
def timm_folder(tmp_path_factory):
    return write_timm_vlm(tmp_path_factory.mktemp("vlm") / "model")


@pytest.fixture(scope="module")
def llava_folder(tmp_path_factory):
    return write_llava(tmp_path_factory.mktemp("vlm") / "model")


@pytest.mark.parametrize("kind", ["timm", "llava"])
def test_a_folder_and_a_run_give_the_same_model(timm_folder, llava_folder, tmp_path, kind):
    folder = timm_folder if kind == "timm" else llava_folder
    vlm = load_generative(folder)
    assert isinstance(vlm, TimmVLM if kind == "timm" else LlavaVLM)
    assert not vlm.training
    shutil.copytree(folder, tmp_path / "run" / "student")
    assert load_generative(str(tmp_path / "run")).fingerprint() == vlm.fingerprint()


def test_the_spec_chooses_the_builder(tmp_path):
    torch.manual_seed(0)
    timm_spec = tiny_llava_spec(vision="timm:test_efficientnet", image_size=64)
    one = load_generative(build_vlm(timm_spec, tmp_path / "timm", texts=TEXTS))
    two = load_generative(build_vlm(tiny_llava_spec(), tmp_path / "llava", texts=TEXTS))
    assert isinstance(one, TimmVLM)
    assert isinstance(two, LlavaVLM)
    assert len(one.answer(tiny_images(1), ["red"], max_new_tokens=2)) == 1
    with pytest.raises(UserError, match="vision_weights for the vision tower 'clip', expected timm:NAME"):
        build_vlm(tiny_llava_spec(vision_weights="file.safetensors"), tmp_path / "new", texts=TEXTS)
    with pytest.raises(UserError, match="expected clip or siglip or timm:NAME"):
        build_vlm(tiny_llava_spec(vision="resnet"), tmp_path / "new", texts=TEXTS)
    with pytest.raises(UserError, match="not empty"):
        build_vlm(timm_spec, tmp_path / "timm", texts=TEXTS)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["llava", "timm"]


def test_equal_seeds_make_equal_students(tmp_path):
    spec = tiny_llava_spec(vision="timm:test_efficientnet", image_size=64)
    folders = []
    for name in ("one", "two"):
        torch.manual_seed(5)
        folders.append(build_vlm(spec, tmp_path / name, texts=TEXTS))
    assert load_generative(folders[0]).fingerprint() == load_generative(folders[1]).fingerprint()


@pytest.mark.parametrize("vision", ["timm:test_efficientnet", "clip"])
def test_a_student_takes_the_tokenizer_of_a_teacher_with_a_timm_vision(timm_folder, tmp_path, vision):
    spec = tiny_llava_spec(vision=vision, image_size=64, patch_size=32, tokenizer=str(timm_folder))
    teacher, student = load_generative(timm_folder), load_generative(build_vlm(spec, tmp_path / "student"))
    assert student.vocabulary == teacher.vocabulary
    assert student.tokenizer.get_vocab() == teacher.tokenizer.get_vocab()
    for one, two in zip(student.preprocessing.encode(TALK), teacher.preprocessing.encode(TALK), strict=True):
        assert torch.equal(one, two)


def test_a_student_may_start_from_the_language_model_of_a_teacher(timm_folder, tmp_path):
    spec = tiny_llava_spec(vision="timm:test_vit", image_size=64, language=str(timm_folder))
    teacher, student = load_generative(timm_folder), load_generative(build_vlm(spec, tmp_path / "student"))
    for one, two in zip(teacher.part_parameters("language"), student.part_parameters("language"), strict=True):
        assert torch.equal(one, two)


def test_other_models_are_refused_in_a_sentence(timm_folder, tmp_path):
    tiny_composite().save(tmp_path / "dual")
    with pytest.raises(UserError, match=r"holds a dual encoder, expected a generative model.*vlkd\.load"):
        load_generative(tmp_path / "dual")
    (tmp_path / "run").mkdir()
    shutil.copytree(tmp_path / "dual", tmp_path / "run" / "student")
    with pytest.raises(UserError, match="holds a dual encoder, expected a generative model"):
        load_generative(tmp_path / "run")
    build_classifier(ClassifierSpec(image="test_efficientnet", image_size=32), ["a", "b"]).save(tmp_path / "classes")
    with pytest.raises(UserError, match="holds a classifier, expected a generative model"):
        load_generative(tmp_path / "classes")
    with pytest.raises(UserError, match="family 'clip', expected one of llava"):
        load_generative(write_clip(tmp_path / "clip"))
    with pytest.raises(UserError, match="Found no folder"):
        load_generative(tmp_path / "nothing")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"no config\.json"):
        load_generative(tmp_path / "empty")
    with pytest.raises(UserError, match="holds a generative model, expected a dual encoder"):
        load(str(timm_folder))
    with pytest.raises(UserError, match=r"holds a model\.json of vlkd-vlm"):
        load_llava(timm_folder)
    with pytest.raises(UserError, match="device nowhere cannot be used"):
        load_generative(timm_folder, device="nowhere")
