from __future__ import annotations

import math
from functools import partial
from itertools import pairwise

import numpy as np
import open_clip
import pytest
import torch
from helpers import properties, references
from helpers.shapes import Shapes
from torch import Tensor
from torch.nn import functional as F

from vlkd.errors import UserError
from vlkd.objectives import info_nce, interactive_contrastive, siglip

BATCH, WIDTH = 6, 5
IDENTITY = torch.eye(BATCH, dtype=torch.bool)


def repeated_captions() -> Tensor:
    """Rows 0, 2 and 5 share one caption, rows 1 and 3 another."""
    captions = torch.tensor([0, 1, 0, 1, 2, 0])
    return captions[:, None] == captions[None, :]


OBJECTIVES = {
    "info_nce": (partial(info_nce, logit_scale=14.0), {0, 1}),
    "siglip": (partial(siglip, logit_scale=10.0, logit_bias=-10.0), {0, 1}),
    "interactive_contrastive": (partial(interactive_contrastive, logit_scale=14.0), {0}),
}

BY_ROWS = {
    "info_nce": lambda a, b, s, c, **options: info_nce(a, b, s, **options),
    "siglip": siglip,
    "interactive_contrastive": lambda a, b, s, c, **options: interactive_contrastive(a, b, s, **options),
}
"""With one signature: inputs, scale, bias."""


def own_rows(match: Tensor | None, rows: slice) -> tuple[Tensor, Tensor] | None:
    return None if match is None else (match[rows], match.T[rows])


def partitions(size: int, number: int, seed: int = 0) -> list[list[slice]]:
    """Consecutive slices between random cuts, the same cut twice among them; the whole as one part first."""
    generator = np.random.default_rng(seed)
    found = [[slice(0, size)], [slice(0, 0), slice(0, size), slice(size, size)]]
    for _ in range(number):
        cuts = [0, *sorted(generator.integers(0, size + 1, size=generator.integers(1, 5)).tolist()), size]
        found.append([slice(begin, end) for begin, end in pairwise(cuts)])
    assert any(part.start == part.stop for parts in found for part in parts)
    return found


@pytest.mark.parametrize("name", OBJECTIVES)
def test_shared_properties(name):
    objective, students = OBJECTIVES[name]
    inputs = properties.embeddings((BATCH, WIDTH), (BATCH, WIDTH))
    properties.assert_follows_permutation(objective, inputs)
    properties.assert_ignores_length(objective, inputs)
    properties.assert_gradient_reaches(objective, inputs, students)
    properties.assert_float32_under_autocast(objective, inputs)


@pytest.mark.parametrize("scale", [0.01, 100.0, 1e4])
@pytest.mark.parametrize("name", OBJECTIVES)
def test_finite_at_extremes(name, scale):
    objective, students = OBJECTIVES[name]
    shapes = [(BATCH, WIDTH), (BATCH, WIDTH)]
    properties.assert_finite_at_extremes(partial(objective, logit_scale=scale), shapes, sorted(students))


def test_info_nce_of_two_orthogonal_pairs():
    # Cosines are the identity, so each row of logits is (s, 0) up to order and the loss -log(e^s / (e^s + 1)).
    pairs = torch.tensor([[2.0, 0.0], [0.0, 7.0]])
    assert info_nce(pairs, pairs, 3.0).item() == pytest.approx(math.log1p(math.exp(-3)), rel=1e-6)


def test_info_nce_when_all_rows_match_all():
    # Equal embeddings give an even softmax over B; against any target its cross entropy is log B.
    same = torch.ones(4, 3)
    for match in (None, torch.ones(4, 4, dtype=torch.bool)):
        assert info_nce(same, same, 50.0, match=match).item() == pytest.approx(math.log(4), rel=1e-6)


def test_info_nce_does_not_punish_a_repeated_caption():
    # Images 0 and 1 share text 0's caption. With the pair marked, the loss of perfect embeddings is the entropy of
    # the even target (log 2, for every row); with the identity the same value is no minimum but the best reachable.
    image = torch.tensor([[1.0, 0.0], [1.0, 0.0]])
    match = torch.ones(2, 2, dtype=torch.bool)
    image.requires_grad_()
    loss = info_nce(image, image.detach(), 20.0, match=match)
    assert loss.item() == pytest.approx(math.log(2), rel=1e-6)
    assert torch.autograd.grad(loss, image)[0].abs().max().item() < 1e-6


@pytest.mark.parametrize("match", [None, IDENTITY, torch.zeros_like(IDENTITY)])
def test_info_nce_equals_open_clip(match):
    image, text = properties.embeddings((BATCH, WIDTH), (BATCH, WIDTH))
    scale = torch.tensor(14.3, dtype=torch.float64)
    expected = open_clip.loss.ClipLoss()(F.normalize(image, dim=1), F.normalize(text, dim=1), scale)
    actual = info_nce(image, text, scale, match=match)
    torch.testing.assert_close(actual, expected)
    torch.testing.assert_close(torch.autograd.grad(actual, image), torch.autograd.grad(expected, image))


@pytest.mark.parametrize("match", [None, IDENTITY])
def test_siglip_equals_open_clip(match):
    image, text = properties.embeddings((BATCH, WIDTH), (BATCH, WIDTH))
    scale, bias = torch.tensor(10.0, dtype=torch.float64), torch.tensor(-10.0, dtype=torch.float64)
    expected = open_clip.loss.SigLipLoss()(F.normalize(image, dim=1), F.normalize(text, dim=1), scale, bias)
    actual = siglip(image, text, scale, bias, match=match)
    torch.testing.assert_close(actual, expected)
    torch.testing.assert_close(torch.autograd.grad(actual, image), torch.autograd.grad(expected, image))


def test_siglip_of_orthogonal_pairs_without_bias():
    # Two positives with logit s, two negatives with logit 0, divided by B = 2: log(1 + e^-s) + log 2.
    pairs = torch.eye(2)
    assert siglip(pairs, pairs, 3.0, 0.0).item() == pytest.approx(math.log1p(math.exp(-3)) + math.log(2), rel=1e-6)


def test_interactive_contrastive_takes_one_direction():
    # Anchors: both students point at teacher 0. Row 0: -log(e^s / (e^s + 1)); row 1: the same plus s.
    # Teacher-to-student anchors would instead see two equal candidates and lose exactly log 2.
    student, teacher = torch.tensor([[1.0, 0.0], [1.0, 0.0]]), torch.eye(2)
    expected = math.log1p(math.exp(-4)) + 4 / 2
    assert interactive_contrastive(student, teacher, 4.0).item() == pytest.approx(expected, rel=1e-6)


def test_interactive_contrastive_parts_are_the_halves_of_info_nce():
    image, text = properties.embeddings((BATCH, WIDTH), (BATCH, WIDTH))
    match = repeated_captions()
    parts = [interactive_contrastive(a, b, 9.0, match=match) for a, b in ((image, text), (text, image))]
    torch.testing.assert_close((parts[0] + parts[1]) / 2, info_nce(image, text, 9.0, match=match))


@pytest.mark.parametrize("match", [IDENTITY, repeated_captions()])
def test_numpy_references(match):
    image, text = properties.embeddings((BATCH, WIDTH), (BATCH, WIDTH), seed=3)
    arrays = image.detach().numpy(), text.detach().numpy()
    mask = match.numpy()
    assert info_nce(image, text, 7.0, match=match).item() == pytest.approx(references.info_nce(*arrays, 7.0, mask))
    expected = references.siglip(*arrays, 7.0, -3.0, mask)
    assert siglip(image, text, 7.0, -3.0, match=match).item() == pytest.approx(expected)
    expected = references.anchored_cross_entropy(*arrays, 7.0, mask)
    assert interactive_contrastive(image, text, 7.0, match=match).item() == pytest.approx(expected)


def test_info_nce_reads_an_asymmetric_match_along_each_direction():
    image, text = properties.embeddings((3, 4), (3, 4))
    match = torch.tensor([[True, True, False], [False, True, False], [False, False, True]])
    expected = references.info_nce(image.detach().numpy(), text.detach().numpy(), 5.0, match.numpy())
    assert info_nce(image, text, 5.0, match=match).item() == pytest.approx(expected)


def test_gradcheck():
    image, text = properties.embeddings((4, 3), (4, 3))
    scale = torch.tensor(3.0, dtype=torch.float64, requires_grad=True)
    bias = torch.tensor(-1.0, dtype=torch.float64, requires_grad=True)
    match = repeated_captions()[:4, :4]
    torch.autograd.gradcheck(lambda a, b, s: info_nce(a, b, s, match=match), (image, text, scale))
    torch.autograd.gradcheck(lambda a, b, s, c: siglip(a, b, s, c, match=match), (image, text, scale, bias))
    anchors = text.detach()
    torch.autograd.gradcheck(lambda a, s: interactive_contrastive(a, anchors, s, match=match), (image, scale))


@pytest.mark.parametrize(
    "objective", [partial(info_nce, logit_scale=1.0), partial(interactive_contrastive, logit_scale=1.0)]
)
def test_a_batch_of_one_is_zero(objective):
    assert objective(torch.ones(1, 3), torch.ones(1, 3)).item() == 0


@pytest.mark.parametrize("shapes", [((4, 3), (4, 2)), ((4, 3), (1, 3)), ((3,), (3,)), ((0, 3), (0, 3))])
@pytest.mark.parametrize("name", OBJECTIVES)
def test_refuses_shapes_that_do_not_pair(name, shapes):
    with pytest.raises(UserError, match="expected"):
        OBJECTIVES[name][0](torch.ones(shapes[0]), torch.ones(shapes[1]))


@pytest.mark.parametrize("match", [torch.eye(4), torch.ones(1, 4, dtype=torch.bool), torch.ones(4, dtype=torch.bool)])
def test_refuses_a_match_that_would_broadcast_or_weigh(match):
    with pytest.raises(UserError, match=r"expected \(4, 4\) of torch.bool"):
        info_nce(torch.ones(4, 3), torch.ones(4, 3), 1.0, match=match)


def test_float32_precision_survives_a_large_scale_under_autocast():
    # bfloat16 cosines carry 8 bits: at s = 100 a logit would be off by about 0.4.
    image, text = (tensor.detach() for tensor in properties.embeddings((BATCH, WIDTH), (BATCH, WIDTH)))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        actual = info_nce(image.float(), text.float(), 100.0).item()
    expected = references.info_nce(image.numpy(), text.numpy(), 100.0, np.eye(BATCH, dtype=bool))
    assert actual == pytest.approx(expected, rel=1e-5)


def asymmetric(size: int) -> Tensor:
    """Random pairs, so that reading the rows of a transpose the wrong way round shows."""
    return torch.rand(size, size, generator=torch.Generator().manual_seed(4)) < 0.3


@pytest.mark.parametrize("match", [None, repeated_captions(), asymmetric(BATCH)], ids=["pairs", "repeated", "any"])
@pytest.mark.parametrize("name", BY_ROWS)
def test_parts_of_any_partition_add_up_to_the_whole(name, match):
    """Values and gradients of every input, in float64."""
    objective = BY_ROWS[name]
    inputs = properties.embeddings((BATCH, WIDTH), (BATCH, WIDTH), seed=5)
    inputs += [torch.tensor(value, dtype=torch.float64, requires_grad=True) for value in (7.0, -2.0)]

    def differentiated(loss):
        return torch.autograd.grad(loss, inputs, retain_graph=True, materialize_grads=True, allow_unused=True)

    whole = objective(*inputs, match=match)
    expected = differentiated(whole)
    assert expected[0].abs().max() > 1e-3
    for parts in partitions(BATCH, 20):
        losses = [objective(*inputs, match=own_rows(match, rows), rows=rows) for rows in parts]
        assert all(loss.shape == () for loss in losses)
        torch.testing.assert_close(sum(losses), whole, rtol=1e-12, atol=1e-12)
        summed = [sum(of_parts) for of_parts in zip(*map(differentiated, losses), strict=True)]
        torch.testing.assert_close(summed, list(expected), rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("name", BY_ROWS)
def test_the_mean_over_ranks_of_unequal_parts_is_the_whole(name):
    """W L_part, though no part is the mean over its own rows."""
    inputs = [*properties.embeddings((BATCH, WIDTH), (BATCH, WIDTH)), 7.0, -2.0]
    parts = [slice(0, 1), slice(1, 1), slice(1, BATCH)]
    losses = [3 * BY_ROWS[name](*inputs, rows=rows) for rows in parts]
    torch.testing.assert_close(torch.stack(losses).mean(), BY_ROWS[name](*inputs))
    assert losses[1].item() == 0


@pytest.mark.parametrize("name", BY_ROWS)
def test_properties_of_parts(name):
    # Reordering the batch moves rows into other parts; all else is as for the whole.
    objective, students = OBJECTIVES[name]
    part = partial(objective, rows=slice(1, 4))
    inputs = properties.embeddings((BATCH, WIDTH), (BATCH, WIDTH))
    properties.assert_ignores_length(part, inputs)
    properties.assert_gradient_reaches(part, inputs, students)
    properties.assert_float32_under_autocast(part, inputs)
    properties.assert_finite_at_extremes(part, [(BATCH, WIDTH), (BATCH, WIDTH)], sorted(students))


@pytest.mark.parametrize("marked", [False, True])
@pytest.mark.parametrize("name", BY_ROWS)
def test_rows_never_make_the_whole_matrix(name, marked):
    size, width, rows = 23, 5, slice(4, 7)
    inputs = properties.embeddings((size, width), (size, width), dtype=torch.float32)
    match = own_rows(asymmetric(size), rows) if marked else None
    with Shapes() as made:
        BY_ROWS[name](*inputs, 7.0, -2.0, match=match, rows=rows).backward()
    assert (3, size) in made.seen
    assert max(map(math.prod, made.seen)) == size * width
    with Shapes() as whole:
        BY_ROWS[name](*inputs, 7.0, -2.0, match=asymmetric(size) if marked else None).backward()
    assert (size, size) in whole.seen


@pytest.mark.parametrize("rows", [slice(4, 9), slice(-2, 6), slice(None), slice(0, 6, 2), slice(4, 2), slice(7, 7)])
@pytest.mark.parametrize("name", OBJECTIVES)
def test_refuses_rows_outside_the_batch(name, rows):
    with pytest.raises(UserError, match=r"of a batch of 6; expected slice\(start, stop\) inside it"):
        OBJECTIVES[name][0](torch.ones(BATCH, 3), torch.ones(BATCH, 3), rows=rows)


def test_refuses_rows_of_an_empty_batch():
    with pytest.raises(UserError, match="of a batch of 0"):
        info_nce(torch.ones(0, 3), torch.ones(0, 3), 1.0, rows=slice(0, 0))


@pytest.mark.parametrize(
    "match", [IDENTITY, IDENTITY[:2], (IDENTITY[:2], IDENTITY), (IDENTITY[:2],), (IDENTITY[:2], IDENTITY[:2].float())]
)
def test_refuses_a_match_that_is_no_pair_of_own_rows(match):
    with pytest.raises(UserError, match=r"expected \(2, 6\) of torch.bool, and again for the transpose"):
        info_nce(torch.ones(BATCH, 3), torch.ones(BATCH, 3), 1.0, match=match, rows=slice(0, 2))


def test_refuses_a_pair_for_the_whole_batch():
    with pytest.raises(UserError, match=r"expected \(6, 6\) of torch.bool, true"):
        info_nce(torch.ones(BATCH, 3), torch.ones(BATCH, 3), 1.0, match=(IDENTITY, IDENTITY))
