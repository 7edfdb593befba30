"""Two gloo ranks compute the loss and the gradients of one, whatever share of the captions each of them holds."""

from __future__ import annotations

import pytest
import torch
from helpers.distilling import TEXTS
from helpers.pairs import picture_pairs
from helpers.ranks import ROWS, distil, run_rank
from safetensors.torch import load_file

from vlkd.engine.distributed import gather_rows

# Rows 2, 5 and 7 have no caption: one rank holds three captions and the other one, then four and none.
SHARES = (((0, 1, 3, 2), (5, 7, 4)), ((0, 1, 3, 4), (2, 5, 7)))


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    pairs = picture_pairs(folder / "pictures", TEXTS)
    torch.multiprocessing.spawn(run_rank, args=(folder, pairs, SHARES), nprocs=2)
    ranks = [load_file(str(folder / f"rank-{rank}.safetensors")) for rank in range(2)]
    alone = [distil(pairs, (*first, *second), lambda rows: rows) for first, second in SHARES]
    return ranks, alone


def test_rows_come_rank_after_rank_in_their_own_type(found):
    for rank in found[0]:
        assert torch.equal(rank["gathered"], torch.tensor(ROWS[0] + ROWS[1]))
        assert rank["flags"].tolist() == [True, True, False]
        assert rank["flags"].dtype == torch.bool
        assert rank["numbers"].tolist() == [2**40, 2**40 + 1, 2**40 + 2]
        assert rank["empty"].shape == (0, 2)


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
    pairs = picture_pairs(tmp_path / "pictures", TEXTS)
    per_rank = [distil(pairs, rows, lambda rows: rows)["weight/one/image"] for rows in SHARES[0]]
    assert abs(per_rank[0] - per_rank[1]) > 1e-3
    assert all(abs(value - found[1][0]["weight/one/image"]) > 1e-3 for value in per_rank)


def test_means_and_first_weights(found):
    for rank in found[0]:
        assert rank["mean"].tolist() == [1.5, 3.0]
        assert torch.equal(rank["weight"], torch.ones(2, 2))


def test_one_process_gathers_nothing():
    rows = torch.ones(2, 3)
    assert gather_rows(rows) is rows
