"""Text towers against torch's encoder and transformers; timm towers and weights."""

from __future__ import annotations

import json

import pytest
import timm
import torch
from helpers.classes import tiny_classifier
from helpers.tiny_models import CAPTIONS, TINY_IMAGE, tiny_composite, word_tokenizer, write_bert
from helpers.tiny_vlms import write_timm_vlm
from safetensors.torch import save_file
from transformers import AutoModel

from vlkd.errors import UserError
from vlkd.models.timm_vlm import load_timm_vlm
from vlkd.models.towers import (
    CompactText,
    build_image_tower,
    build_transformers_text,
    image_tokens,
    image_tower_width,
    load_timm_weights,
    masked_mean,
    set_dropout,
)

IDS = torch.tensor([[2, 5, 7, 0, 0], [2, 9, 4, 6, 8], [2, 0, 0, 0, 0]])
MASK = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1], [1, 0, 0, 0, 0]], dtype=torch.bool)


def compact(**changes):
    sizes = {"vocab_size": 11, "width": 16, "layers": 3, "heads": 4, "context_length": 8} | changes
    return CompactText(**sizes).eval()


def as_torch_encoder(tower, heads):
    """torch's own encoder with the tower's weights."""
    width = tower.width
    layer = torch.nn.TransformerEncoderLayer(
        width, heads, 4 * width, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
    )
    encoder = torch.nn.TransformerEncoder(layer, len(tower.blocks), norm=tower.final_norm, enable_nested_tensor=False)
    names = {
        "self_attn.in_proj_weight": "in_projection.weight",
        "self_attn.in_proj_bias": "in_projection.bias",
        "self_attn.out_proj.weight": "out_projection.weight",
        "self_attn.out_proj.bias": "out_projection.bias",
        "linear1.weight": "mlp_in.weight",
        "linear1.bias": "mlp_in.bias",
        "linear2.weight": "mlp_out.weight",
        "linear2.bias": "mlp_out.bias",
        "norm1.weight": "attention_norm.weight",
        "norm1.bias": "attention_norm.bias",
        "norm2.weight": "mlp_norm.weight",
        "norm2.bias": "mlp_norm.bias",
    }
    for block, target in zip(tower.blocks, encoder.layers, strict=True):
        state = block.state_dict()
        target.load_state_dict({key: state[value] for key, value in names.items()})
    return encoder.eval()


def test_compact_tower_equals_torchs_encoder():
    tower = compact()
    with torch.no_grad():
        embedded = tower.token_embedding.weight[IDS] + tower.position_embedding[:5]
        tokens = as_torch_encoder(tower, 4)(embedded, src_key_padding_mask=~MASK)
        wanted = torch.stack([row[keep].mean(dim=0) for row, keep in zip(tokens, MASK, strict=True)])
        torch.testing.assert_close(tower(IDS, MASK), wanted, rtol=0, atol=1e-5)


def test_padding_does_not_change_a_text():
    tower = compact()
    with torch.no_grad():
        together = tower(IDS, MASK)
        alone = torch.cat([tower(IDS[i : i + 1, :n], MASK[i : i + 1, :n]) for i, n in enumerate((3, 5, 1))])
    torch.testing.assert_close(together, alone, rtol=0, atol=1e-5)


def test_dropout_acts_in_training_alone():
    tower = compact(dropout=0.5)
    assert torch.equal(tower(IDS, MASK), tower(IDS, MASK))
    tower.train()
    assert not torch.equal(tower(IDS, MASK), tower(IDS, MASK))
    set_dropout(tower, 0.0)
    assert torch.equal(tower(IDS, MASK), tower(IDS, MASK))


def test_heads_must_divide_the_width():
    with pytest.raises(UserError, match="16 with 3 heads"):
        compact(heads=3)


def test_masked_mean_of_a_text_without_tokens_is_zero():
    assert torch.equal(masked_mean(torch.randn(1, 3, 4), torch.zeros(1, 3, dtype=torch.bool)), torch.zeros(1, 4))


@pytest.mark.parametrize("pooling", ["mean", "cls"])
def test_transformers_tower_equals_the_library(tmp_path, pooling):
    folder = write_bert(tmp_path / "bert")
    tower = build_transformers_text(folder, pooling=pooling, weights=True).eval()
    encoder = AutoModel.from_pretrained(folder).eval()
    text = word_tokenizer()(list(CAPTIONS), padding=True, return_tensors="pt")
    mask = text["attention_mask"]
    with torch.no_grad():
        tokens = encoder(**text).last_hidden_state
        mean = (tokens * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
        found = tower(text["input_ids"], mask.bool())
    torch.testing.assert_close(found, mean if pooling == "mean" else tokens[:, 0], rtol=0, atol=1e-5)
    assert not [name for name, _ in tower.named_parameters() if "pooler" in name]


def test_transformers_folder_without_safetensors(tmp_path):
    folder = write_bert(tmp_path / "bert")
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(UserError, match="Cannot load a text tower"):
        build_transformers_text(folder, pooling="mean", weights=True)
    with pytest.raises(UserError, match=r"Found no config\.json"):
        build_transformers_text(tmp_path, pooling="mean", weights=True)


@pytest.mark.parametrize(
    ("name", "kwargs"),
    [
        ("resnet10t", TINY_IMAGE["image_kwargs"]),
        ("mobilenetv4_conv_small_050", ""),
        ("vit_tiny_patch16_224", '{"img_size": 32}'),
    ],
)
def test_width_is_that_of_the_output(name, kwargs):
    tower = build_image_tower(name, kwargs).eval()
    with torch.no_grad():
        assert tower(torch.zeros(1, 3, 32, 32)).shape == (1, image_tower_width(tower))


def test_timm_refusals_name_neighbours():
    with pytest.raises(UserError, match="such as"):
        build_image_tower("resnet10x", "")
    with pytest.raises(UserError, match="timm cannot build"):
        build_image_tower("resnet10t", '{"no_such_argument": 1}')
    with pytest.raises(UserError, match="timm cannot build"):
        build_image_tower("resnet10t", "{not json")


def test_timm_weights_with_classifier(tmp_path):
    source = timm.create_model("resnet10t", channels=(8, 8, 16, 16), stem_width=8, num_classes=7).eval()
    path = tmp_path / "tower.safetensors"
    save_file({key: value.half() if value.ndim > 1 else value for key, value in source.state_dict().items()}, path)
    tower = build_image_tower("resnet10t", TINY_IMAGE["image_kwargs"]).eval()
    load_timm_weights(tower, str(path))
    pixels = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        wanted = source.forward_head(source.forward_features(pixels), pre_logits=True)
        torch.testing.assert_close(tower(pixels), wanted, rtol=2e-3, atol=2e-3)
    with pytest.raises(UserError, match="does not fit its model"):
        load_timm_weights(build_image_tower("resnet10t", ""), str(path))


@pytest.mark.parametrize("kind", ["dual encoder", "classifier", "vlm"])
def test_timm_weights_of_a_vlkd_folder(kind, tmp_path):
    folder, name, kwargs = tmp_path / "model", "resnet10t", TINY_IMAGE["image_kwargs"]
    if kind == "dual encoder":
        wanted = (model := tiny_composite(seed=1)).image_tower
        model.save(folder)
    elif kind == "classifier":
        wanted = (model := tiny_classifier(seed=1)).trunk[0]
        model.save(folder)
    else:
        name, kwargs = "test_efficientnet", ""
        wanted = load_timm_vlm(write_timm_vlm(folder, vision=f"timm:{name}")).tower
    tower = build_image_tower(name, kwargs)
    load_timm_weights(tower, str(folder))
    assert tower.state_dict().keys() == wanted.state_dict().keys()
    assert all(torch.equal(value, wanted.state_dict()[key]) for key, value in tower.state_dict().items())
    with pytest.raises(UserError, match="does not fit its model"):
        load_timm_weights(build_image_tower(name, '{"in_chans": 1}'), str(folder))
    # Towers of equal shapes may want other pixels: the name decides.
    with pytest.raises(UserError, match=f"The image tower of .* is '{name}', expected 'resnet14t'"):
        load_timm_weights(build_image_tower("resnet14t", ""), str(folder))


def test_timm_weights_of_a_folder_without_a_vlkd_model(tmp_path):
    with pytest.raises(UserError, match=r"Found no vlkd model in .*, expected one or a safetensors file"):
        load_timm_weights(build_image_tower("resnet10t", TINY_IMAGE["image_kwargs"]), str(tmp_path))


@pytest.mark.parametrize("image", [None, "resnet10t", {}, {"timm": 3}])
def test_timm_weights_of_a_folder_that_names_no_tower(tmp_path, image):
    (tmp_path / "model.json").write_text(json.dumps({"format": "vlkd-model", "version": 1, "image": image}))
    with pytest.raises(UserError, match=r"model\.json names no image tower under 'image'; write the model again"):
        load_timm_weights(build_image_tower("resnet10t", TINY_IMAGE["image_kwargs"]), str(tmp_path))


def test_pickled_damaged_and_missing_weights(tmp_path):
    tower = build_image_tower("resnet10t", TINY_IMAGE["image_kwargs"])
    torch.save(tower.state_dict(), tmp_path / "tower.pth")
    with pytest.raises(UserError, match="never unpickles"):
        load_timm_weights(tower, str(tmp_path / "tower.pth"))
    (tmp_path / "tower.safetensors").write_bytes(b"half")
    with pytest.raises(UserError, match="damaged"):
        load_timm_weights(tower, str(tmp_path / "tower.safetensors"))
    with pytest.raises(UserError, match="Found no file"):
        load_timm_weights(tower, str(tmp_path / "nowhere.safetensors"))


TOWERS = [
    ("efficientnet_lite0", "", 64),
    ("resnet10t", TINY_IMAGE["image_kwargs"], 64),
    ("test_vit", "", 160),
    ("test_resnet", "", 64),
    ("mobilenetv4_conv_small_050", "", 64),
    ("test_convnext", "", 64),
    ("test_mambaout", "", 64),
    ("vit_tiny_patch16_224", '{"img_size": 48, "class_token": false, "global_pool": "avg", "depth": 1}', 48),
    ("deit_tiny_distilled_patch16_224", '{"img_size": 48, "depth": 1}', 48),
]


def random_tower(name, kwargs):
    """A tower in evaluation mode whose running statistics differ from the first ones."""
    torch.manual_seed(0)
    tower = build_image_tower(name, kwargs)
    for key, value in tower.named_buffers():
        if key.endswith("running_mean"):
            value.normal_(std=0.1)
    return tower.eval()


@pytest.mark.parametrize(("name", "kwargs", "size"), TOWERS)
def test_one_pass_gives_tokens_and_the_same_pooled_output(name, kwargs, size):
    tower = random_tower(name, kwargs)
    pixels = torch.randn(2, 3, size, size)
    with torch.no_grad():
        maps = tower.forward_features(pixels)
        assert torch.equal(tower.forward_head(maps), tower(pixels))
        tokens = image_tokens(tower, maps)
    cells = min(16, maps.shape[1] - tower.num_prefix_tokens if maps.ndim == 3 else (size // 32) ** 2)
    assert tokens.shape == (2, cells, image_tower_width(tower))


@pytest.mark.parametrize(("name", "kwargs"), [("resnet10t", TINY_IMAGE["image_kwargs"]), ("test_efficientnet", "")])
@pytest.mark.parametrize("size", [32, 128, 256])
def test_tokens_of_an_averaging_network_average_to_its_output(name, kwargs, size):
    tower = random_tower(name, kwargs)
    with torch.no_grad():
        maps = tower.forward_features(torch.randn(2, 3, size, size))
        tokens = image_tokens(tower, maps)
        torch.testing.assert_close(tokens.mean(dim=1), tower.forward_head(maps), rtol=1e-4, atol=1e-5)
    assert tokens.shape[1] == min(16, (size // 32) ** 2)


@pytest.mark.parametrize("name", ["resnet10t", "mobilenetv4_conv_small_050", "test_convnext", "test_mambaout"])
def test_a_map_of_equal_cells_has_the_output_as_every_token(name):
    """Norms and widenings after the pool act on tokens as on the pooled output; neither layout mixes cells."""
    tower = random_tower(name, "")
    width = tower.num_features
    map_ = torch.randn(3, width, 1, 1).expand(3, width, 5, 6)
    maps = map_.permute(0, 2, 3, 1) if name == "test_mambaout" else map_
    with torch.no_grad():
        tokens, output = image_tokens(tower, maps), tower.forward_head(maps)
    torch.testing.assert_close(tokens, output[:, None].expand(3, 16, -1), rtol=1e-4, atol=1e-4)


def test_patches_take_the_norm_that_follows_the_pool():
    tower = random_tower(
        "vit_tiny_patch16_224", '{"img_size": 64, "class_token": false, "global_pool": "avg", "depth": 1}'
    )
    patches = 5 * torch.randn(3, 1, 192).expand(3, 16, 192) + 2
    with torch.no_grad():
        tokens, output = image_tokens(tower, patches), tower.forward_head(patches)
    torch.testing.assert_close(tokens, output[:, None].expand(3, 16, -1), rtol=1e-4, atol=1e-4)
    assert output.mean(dim=1).abs().max() < 1e-4


def test_cells_come_row_by_row_and_prefix_tokens_are_dropped():
    cells = torch.arange(16.0)
    tower = random_tower("resnet10t", "")
    tokens = image_tokens(tower, cells.view(1, 1, 4, 4).repeat(1, 512, 1, 1).repeat_interleave(2, dim=2))
    assert torch.equal(tokens[0, :, 7], cells)
    tower = random_tower("deit_tiny_distilled_patch16_224", '{"img_size": 64, "depth": 1}')
    patches = torch.cat([torch.tensor([-50.0, -70.0]), cells]).view(1, 18, 1).expand(1, 18, 192)
    assert torch.equal(image_tokens(tower, patches)[0, :, 7], cells)
    # Three patches form no square: they stay as they are.
    assert torch.equal(image_tokens(tower, patches[:, :5])[0, :, 7], cells[:3])


def test_statistics_count_pooled_images_alone():
    """In training the cells pass a head's BatchNorm without being counted, and modes are put back."""
    tower = build_image_tower("mobilenetv4_conv_small_050", "").train()
    maps = torch.randn(2, tower.num_features, 3, 3)
    norms = [child for child in tower.modules() if isinstance(child, torch.nn.BatchNorm2d)]
    before = [int(norm.num_batches_tracked) for norm in norms]
    image_tokens(tower, maps)
    assert [int(norm.num_batches_tracked) for norm in norms] == before
    assert all(child.training for child in tower.modules())
    tower.forward_head(maps)
    assert sum(int(norm.num_batches_tracked) for norm in norms) == sum(before) + 1


def test_features_of_another_form_are_one_sentence():
    tower = random_tower("resnet10t", "")
    for maps, part in (([torch.zeros(1, 3)], "list"), (torch.zeros(1, 512), "(1, 512)"), (torch.zeros(1, 3, 7), "7)")):
        with pytest.raises(UserError, match="no term that reads image tokens") as caught:
            image_tokens(tower, maps)
        assert part in str(caught.value)


@pytest.mark.parametrize("kind", ["compact", "bert-mean", "bert-cls"])
def test_pooled_tokens_are_the_output(tmp_path, kind):
    tower = compact()
    if kind != "compact":
        tower = build_transformers_text(write_bert(tmp_path / "bert"), pooling=kind[5:], weights=True).eval()
    with torch.no_grad():
        tokens = tower.tokens(IDS, MASK)
        assert tokens.shape == (3, 5, tower.width)
        assert torch.equal(tower.pool(tokens, MASK), tower(IDS, MASK))
        by_hand = (
            tokens[:, 0]
            if kind == "bert-cls"
            else torch.stack([row[:n].mean(0) for row, n in zip(tokens, (3, 5, 1), strict=True)])
        )
    torch.testing.assert_close(tower(IDS, MASK), by_hand, rtol=0, atol=1e-6)
