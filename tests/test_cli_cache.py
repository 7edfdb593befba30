"""`vlkd cache embeddings` builds, continues, opens and verifies caches, and ends with figures."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch
from helpers.distilling import TEXTS, tiny_teachers
from helpers.pairs import picture_pairs
from safetensors.torch import load_file, save_file

from vlkd.cli.main import main
from vlkd.data.sources import open_pairs
from vlkd.data.views import ViewSettings
from vlkd.distill.cache import CacheSpec, open_cache
from vlkd.distill.cache import format as cache_format
from vlkd.models.load import load


@pytest.fixture
def place(tmp_path):
    """Two teachers, two sources."""
    for name, model in tiny_teachers().items():
        model.save(tmp_path / "runs" / name / "student")
    for folder, texts in (("x", TEXTS), ("y", TEXTS[:3])):
        pairs = picture_pairs(tmp_path / folder, texts)
        lines = [
            json.dumps({"image": file.path.name, "captions": list(captions), "split": "train"})
            for file, captions in zip(pairs.files, pairs.captions, strict=True)
        ]
        (tmp_path / folder / "captions.jsonl").write_text("\n".join(lines))
    return tmp_path


def words(place, *more, teachers=("one", "two"), sources=("x", "y")):
    found = ["cache", "embeddings", "--out", str(place / "cache"), "--views", "2", "--device", "cpu", *more]
    for name in teachers:
        found += ["--teacher", str(place / "runs" / name / "student")]
    return [*found, "--data", *(str(place / name / "captions.jsonl") + "#train" for name in sources)]


def refused(capsys, arguments):
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == 2
    return capsys.readouterr().err.splitlines()[-1]


def test_every_teacher_and_source_has_a_folder_and_a_row(place, capsys):
    main(words(place, "--json", "--batch-size", "3"))
    lines = capsys.readouterr().out.splitlines()
    rows = json.loads(lines[-1])["caches"]
    assert [(row["teacher"], row["source"], row["images"], row["captions"]) for row in rows] == [
        (teacher, f"{folder}-captions-train", images, captions)
        for teacher in ("one", "two")
        for folder, images, captions in (("x", 8, 7), ("y", 3, 3))
    ]
    for row in rows:
        folder = place / "cache" / row["teacher"] / row["source"]
        size = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
        assert (row["folder"], row["bytes"], row["bytes_per_image"]) == (str(folder), size, size / row["images"])
        assert 0 < row["error"]["image.embed"]["max_relative_l2"] < 1e-3
        assert row["views_per_second"] > 0
    assert lines[-6].split() == [
        "teacher",
        "source",
        "images",
        "unreadable",
        "views",
        "MB",
        "bytes/image",
        "error",
        "views/s",
    ]
    assert lines[-5].split()[:5] == ["one", "x-captions-train", "8", "0", "2"]
    model, pairs = load(str(place / "runs" / "two" / "student")), open_pairs(str(place / "y/captions.jsonl#train"))
    spec = CacheSpec(features=("image.embed", "text.embed"), views=2, view_settings=ViewSettings())
    reader = open_cache(place / "cache" / "two" / "y-captions-train", "two", model, pairs, spec)
    assert reader.manifest["dtype"] == "float16"
    main(words(place, "--json"))
    again = json.loads(capsys.readouterr().out.splitlines()[-1])["caches"]
    assert [row["bytes"] for row in again] == [row["bytes"] for row in rows]


def test_settings_reach_the_cache(place, capsys):
    options = ["--crop-scale", "0.9,1", "--crop-ratio", "1,1", "--flip", "0", "--dtype", "int8", "--precision", "bf16"]
    main(words(place, *options, "--features", "image.pooled", teachers=["two"], sources=["y"]))
    manifest = json.loads((place / "cache" / "two" / "y-captions-train" / "manifest.json").read_text())
    assert manifest["views"]["settings"] == {"crop_scale": [0.9, 1.0], "crop_ratio": [1.0, 1.0], "flip": 0.0}
    assert (manifest["dtype"], manifest["precision"], manifest["features"]) == ("int8", "bf16", ["image.pooled"])
    assert manifest["views"]["count"] == 2


def test_verify_passes_and_builds_nothing(place, capsys):
    sentence = refused(capsys, words(place, "--verify", teachers=["one"], sources=["x"]))
    assert "holds no cache of teacher one; build it with `vlkd cache embeddings --teacher" in sentence
    assert not (place / "cache").exists()
    main(words(place, teachers=["one"], sources=["x"]))
    capsys.readouterr()
    main(words(place, "--verify", "--sample", "5", "--json", teachers=["one"], sources=["x"]))
    out = capsys.readouterr().out
    assert out.count("of 5 sampled, all hashes as written") == 2
    (row,) = json.loads(out.splitlines()[-1])["caches"]
    assert row["cosines"].keys() == {"image.embed", "text.embed"}
    assert 0.9999 < row["lowest_cosine"] <= 1.0000001


def test_verify_fails_after_flipped_bytes(place, capsys):
    main(words(place, teachers=["one"], sources=["x"]))
    path = place / "cache" / "one" / "x-captions-train" / "rows.000.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 64
    path.write_bytes(content)
    main(words(place, teachers=["one"], sources=["x"]))
    sentence = refused(capsys, words(place, "--verify", teachers=["one"], sources=["x"]))
    assert "rows.000.safetensors of teacher one has changed since it was written (sha256" in sentence


def test_verify_fails_after_other_weights(place, capsys, monkeypatch):
    main(words(place, teachers=["one"], sources=["x"]))
    path = place / "runs" / "one" / "student" / "model.safetensors"
    weights = load_file(str(path))
    generator = torch.Generator().manual_seed(0)
    weights["image_projection.0.weight"] = torch.randn(weights["image_projection.0.weight"].shape, generator=generator)
    save_file(weights, str(path))
    assert "with other weights" in refused(capsys, words(place, "--verify", teachers=["one"], sources=["x"]))
    # A hash that does not notice: the sample does.
    told = json.loads((place / "cache/one/x-captions-train/manifest.json").read_text())["teacher"]["fingerprint"]
    monkeypatch.setattr(cache_format, "model_fingerprint", lambda model, **_: told)
    sentence = refused(capsys, words(place, "--verify", teachers=["one"], sources=["x"]))
    assert "are not those computed anew (lowest cosine" in sentence
    assert "expected 0.999 or more" in sentence


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--views", "0"], "--views is 0; expected 1 or more"),
        (["--flip", "2"], "Found --flip 2.0"),
        (["--crop-scale", "0.9,0.1"], "expected two ascending numbers"),
        (["--features", "image.nothing"], "no feature is called 'image.nothing'"),
    ],
)
def test_impossible_settings_are_refused(place, capsys, options, message):
    assert message in refused(capsys, words(place, *options, teachers=["one"], sources=["x"]))


def test_sources_of_one_name_are_refused(place, capsys):
    assert "have the same last two path parts" in refused(capsys, words(place, sources=["x", "x"]))


def test_an_unknown_subcommand_is_one_sentence(capsys):
    expected = "vlkd: vlkd cache has no 'pictures'; there are embeddings and answers."
    assert refused(capsys, ["cache", "pictures"]) == expected
    main(["cache"])
    assert "examples:\n  vlkd cache embeddings" in capsys.readouterr().out


def test_the_subcommands_help_never_imports_torch():
    code = "import sys; from vlkd.cli.main import main\ntry: main(sys.argv[1:])\nexcept SystemExit: pass\n"
    code += "assert not {'torch', 'transformers', 'timm', 'open_clip'} & set(sys.modules)"
    call = [sys.executable, "-c", code, "cache", "embeddings", "--help"]
    done = subprocess.run(call, capture_output=True, text=True, check=True)
    assert done.stdout.split("examples:\n")[1].count("  vlkd cache embeddings") == 2
