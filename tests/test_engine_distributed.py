"""Two gloo ranks compute the loss and the gradients of one, whatever share of the captions each of them holds.

Of the whole global batch or, in the modes called local, of their own rows of the logits alone.
"""

from __future__ import annotations

import pytest
import torch
from helpers.distilling import TEXTS
from helpers.pairs import picture_pairs
from helpers.ranks import BY_ROWS, MODES, ROWS, distil, mixed_terms, run_rank
from safetensors.torch import load_file

from vlkd.engine.distributed import gather_rows, own_rows

CAPTIONED = (*TEXTS[:6], TEXTS[0][1:], *TEXTS[7:])
"""Row 0 is drawn its other caption: that of row 6 matches image 0, and not the other way round."""

# Rows 2, 5 and 7 have no caption: one rank holds four captions and the other one, then four and none.
SHARES = (((0, 1, 6, 3, 2), (5, 7, 4)), ((0, 1, 6, 4), (2, 5, 7)))


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    pairs = picture_pairs(folder / "pictures", CAPTIONED)
    torch.multiprocessing.spawn(run_rank, args=(folder, pairs, SHARES), nprocs=2)
    ranks = [load_file(str(folder / f"rank-{rank}.safetensors")) for rank in range(2)]
    alone = [distil(pairs, (*first, *second), mixed_terms()) for first, second in SHARES]
    return ranks, alone


@pytest.fixture(scope="module")
def alone_by_rows(tmp_path_factory):
    """What one rank finds, by method and share."""
    pairs = picture_pairs(tmp_path_factory.mktemp("pictures"), CAPTIONED)
    return {
        method: [distil(pairs, (*first, *second), terms) for first, second in SHARES]
        for method, terms in BY_ROWS.items()
    }


def test_rows_come_rank_after_rank_in_their_own_type(found):
    for rank in found[0]:
        assert torch.equal(rank["gathered"], torch.tensor(ROWS[0] + ROWS[1]))
        assert rank["flags"].tolist() == [True, True, False]
        assert rank["flags"].dtype == torch.bool
        assert rank["numbers"].tolist() == [2**40, 2**40 + 1, 2**40 + 2]
        assert rank["empty"].shape == (0, 2)
        assert rank["texts"]


def test_gradients_are_summed_over_the_ranks_losses(found):
    weights = torch.arange(8.0).reshape(4, 2) * 3
    assert torch.equal(found[0][0]["own.gradient"], weights[:1])
    assert torch.equal(found[0][1]["own.gradient"], weights[1:])


@pytest.mark.parametrize("share", range(len(SHARES)))
def test_two_ranks_are_one(found, share):
    ranks, alone = found
    expected = alone[share]
    assert {"loss/contrastive", "loss/images", "loss/texts", "loss/images two", "loss/two/text"} <= expected.keys()
    moved = [name for name, value in expected.items() if name.startswith("gradient/") and value.abs().max() > 1e-4]
    assert {"gradient/heads.one.weight", "gradient/heads.two.weight", "gradient/student.log_logit_scale"} <= set(moved)
    assert any("text_tower" in name for name in moved)
    assert any("image_tower" in name for name in moved)
    for rank in ranks:
        assert {name[2:] for name in rank if name.startswith(f"{share}/")} == expected.keys()
        for name, value in expected.items():
            torch.testing.assert_close(rank[f"{share}/{name}"], value, rtol=1e-5, atol=1e-5, msg=name)


@pytest.mark.parametrize("share", range(len(SHARES)))
def test_teacher_weights_are_of_the_global_batch(found, share):
    """Both ranks have the weights of one; solving on a rank's own rows alone would give others."""
    ranks, alone = found
    weights = {name: value for name, value in alone[share].items() if name.startswith("weight/")}
    assert {"weight/one/image", "weight/two/image", "weight/one/text", "weight/two/text"} <= weights.keys()
    for name, value in weights.items():
        assert torch.equal(ranks[0][f"{share}/{name}"], ranks[1][f"{share}/{name}"])
        torch.testing.assert_close(ranks[0][f"{share}/{name}"], value, rtol=0, atol=1e-5)


def test_a_solution_per_rank_would_differ(found, tmp_path):
    pairs = picture_pairs(tmp_path / "pictures", CAPTIONED)
    per_rank = [distil(pairs, rows, mixed_terms())["weight/one/image"] for rows in SHARES[0]]
    assert abs(per_rank[0] - per_rank[1]) > 1e-3
    assert all(abs(value - found[1][0]["weight/one/image"]) > 1e-3 for value in per_rank)


def test_means_and_first_weights(found):
    for rank in found[0]:
        assert rank["mean"].tolist() == [1.5, 3.0]
        assert torch.equal(rank["weight"], torch.ones(2, 2))


def test_own_rows_lie_where_gathering_puts_them(found):
    # One row and three, then none and one.
    assert [rank["share"].tolist() for rank in found[0]] == [[0, 1, 2, 0, 0, 2], [1, 4, 2, 0, 1, 2]]


@pytest.mark.parametrize("share", range(len(SHARES)))
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("method", BY_ROWS)
def test_two_ranks_are_one_by_rows(found, alone_by_rows, method, mode, share):
    """Losses, teacher weights (of the gradients at the student's embeddings) and gradients of every parameter."""
    ranks, expected = found[0], alone_by_rows[method][share]
    prefix = f"{method}/{mode}/{share}/"
    assert {name.partition("/")[0] for name in expected} >= {"loss", "gradient"}
    assert len([name for name in expected if name.startswith("loss/")]) == len(BY_ROWS[method])
    moved = [name for name, value in expected.items() if name.startswith("gradient/") and value.abs().max() > 1e-4]
    assert any("image_tower" in name for name in moved)
    assert any("text_tower" in name for name in moved) == (method != "images")
    assert ("gradient/student.logit_bias" in moved) == ("siglip" in method)
    # Rounding grows with the largest numbers on the way.
    largest = max(1.0, *(float(value.abs().max()) for value in expected.values() if value.numel()))
    for rank in ranks:
        for name, value in expected.items():
            atol = 1e-5 * largest
            torch.testing.assert_close(rank[prefix + name], value, rtol=1e-5, atol=atol, msg=prefix + name)
    for name in expected:
        if name.startswith(("loss/", "weight/")):
            assert torch.equal(ranks[0][prefix + name], ranks[1][prefix + name]), name


@pytest.mark.parametrize("share", range(len(SHARES)))
@pytest.mark.parametrize("method", BY_ROWS)
def test_a_rank_has_its_own_rows_alone(found, method, share):
    """Before the mean over ranks their losses differ, and one without captions has none of what needs them."""
    ranks = found[0]
    assert not any(f"{method}/global/{share}/own" in rank for rank in ranks)
    own = [rank[f"{method}/local/{share}/own"] for rank in ranks]
    local = [term.name for term in BY_ROWS[method] if term.by_rows]
    assert own[0].shape == (len(local),)
    assert ((own[0] - own[1]).abs() > 1e-3).all()
    reported = torch.stack([ranks[0][f"{method}/local/{share}/loss/{name}"] for name in local])
    torch.testing.assert_close((own[0] + own[1]) / 2, reported)
    captioned = torch.tensor([any(".text." in feature for feature in t.features) for t in BY_ROWS[method] if t.by_rows])
    assert (own[1] == 0).tolist() == (captioned & (share == 1)).tolist()


@pytest.mark.parametrize("method", ["interactive", "interactive with matches", "images", "mixed"])
def test_local_teachers_are_balanced_by_the_whole_gradient(alone_by_rows, method):
    # Teachers of equal weight would not tell a wrong Gramian from the right one.
    for found in alone_by_rows[method]:
        weights = [value for name, value in found.items() if name.startswith("weight/one/")]
        assert len(weights) >= 1
        assert all(abs(weight - 0.5) > 1e-3 for weight in weights)


def test_one_process_gathers_nothing():
    rows = torch.ones(2, 3)
    assert gather_rows(rows) is rows
    assert own_rows(rows) == (slice(0, 2), 1)
