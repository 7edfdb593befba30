"""`vlkd doctor` tells sound models from broken ones, and what the machine has."""

from __future__ import annotations

import io
import json

import pytest
import torch
from helpers.tiny_models import CAPTIONS, tiny_composite, tiny_images
from helpers.tiny_vlms import write_llava
from PIL import Image
from safetensors.torch import load_file, save_file

from vlkd.cli.main import main
from vlkd.data.vqa_writer import QA, VqaSample, write_vqa_shards
from vlkd.models.via_llava import load_llava


@pytest.fixture
def model(tmp_path):
    folder = tmp_path / "sound"
    tiny_composite().save(folder, golden=True)
    return folder


def test_the_environment_is_told(capsys):
    main(["doctor", "--json"])
    lines = capsys.readouterr().out.splitlines()
    found = json.loads(lines[-1])["environment"]
    assert found["torch"] == torch.__version__
    assert {"python", "faiss-cpu", "cores", "memory", "devices", "torchvision ops", "extra [demo]"} <= found.keys()
    assert any(line.startswith("torch ") and torch.__version__ in line for line in lines)


def test_a_sound_model_is_described(model, tmp_path, capsys):
    (tmp_path / "captions.jsonl").write_text(
        "".join(json.dumps({"image": f"{i}.png", "captions": [CAPTIONS[i % 5]]}) + "\n" for i in range(6))
    )
    for i, image in enumerate(tiny_images(6)):
        image.save(tmp_path / f"{i}.png")
    (tmp_path / "3.png").write_bytes(b"no picture")
    main(["doctor", str(model), "--data", str(tmp_path / "captions.jsonl"), "--json"])
    row = json.loads(capsys.readouterr().out.splitlines()[-1])["models"][0]
    counts = tiny_composite().parameter_counts()
    assert row["error"] == ""
    assert row["width"] == "24"
    assert row["parameters"] == f"{counts['image']:,} image, {counts['text']:,} text"
    assert row["preprocessing"].startswith("32 x 32 px")
    assert row["golden"].startswith("equal")
    assert "of 5 pairs" in row["pairs"]


def test_a_broken_model_ends_with_code_2_after_the_others(model, tmp_path, capsys):
    broken = tmp_path / "broken"
    tiny_composite().save(broken, golden=True)
    weights = load_file(str(broken / "model.safetensors"))
    weights["image_projection.0.weight" if "image_projection.0.weight" in weights else sorted(weights)[0]] *= 1.5
    save_file(weights, str(broken / "model.safetensors"))
    with pytest.raises(SystemExit) as stop:
        main(["doctor", str(broken), str(tmp_path / "gone"), str(model)])
    assert stop.value.code == 2
    captured = capsys.readouterr()
    assert "golden inputs differs" in captured.err
    assert "Found no model" in captured.err
    assert captured.err.splitlines()[-1].startswith("vlkd: 2 of 3 models cannot be used")
    assert "equal to those it was saved with" in captured.out


def test_data_without_a_model_are_refused(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["doctor", "--data", "shards"])
    assert stop.value.code == 2
    assert "name at least one REF" in capsys.readouterr().err


def test_a_run_is_planned_in_a_process_of_its_own(tmp_path, capsys):
    words = ["smoke=true", f"out={tmp_path / 'run'}", "teachers.refs=a,b", "method.matching=1"]
    main(["doctor", "--json", "--plan", "retriever", *words])
    lines = capsys.readouterr().out.splitlines()
    plan = json.loads(lines[-1])["plan"]
    assert (plan["task"], plan["settings"]) == ("retriever", words)
    assert plan["images_per_second"]["run"] > 0
    table = "\n".join(lines)
    for name in ("memory of the machine", "  activations", "  teacher teacher1", "  this run", "when it pays"):
        assert f"\n{name}" in table or f"\n  {name}" in table
    assert plan["bottleneck"]["sentence"] in table
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--plan", "retreiver"], "Did you mean 'retriever'"),
        (["--plan", "dho", "smoke=true"], "this recipe trains a classifier"),
        (["--plan", "retriever", "train.batch=8"], "No setting is called 'train.batch'"),
        (["--plan", "retriever", "smoke=true", "--ranks", "0"], "--ranks is 0"),
    ],
)
def test_a_plan_that_cannot_be_made_ends_with_one_sentence(words, sentence, capsys):
    with pytest.raises(SystemExit) as stop:
        main(["doctor", *words])
    assert stop.value.code == 2
    captured = capsys.readouterr()
    assert sentence in captured.err
    assert len(captured.err.splitlines()) == 1


def test_a_model_that_answers_questions_is_described(tmp_path, capsys):
    model = load_llava(write_llava(tmp_path / "run" / "student"))
    (tmp_path / "run" / "config.json").write_text('{"data": {}}')
    for ref in ("run", "run/student"):
        main(["doctor", str(tmp_path / ref), "--json"])
        row = json.loads(capsys.readouterr().out.splitlines()[-1])["models"][0]
        assert row["error"] == ""
        assert row["parameters"].startswith(f"{sum(value.numel() for value in model.parameters()):,}: ")
        assert row["picture"].startswith(f"{model.visual_tokens} tokens, {model.visual_width} wide")
        assert "nats between drawn pictures" in row["answers"]


def test_a_model_that_answers_without_looking_is_broken(tmp_path, capsys):
    model = load_llava(write_llava(tmp_path / "seeing"))
    with torch.no_grad():
        for value in model.part_parameters("projector"):
            value.zero_()
    model.save(tmp_path / "blind")
    write_vqa_shards(
        (
            VqaSample(key=f"s{i}", image=png(i), suffix="png", qa=(QA(question="What is it?", answer=str(i)),))
            for i in range(4)
        ),
        tmp_path / "data",
        name="test",
    )
    for more in ([], ["--data", str(tmp_path / "data")]):
        with pytest.raises(SystemExit):
            main(["doctor", str(tmp_path / "blind"), *more])
        assert "does not look at pictures" in capsys.readouterr().err


def test_a_run_without_a_student_yet_is_told(tmp_path, capsys):
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    with pytest.raises(SystemExit):
        main(["doctor", str(tmp_path / "run")])
    assert "has no student yet" in capsys.readouterr().err


def png(seed):
    with io.BytesIO() as stream:
        Image.new("RGB", (40, 40), (60 * seed, 90, 200)).save(stream, "PNG")
        return stream.getvalue()
