"""The fusion network: masks, order, and that it can tell what belongs together."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from vlkd.errors import UserError
from vlkd.models.fusion import FusionNetwork


def network(width=16, **changes):
    torch.manual_seed(0)
    return FusionNetwork(width, **({"heads": 4, "layers": 2} | changes)).eval()


def pairs(count=5, *, width=16, seed=1):
    """Image tokens (P, 6, D), text tokens (P, 7, D), and masks of one to seven real tokens."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.arange(count) * 3 % 7 + 1
    mask = torch.arange(7) < lengths[:, None]
    image, text = (torch.randn(count, length, width, generator=generator) for length in (6, 7))
    return image, text, mask


def test_shapes():
    fused, logits = network()(*pairs())
    assert fused.shape == (5, 16)
    assert logits.shape == (5,)


def test_padding_changes_nothing():
    net, (image, text, mask) = network(), pairs()
    with torch.no_grad():
        wanted = net(image, text, mask)
        noisy = torch.where(mask[..., None], text, 1e3 * torch.randn_like(text))
        longer = net(image, F.pad(noisy, (0, 0, 0, 4), value=7.0), F.pad(mask, (0, 4)))
        alone = [net(image[i : i + 1], text[i : i + 1, row], row[row][None]) for i, row in enumerate(mask)]
    torch.testing.assert_close(longer, wanted, rtol=0, atol=1e-5)
    torch.testing.assert_close(torch.cat([logits for _, logits in alone]), wanted[1], rtol=0, atol=1e-5)


def test_pairs_do_not_see_each_other():
    net, given = network(), pairs()
    order = torch.tensor([3, 0, 4, 2, 1])
    with torch.no_grad():
        for found, wanted in zip(net(*(part[order] for part in given)), net(*given), strict=True):
            torch.testing.assert_close(found, wanted[order], rtol=0, atol=1e-5)


def test_both_modalities_and_every_parameter_take_part():
    net, (image, text, mask) = network(), pairs()
    image.requires_grad_()
    text.requires_grad_()
    _, logits = net(image, text, mask)
    logits.square().sum().backward()
    assert (image.grad.abs().sum(dim=2) > 0).all()
    assert torch.equal(text.grad.abs().sum(dim=2) > 0, mask)
    assert not [name for name, value in net.named_parameters() if value.grad is None]


def test_each_stream_reads_the_other_modality():
    """Before anything is merged, every image token has seen the text, and every text token the image."""
    net, (image, text, mask) = network(layers=1), pairs()
    seen = {}
    net.image_streams[0].register_forward_hook(lambda *args: seen.update(image=args[2]))
    net.text_streams[0].register_forward_hook(lambda *args: seen.update(text=args[2]))

    def streams(image, text):
        with torch.no_grad():
            net(image, text, mask)
        return seen["image"], seen["text"]

    before = streams(image, text)
    for changed, row in ((streams(image, text.flip(0)), 0), (streams(image.flip(0), text), 1)):
        assert ((changed[row] - before[row]).abs().amax(dim=2)[[0, 1, 3, 4]] > 1e-3).all()
    # The third pair is the middle one, which flipping leaves in place.
    assert torch.equal(changed[1][2], before[1][2])


def test_scale_of_the_projection_does_not_matter():
    net, (image, text, mask) = network(), pairs()
    with torch.no_grad():
        found, wanted = net(40 * image, 0.5 * text, mask), net(image, text, mask)
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-3)


def test_a_text_without_tokens_is_finite():
    net, (image, text, mask) = network(), pairs()
    mask[2] = False
    with torch.no_grad():
        found = net(image, text, mask)[1]
    assert found.isfinite().all()


def test_it_learns_what_belongs_together():
    """An image shows one of eight things in one of its tokens, a text names one in one of its; do they agree?"""
    torch.manual_seed(0)
    net = FusionNetwork(16, heads=2, layers=1).train()
    shown, named = torch.randn(2, 8, 16).mul(2)
    mask = torch.arange(5) < 4

    def batch(count):
        things, labels = torch.randint(8, (count,)), torch.rand(count) < 0.5
        names = torch.where(labels, things, (things + torch.randint(1, 8, (count,))) % 8)
        image, text = 0.3 * torch.randn(count, 4, 16), 0.3 * torch.randn(count, 5, 16)
        rows = torch.arange(count)
        image[rows, torch.randint(4, (count,))] += shown[things]
        text[rows, torch.randint(4, (count,))] += named[names]
        text[:, 4] = named[torch.randint(8, (count,))]  # behind the mask, another name misleads whoever reads it
        return image, text, mask.expand(count, 5), labels

    optimizer = torch.optim.AdamW(net.parameters(), lr=3e-3)
    for _ in range(300):
        *inputs, labels = batch(64)
        optimizer.zero_grad()
        F.binary_cross_entropy_with_logits(net(*inputs)[1], labels.float()).backward()
        optimizer.step()
    *inputs, labels = batch(1000)
    with torch.no_grad():
        right = ((net.eval()(*inputs)[1] > 0) == labels).float().mean()
    assert right > 0.9


def test_sizes_are_checked():
    with pytest.raises(UserError, match="16 with 3 heads"):
        FusionNetwork(16, heads=3)
    with pytest.raises(UserError, match="Found 0 fusion layers"):
        FusionNetwork(16, heads=4, layers=0)
