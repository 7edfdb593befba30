"""Encoding of a data set with a model made of numbers, and the `eval retrieval` command against direct calls."""

from __future__ import annotations

import io
import json
import re
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from helpers.tiny_models import CAPTIONS, tiny_composite, tiny_images
from PIL import Image
from safetensors.torch import save_file

from vlkd.cli.main import main
from vlkd.data.sources import open_pairs
from vlkd.errors import UserError
from vlkd.metrics import bootstrap_means, hit_at_k, interval
from vlkd.models.load import load
from vlkd.retrieval.encode import encode_images, encode_pairs, encode_texts
from vlkd.retrieval.search import evaluate_retrieval
from vlkd.suite.results import read_results

SCRIPT = Path(__file__).parents[1] / "eval" / "retrieval.py"


class Pairs:
    """Image i is one grey value, i; its captions say the number."""

    def __init__(self, captions, broken=()):
        self.captions = captions
        self.keys = [f"k{i}" for i in range(len(captions))]
        self.broken = broken
        self.problems = ("0.tar: k99 has no image",)

    def __len__(self):
        return len(self.captions)

    def image(self, i):
        if i in self.broken:
            raise UserError(f"k{i} is cut short; expected a whole image.")
        return Image.new("RGB", (2, 2), (i, i, i))


class Model:
    """Both towers put a number on the circle; `shift` turns the texts by so many numbers."""

    def __init__(self, width=2, shift=0):
        self.width, self.shift, self.batches, self.texts = width, shift, [], []

    def place(self, numbers):
        angle = torch.tensor(numbers) / 10
        return torch.nn.functional.pad(torch.stack([angle.cos(), angle.sin()], 1), (0, self.width - 2))

    def encode_image(self, images, *, batch_size=64):
        self.batches.append(len(images))
        return self.place([float(image.getpixel((0, 0))[0]) for image in images])

    def encode_text(self, texts, *, batch_size=256):
        self.texts += texts
        return self.place([float(text.split()[-1]) + self.shift for text in texts])


def numbered(n, broken=()):
    return Pairs([(f"number {i}", f"the {i}") for i in range(n)], broken)


def test_images_stream_in_batches_and_bad_ones_are_listed():
    model = Model()
    encoded = encode_images(model, numbered(7, broken=(2, 6)), batch_size=3, progress=False)
    assert model.batches == [2, 3]
    assert encoded.index.tolist() == [0, 1, 3, 4, 5]
    assert encoded.bad == tuple((f"k{i}", f"k{i} is cut short; expected a whole image.") for i in (2, 6))
    assert torch.equal(encoded.embed, model.place([0.0, 1.0, 3.0, 4.0, 5.0]))


def test_captions_of_a_bad_image_leave_with_it():
    pairs = Pairs([("a 0",), ("a 1", "b 1"), ("a 2", "b 2", "c 2"), ("a 3",)], broken=(1,))
    encoded = encode_pairs(Model(), Model(), pairs, batch_size=2, progress=False)
    assert encoded.keys == ("k0", "k2", "k3")
    assert encoded.captions == ("a 0", "a 2", "b 2", "c 2", "a 3")
    assert encoded.image_of_text.tolist() == [0, 1, 1, 1, 2]
    assert len(encoded.image_embed) == 3
    assert torch.equal(encoded.text_embed, Model().place([0.0, 2.0, 2.0, 2.0, 3.0]))


def test_equal_texts_are_encoded_once():
    model = Model()
    embed = encode_texts(model, ["x 1", "x 2", "x 1", "x 1"], batch_size=1, progress=False)
    assert model.texts == ["x 1", "x 2"]
    assert torch.equal(embed, model.place([1.0, 2.0, 1.0, 1.0]))


@pytest.mark.parametrize(
    ("pairs", "sentence"),
    [
        (Pairs([]), "The data set is empty"),
        (numbered(2, broken=(0, 1)), "None of the 2 images can be read; the first: k0"),
        (Pairs([("a 0",), ()]), r"Image 'k1' has no caption \(1 of 2 images\)"),
    ],
)
def test_unusable_data_is_refused(pairs, sentence):
    with pytest.raises(UserError, match=sentence):
        encode_pairs(Model(), Model(), pairs, progress=False)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """24 noisy pictures with 1, 2 or 3 captions, one unreadable picture, one sample without a picture, two models."""
    root = tmp_path_factory.mktemp("pairs")
    pictures = tiny_images(24)
    members = []
    for i, picture in enumerate(pictures):
        stream = io.BytesIO()
        picture.save(stream, "PNG")
        captions = [f"{CAPTIONS[(i + j) % 5]} {'a small star ' * (i % 7)}" for j in range(i % 3 + 1)]
        members += [(f"s{i:02d}.png", b"broken" if i == 5 else stream.getvalue())]
        members += [(f"s{i:02d}.json", json.dumps({"captions": captions}).encode())]
    members.append(("t.json", b'{"captions": ["nothing to see"]}'))
    (root / "test").mkdir()
    with tarfile.open(root / "test" / "pairs.tar", "w") as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    for seed, name in enumerate(("a", "b")):
        tiny_composite(seed=seed).save(root / name)
    tiny_composite(width=16).save(root / "wide")
    return root


def evaluate(place, out, *words, models=("a", "b"), capsys):
    """The rows of the last line, and the lines before it."""
    refs = [str(place / name) for name in models]
    main(["eval", "retrieval", "--model", *refs, "--data", f"{place}#test", "--out", str(out), "--json", *words])
    *printed, last = capsys.readouterr().out.strip().splitlines()
    found = json.loads(last, parse_constant=pytest.fail)
    assert found["command"] == "eval retrieval"
    return found["results"], printed


def by_hand(place, images, texts):
    pairs = open_pairs(f"{place}#test")
    model, other = load(str(place / images)), load(str(place / texts))
    encoded = encode_pairs(model, other, pairs, batch_size=64, progress=False)
    return evaluate_retrieval(
        encoded.image_embed, encoded.text_embed, encoded.image_of_text, captions=encoded.captions
    )  # fmt: skip


def means(result):
    """Bootstrap means of both directions from the hits of every query."""
    image, text = result.ranks.image_to_text, result.ranks.text_to_image
    return bootstrap_means(hit_at_k(image, 1)), bootstrap_means(hit_at_k(text, 1), groups=result.image_of_text)


def test_rows_hold_what_one_evaluation_finds(place, tmp_path, capsys):
    rows, printed = evaluate(place, tmp_path, capsys=capsys)
    wanted = [by_hand(place, name, name) for name in ("a", "b")]
    assert wanted[0].mean_hit_at_1 != wanted[1].mean_hit_at_1
    for row, result in zip(rows, wanted, strict=True):
        assert {name: row[name] for name in result.as_row()} == result.as_row()
        assert (row["images"], row["captions"]) == (23, 24 * 2 - 3)
        assert (row["unreadable_images"], row["unreadable_keys"], row["left_out_samples"]) == (1, ["s05"], 1)
        assert row["metrics"]["mean_recall@1"] == row["score"] == result.mean_hit_at_1
        image, text = means(result)
        for name, found in (("image_to_text", image), ("text_to_image", text), ("mean", (image + text) / 2)):
            np.testing.assert_allclose(row[f"{name}_hit@1_interval"], interval(found), atol=1e-12)
        assert row["text_model"] == row["model_ref"]
    np.testing.assert_allclose(rows[0]["interval"], rows[0]["mean_hit@1_interval"], atol=1e-12)
    first, second = (np.mean(means(result), axis=0) for result in wanted)
    np.testing.assert_allclose(rows[1]["mean_hit@1_gain_interval"], interval(second - first), atol=1e-12)
    assert "mean_hit@1_gain_interval" not in rows[0]
    assert "23 images x 45 captions" in printed[0]
    assert f"gain over {place / 'a'}" in printed[3]


def test_the_folder_is_that_of_a_suite(place, tmp_path, capsys, monkeypatch):
    rows, _ = evaluate(place, tmp_path, capsys=capsys)
    stored = read_results(tmp_path)
    assert [row["metrics"] for row in stored] == [row["metrics"] for row in rows]
    monkeypatch.setattr("vlkd.suite.subject.encode_images", lambda *_, **__: pytest.fail("encoded again"))
    # The models are shown in the order of the words, whichever was measured first.
    again, _ = evaluate(place, tmp_path, models=("b", "a"), capsys=capsys)
    assert [row["score"] for row in again] == [row["score"] for row in rows[::-1]]
    with pytest.raises(SystemExit, match="2"):
        evaluate(place, tmp_path / "results.jsonl", capsys=capsys)
    assert "is a file; expected a folder" in capsys.readouterr().err


def test_each_fold_is_a_gallery_of_its_own(place, tmp_path, capsys):
    (row,), printed = evaluate(place, tmp_path, "--folds", "2", models=("a",), capsys=capsys)
    pairs = open_pairs(f"{place}#test")
    encoded = encode_pairs(load(str(place / "a")), load(str(place / "a")), pairs, progress=False)
    hits = []
    for first, last in ((0, 12), (12, 23)):
        own = (encoded.image_of_text >= first) & (encoded.image_of_text < last)
        images, texts = encoded.image_embed[first:last], encoded.text_embed[torch.from_numpy(own)]
        hits.append(evaluate_retrieval(images, texts, encoded.image_of_text[own] - first).image_to_text["hit@5"])
    assert row["fold2_image_to_text_hit@5"] == pytest.approx(np.mean(hits))
    assert f"fold2_image_to_text_hit@5 {100 * np.mean(hits):.1f}" in printed[-1]
    with pytest.raises(SystemExit, match="2"):
        evaluate(place, tmp_path, "--folds", "1", capsys=capsys)


def test_another_text_model_encodes_the_captions(place, tmp_path, capsys):
    (row,), _ = evaluate(place, tmp_path, "--text-model", str(place / "b"), models=("a",), capsys=capsys)
    assert row["text_model"] == str(place / "b")
    assert row["model_ref"] == f"{place / 'a'} + {place / 'b'}"
    wanted = by_hand(place, "a", "b").as_row()
    assert {name: row[name] for name in wanted} == wanted
    assert wanted != by_hand(place, "a", "a").as_row()
    with pytest.raises(SystemExit, match="2"):
        evaluate(place, tmp_path, "--text-model", str(place / "wide"), models=("a",), capsys=capsys)
    assert re.search(r"a has width 24 but the text model \S+wide has 16", capsys.readouterr().err)


def test_a_tower_without_texts_is_refused(place, tmp_path, capsys):
    torch.manual_seed(0)
    save_file(timm.create_model("resnet10t", pretrained=False).state_dict(), str(tmp_path / "r.safetensors"))
    ref = f"timm:resnet10t@{tmp_path / 'r.safetensors'}"
    with pytest.raises(SystemExit, match="2"):
        main(["eval", "retrieval", "--model", ref, "--data", f"{place}#test", "--out", str(tmp_path / "out")])
    assert "encodes no texts, which retrieval needs" in capsys.readouterr().err
    # Beside it the others are still shown.
    models = [str(place / "a"), ref]
    with pytest.raises(SystemExit, match="2"):
        main(["eval", "retrieval", "--model", *models, "--data", f"{place}#test", "--out", str(tmp_path), "--json"])
    printed = capsys.readouterr().out.strip().splitlines()
    rows = json.loads(printed[-1])["results"]
    assert [(row["model_ref"], row["status"]) for row in rows] == [(models[0], "ok"), (ref, "error")]
    assert any(line.startswith(models[0]) for line in printed)


def test_help_needs_no_torch_and_ends_with_two_examples():
    code = (
        f"import runpy, sys\nmodule = runpy.run_path({str(SCRIPT)!r})\n"
        "try:\n    module['main'](['--help'])\nexcept SystemExit:\n    pass\nassert 'torch' not in sys.modules"
    )
    text = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
    assert sum("vlkd eval retrieval" in line for line in text.split("examples:")[1].splitlines()) == 2
