"""The cost model in closed forms, what is summed against what is really held or stored, and whole plans."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from accelerate import Accelerator
from helpers.distilling import CONTRASTIVE, TEXTS, batch_of, sequence_of, terms_of, tiny_student, tiny_teachers
from helpers.pairs import picture_pairs
from helpers.tiny_models import CAPTIONS
from torch import nn

from vlkd import recipes
from vlkd.data.scenes import generate_scenes
from vlkd.data.shards import write_shards
from vlkd.data.sources import open_pairs
from vlkd.data.views import ViewSettings
from vlkd.distill.cache import CacheSpec, ensure_cache
from vlkd.distill.distiller import Distiller
from vlkd.distill.teachers import OnlineTeacher
from vlkd.engine.cache_cost import BuildTimes, cache_bytes
from vlkd.engine.checkpoint import save_checkpoint
from vlkd.engine.cost import (
    Host,
    Memory,
    Times,
    advice,
    bottleneck,
    cached_rate,
    decoding_rate,
    images_per_second,
    online_rate,
    parts_that_fit,
    payback,
    payback_sentence,
)
from vlkd.engine.dry_run import open_setup, stored_models
from vlkd.engine.footprint import Peaks, held_bytes, line, loss_matrix_bytes, memories
from vlkd.engine.optim import AveragedWeights, parameter_groups
from vlkd.engine.preflight import plan_run, stored
from vlkd.engine.settings import Train
from vlkd.engine.step import backward_step
from vlkd.engine.teaching import cache_folder, cache_spec
from vlkd.errors import UserError
from vlkd.weighting import Fixed

ROOM = Memory(where="the machine", parts={"activations": 1.0}, available=100.0)
TIMES = Times(student=0.02, teachers={"a": 0.03, "b": 0.01}, data=0.01, data_online=0.015)
TINY = (
    "model.image=test_resnet", "model.image_size=32", "model.width=16", "model.text_width=32", "model.text_layers=1",
    "model.text_heads=2", "train.batch_size=8", "train.samples=80", "train.device=cpu",
)  # fmt: skip


@pytest.fixture(autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def accelerator():
    return Accelerator(cpu=True)


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    return picture_pairs(tmp_path_factory.mktemp("pictures"), TEXTS)


def host(cores: int = 2, threads: int = 1, workers: int = 0, ranks: int = 1) -> Host:
    return Host(cores=cores, threads=threads, workers=workers, ranks=ranks)


def test_one_process_does_one_thing_after_the_other():
    assert cached_rate(TIMES, host()) == pytest.approx(1 / (0.02 + 0.01))
    assert online_rate(TIMES, host()) == pytest.approx(1 / (0.02 + 0.03 + 0.01 + 0.015))
    assert cached_rate(TIMES, host(threads=2)) == cached_rate(TIMES, host())
    assert decoding_rate(0.01, host()) == pytest.approx(100)


@pytest.mark.parametrize(
    ("step", "data", "machine", "seconds"),
    [
        (0.04, 0.01, host(cores=4, workers=1), 0.04),  # the step
        (0.01, 0.06, host(cores=8, workers=3), 0.02),  # three workers
        (0.01, 0.03, host(cores=2, workers=2), 0.02),  # 0.01 + 0.03 of work on two cores
        (0.02, 0.03, host(cores=2, workers=2, threads=2), (2 * 0.02 + 0.03) / 2),  # each step keeps both cores busy
        (0.02, 0.03, host(cores=2, workers=2, threads=64), (2 * 0.02 + 0.03) / 2),
        (0.01, 0.08, host(cores=2, workers=16), 0.045),  # more workers than cores: all of the work on both
    ],
)
def test_workers_and_steps_overlap_as_far_as_there_are_cores(step, data, machine, seconds):
    assert images_per_second(step, data, machine) == pytest.approx(1 / seconds)
    assert images_per_second(step, data, replace(machine, ranks=3)) == pytest.approx(3 / seconds)


@pytest.mark.parametrize(
    ("machine", "online", "part", "share"),
    [
        (host(), False, "student", 2 / 3),
        (host(), True, "teacher", 0.04 / 0.075),
        (host(cores=4, workers=2), True, "teacher", 0.04 / 0.06),  # data are prepared meanwhile
        (host(cores=8, workers=1), False, "student", 1.0),
        (host(cores=1, workers=1), False, "student", 2 / 3),  # one core has all of the work
    ],
)
def test_the_largest_part_of_what_sets_the_pace_is_the_bottleneck(machine, online, part, share):
    assert bottleneck(TIMES, machine, online=online) == (part, pytest.approx(share))


def told(times: Times = TIMES, machine: Host | None = None, memory: Memory = ROOM, online: bool = False):
    options = {"online": online, "views": 3, "accumulate": 1, "batch_size": 64}
    return advice(times, machine or host(), memory, **options)


def test_the_advice_names_the_setting_that_moves_the_bottleneck():
    slow = replace(TIMES, data=0.06)
    assert bottleneck(slow, host(cores=8, workers=1), online=False) == ("data", 1.0)
    part, sentence = told(slow, host(cores=8, workers=1))
    # Three workers give 1 / 0.02, the rate of the step.
    assert part == "data"
    assert "data.workers=3 would give 50 images/s, not 16.7" in sentence
    part, sentence = told(slow, host(cores=2, workers=2))
    assert part == "data"
    assert "smaller pictures" in sentence
    part, sentence = told(online=True)
    assert part == "teacher"
    assert (
        f"teachers.views=3 would train on stored features at {1 / 0.03:.1f} images/s, not {1 / 0.075:.1f}" in sentence
    )
    part, sentence = told(machine=host(cores=8, workers=4))
    assert (part, "smaller model.image" in sentence) == ("student", True)


def test_too_little_memory_comes_first_and_names_the_parts_that_fit():
    memory = Memory(where="the machine", parts={"weights": 8.0, "activations": 8.0}, available=12.0)
    # 8 + 8 / 2 is more than 0.9 * 12, 8 + 8 / 4 is not.
    assert parts_that_fit(memory, 1, 64) == 4
    part, sentence = told(memory=memory)
    assert part == "memory"
    assert "train.accumulate=4 would fit" in sentence
    full = replace(memory, parts={"weights": 12.0, "activations": 8.0})
    assert parts_that_fit(full, 1, 64) is None
    assert "train.batch_size lower" in told(memory=full)[1]


def test_a_cache_pays_from_the_run_on_that_a_search_finds():
    online, cached, build, images, samples = 20.0, 50.0, 1000.0, 4000, 10_000
    rates = {"online": online, "cached": cached, "build": build, "images": images, "samples": samples}
    found = payback(**rates, start=0.0)
    runs = next(r for r in range(1, 100) if r * samples / online > build + r * samples / cached)
    assert found.runs == runs == 4
    with_start = payback(**rates, start=100.0)
    runs = next(r for r in range(1, 100) if r * (samples / online + 100) > build + r * samples / cached)
    assert with_start.runs == runs == 3
    at_break = with_start.epochs * images
    assert 100 + at_break / online == pytest.approx(build + at_break / cached)
    assert found.epochs * images * (1 / online - 1 / cached) == pytest.approx(build)
    words = {"online": samples / online, "cached": samples / cached, "build": build, "epochs": 2.5, "views": 4}
    assert "from run 4" in payback_sentence(found, **words)
    assert "in this run" in payback_sentence(replace(found, runs=1), **words)
    assert "The cache is there" in payback_sentence(found, **words | {"build": 0.0})
    never = payback(online=50.0, cached=50.0, build=1.0, start=0.0, images=10, samples=10)
    assert never.runs is None
    assert "never" in payback_sentence(never, **words)


@pytest.mark.parametrize("views", [1, 4, 30])
def test_with_the_teachers_passes_alone_a_cache_pays_after_k_epochs(views):
    times = Times(student=0.02, teachers={"a": 0.05}, data=1e-12, data_online=1e-12)
    build = BuildTimes(row=0.0, view=0.05, text=0.0, views=views).seconds(1000, 5000, host())
    found = payback(
        online=online_rate(times, host()),
        cached=cached_rate(times, host()),
        build=build,
        start=0.0,
        images=1000,
        samples=1000,
    )
    assert found.epochs == pytest.approx(views)


def test_building_decodes_once_per_image_and_passes_every_view_and_caption():
    times = BuildTimes(row=0.06, view=0.03, text=0.002, views=3)
    assert times.seconds(100, 500, host()) == pytest.approx(100 * (0.06 + 3 * 0.03) + 500 * 0.002)
    assert times.seconds(100, 500, host(cores=8, workers=4)) == pytest.approx(100 * 3 * 0.03 + 500 * 0.002)
    assert BuildTimes(row=0.0, view=0.0, text=0.002, views=3).seconds(100, 500, host()) == pytest.approx(1.0)


def distiller_of(pairs, terms=None):
    models = {"student": tiny_student()} | tiny_teachers()
    sources = {name: OnlineTeacher(name, model) for name, model in models.items() if name != "student"}
    return Distiller(models["student"], terms or terms_of("one"), sources).train(), sequence_of(pairs, models)


def test_what_is_held_is_what_training_and_a_checkpoint_hold(pairs, accelerator, tmp_path):
    distiller, sequence = distiller_of(pairs)
    next(distiller.student.image_tower.parameters()).requires_grad_(False)
    optimizer = torch.optim.AdamW(parameter_groups(distiller, 0.1))
    averaged = AveragedWeights(nn.ModuleDict({"student": distiller.student, "heads": distiller.heads}), 0.9)
    backward_step(distiller, batch_of(sequence, range(8)), Fixed([1.0]), accelerator)
    optimizer.step()

    def total(tensors) -> int:
        return sum(tensor.untyped_storage().nbytes() for tensor in tensors)

    moments = [state[name] for state in optimizer.state.values() for name in ("exp_avg", "exp_avg_sq")]
    held = held_bytes(distiller, 0.9)
    assert held["weights"] == total(distiller.state_dict().values())
    assert held["gradients"] == total(value.grad for value in distiller.parameters() if value.grad is not None)
    assert held["moments"] == total(moments)
    assert held["averaged weights"] == held["evaluation copy"] == total(averaged.state_dict().values())
    assert held_bytes(distiller, 0.0)["averaged weights"] == 0
    modules = {"distiller": distiller, "averaged": averaged}
    saved = save_checkpoint(tmp_path, 1, modules=modules, optimizer=optimizer, state={})
    heads = sum(8 + int.from_bytes(path.read_bytes()[:8], "little") for path in saved.glob("*.safetensors"))
    tensors = sum(path.stat().st_size for path in saved.glob("*.safetensors") if "rng" not in path.name)
    # A step count of four bytes for each parameter, and the headers.
    checkpoint = held["weights"] + held["moments"] + held["averaged weights"]
    assert checkpoint < tensors <= checkpoint + 4 * len(optimizer.state) + heads


def test_loss_matrices_are_counted_by_what_is_kept(pairs, accelerator):
    contrastive, sequence = distiller_of(pairs, (replace(CONTRASTIVE, match=False),))
    captioned = [row for row, own in enumerate(TEXTS) if own]
    small, large = (
        loss_matrix_bytes(contrastive, batch_of(sequence, rows), accelerator) for rows in (captioned[:3], captioned)
    )
    assert small == pytest.approx(large)
    # The softmax of both directions and the gradient of the logits at least, in float32.
    assert small >= 3 * 4
    matching, _ = distiller_of(pairs, tuple(term for term in terms_of("one") if term.name in ("images", "texts")))
    assert loss_matrix_bytes(matching, batch_of(sequence, captioned), accelerator) == 0


def test_two_batches_give_the_line_that_they_lie_on():
    fixed, sample, matrix = 5e8, 3e6, 12.0
    peaks = [
        Peaks(batch_size=b, before=10**8, device=int(fixed + sample * b + matrix * b * b), host=0) for b in (8, 40)
    ]
    assert line(*peaks, matrix, made=1.0) == pytest.approx((sample, fixed))
    alone = line(peaks[1], peaks[1], matrix, made=3e8)
    assert alone == pytest.approx(((fixed + 40 * sample - 4e8) / 40, 4e8))


@pytest.mark.parametrize(("local", "rows"), [(False, 64), (True, 16)])
def test_memory_of_ranks_and_of_a_local_loss(local, rows):
    held = {"weights": 100, "gradients": 90, "moments": 180, "averaged weights": 0, "evaluation copy": 100}
    peaks = [Peaks(batch_size=b, before=0, device=1000 + 50 * b + 8 * b * b, host=0) for b in (4, 12)]
    (memory,) = memories(
        *peaks,
        held,
        matrices=8.0,
        teachers=30.0,
        beside={"workers": 7.0},
        start=0.0,
        train=Train(batch_size=64, local_loss=local),
        host=host(ranks=4),
        device=torch.device("cpu"),
        machine=1e9,
    )
    expected = {
        **held, "teachers": 30, "activations": 50 * 16, "loss matrices": 8 * 64 * rows,
        "process": 1000 - 470 - 30, "workers": 7,
    }  # fmt: skip
    assert memory.parts == pytest.approx({name: 4 * size for name, size in expected.items()})


@pytest.mark.parametrize("dtype", ["float32", "float16", "int8"])
@pytest.mark.parametrize("features", [("image.embed", "text.embed"), ("image.tokens", "text.tokens", "text.mask")])
def test_the_disk_that_a_cache_takes(dtype, features, accelerator, tmp_path):
    pictures = picture_pairs(tmp_path / "p", [CAPTIONS[i % 4 : i % 4 + 1 + i % 3] for i in range(40)])
    write_shards(generate_scenes("shapes", count=40, seed=0, split="train", image_size=32), tmp_path / "tars")
    spec = CacheSpec(features=features, views=3, view_settings=ViewSettings(), dtype=dtype)
    model = tiny_teachers()["one"]
    for number, table in enumerate((pictures, open_pairs(str(tmp_path / "tars")))):
        reader = ensure_cache(tmp_path / f"cache{number}", "one", model, table, spec)
        built = sum(path.stat().st_size for path in reader.folder.glob("*.safetensors"))
        assert cache_bytes(model, table, spec, accelerator) == pytest.approx(built, rel=0.02)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Shards and a teacher that knows nothing."""
    folder = tmp_path_factory.mktemp("data")
    write_shards(generate_scenes("shapes", count=40, seed=0, split="train", image_size=40), folder / "train")
    tiny_teachers()["one"].save(folder / "teacher")
    return folder


def planned(task: str, *words: str, ranks: int = 1) -> dict:
    recipe = recipes.load(recipes.find("tasks", task))
    return plan_run(recipe, words, memory=2**34, cores=2, ranks=ranks)


def numbers(found: object) -> list[float]:
    if isinstance(found, dict):
        found = list(found.values())
    if isinstance(found, list):
        return [number for part in found for number in numbers(part)]
    return [found] if isinstance(found, int | float) and not isinstance(found, bool) else []


@pytest.mark.parametrize(
    ("task", "words", "stored"),
    [
        ("retriever", [], []),
        ("ammkd", ["teachers.refs=a,b", "train.accumulate=2", "train.ema=0.9"], ["teacher0", "teacher1"]),
        ("ammkd", ["teachers.refs=a", "teachers.views=0", "teachers.bank=20"], ["teacher0"]),
        ("pretrain", ["teachers.refs=a", "teachers.views=0", "method.relational=1"], ["teacher0"]),
        ("prepare_teacher", ["method.fusion=1"], ["towers-"]),
    ],
)
def test_every_kind_of_run_is_planned(task, words, stored, tmp_path):
    out = tmp_path / "run"
    plan = json.loads(json.dumps(planned(task, "smoke=true", f"out={out}", *words), allow_nan=False))
    assert list(tmp_path.iterdir()) == []
    assert all(number >= 0 for number in numbers(plan))
    rates, run, seconds = plan["images_per_second"], plan["run"], plan["seconds"]
    assert run["steps"] == 3
    assert list(run["epochs"].values()) == [1.0]
    assert plan["measured"]["batch_size"] == run["batch_size"] == 16
    teachers = [] if task == "prepare_teacher" else stored
    assert list(rates["teachers"]) == teachers
    online = bool(teachers) and "teachers.views=0" in words
    assert rates["run"] == rates["online" if online else "cached"] > 0
    assert (rates["online"] < rates["student"]) or not teachers
    assert seconds["cached"] == pytest.approx(48 / rates["cached"])
    # Tables in memory begin with all of their captions.
    ahead = seconds["online"] - 48 / rates["online"]
    assert (ahead > 1e-9) == bool(teachers and task != "pretrain")
    assert seconds["run"] == seconds["online" if online else "cached"]
    (memory,) = plan["memory"]
    assert memory["total"] == pytest.approx(sum(memory["parts"].values()))
    assert memory["fits"]
    assert (memory["parts"]["averaged weights"] > 0) == (
        "train.ema=0.9" in words or task in ("pretrain", "prepare_teacher")
    )
    assert plan["bottleneck"]["part"] in ("data", "teacher", "student")
    if stored:
        assert all(name.startswith(own) for name, own in zip(plan["cache"]["bytes"], stored, strict=True))
        assert plan["cache"]["missing_bytes"] == sum(plan["cache"]["bytes"].values()) > 0
        assert plan["cache"]["build_seconds"] > 0
    else:
        assert plan["cache"] is None


def test_data_and_models_of_ones_own_are_planned_and_nothing_is_written(data, tmp_path):
    words = [*TINY, f"data.train={data}/train", f"teachers.folder={tmp_path}/cache", f"out={tmp_path}/run"]
    words += [f"teachers.refs={data}/teacher", "method.matching=1", "data.keep_short_side=36", "data.workers=1"]
    plan = planned("retriever", *words, ranks=2)
    assert list(tmp_path.iterdir()) == []
    assert plan["run"]["epochs"] == {f"{data.name}-train": 2.0}
    assert plan["measured"]["batch_size"] == 4
    parts = plan["memory"][0]["parts"]
    # Two ranks, 40 pictures of 36 x 36 pixels in each.
    assert parts["pictures in memory"] == 2 * 40 * 36 * 36 * 3
    assert parts["workers"] > 0


def test_stored_features_are_found_and_those_that_cannot_serve_are_refused(data, tmp_path):
    recipe = recipes.load(recipes.find("tasks", "retriever"))
    words = [*TINY, f"data.train={data}/train", f"teachers.folder={tmp_path}/cache", f"teachers.refs={data}/teacher"]
    words += ["teachers.views=2", "method.matching=1"]
    (tmp_path / "a").mkdir()
    setup = open_setup(recipe, words, tmp_path / "a")
    models = stored_models(setup)
    (name, (model, want)), (ref, table) = next(iter(models.items())), next(iter(setup.sources.items()))
    folder = cache_folder(setup.config, name, ref)
    assert stored(setup, models).missing == [(name, 40, table.caption_total)]
    ensure_cache(folder, name, model, table, cache_spec(setup.config, want))
    found = stored(setup, models)
    assert found.missing == []
    assert found.missing_bytes == 0
    assert found.sizes == {name: sum(path.stat().st_size for path in folder.glob("*.safetensors"))}
    assert found.free > 0
    (tmp_path / "b").mkdir()
    changed = open_setup(recipe, [*words, "views.flip=0"], tmp_path / "b")
    with pytest.raises(UserError, match="of other views"):
        stored(changed, stored_models(changed))


@pytest.mark.parametrize(
    ("words", "ranks", "sentence"),
    [
        (["train.batch=8"], 1, "No setting is called"),
        (["data.train=/nowhere"], 1, "/nowhere"),
        (["train.batch_size=100"], 1, "larger than the 40 training images"),
        ([], 3, "does not divide among 3 ranks"),
        (["method.matching=1"], 1, "name one with teachers.refs"),
    ],
)
def test_what_a_run_refuses_its_plan_refuses(words, ranks, sentence, data):
    with pytest.raises(UserError, match=sentence):
        planned("retriever", *TINY, f"data.train={data}/train", *words, ranks=ranks)
