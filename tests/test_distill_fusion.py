"""What the matching term judges, whom its gradient reaches, and that the exported teacher knows nothing of it."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from helpers.tiny_models import CAPTIONS, tiny_composite, tiny_images
from safetensors.torch import load_file
from torch.nn import functional as F

from vlkd.distill.fusion import FusionMatching, matching_pairs
from vlkd.errors import UserError
from vlkd.models.composite import tower_names

INPUTS = ("image.token_embeds", "text.token_embeds", "text.mask", "image.embed", "text.embed", "logit_scale")
"""In the order of `FusionMatching.forward`."""


def features_of(model, *, pixel_seed=0):
    """The features of four matching rows."""
    images = torch.stack([model.preprocessing.image_transform(image) for image in tiny_images(seed=pixel_seed)])
    return model.encode({"pixels": images} | model.preprocessing.tokenize(CAPTIONS[:4]), INPUTS)


def frozen_model(**changes):
    model = tiny_composite(image_projection="mlp", text_projection="mlp", **changes)
    model.image_tower.requires_grad_(False)
    model.text_tower.requires_grad_(False)
    return model


def matching_loss(objective, model, match=None):
    features = features_of(model)
    match = torch.eye(4, dtype=torch.bool) if match is None else match
    return objective(*(features[name] for name in INPUTS), match=match)


def test_the_gradient_reaches_both_projections_and_no_frozen_tower():
    model = frozen_model()
    objective = FusionMatching(model.width)
    loss = matching_loss(objective, model)
    assert loss.shape == ()
    loss.backward()
    for projection in (model.image_projection, model.text_projection):
        assert all(value.grad.abs().sum() > 0 for value in projection[0].outer.parameters())
        assert projection[0].linear.weight.grad.abs().sum() > 0
    for tower in (model.image_tower, model.text_tower):
        assert all(value.grad is None for value in tower.parameters())
    # The scale serves the choice of negatives alone.
    assert model.log_logit_scale.grad is None
    assert all(value.grad is not None for value in objective.parameters())


def test_one_step_of_the_term_alone_moves_the_projections_and_the_loss():
    model = frozen_model()
    objective = FusionMatching(model.width, dropout=0.0)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    moved = [*model.image_projection.parameters(), *model.text_projection.parameters()]
    optimizer = torch.optim.SGD(moved, lr=0.05)

    def loss():
        torch.manual_seed(0)  # the same negatives before and after
        return matching_loss(objective, model)

    first = loss()
    first.backward()
    optimizer.step()
    assert loss() < first
    after = model.state_dict()
    changed = {name.split(".")[0] for name, value in before.items() if not torch.equal(value, after[name])}
    assert changed == {"image_projection", "text_projection"}


def test_frozen_towers_give_the_same_loss_from_stored_features():
    """What a table of tower features holds is enough, its mask as numbers."""
    model = frozen_model()
    model.eval()
    objective = FusionMatching(model.width).eval()
    images = torch.stack([model.preprocessing.image_transform(image) for image in tiny_images()])
    inputs = {"pixels": images} | model.preprocessing.tokenize(CAPTIONS[:4])
    held = {name: value.float() for name, value in model.encode(inputs, tower_names(INPUTS)).items()}
    found = held | model.project(held) | model.scale_features()
    torch.manual_seed(0)
    stored = objective(*(found[name] for name in INPUTS), match=torch.eye(4, dtype=torch.bool))
    torch.manual_seed(0)
    torch.testing.assert_close(stored, matching_loss(objective, model), rtol=0, atol=1e-6)


def test_the_loss_by_hand():
    """At a large scale the hardest negatives are certain; the pairs are judged one by one."""
    objective = FusionMatching(8, layers=2).eval()
    torch.manual_seed(1)
    image, text = torch.randn(3, 4, 8), torch.randn(3, 6, 8)
    mask = torch.arange(6) < torch.tensor([[2], [4], [3]])
    cosines = torch.tensor([[0.8, 0.5, 0.1], [0.2, 0.9, 0.4], [0.6, 0.3, 0.7]])
    # Orthonormal images and texts with these coordinates have these cosines up to the texts' lengths.
    columns = F.normalize(cosines, dim=0)
    found = objective(image, text, mask, torch.eye(3), columns.T, torch.tensor(1e4), match=torch.eye(3).bool())
    off = columns.numpy() - 9 * np.eye(3)
    pairs = [(i, i, 1) for i in range(3)]
    pairs += [(i, int(off[i].argmax()), 0) for i in range(3)] + [(int(off[:, i].argmax()), i, 0) for i in range(3)]
    losses = []
    with torch.no_grad():
        for i, j, label in pairs:
            logit = objective.network(image[i][None], text[j, mask[j]][None], mask[j, mask[j]][None])[1].item()
            losses.append(math.log1p(math.exp(-logit if label else logit)))
    assert found.item() == pytest.approx(np.mean(losses), abs=1e-5)


def test_pairs_that_match_are_no_negatives_and_rows_without_any_give_none():
    match = torch.eye(4, dtype=torch.bool)
    match[0, 1] = match[1, 0] = match[2, 3] = match[3, 2] = True
    for _ in range(20):
        images, texts, labels = matching_pairs(torch.randn(4, 4), match)
        assert torch.equal(match[images, texts], labels)
        assert labels.tolist() == [True] * 4 + [False] * 8
    match[2] = True  # image 2 matches every text; text 2 still has negatives
    images, texts, labels = matching_pairs(torch.randn(4, 4), match)
    assert torch.equal(match[images, texts], labels)
    assert images[4:7].tolist() == [0, 1, 3]
    assert texts[7:].tolist() == [0, 1, 2, 3]
    images, texts, labels = matching_pairs(torch.randn(2, 2), torch.ones(2, 2, dtype=torch.bool))
    assert (images.tolist(), texts.tolist(), labels.tolist()) == ([0, 1], [0, 1], [True, True])


def test_the_order_of_the_batch_does_not_matter():
    """With every other row a certain negative, a shuffled batch is judged alike."""
    model = frozen_model()
    objective = FusionMatching(model.width).eval()
    features = features_of(model) | {"logit_scale": torch.tensor(1e6)}
    order = torch.tensor([2, 0, 3, 1])
    match = torch.eye(4, dtype=torch.bool)
    shuffled = {name: value[order] if value.dim() else value for name, value in features.items()}
    found, wanted = (objective(*(part[name] for name in INPUTS), match=match) for part in (shuffled, features))
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-5)


def test_what_is_exported_has_no_fusion_weights(tmp_path):
    """The module that trains both holds the network; the model's folder does not."""
    model = frozen_model()
    together = torch.nn.ModuleDict({"student": model, "objective": FusionMatching(model.width)})
    matching_loss(together["objective"], together["student"]).backward()
    together["student"].save(tmp_path / "teacher")
    assert any("network" in name for name in together.state_dict())
    assert (
        load_file(tmp_path / "teacher" / "model.safetensors").keys()
        == tiny_composite(image_projection="mlp", text_projection="mlp").state_dict().keys()
    )


def test_another_width_is_one_sentence():
    model = frozen_model()
    with pytest.raises(UserError, match=r"width 16 and found tokens of width 24; set model\.width"):
        matching_loss(FusionMatching(16), model)
    with pytest.raises(UserError, match="Found 0 fusion layers"):
        FusionMatching(24, layers=0)
