"""The adapter for lmms-eval, against the model's own answers, on a stand-in and, where installed, on the real one."""

from __future__ import annotations

import importlib
import subprocess
import sys
import tomllib
from importlib.util import find_spec
from pathlib import Path

import pytest
from helpers.lmms_standin import Lmms, requests_of, standing_in
from helpers.pairs import noise
from helpers.tiny_vlms import write_llava

from vlkd.errors import UserError
from vlkd.features import Turn
from vlkd.models.via_llava import load_llava

DOCS = [{"question": "What colour is the circle? " * (1 + n % 3), "image": noise(n)} for n in range(9)]
GREEDY = {"max_new_tokens": 8, "temperature": 0, "top_p": 1.0, "num_beams": 1, "do_sample": False, "until": ["\n\n"]}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    run = tmp_path_factory.mktemp("lmms") / "run"
    write_llava(run / "student")
    return run


@pytest.fixture
def adapter():
    with standing_in():
        sys.modules.pop("vlkd.lmms_eval", None)
        yield importlib.import_module("vlkd.lmms_eval")
    sys.modules.pop("vlkd.lmms_eval", None)


def answers(adapter, run, docs, settings, batch_size=1, **more):
    found = adapter.VlkdVLM.create_from_arg_string(f"pretrained={run}", {"batch_size": batch_size, "device": "cpu"})
    requests, found.task_dict = requests_of(docs, settings, **more)
    return found.generate_until(requests), found


def own(run, **settings):
    model = load_llava(run / "student")
    return [model.answer([doc["image"]], [doc["question"]], **settings)[0] for doc in DOCS]


def test_answers_are_the_models_own_in_the_order_of_the_requests(adapter, run):
    wanted = own(run, max_new_tokens=8)
    assert len(set(wanted)) > 4
    calls = []
    for size in (1, "3", 8):
        said, found = answers(adapter, run, DOCS, GREEDY, size)
        assert said == wanted
        calls.append(found.cache_hook.told)
    assert len(calls[0]) == len(calls[2]) == 9
    assert {told[2] for told in calls[2]} == set(wanted)
    assert calls[2][0][:2] == ("generate_until", (DOCS[2]["question"], GREEDY))
    assert isinstance(found, Lmms)
    assert found.device.type == "cpu"


def test_requests_are_answered_in_batches(adapter, run, monkeypatch):
    sizes = []
    found = adapter.VlkdVLM(str(run), batch_size=4)
    generate = found.vlm.generate
    monkeypatch.setattr(
        found.vlm, "generate", lambda ids, mask, **more: sizes.append(len(ids)) or generate(ids, mask, **more)
    )
    requests, found.task_dict = requests_of(DOCS, GREEDY)
    found.generate_until(requests)
    assert sizes == [4, 4, 1]


def test_requests_of_other_lengths_are_not_mixed(adapter, run):
    short, _ = requests_of(DOCS[:4], GREEDY | {"max_new_tokens": 2})
    found = adapter.VlkdVLM(str(run), batch_size=8)
    long, found.task_dict = requests_of(DOCS, GREEDY)
    said = found.generate_until([*long[4:], *short])
    assert said == own(run, max_new_tokens=8)[4:] + own(run, max_new_tokens=2)[:4]


def test_an_answer_ends_before_its_first_stop_string(adapter, run):
    whole = own(run, max_new_tokens=8)
    stops = [whole[0][3], whole[0][1]]
    said, _ = answers(adapter, run, DOCS, GREEDY | {"until": [*stops, ""]}, 4)
    for text, cut in zip(whole, said, strict=True):
        ends = [text.index(stop) for stop in stops if stop in text]
        assert cut == text[: min(ends, default=len(text))].strip()
    assert len(said[0]) <= 1
    assert answers(adapter, run, DOCS[:1], GREEDY | {"until": stops[1]})[0] == said[:1]
    assert answers(adapter, run, DOCS[:1], GREEDY | {"until": None})[0] == whole[:1]


def test_a_picture_may_stand_behind_the_question(adapter, run):
    docs = [{"question": "What colour? <image>", "image": noise(1)}]
    model = load_llava(run / "student")
    wanted = model.answer([noise(1)], [(Turn("user", "What colour? <image>"),)], max_new_tokens=8)
    assert answers(adapter, run, docs, GREEDY)[0] == wanted
    assert wanted != model.answer([noise(1)], ["What colour?"], max_new_tokens=8)


@pytest.mark.parametrize(
    ("pictures", "sentence"),
    [
        (lambda doc: [doc["image"]] * 2, r"Document 2 of the task t has 2 pictures \(Image, Image\), expected one"),
        (lambda doc: [], r"has 0 pictures \(nothing\)"),
        (lambda doc: ["clip.mp4"], r"has 1 pictures \(str\)"),
    ],
)
def test_other_than_one_picture_is_refused(adapter, run, pictures, sentence):
    with pytest.raises(UserError, match=sentence):
        answers(adapter, run, DOCS, GREEDY, pictures=pictures)


@pytest.mark.parametrize("change", [{"do_sample": True}, {"temperature": 0.2}, {"num_beams": 5}])
def test_what_is_not_greedy_is_refused(adapter, run, change):
    with pytest.raises(UserError, match="answers greedily; give --gen_kwargs"):
        answers(adapter, run, DOCS, GREEDY | change)


def test_other_refusals(adapter, run):
    found = adapter.VlkdVLM(str(run))
    for method in (found.loglikelihood, found.generate_until_multi_round):
        with pytest.raises(UserError, match="choose tasks of the type generate_until"):
            method([])
    for settings in ({"batch_size": "auto"}, {"batch_size": 0}, {"max_batch_size": 8}):
        with pytest.raises(UserError, match="--batch_size is"):
            adapter.VlkdVLM(str(run), **settings)
    with pytest.raises(UserError, match="2 times <image>"):
        answers(adapter, run, [{"question": "<image> or <image>?", "image": noise(1)}], GREEDY)
    with pytest.raises(UserError, match="Found no folder"):
        adapter.VlkdVLM("nowhere")


def test_the_manifest_names_the_class_and_the_package_names_the_manifest(adapter):
    found = adapter.manifest()
    module, _, name = found.simple_class_path.rpartition(".")
    assert found.model_id == "vlkd"
    assert getattr(importlib.import_module(module), name) is adapter.VlkdVLM
    assert adapter.VlkdVLM.is_simple
    project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())["project"]
    assert project["entry-points"]["lmms_eval.models"] == {"vlkd": "vlkd.lmms_eval:manifest"}


def test_vlkd_never_imports_it():
    code = "import sys, vlkd, vlkd.cli.main, vlkd.models.load_generative; sys.exit('lmms_eval' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.skipif(find_spec("lmms_eval") is None, reason="lmms-eval is not installed")
def test_the_real_one_takes_the_class(run):
    registry = importlib.import_module("lmms_eval.models.registry_v2")
    models = registry.ModelRegistryV2()
    models.register_manifest(importlib.import_module("vlkd.lmms_eval").manifest())
    found = models.get_model_class("vlkd").create_from_arg_string(f"pretrained={run}", {"batch_size": 4})
    requests, found.task_dict = requests_of(DOCS, GREEDY)
    assert found.generate_until(requests) == own(run, max_new_tokens=8)
