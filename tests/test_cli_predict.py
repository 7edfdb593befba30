"""`vlkd predict`: tables of probabilities from classifiers and dual encoders, and the way from them to new labels."""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.classes import CLASSES, tiny_classifier
from helpers.pairs import noise
from helpers.tiny_models import tiny_composite

from vlkd.active import read_pool
from vlkd.cli.main import main
from vlkd.cli.predict import main as predict
from vlkd.data.given_images import open_given
from vlkd.data.images import open_image
from vlkd.data.pool import PoolData, open_pool
from vlkd.data.shard_writer import RawSample, write_shards
from vlkd.errors import UserError
from vlkd.models.classifier import load_classifier
from vlkd.models.load import load


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    place = tmp_path_factory.mktemp("models")
    student = tiny_classifier()
    student.alpha, student.beta = 0.3, 0.7
    student.save(place / "run" / "student")
    tiny_classifier(heads="one").save(place / "single")
    tiny_composite().save(place / "dual")
    return place


@pytest.fixture
def data(tmp_path):
    """Two splits of class folders, with the same file names in both."""
    for split in ("train", "test"):
        for number in range(10):
            path = tmp_path / "data" / split / CLASSES[number % 5] / f"{number}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            noise(number + 100 * (split == "test")).save(path)
    return tmp_path / "data"


def table(path: Path) -> list[dict[str, str]]:
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def own_probabilities(folder: Path, paths: list[str]) -> dict[str, np.ndarray]:
    model = load_classifier(folder)
    pixels = torch.stack([model.preprocessing.image_transform(open_image(Path(path))) for path in paths])
    with torch.no_grad():
        return {name: found.numpy() for name, found in model.probabilities(pixels).items()}


def test_a_classifiers_table_has_the_models_own_probabilities(models, data, tmp_path, capsys):
    out = tmp_path / "new" / "p.csv"
    predict([str(models / "run"), str(data / "train"), "--out", str(out), "--batch-size", "3", "--top", "3", "--json"])
    rows = table(out)
    assert [row["key"] for row in rows] == sorted(f"train/{CLASSES[n % 5]}/{n}.png" for n in range(10))
    assert all(Path(row["path"]) == data / row["key"] for row in rows)
    wanted = own_probabilities(models / "run/student", [row["path"] for row in rows])
    order = np.argsort(-wanted["mix"], axis=1)
    for i, row in enumerate(rows):
        for place, suffix in enumerate(("", "_2", "_3")):
            assert row[f"class{suffix}"] == CLASSES[order[i, place]]
            assert float(row[f"probability{suffix}"]) == pytest.approx(wanted["mix"][i, order[i, place]], abs=2e-6)
        for head in ("label", "teacher"):
            assert row[f"{head}_head_class"] == CLASSES[wanted[head][i].argmax()]
            assert float(row[f"{head}_head_probability"]) == pytest.approx(wanted[head][i].max(), abs=2e-6)
    assert "class_4" not in rows[0]
    told = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (told["images"], told["predicted"], told["unreadable"], told["classes"], told["heads"]) == (10, 10, 0, 5, 2)
    assert told["seconds"] > 0
    assert told["images_per_second"] > 0
    assert told["bad_list"] is None


def test_lines_of_json_have_all_probabilities(models, data, tmp_path):
    predict([str(models / "run/student"), str(data / "train"), "--out", str(tmp_path / "p.jsonl")])
    rows = [json.loads(line) for line in (tmp_path / "p.jsonl").read_text().splitlines()]
    wanted = own_probabilities(models / "run/student", [row["path"] for row in rows])
    for name, key in (("mix", "probabilities"), ("label", "label_head"), ("teacher", "teacher_head")):
        assert [list(row[key]) for row in rows] == [list(CLASSES)] * 10
        np.testing.assert_allclose([list(row[key].values()) for row in rows], wanted[name], atol=2e-6)
    assert [row["class"] for row in rows] == [CLASSES[i] for i in wanted["mix"].argmax(axis=1)]
    assert all(row["probability"] == max(row["probabilities"].values()) for row in rows)


def test_a_single_head_has_no_columns_of_heads(models, data, tmp_path):
    predict([str(models / "single"), str(data / "train"), "--out", str(tmp_path / "p.csv"), "--top", "1"])
    rows = table(tmp_path / "p.csv")
    assert list(rows[0]) == ["key", "path", "class", "probability"]
    wanted = own_probabilities(models / "single", [row["path"] for row in rows])["label"]
    np.testing.assert_allclose([float(row["probability"]) for row in rows], wanted.max(axis=1), atol=2e-6)


def test_bad_images_are_listed_and_the_others_go_on(models, data, tmp_path, capsys):
    broken = data / "train/ant/5.png"
    broken.write_bytes(broken.read_bytes()[:50])
    (data / "train/bee/note.jpg").write_text("no picture")
    words = [str(models / "run"), str(data / "train"), "--out", str(tmp_path / "p.csv"), "--json"]
    words += ["--save-probabilities", str(tmp_path / "pool")]
    predict(words)
    captured = capsys.readouterr()
    bad = table(tmp_path / "p.bad.csv")
    assert [row["key"] for row in bad] == ["train/ant/5.png", "train/bee/note.jpg"]
    assert [row["path"] for row in bad] == [str(broken), str(data / "train/bee/note.jpg")]
    assert "no picture" in bad[1]["reason"]
    assert "unreadable: train/ant/5.png: " in captured.err
    told = json.loads(captured.out.splitlines()[-1])
    assert (told["images"], told["predicted"], told["unreadable"]) == (11, 9, 2)
    keys = [row["key"] for row in table(tmp_path / "p.csv")]
    assert not {row["key"] for row in bad} & set(keys)
    assert list(read_pool(tmp_path / "pool").keys) == keys
    noise(1).save(broken)
    (data / "train/bee/note.jpg").unlink()
    predict(words)
    assert not (tmp_path / "p.bad.csv").exists()


def test_a_dual_encoder_gives_the_softmax_of_its_scaled_cosines(models, data, tmp_path):
    names = ["red square", "blue circle", "dog"]
    (tmp_path / "names.txt").write_text("\n".join(names) + "\n")
    (tmp_path / "templates.txt").write_text("a {c}\nthe small {c}\n")
    words = [str(models / "dual"), str(data / "test"), "--templates", str(tmp_path / "templates.txt")]
    for number, given in enumerate((",".join(names), str(tmp_path / "names.txt"))):
        out = tmp_path / f"{number}.jsonl"
        predict([*words, "--classes", given, "--out", str(out), "--save-probabilities", str(tmp_path / "pool")])
    assert (tmp_path / "0.jsonl").read_bytes() == (tmp_path / "1.jsonl").read_bytes()
    rows = [json.loads(line) for line in out.read_text().splitlines()]

    model = load(str(models / "dual"))

    def unit(values):
        return values / np.linalg.norm(values, axis=-1, keepdims=True)

    images = unit(model.encode_image([open_image(Path(row["path"])) for row in rows]).double().numpy())
    texts = [unit(model.encode_text([f"a {name}", f"the small {name}"]).double().numpy()).mean(0) for name in names]
    with torch.no_grad():
        scale = float(model.encode({}, ("logit_scale",))["logit_scale"])
    logits = scale * images @ unit(np.stack(texts)).T
    wanted = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    np.testing.assert_allclose([list(row["probabilities"].values()) for row in rows], wanted, rtol=1e-4)
    assert "label_head" not in rows[0]
    pool = read_pool(tmp_path / "pool")
    np.testing.assert_allclose(pool.features, images, atol=1e-5)
    np.testing.assert_allclose(pool.probabilities, wanted, atol=1e-5)
    assert pool.classes == tuple(names)


def test_keys_are_those_of_the_pool_of_a_run(data):
    wanted = set(open_pool(PoolData(root=str(data), val="", test="test", shots="all"), seed=0).pairs.keys)
    for ref in (f"{data}#train", f"{data}/train", f"{data}/train/"):
        assert wanted <= set(open_given([ref]).keys)
    assert wanted <= set(open_given([str(data)]).keys)
    # Below the root of a run's data the root decides, whatever is named.
    one = str(data / "train/ant/0.png")
    assert open_given([one], str(data)).keys == ["train/ant/0.png"]
    assert open_given([str(data / "train/ant")], str(data)).keys == ["train/ant/0.png", "train/ant/5.png"]
    flat = set(open_pool(PoolData(root=str(data / "train"), train="", val="", test="", shots="all"), seed=0).pairs.keys)
    assert flat <= set(open_given([str(data / "train")], str(data / "train")).keys)


def test_what_images_may_be(data, tmp_path, monkeypatch):
    monkeypatch.chdir(data)
    assert open_given(["train/ant/0.png", "./train/bee/1.png", "train/ant/0.png"]).keys == [
        "train/ant/0.png", "train/bee/1.png",
    ]  # fmt: skip
    assert open_given(["train/*/5.png", "test/ant/0.png"]).keys == ["train/ant/5.png", "test/ant/0.png"]
    assert len(open_given(["**/*.png"])) == 20
    assert open_given(["train/ant", "test/ant"]).keys == ["0.png", "5.png", "1:0.png", "1:5.png"]
    joined = open_given(["train", "test", "train/ant"]).keys
    assert len(set(joined)) == 22
    assert joined[10] == "test/ant/0.png"
    (data / "list.jsonl").write_text(json.dumps({"image": "train/cat/2.png", "caption": "a cat"}) + "\n")
    assert open_given(["list.jsonl"]).files[0].path.name == "2.png"
    for refs, message in (([], "No images are named"), (["nothing"], "nothing at"), (["no/*.png"], "nothing at")):
        with pytest.raises(UserError, match=message):
            open_given(refs)


def test_shards(models, data, tmp_path):
    paths = sorted((data / "train").rglob("*.png"))
    samples = [
        RawSample(key=f"k{number}", image=path.read_bytes(), extension="png", captions=("a",))
        for number, path in enumerate(paths)
    ]
    write_shards(samples, tmp_path / "shards", samples_per_shard=4)
    for out, images in (("s.csv", tmp_path / "shards"), ("f.csv", data / "train")):
        predict([str(models / "run"), str(images), "--out", str(tmp_path / out)])
    rows, wanted = table(tmp_path / "s.csv"), table(tmp_path / "f.csv")
    assert [row["key"] for row in rows] == [f"k{number}" for number in range(10)]
    assert all(row["path"].endswith(f".tar/{row['key']}") for row in rows)
    assert [row["probability"] for row in rows] == [row["probability"] for row in wanted]


def test_from_a_run_to_new_labels_to_a_run(tmp_path, capsys):
    run = tmp_path / "run"
    main(["train", "dho", "smoke=true", "method.distillation=0", f"out={run}"])
    root = json.loads((run / "config.json").read_text())["data"]["root"]
    pool = tmp_path / "pool.safetensors"
    lists = []
    for number, ref in enumerate((f"{root}#train", f"{root}/train")):
        rounds = tmp_path / f"rounds-{number}"
        main(["predict", str(run), ref, "--out", str(tmp_path / "p.csv"), "--save-probabilities", str(pool)])
        main([
            "prep", "label_pool", "--pool", ref, "--probabilities", str(pool),
            "--strategy", "pcoreset", "--count", "55", "--out", str(rounds),
        ])  # fmt: skip
        lists.append((rounds / "round-001.txt").read_text())
    assert lists[0] == lists[1]
    assert len(lists[0].splitlines()) == 55
    features = read_pool(pool).features
    assert features is not None
    assert features.shape == (60, load_classifier(run / "student").width)
    capsys.readouterr()
    sizes = ["model.image=test_resnet", "model.image_size=32", "train.batch_size=16", "train.samples=32"]
    shots = f"data.shots={tmp_path / 'rounds-0/round-001.txt'}"
    again = [f"data.root={root}", shots, *sizes, "train.device=cpu", f"out={tmp_path / 'again'}"]
    main(["train", "dho", "method.distillation=0", *again])
    assert "55 of them show their label" in capsys.readouterr().out


def test_rounds_leave_out_what_validation_took(tmp_path):
    """Without a split for validation a part of the pool is held out: no round names it, and the next run takes it."""
    smoke = tmp_path / "smoke"
    main(["train", "dho", "smoke=true", "method.distillation=0", f"out={smoke}"])
    root = json.loads((smoke / "config.json").read_text())["data"]["root"]
    words = ["train", "dho", "method.distillation=0", f"data.root={root}", "data.val=", "model.image=test_resnet",
             "model.image_size=32", "train.batch_size=8", "train.samples=16", "train.device=cpu"]  # fmt: skip
    run, pool = tmp_path / "run", tmp_path / "pool.safetensors"
    main([*words, "data.shots=1", f"out={run}"])
    labelled, held_out = ((run / name).read_text().splitlines() for name in ("labelled.txt", "held_out.txt"))
    classes = {Path(key).parent for key in labelled}
    assert len(labelled) == len(classes) == len(list((Path(root) / "train").iterdir()))
    assert len(held_out) == round(0.2 * 60)
    main(["predict", str(run), f"{root}#train", "--out", str(tmp_path / "p.csv"), "--save-probabilities", str(pool)])
    left = 60 - len(labelled) - len(held_out)
    main([
        "prep", "label_pool", "--pool", f"{root}#train", "--probabilities", str(pool), "--strategy", "pcoreset",
        "--labelled", str(run / "labelled.txt"), "--leave-out", str(run / "held_out.txt"),
        "--count", str(left), "--out", str(tmp_path / "rounds"),
    ])  # fmt: skip
    chosen = (tmp_path / "rounds/round-001.txt").read_text().splitlines()
    assert len({*chosen, *labelled, *held_out}) == 60
    (tmp_path / "all.txt").write_text("\n".join([*labelled, *chosen]))
    main([*words, f"data.shots={tmp_path / 'all.txt'}", f"out={tmp_path / 'again'}"])
    assert (tmp_path / "again/held_out.txt").read_text().splitlines() == held_out
    assert len((tmp_path / "again/labelled.txt").read_text().splitlines()) == left + len(labelled)


def test_a_run_that_has_not_ended_says_so(models, data, tmp_path, capsys):
    shutil.copytree(models / "run", tmp_path / "run")
    for ended in (True, False):
        predict([str(tmp_path / "run"), str(data / "train"), "--out", str(tmp_path / f"{ended}.csv")])
        assert ("has not ended: this is its student so far" in capsys.readouterr().err) != ended
        (tmp_path / "run/results.jsonl").unlink(missing_ok=True)
        (tmp_path / "run/metrics.jsonl").touch()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["missing", "train", "--out", "p.csv"], "Found no model 'missing'"),
        (["half", "train", "--out", "p.csv"], "has no student yet"),
        (["{run}", "empty", "--out", "p.csv"], "holds no usable image"),
        (["{run}", "gone", "--out", "p.csv"], "nothing at gone"),
        (["{run}", "broken", "--out", "p.csv"], "None of the 1 images can be read"),
        (["{run}", "train", "--out", "p.csv", "--classes", "a,b"], "leave --classes"),
        (["{dual}", "train", "--out", "p.csv"], "--classes is missing"),
        (["{dual}", "train", "--out", "p.csv", "--classes", "cat"], "has 1 names"),
        (["{dual}", "train", "--out", "p.csv", "--classes", "cat,dog,cat"], "names 'cat' twice"),
        (["{dual}", "train", "--out", "p.csv", "--classes", "cat,,dog"], "empty name"),
        (["{dual}", "train", "--out", "p.csv", "--classes", "none.txt"], "none.txt cannot be read"),
        (["{run}", "train", "--out", "p.txt"], r"ends in \.csv or \.jsonl"),
        (["{run}", "train", "--out", "p.csv", "--top", "0"], "--top is 0"),
        (["{run}", "train", "--out", "p.csv", "--save-probabilities", "./p.csv"], "name two files"),
        (["{run}", "list.csv", "--out", "list.csv"], "would be overwritten"),
        (["{run}", "train", "--out", "p.csv", "--device", "nowhere"], "device nowhere cannot be used"),
    ],
)
def test_refusals(models, data, monkeypatch, words, message):
    monkeypatch.chdir(data)
    (data / "empty").mkdir()
    (data / "broken").mkdir()
    (data / "broken/1.jpg").write_bytes(b"x")
    (data / "half/checkpoints").mkdir(parents=True)
    (data / "list.csv").write_text("image,caption\ntrain/ant/0.png,an ant\n")
    places = {"run": str(models / "run"), "dual": str(models / "dual")}
    with pytest.raises(UserError, match=message):
        predict([word.format(**places) for word in words])
    assert not (data / "p.csv").exists()
