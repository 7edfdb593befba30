"""Encoding of a data set and the `eval retrieval` command, with a model and pairs made of numbers."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from PIL import Image

from vlkd.errors import UserError
from vlkd.retrieval.encode import encode_images, encode_pairs, encode_texts

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


@pytest.fixture
def command(monkeypatch):
    """The command's module, reading `numbered` pairs and models called right, off or wide."""
    spec = importlib.util.spec_from_file_location("eval_retrieval_under_test", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    sources, load = ModuleType("vlkd.data.sources"), ModuleType("vlkd.models.load")
    sources.open_pairs = lambda ref: numbered(12, broken=(4,))
    load.load = lambda ref: {"right": Model(), "off": Model(shift=-1.25), "wide": Model(width=3)}[ref]
    monkeypatch.setitem(sys.modules, "vlkd.data.sources", sources)
    monkeypatch.setitem(sys.modules, "vlkd.models.load", load)
    return module


def test_command_appends_one_strict_line_per_model(command, tmp_path, capsys):
    out = tmp_path / "new" / "results.jsonl"
    for _ in range(2):
        command.main(["--model", "right", "off", "--data", "x#test", "--out", str(out), "--json"])
    rows = [json.loads(line, parse_constant=pytest.fail) for line in out.read_text().splitlines()]
    assert [row["model"] for row in rows] == ["right", "off"] * 2
    printed = capsys.readouterr().out.splitlines()
    assert json.loads(printed[-1])["results"] == rows[:2] == rows[2:]
    right, off = rows[:2]
    assert (right["images"], right["captions"], right["unreadable_images"]) == (11, 22, 1)
    assert right["left_out_samples"] == 1
    assert right["mean_hit@1"] == right["image_to_text_mAP@R"] == 1.0
    assert right["rsum"] == 600
    # Captions lie 1.25 below their image: only the last image has its own nearest, and only the captions of 0 find it.
    assert off["image_to_text_hit@1"] == pytest.approx(1 / 11)
    assert off["text_to_image_hit@1"] == pytest.approx(2 / 22)
    low, high = off["mean_hit@1_gain_interval"]
    assert -1 <= low < high < -0.5
    assert off["mean_hit@1_interval"][0] <= off["mean_hit@1"] <= off["mean_hit@1_interval"][1]
    assert "11 images x 22 captions" in printed[0]
    assert "gain over right" in printed[3]


def test_another_text_model_encodes_the_captions(command, capsys):
    command.main(["--model", "right", "--text-model", "off", "--data", "x", "--json"])
    row = json.loads(capsys.readouterr().out.splitlines()[-1])["results"][0]
    assert row["text_model"] == "off"
    assert row["image_to_text_hit@1"] == pytest.approx(1 / 11)
    with pytest.raises(UserError, match="right has width 2 but the text model wide has 3"):
        command.main(["--model", "right", "--text-model", "wide", "--data", "x"])


def test_help_needs_no_torch_and_ends_with_two_examples():
    code = (
        f"import runpy, sys\nmodule = runpy.run_path({str(SCRIPT)!r})\n"
        "try:\n    module['main'](['--help'])\nexcept SystemExit:\n    pass\nassert 'torch' not in sys.modules"
    )
    text = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
    assert sum("vlkd eval retrieval" in line for line in text.split("examples:")[1].splitlines()) == 2
