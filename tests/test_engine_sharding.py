"""A student sharded over two gloo ranks is trained, averaged, saved and continued like a whole one on one rank."""

from __future__ import annotations

import hashlib
from types import SimpleNamespace

import pytest
import torch
from helpers.distilling import TEXTS, tiny_student
from helpers.pairs import picture_pairs
from helpers.sharded import LARGEST_NORM, STEPS, Trial, run_sharded_rank
from helpers.tiny_models import tiny_composite
from safetensors.torch import load_file
from torch import nn

from vlkd.engine.checkpoint import random_state
from vlkd.engine.sharding import blocks, fill_whole, full_state, load_full_state, shard, whole_copy
from vlkd.errors import UserError


def one_rank(pairs, steps=STEPS, precision="fp32"):
    trial = Trial(pairs, sharded=False, precision=precision)
    for share in steps:
        trial.step((*share[0], *share[1]))
    return trial


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sharded")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    pairs = picture_pairs(folder / "pictures", TEXTS)
    alone = one_rank(pairs)
    torch.manual_seed(77)
    saved = alone.save(folder / "one")
    generator = random_state()["torch"]
    torch.multiprocessing.spawn(run_sharded_rank, args=(folder, pairs, saved), nprocs=2)
    torch.set_num_threads(threads)
    tensors = [load_file(str(folder / f"sharded-{rank}.safetensors")) for rank in range(2)]
    texts = [(folder / f"rank-{rank}.txt").read_text().split("\n") for rank in range(2)]
    return SimpleNamespace(
        folder=folder, pairs=pairs, alone=alone.found(), saved=saved, generator=generator, ranks=tensors, texts=texts
    )


def part(tensors, scenario):
    begin = f"{scenario}/"
    return {name.removeprefix(begin): value for name, value in tensors.items() if name.startswith(begin)}


def check_equal(left, right):
    assert left.keys() == right.keys()
    assert left
    for name, value in left.items():
        assert torch.equal(value, right[name]), name


@pytest.mark.parametrize("scenario", ["sharded", "parts"])
def test_three_steps_are_those_of_one_whole_rank(found, scenario):
    """Weights, averages, moments, norms; in parts, each rank's batch passes the towers in two pieces."""
    trained = part(found.ranks[0], scenario)
    assert trained.keys() == found.alone.keys()
    for name, value in found.alone.items():
        bound = 1e-5 * max(1.0, float(value.abs().max()))
        assert float((trained[name] - value).abs().max()) <= bound, name
    start = Trial(found.pairs, sharded=False).found()
    moved = {name for name, value in start.items() if not torch.equal(value, found.alone[name])}
    assert {"weight/student.text_tower.blocks.0.mlp_in.weight", "averaged/student.image_tower.cls_token"} <= moved
    assert float(trained["norm/0"]) > LARGEST_NORM


def test_each_rank_holds_its_part_alone(found):
    names = found.texts[0][0].split(",")
    every = set(dict(Trial(found.pairs, sharded=False).distiller.named_parameters()))
    assert every - set(names) == {"student.log_logit_scale", "heads.one.weight", "heads.two.weight"}
    own = torch.stack([rank["held/own"] for rank in found.ranks])
    assert own.sum(dim=0).tolist() == 3 * found.ranks[0]["held/all"].tolist()
    assert (own > 0.4 * found.ranks[0]["held/all"]).all()


def test_scalars_train_alike_on_all_ranks(found):
    name = "sharded/scalar/student.log_logit_scale"
    assert torch.equal(found.ranks[0][name], found.ranks[1][name])
    assert not torch.equal(found.ranks[0][name], tiny_student().log_logit_scale.detach())
    assert all(torch.equal(found.ranks[0][f"sharded/norm/{i}"], found.ranks[1][f"sharded/norm/{i}"]) for i in range(3))


def test_evaluation_reads_a_whole_copy_of_the_averages(found):
    averages = part(found.ranks[0], "sharded/averaged")
    filled = part(found.ranks[0], "filled")
    check_equal(filled, averages)
    assert [texts[1] for texts in found.texts] == ["cpu", "meta"]
    assert not part(found.ranks[1], "filled")


def test_continuing_is_bit_exact_with_a_generator_per_rank(found):
    for rank in found.ranks:
        check_equal(part(rank, "resumed/continued"), part(rank, "resumed/uninterrupted"))
        check_equal(part(rank, "resumed/restored"), part(rank, "resumed/saved"))
    stored = [load_file(str(found.folder / f"checkpoints/step-00000003/rng-{rank}.safetensors")) for rank in range(2)]
    for rank in range(2):
        assert torch.equal(stored[rank]["torch"], found.ranks[rank]["resumed/saved/torch"])
    assert not torch.equal(stored[0]["torch"], stored[1]["torch"])


def test_a_sharded_checkpoint_is_read_by_whole_ranks(found):
    trial = Trial(found.pairs, sharded=False, seed=9)
    trial.load(found.folder / "checkpoints" / "step-00000003")
    sharded = part(found.ranks[0], "sharded")
    expected = {name: value for name, value in sharded.items() if not name.startswith("norm")}
    check_equal(trial.found(), expected)
    check_equal(part(found.ranks[0], "resumed/unsharded"), expected)


def test_a_whole_ranks_checkpoint_is_read_by_sharded_ones(found):
    expected = {name: value for name, value in found.alone.items() if not name.startswith("norm")}
    loaded = {name: value for name, value in part(found.ranks[0], "from one").items() if not name.startswith("rng")}
    check_equal(loaded, expected)


def test_a_rank_without_a_stored_generator_gets_one_of_its_own(found):
    assert torch.equal(found.ranks[0]["from one/rng/torch"], found.generator)
    second = found.ranks[1]["from one/rng/torch"]
    assert torch.equal(second, found.ranks[1]["from one again/rng/torch"])
    digest = hashlib.sha256(found.generator.numpy().tobytes() + b"/1").digest()
    seed = int.from_bytes(digest[:8], "little") // 2
    assert torch.equal(second, torch.Generator().manual_seed(seed).get_state())


def test_clipping_is_by_the_global_norm(found):
    ranks = [part(rank, "clip") for rank in found.ranks]
    before, after = part(ranks[0], "before"), part(ranks[0], "after")
    assert len(before) == len(found.texts[0][0].split(",")) + 3
    expected = torch.cat([value.double().flatten() for value in before.values()]).norm()
    assert float(expected) > 0.01
    for rank in ranks:
        assert rank["norm"].shape == ()
        assert float(rank["norm"]) == pytest.approx(float(expected), rel=1e-6)
        assert float(rank["norm after"]) == pytest.approx(0.01, rel=1e-3)
    for name, value in before.items():
        torch.testing.assert_close(after[name], value * float(0.01 / (expected + 1e-6)), rtol=1e-6, atol=1e-12)


def test_bf16_goes_on_under_sharding(found):
    alone = one_rank(found.pairs, STEPS[:1], "bf16").found()
    trained = part(found.ranks[0], "bf16")
    assert float(trained["norm/0"]) == pytest.approx(float(alone["norm/0"]), rel=1e-2)
    assert float(trained["norm/0"]) != pytest.approx(float(found.alone["norm/0"]), rel=1e-5)
    for name, value in alone.items():
        if name.endswith("exp_avg"):
            assert (trained[name] - value).norm() <= 0.05 * value.norm() + 1e-6, name


def test_running_statistics_frozen_layers_and_channels_last_weights(found):
    """Two sharded ranks with batch norms are two whole ranks; each normalises its own share of the batch."""
    for rank in found.ranks:
        whole, sharded = part(rank, "conv unsharded"), part(rank, "conv")
        assert sharded.keys() == whole.keys()
        for name, value in whole.items():
            assert float((sharded[name] - value).abs().max()) <= 1e-5 * max(1.0, float(value.abs().max())), name
    name = "conv/buffer/student.image_tower.bn1.running_mean"
    assert not torch.equal(found.ranks[0][name], found.ranks[1][name])
    start = dict(tiny_composite(seed=3).named_parameters())
    moved = {
        name for name, value in start.items() if not torch.equal(found.ranks[0][f"conv/weight/student.{name}"], value)
    }
    assert start.keys() - moved == {name for name in start if name.startswith("image_tower.conv1.")}


def test_a_step_without_captions_moves_the_image_side_alone(found):
    before, after = part(found.ranks[0], "resumed/uninterrupted"), part(found.ranks[0], "without captions")
    moved = {
        name for name, value in after.items() if not name.startswith("norm") and not torch.equal(value, before[name])
    }
    assert "weight/student.image_tower.cls_token" in moved
    assert not [name for name in moved if name.startswith("weight/student.text")]


def test_all_ranks_are_told_of_a_full_disk(found):
    for texts in found.texts:
        assert texts[2].startswith("The checkpoint ")
        assert "cannot be written (" in texts[2]
        assert "make room" in texts[2]
    assert [texts[3] for texts in found.texts] == ["TypeError", "UserError"]
    assert [path.name for path in (found.folder / "checkpoints").iterdir()] == ["step-00000003"]


def test_rank_0_decides(found):
    for texts in found.texts:
        assert texts[4:] == ["step-00000003", "None", "True", "False", "rank 0 ä", ""]


def test_blocks_are_layers_and_stages():
    vit, conv = tiny_student(), tiny_composite()
    total = sum(value.numel() for value in vit.parameters())
    found = list(blocks(vit, 0.01 * total))
    assert [*vit.image_tower.blocks, *vit.text_tower.blocks] == [
        block for block in found if block not in (*vit.image_projection, *vit.text_projection)
    ]
    stages = list(blocks(conv, 0.01 * sum(value.numel() for value in conv.parameters())))
    assert conv.image_tower.layer4[0] in stages
    # None stands inside another one.
    inside = {child for block in stages for child in block.modules() if child is not block}
    assert not inside & set(stages)
    assert list(blocks(vit, total)) == []


def test_one_rank_stays_whole(found):
    trial = Trial(found.pairs, sharded=True)
    assert all(type(value) is nn.Parameter for value in trial.distiller.parameters())
    shard(trial.distiller)
    exported = trial.exported
    assert fill_whole(exported, exported) is exported
    copied = whole_copy(exported)
    trial.step((0, 1, 3))
    assert not torch.equal(copied["heads"]["one"].weight, exported["heads"]["one"].weight)
    check_equal(dict(fill_whole(copied, exported).state_dict()), dict(exported.state_dict()))
    assert not any(value.requires_grad for value in copied.parameters())


def test_frozen_towers_are_refused(found):
    trial = Trial(found.pairs, sharded=False)
    trial.distiller.towers = object()
    with pytest.raises(UserError, match="Found frozen towers"):
        shard(trial.distiller)


def test_states_of_other_names_or_shapes_are_refused():
    state = full_state(nn.Linear(2, 3).state_dict())
    with pytest.raises(ValueError, match=r"bias stands on one side alone"):
        load_full_state(nn.Linear(2, 3, bias=False).state_dict(), state)
    with pytest.raises(ValueError, match=r"weight has the shape \(3, 2\), not \(3, 4\)"):
        load_full_state(nn.Linear(4, 3).state_dict(), state)
