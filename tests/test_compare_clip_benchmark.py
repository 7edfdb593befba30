"""CLIP_benchmark's and open_clip's own figures on the same tiny models and folders."""

from __future__ import annotations

import importlib.util
import itertools
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("clip_benchmark.datasets.builder", reason="clip_benchmark is absent", exc_type=ImportError)

import open_clip
import webdataset
from helpers.tiny_models import tiny_composite, write_open_clip
from PIL import Image
from safetensors.torch import load_file, save_file

from vlkd.data.eval_set import open_eval_set
from vlkd.protocols.zero_shot import zero_shot
from vlkd.retrieval.zero_shot import class_vectors

SCRIPT = Path(__file__).parents[1] / "scripts" / "compare_clip_benchmark.py"
COLOURS = ("red", "green", "blue", "orange", "purple", "black", "brown")
TEMPLATES = ("a drawing of a {c} thing", "{c}", "some {c} shape on noise")
IMAGES = 52
ACCURACIES = ("acc1", "acc5", "mean_per_class_recall")
RECALLS = tuple(f"{side}_retrieval_recall@{k}" for side in ("image", "text") for k in (1, 5, 10))


def load_script() -> Any:
    spec = importlib.util.spec_from_file_location("compare_under_test", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    try:
        spec.loader.exec_module(module)
    finally:
        del sys.modules[spec.name]
    return module


@pytest.fixture(scope="module")
def script():
    return load_script()


def picture(rng: np.random.Generator, colour: str = "white", mode: str = "RGB") -> Image.Image:
    """Noise around a square of a colour, of any proportions."""
    width, height = (int(side) for side in rng.integers(30, 70, 2))
    channels = len(mode)
    image = Image.fromarray(rng.integers(0, 256, (5, 6, channels), dtype=np.uint8)).resize((width, height))
    left, top = (int(place) for place in rng.integers(0, 15, 2))
    image.paste(Image.new(mode, (15, 12), colour), (left, top))
    return image


def sentences(rng: np.random.Generator, count: int) -> list[str]:
    """Different captions of words that the tiny tokenizer knows."""
    words = [("a", "two"), ("red", "blue", "green", "small", "large"), ("star", "square", "circle", "dog")]
    every = [" ".join(own) for own in itertools.product(*words, ("above", "on"), *words[1:])]
    return rng.permutation(every)[:count].tolist()


def write(
    root: Path,
    rng: np.random.Generator,
    labels: Sequence[Mapping[str, Any]],
    *,
    colours: Sequence[str] = ("white",),
    classes: Sequence[str] = (),
    kind: str = "",
    mode: str = "RGB",
) -> Path:
    """Two tars and the text files as CLIP_benchmark's `convert_dataset` writes them; one label dict a picture."""
    (root / "test").mkdir(parents=True)
    (root / "test" / "nshards.txt").write_text("2")
    if kind:
        (root / "dataset_type.txt").write_text(kind)
    if classes:
        (root / "classnames.txt").write_text("\n".join(classes))
        (root / "zeroshot_classification_templates.txt").write_text("\n".join(TEMPLATES))
    half = len(labels) // 2
    for shard, rows in enumerate((range(half), range(half, len(labels)))):
        with webdataset.TarWriter(str(root / "test" / f"{shard}.tar")) as tar:
            for i in rows:
                image = picture(rng, colours[i % len(colours)], mode)
                tar.write({"__key__": f"s{i:07d}", "png": image, **labels[i]})
    return root


def classification(root: Path, classes: Sequence[str], *, seed: int = 0, mode: str = "RGB") -> Path:
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, len(classes), IMAGES).tolist()
    colours = [classes[label] for label in labels]
    return write(root, rng, [{"cls": label} for label in labels], colours=colours, classes=classes, mode=mode)


def multilabel(root: Path, *, empty: bool) -> Path:
    rng = np.random.default_rng(1)
    labels = rng.random((IMAGES, 6)) < 0.3
    labels[:6] |= np.eye(6, dtype=bool)
    labels[:, -1] &= not empty
    rows = [{"npy": row.astype(np.int64)} for row in labels]
    return write(root, rng, rows, colours=COLOURS, classes=COLOURS[:6], kind="multilabel")


def captioned(root: Path) -> Path:
    """One to five captions a picture."""
    rng = np.random.default_rng(2)
    captions = iter(sentences(rng, 5 * IMAGES))
    rows = [{"txt": "\n".join(next(captions) for _ in range(1 + i % 5))} for i in range(IMAGES)]
    return write(root, rng, rows, colours=COLOURS, kind="retrieval")


def choices(root: Path, *, images: int, equal: int = 0) -> Path:
    """Items of one or two pictures and two captions, the first `equal` items with the same one twice."""
    rng = np.random.default_rng(3)
    captions = sentences(rng, 60)
    lines = []
    root.mkdir()
    for item in range(30):
        names = [f"{item}-{side}.png" for side in range(images)]
        for side, name in enumerate(names):
            picture(rng, COLOURS[(item + side) % 7]).save(root / name)
        own = captions[2 * item : 2 * item + 2]
        lines.append(json.dumps({"images": names, "captions": [own[0]] * 2 if item < equal else own}))
    (root / "items.jsonl").write_text("\n".join(lines))
    return root / "items.jsonl"


def lively(folder: Path, *, seed: int) -> Path:
    """A random model whose embeddings depend on what it is shown; fresh weights name one class for nearly all."""
    weights = write_open_clip(folder, seed=seed) / "open_clip_model.safetensors"
    state = load_file(weights)
    for name, value in state.items():
        if name == "visual.conv1.weight" or name.endswith(("attn.out_proj.weight", "mlp.c_proj.weight")):
            value *= 8
    save_file(state, weights)
    return folder


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return lively(tmp_path_factory.mktemp("model"), seed=1)


@pytest.fixture(scope="module")
def rows(script, model, tmp_path_factory):
    root = tmp_path_factory.mktemp("data")
    own = classification(root / "own", COLOURS[:5])
    own_prompts = {name: [f"{name} number {i}" for i in range(2 + place)] for place, name in enumerate(COLOURS[:5])}
    (own / "prompts.json").write_text(json.dumps(own_prompts))
    learned = classification(root / "learned", COLOURS[:3], seed=4)
    (learned / "train").mkdir()
    (learned / "train" / "nshards.txt").write_text("1")
    places = [
        classification(root / "seven", COLOURS),
        own,
        learned,
        classification(root / "twice", ("red", "red", "blue", "green", "black", "brown")),
        multilabel(root / "several", empty=False),
        multilabel(root / "empty", empty=True),
        captioned(root / "captioned"),
        choices(root / "pairs", images=2),
        choices(root / "single", images=1, equal=3),
    ]
    found = script.compare(str(model), [str(place) for place in places], root / "work")
    return {(row.data.removeprefix(f"{root.name}-"), row.figure): row for row in found}


def test_figures_are_equal_where_the_definitions_are(rows):
    wanted = {("seven", figure) for figure in ACCURACIES} | {("own", figure) for figure in ACCURACIES}
    wanted |= {("learned", "acc1"), ("learned", "mean_per_class_recall"), ("several", "mean_average_precision")}
    wanted |= {("captioned", figure) for figure in RECALLS}
    wanted |= {("pairs-items", figure) for figure in ("image_acc", "text_acc", "acc")}
    assert {key: rows[key].verdict for key in wanted} == dict.fromkeys(wanted, "equal")
    assert all(0 < rows[key].ours < 1 for key in wanted - {("own", "acc5")}), "equal zeros would prove nothing"
    assert [row for row in rows.values() if row.verdict == "DIFFERENT"] == []


def test_differences_are_those_of_the_definitions(rows):
    tied = {("twice", figure) for figure in ACCURACIES} | {("single-items", figure) for figure in ("text_acc", "acc")}
    found = {key: (row.theirs, row.ours) for key, row in rows.items() if row.explained and key not in tied}
    theirs, ours = found.pop(("empty", "mean_average_precision"))
    assert theirs == pytest.approx(ours * 5 / 6, abs=1e-6)
    assert found == {
        ("learned", "acc5"): (None, None),
        ("learned", "lp_acc1"): (None, None),
        ("single-items", "image_acc"): (1.0, None),
    }


def test_equal_scores_bound_what_may_differ(rows):
    """Rounding may part equal captions and classes in CLIP_benchmark, so only the bounds are certain."""
    row = rows["single-items", "text_acc"]
    assert row.why.startswith("3 equal scores")
    assert row.expected == pytest.approx((row.ours, row.ours + 3 / 30))
    row = rows["twice", "acc1"]
    labels = np.random.default_rng(0).integers(0, 6, IMAGES)
    assert row.why.startswith("2 classes share")
    assert row.expected[1] - row.ours == pytest.approx(np.mean(labels < 2))
    assert row.expected[0] < row.theirs < row.expected[1]


def test_an_explanation_holds_only_as_far_as_it_reaches(script):
    told = {"data": "d", "figure": "text_acc", "ours": 0.5, "why": "two of ten are equal"}
    for theirs, fine in ((0.7, True), (0.5 + 2e-6, True), (0.8, False), (0.4, False), (None, False)):
        row = script.Row(theirs=theirs, expected=(0.5, 0.7), **told)
        assert (row.explained, row.verdict) == (fine, told["why"] if fine else "DIFFERENT")
    assert script.Row(data="d", figure="acc1", theirs=0.5, ours=0.5 + 5e-7).verdict == "equal"
    assert script.Row(data="d", figure="acc1", theirs=0.5, ours=None).verdict == "DIFFERENT"


def test_vlkds_own_models_are_measured_by_clip_benchmark(script, tmp_path):
    tiny_composite(seed=5).save(tmp_path / "model")
    data = [classification(tmp_path / "seven", COLOURS), captioned(tmp_path / "captioned")]
    rows = script.compare(str(tmp_path / "model"), [str(one) for one in data], tmp_path / "work")
    assert [row.figure for row in rows] == [*ACCURACIES, *sorted(RECALLS, key=lambda name: int(name.split("@")[1]))]
    assert {row.verdict for row in rows} == {"equal"}


def test_transparent_pictures_are_named_where_figures_differ(script, tmp_path, monkeypatch, capsys):
    data = classification(tmp_path / "clear", COLOURS, mode="RGBA")
    assert script.decoded_otherwise(open_eval_set(data)) == IMAGES
    assert script.decoded_otherwise(open_eval_set(classification(tmp_path / "plain", COLOURS))) == 0
    name = script.source_name(str(data))
    wrong = script.Row(data=name, figure="acc1", theirs=0.5, ours=0.25)
    monkeypatch.setattr(script, "compare", lambda ref, places, work: [wrong])
    assert script.main(["--model", "any", "--data", str(data), "--json"]) == 1
    table, line = capsys.readouterr().out.strip().rsplit("\n", 1)
    assert "DIFFERENT" in table
    assert f"decodes {IMAGES} pictures otherwise" in table
    assert json.loads(line, parse_constant=pytest.fail)["different"] == 1
    same = script.Row(data=name, figure="acc1", theirs=0.5, ours=0.5)
    monkeypatch.setattr(script, "compare", lambda ref, places, work: [same])
    assert script.main(["--model", "any", "--data", str(data)]) == 0


def test_refusals_are_one_sentence(script, model, tmp_path, monkeypatch):
    for name in ("cat", "dog"):
        (tmp_path / name).mkdir()
        picture(np.random.default_rng(0)).save(tmp_path / name / "1.png")
    with pytest.raises(SystemExit, match="prep wds_eval"):
        script.main(["--model", str(model), "--data", str(tmp_path)])
    monkeypatch.setitem(sys.modules, "clip_benchmark.datasets.builder", None)
    with pytest.raises(SystemExit, match="pip install clip_benchmark requests"):
        load_script()


def test_open_clips_classifier_gives_the_same_accuracy(script, model, tmp_path):
    data = open_eval_set(classification(tmp_path / "seven", COLOURS))
    theirs, ours = script.load_theirs(str(model)), script.load(str(model))
    templates = [template.replace("{c}", "{}") for template in TEMPLATES]
    classifier = open_clip.build_zero_shot_classifier(
        theirs.model, theirs.tokenizer, data.classes, templates, num_classes_per_batch=3
    )
    vectors = class_vectors(ours.encode_text, data.classes, data.templates)
    torch.testing.assert_close(vectors, classifier.T, rtol=0, atol=1e-6)
    with torch.no_grad():
        pixels = torch.stack([theirs.transform(data.image(i)) for i in range(len(data))])
        logits = 100 * theirs.model.encode_image(pixels, normalize=True) @ classifier
    best = logits.topk(5, dim=1).indices == torch.from_numpy(data.labels)[:, None]
    embed = ours.encode_image([data.image(i) for i in range(len(data))])
    found = zero_shot(embed, vectors, data.labels, classes=data.classes, logit_scale=100.0)
    assert found.metrics["acc1"] == best[:, 0].double().mean().item()
    assert found.metrics["acc5"] == best.any(dim=1).double().mean().item()
    confidence = logits.softmax(dim=1).amax(dim=1).double().numpy()
    np.testing.assert_allclose(found.per_item["confidence"], confidence, atol=1e-4)
