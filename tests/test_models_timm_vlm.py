"""Generative models with a timm vision against timm's own features and transformers' own language model."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import timm
import torch
from helpers.tiny_models import tiny_images
from helpers.tiny_vlms import TEXTS, tiny_llava_spec, write_causal, write_timm_vlm
from safetensors.torch import load_file, save_file
from timm.data import create_transform, resolve_model_data_config
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, LlavaProcessor

from vlkd.errors import UserError
from vlkd.features import Turn
from vlkd.models.label_masks import answer_positions, answer_targets, pad_conversations
from vlkd.models.timm_vlm import build_timm_vlm, load_timm_vlm

SHARED = Path(__file__).parents[2] / "shared" / "models"
QUESTIONS = ("What colour is the circle?", "Is there a dog?", "How many cups are there, on the table?", "red", "no?")
TALK = (Turn("user", "<image>\nIs there a dog?"), Turn("assistant", "no"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_timm_vlm(tmp_path_factory.mktemp("vlm") / "model")


def batch(vlm, *, left=False):
    rows = [
        vlm.preprocessing.encode((Turn("user", f"<image>\n{question}"), Turn("assistant", "two red cups")))
        for question in QUESTIONS
    ]
    padded = pad_conversations(rows, vlm.preprocessing.pad_id, left=left)
    return vlm.preprocessing.image_inputs(tiny_images(5)) | padded


def spec_of(name, **changes):
    return tiny_llava_spec(vision=f"timm:{name}", image_size=64, **changes)


def own_tower(folder, name, **kwargs):
    """timm's model with the folder's weights, the tower's keys as timm has them."""
    weights = load_file(folder / "model.safetensors")
    tower = timm.create_model(name, num_classes=0, **kwargs).eval()
    tower.load_state_dict({key.removeprefix("tower."): value for key, value in weights.items() if key[:6] == "tower."})
    return tower


def by_hand(folder, inputs):
    """Logits (B, T, V) with timm's and transformers' own parts, the picture put in place by a loop."""
    weights = load_file(folder / "model.safetensors")
    language = AutoModelForCausalLM.from_pretrained(folder / "language").eval()
    image_id = LlavaProcessor.from_pretrained(folder / "language").image_token_id
    logits = torch.zeros(*inputs["ids"].shape, language.config.vocab_size)
    with torch.no_grad():
        maps = own_tower(folder, "test_efficientnet").forward_features(inputs["pixels"])
        hidden = maps.permute(0, 2, 3, 1).reshape(len(maps), -1, 256)
        hidden = hidden @ weights["projector.linear_1.weight"].T + weights["projector.linear_1.bias"]
        visual = nn.functional.gelu(hidden) @ weights["projector.linear_2.weight"].T
        visual = visual + weights["projector.linear_2.bias"]
        for row, (ids, mask) in enumerate(zip(inputs["ids"], inputs["mask"], strict=True)):
            embeds = language.get_input_embeddings()(ids[mask])
            at = 0
            for place, token in enumerate(ids[mask].tolist()):
                if token == image_id:
                    embeds[place] = visual[row, at]
                    at += 1
            assert at == 4
            # one conversation at a time, without padding
            logits[row, mask] = language(inputs_embeds=embeds[None]).logits[0]
    return logits, language, visual


@pytest.mark.parametrize("left", [False, True])
def test_logits_equal_timm_and_transformers(folder, left):
    vlm = load_timm_vlm(folder)
    inputs = batch(vlm, left=left)
    wanted, _, visual = by_hand(folder, inputs)
    mask = inputs["mask"]
    with torch.no_grad():
        found = vlm.forward_logits(inputs["pixels"], inputs["ids"], mask)
        kept = vlm.forward_logits(inputs["pixels"], inputs["ids"], mask, keep=mask)
        torch.testing.assert_close(vlm.project(vlm.vision(inputs["pixels"])), visual, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(found[mask], wanted[mask], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(kept, found[mask], rtol=1e-4, atol=1e-5)
    assert found.shape[-1] == vlm.vocabulary == len(vlm.tokenizer)
    assert wanted[mask].std() > 0.1
    # The picture matters, so that the comparison above can fail.
    with torch.no_grad():
        blank = vlm.forward_logits(torch.zeros_like(inputs["pixels"]), inputs["ids"], mask)
    assert (blank[mask] - found[mask]).abs().max() > 0.1


@pytest.mark.parametrize(
    ("name", "layout", "sizes", "expected"),
    [
        ("test_efficientnet", "NCHW", {}, (4, 256)),
        ("test_vit", "NLC", {"img_size": 64}, (16, 64)),  # a class token in front, positions that depend on the size
        ("swin_tiny_patch4_window7_224", "NHWC", {"img_size": 64}, (4, 768)),
        ("mobilenetv3_small_100", "NCHW", {}, (4, 576)),  # parameters behind its features
    ],
)
def test_tokens_are_the_features_of_any_timm_model(tmp_path, name, layout, sizes, expected):
    torch.manual_seed(0)
    folder = build_timm_vlm(spec_of(name), tmp_path / "model", texts=TEXTS)
    vlm = load_timm_vlm(folder)
    pixels = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        found, features = vlm.vision(pixels), own_tower(folder, name, **sizes).forward_features(pixels)
    assert found.shape == (2, *expected) == (2, vlm.visual_tokens, vlm.visual_width)
    for at in range(expected[0]):
        row, column = divmod(at, 2)
        place = {
            "NCHW": (slice(None), slice(None), row, column),
            "NHWC": (slice(None), row, column),
            "NLC": (slice(None), 1 + at),
        }[layout]
        assert torch.equal(found[:, at], features[place])


@pytest.mark.parametrize("name", ["test_efficientnet", "test_vit", "mobilenetv3_small_100"])
def test_whatever_learns_has_a_gradient(tmp_path, name):
    torch.manual_seed(0)
    vlm = load_timm_vlm(build_timm_vlm(spec_of(name), tmp_path / "model", texts=TEXTS)).train()
    for value in vlm.parameters():
        value.requires_grad_(True)
    inputs = batch(vlm)
    vlm.forward_logits(inputs["pixels"], inputs["ids"], inputs["mask"]).square().sum().backward()
    without = {key for key, value in vlm.named_parameters() if value.grad is None}
    assert without == {key for key, _ in vlm.named_parameters() if vlm.is_idle(key)}
    # MobileNetV3 widens its features behind the pool, which is left out.
    assert without == ({"tower.conv_head.weight", "tower.conv_head.bias"} if "mobilenet" in name else set())
    assert not any("classifier" in key or "head.fc" in key for key, _ in vlm.named_parameters())
    vlm.train_only(("projector",))
    assert {vlm.part_of(key) for key, value in vlm.named_parameters() if value.requires_grad} == {"projector"}
    counts = [sum(value.numel() for value in vlm.part_parameters(part)) for part in ("vision", "projector", "language")]
    assert sum(counts) == sum(value.numel() for value in vlm.parameters())


def test_answers_equal_transformers_generate(folder):
    vlm, images = load_timm_vlm(folder), tiny_images(5)
    wanted = []
    for question, image in zip(QUESTIONS, images, strict=True):
        ids = vlm.preprocessing.prompt_ids(question)[None]
        inputs = vlm.preprocessing.image_inputs([image]) | {"ids": ids, "mask": torch.ones_like(ids).bool()}
        logits, language, visual = by_hand(folder, inputs)
        embeds = language.get_input_embeddings()(ids).detach().clone()
        embeds[ids == vlm.image_token_id] = visual[0]
        assert ids[0].tolist().count(vlm.image_token_id) == 4
        new = language.generate(
            inputs_embeds=embeds, attention_mask=torch.ones_like(ids), max_new_tokens=8, do_sample=False, eos_token_id=2
        )
        assert new[0, 0] == logits[0, -1].argmax()
        wanted.append(vlm.tokenizer.decode(new[0], skip_special_tokens=True).strip())
    assert vlm.answer(images, QUESTIONS, max_new_tokens=8) == wanted
    assert vlm.answer(images, QUESTIONS, max_new_tokens=8, batch_size=1) == wanted
    assert vlm.answer(images, QUESTIONS, max_new_tokens=8, batch_size=3) == wanted
    assert len(set(wanted)) > 1
    assert vlm.stop_ids == (2,) == (vlm.tokenizer.eos_token_id,)


def test_an_answer_ends_at_the_stop_token(folder):
    vlm = load_timm_vlm(folder)
    head = vlm.language_model.get_output_embeddings()
    head.register_forward_hook(lambda module, found, logits: logits.index_fill(-1, torch.tensor([2]), 1e4))
    ids = vlm.preprocessing.prompt_ids("red")[None]
    pixels = vlm.preprocessing.image_inputs(tiny_images(1))["pixels"]
    assert vlm.generate(ids, torch.ones_like(ids).bool(), max_new_tokens=8, pixels=pixels).tolist() == [[2]]


def test_saving_and_loading_keeps_every_logit(folder, tmp_path):
    vlm = load_timm_vlm(folder)
    before = torch.random.get_rng_state()
    vlm.train().save(tmp_path / "again")
    assert torch.equal(torch.random.get_rng_state(), before)
    assert vlm.training
    vlm.eval()
    again = load_timm_vlm(tmp_path / "again")
    inputs = batch(vlm)
    arguments = inputs["pixels"], inputs["ids"], inputs["mask"]
    with torch.no_grad():
        torch.testing.assert_close(again.forward_logits(*arguments), vlm.forward_logits(*arguments), rtol=0, atol=0)
    assert again.fingerprint() == vlm.fingerprint()
    assert not again.training
    with torch.no_grad():
        next(iter(again.part_parameters("projector")))[0, 0] += 1e-3
    assert again.fingerprint() != vlm.fingerprint()
    names = {path.name for path in (tmp_path / "again").iterdir()}
    assert names == {"model.json", "model.safetensors", "golden.safetensors", "language"}
    assert {path.suffix for path in (tmp_path / "again").rglob("*.*")} <= {".json", ".safetensors", ".jinja"}


def test_the_language_folder_is_plain_transformers(folder):
    vlm = load_timm_vlm(folder)
    model = AutoModelForCausalLM.from_pretrained(folder / "language").eval()
    tokenizer = AutoTokenizer.from_pretrained(folder / "language")
    ids = tokenizer("Is there a dog?", return_tensors="pt")["input_ids"]
    with torch.no_grad():
        found = vlm.language(vlm.embed(ids), torch.ones_like(ids).bool())
        torch.testing.assert_close(found, model(ids).logits, rtol=0, atol=1e-5)
    assert model.generation_config.eos_token_id == [2]


def test_a_failed_save_leaves_what_was_there(folder, tmp_path, monkeypatch):
    target = tmp_path / "model"
    shutil.copytree(folder, target)
    before = load_timm_vlm(target)
    monkeypatch.setattr("vlkd.models.timm_vlm.store_golden", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        write_timm_vlm_again(before, target)
    assert load_timm_vlm(target).fingerprint() == load_timm_vlm(folder).fingerprint()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model"]


def write_timm_vlm_again(vlm, target):
    with torch.no_grad():
        for value in vlm.parameters():
            value.add_(0.1)
    vlm.save(target)


def test_golden_logits_notice_other_weights_and_preprocessing(folder, tmp_path):
    target = tmp_path / "model"
    shutil.copytree(folder, target)
    path = target / "language" / "processor_config.json"
    settings = json.loads(path.read_text())
    settings["image_processor"]["image_mean"] = [0.1, 0.1, 0.1]
    path.write_text(json.dumps(settings))
    with pytest.raises(UserError, match=r"answer\.logits of the golden inputs differs by"):
        load_timm_vlm(target)
    shutil.copytree(folder, target, dirs_exist_ok=True)
    weights = load_file(target / "model.safetensors")
    weights["tower.conv_stem.weight"] = weights["tower.conv_stem.weight"].flip(0)
    save_file(weights, target / "model.safetensors")
    with pytest.raises(UserError, match=r"answer\.logits of the golden inputs differs by"):
        load_timm_vlm(target)


@pytest.mark.parametrize("name", ["test_efficientnet", "tf_efficientnet_lite0"])
def test_pixels_equal_timms_transform(tmp_path, name):
    """mean and std are the model's own: ImageNet's for one, 0.5 for the other."""
    vlm = load_timm_vlm(build_timm_vlm(spec_of(name), tmp_path / "model", texts=TEXTS))
    settings = resolve_model_data_config(timm.create_model(name)) | {
        "input_size": (3, 64, 64),
        "crop_pct": 1.0,
        "crop_mode": "squash",
    }
    transform = create_transform(**settings, is_training=False)
    images = tiny_images(4)
    found = vlm.preprocessing.image_inputs(images)["pixels"]
    wanted = torch.stack([transform(image) for image in images])
    step = 1 / 255 / min(settings["std"])
    assert found.shape == wanted.shape == (4, 3, 64, 64)
    # Both resize uint8, Pillow in fixed point and torchvision in its own: at most two grey levels apart.
    assert (found - wanted).abs().max() <= 2.01 * step
    assert (found - wanted).abs().mean() <= 0.2 * step
    assert vlm.preprocessing.image_size == (64, 64)


def test_places_come_from_the_weights(folder, tmp_path):
    target = tmp_path / "model"
    shutil.copytree(folder, target)
    path = target / "language" / "processor_config.json"
    told = {"patch_size": 7, "num_additional_image_tokens": 3, "vision_feature_select_strategy": "default"}
    path.write_text(json.dumps(json.loads(path.read_text()) | told))
    vlm = load_timm_vlm(target)
    assert vlm.processor.patch_size == 7
    assert vlm.preprocessing.encode(TALK)[0].tolist().count(vlm.image_token_id) == vlm.visual_tokens == 4


def running(module):
    return {name: value.clone() for name, value in module.named_buffers() if "running_" in name}


def test_running_statistics_follow_learning(folder):
    class Parent(nn.Module):
        def __init__(self, teacher, student):
            super().__init__()
            self.teacher, self.student = teacher, student

    teacher, student = load_timm_vlm(folder).freeze(), load_timm_vlm(folder)
    parent = Parent(teacher, student).train()
    pixels = batch(teacher)["pixels"]
    before = running(teacher)
    assert before

    def moved(vlm):
        vlm.vision(pixels)
        return any(not torch.equal(value, before[name]) for name, value in running(vlm).items())

    assert not teacher.training
    assert not moved(teacher)
    student.train_only(("projector", "language"))
    assert student.training
    assert not moved(student)
    parent.eval().train()
    assert not moved(student)
    student.train_only(("vision",))
    assert moved(student)


@pytest.mark.parametrize("checkpointed", [False, True])
def test_gradient_of_the_switch_reaches_the_students_vision_alone(folder, tmp_path, checkpointed):
    teacher = load_timm_vlm(folder).freeze().train()
    student = load_timm_vlm(write_timm_vlm(tmp_path / "student", seed=3, language_width=16)).train()
    teacher.checkpointing(checkpointed)
    assert (student.visual_tokens, student.visual_width) == (teacher.visual_tokens, teacher.visual_width)
    before = teacher.fingerprint()
    inputs = batch(teacher)
    keep, targets = answer_positions(inputs["labels"]), answer_targets(inputs["labels"])
    visual = teacher.project(student.vision(inputs["pixels"]))
    logits = teacher.forward_logits(None, inputs["ids"], inputs["mask"], visual=visual, keep=keep)
    assert logits.shape == (len(targets), teacher.vocabulary)
    own = teacher.forward_logits(inputs["pixels"], inputs["ids"], inputs["mask"], keep=keep)
    assert (own - logits).abs().max() > 0.1
    nn.functional.cross_entropy(logits, targets).backward()
    assert all(value.grad is None for value in teacher.parameters())
    for name, value in student.named_parameters():
        if student.part_of(name) == "vision":
            assert value.grad is not None, name
        else:
            assert value.grad is None, name
    assert sum(value.grad.abs().sum() for value in student.part_parameters("vision")) > 0
    torch.optim.SGD(list(student.part_parameters("vision")), lr=0.1).step()
    assert teacher.fingerprint() == before


def test_a_scaled_output_layer_answers_as_alone(tmp_path):
    """Granite divides its logits behind the output layer, which a LLaVA's folder could not hold."""
    source = write_causal(tmp_path / "source", kind="granite", logits_scaling=4.0)
    vlm = load_timm_vlm(build_timm_vlm(spec_of("test_efficientnet", language=str(source)), tmp_path / "model"))
    ids = vlm.tokenizer("Is there a dog?", return_tensors="pt")["input_ids"]
    mask = torch.ones_like(ids).bool()
    with torch.no_grad():
        alone = AutoModelForCausalLM.from_pretrained(source).eval()(ids).logits
        torch.testing.assert_close(vlm.language(vlm.embed(ids), mask, mask), alone[0], rtol=0, atol=1e-5)
    assert vlm.vocabulary == 320 > len(vlm.tokenizer)
    assert vlm.tokenizer.convert_tokens_to_ids("<|im_end|>") in vlm.stop_ids


def test_weights_by_timms_keys(tmp_path):
    torch.manual_seed(4)
    whole = timm.create_model("test_efficientnet", num_classes=10).eval()
    save_file({key: value.half() for key, value in whole.state_dict().items()}, tmp_path / "weights.safetensors")
    spec = spec_of("test_efficientnet", vision_weights=str(tmp_path / "weights.safetensors"))
    vlm = load_timm_vlm(build_timm_vlm(spec, tmp_path / "model", texts=TEXTS))
    assert {value.dtype for value in vlm.parameters()} == {torch.float32}
    pixels = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        wanted = whole.half().float().forward_features(pixels).flatten(2).mT
        torch.testing.assert_close(vlm.vision(pixels), wanted, rtol=1e-5, atol=1e-6)
    weights = load_file(tmp_path / "weights.safetensors")
    weights["foreign"] = weights.pop("conv_stem.weight")
    save_file(weights, tmp_path / "weights.safetensors")
    with pytest.raises(UserError, match=r"conv_stem\.weight is missing; foreign is unexpected"):
        build_timm_vlm(spec, tmp_path / "other", texts=TEXTS)
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"vision": "timm:no_such_model"}, "timm cannot build 'no_such_model'"),
        ({"vision_weights": "nowhere.safetensors"}, "no file nowhere.safetensors"),
        ({"vision_weights": "weights.bin"}, r"no file weights\.bin"),
        ({"vision": "timm:test_vit", "image_size": 8}, "8 x 8 pixels"),
        ({"language_heads": 3}, "language width of 32 with 3 heads"),
        ({"tokenizer": "nowhere"}, "no folder 'nowhere'"),
    ],
)
def test_what_cannot_be_built_is_refused(tmp_path, changes, sentence):
    settings = {"vision": "timm:test_efficientnet", "image_size": 64} | changes
    with pytest.raises(UserError, match=sentence):
        build_timm_vlm(tiny_llava_spec(**settings), tmp_path / "model", texts=TEXTS)
    assert not list(tmp_path.iterdir())


def test_damaged_folders_are_refused_in_a_sentence(folder, tmp_path):
    def damaged(name):
        target = tmp_path / name.replace("/", "-")
        shutil.copytree(folder, target)
        (target / name).unlink()
        return target

    for name, sentence in {
        "model.json": r"no model\.json",
        "model.safetensors": r"no file .*model\.safetensors",
        "language/model.safetensors": "cannot load the language model",
        "language/config.json": "cannot load the language model",
        "language/processor_config.json": "no readable processor",
    }.items():
        with pytest.raises(UserError, match=sentence):
            load_timm_vlm(damaged(name))
    target = tmp_path / "layout"
    shutil.copytree(folder, target)
    (target / "model.json").write_text('{"format": "vlkd-vlm", "version": 1}')
    with pytest.raises(UserError, match="lacks or misspells 'vision'"):
        load_timm_vlm(target)


@pytest.mark.parametrize("size", [96, 128])
def test_efficientnet_lites_are_of_one_layout(tmp_path, size):
    """The pair of the evidence: equal N and C, so that one's features may enter the other's projector."""
    found = []
    for name in ("tf_efficientnet_lite0", "tf_efficientnet_lite2"):
        file = SHARED / f"{name}.safetensors"
        if not file.is_file():
            pytest.skip(f"needs {file}")
        spec = tiny_llava_spec(vision=f"timm:{name}", vision_weights=str(file), image_size=size)
        vlm = load_timm_vlm(build_timm_vlm(spec, tmp_path / name, texts=TEXTS))
        pixels = vlm.preprocessing.image_inputs(tiny_images(2))["pixels"]
        found.append((vlm.visual_tokens, vlm.visual_width, pixels))
        assert not any(vlm.is_idle(key) for key, _ in vlm.named_parameters())
    assert found[0][:2] == found[1][:2] == ((size // 32) ** 2, 1280)
    assert torch.equal(found[0][2], found[1][2])
