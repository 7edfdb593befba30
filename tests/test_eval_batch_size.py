"""`vlkd eval batch_size` with a model that turns every embedding by a known angle for each item of its batch."""

from __future__ import annotations

import io
import json
import re

import numpy as np
import pytest
import torch
from helpers.tiny_models import tiny_composite
from PIL import Image

from vlkd.cli.main import main
from vlkd.data.shards import RawSample, write_shards

TURN = 0.012
GAP = np.cos(TURN) - np.cos(0.1 - TURN)
"""At batch size 1, between the cosines of an image with its own text and with that of the next number."""


class Turning:
    """Number n lies at n / 10; an image's angle grows by `turn` for each image of its batch."""

    def __init__(self, turn):
        self.turn = turn

    def place(self, numbers, turn=0.0):
        angle = torch.tensor(numbers, dtype=torch.float64) / 10 + turn
        return torch.stack([angle.cos(), angle.sin()], 1)

    def encode_image(self, images, *, batch_size=64):
        assert len(images) <= batch_size
        return self.place([image.getpixel((0, 0))[0] for image in images], self.turn * len(images))

    def encode_text(self, texts, *, batch_size=256):
        return self.place([int(re.search(r"\d+", text)[0]) for text in texts])


def png(number):
    with io.BytesIO() as stream:
        Image.new("RGB", (4, 4), (number, number, number)).save(stream, "PNG")
        return stream.getvalue()


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    samples = [
        RawSample(key=f"k{n}", image=png(n), extension="png", captions=(f"number {n}",), extra={}) for n in range(10)
    ]
    place = tmp_path_factory.mktemp("data") / "pairs"
    write_shards(samples, place)
    return str(place)


@pytest.fixture
def run(monkeypatch, capsys):
    """The command with a `Turning` model: its exit code, row, printed lines, and what stands on stderr."""

    def call(data, *words, turn=TURN):
        monkeypatch.setattr("vlkd.models.load.load", lambda ref, device: Turning(turn))
        code = 0
        try:
            main(["eval", "batch_size", "--model", "m", "--data", data, "--json", *words])
        except SystemExit as end:
            code = end.code
        out, err = capsys.readouterr()
        lines = out.strip().splitlines()
        row = json.loads(lines[-1], parse_constant=pytest.fail)["results"][0] if lines else None
        return code, row, lines[:-1], err

    return call


def difference(batches):
    """Of the entries of unit vectors, by which the batches moved number n from where a batch of one puts it."""
    angle = np.arange(len(batches)) / 10
    now, was = angle + TURN * np.array(batches), angle + TURN
    return max(np.abs(np.cos(now) - np.cos(was)).max(), np.abs(np.sin(now) - np.sin(was)).max())


def test_every_changed_rank_is_listed(pairs, run):
    code, row, printed, err = run(pairs, "--sizes", "1", "3", "7")
    assert (row["images"], row["texts"], row["kind"]) == (10, 10, "retrieval")
    three, seven = row["pairs"]
    assert (three["sizes"], seven["sizes"]) == ([1, 3], [1, 7])
    # Seven images turn by 0.084, nearer to the next caption; the last three by 0.036, nearer to their own.
    assert three["image_difference"] == pytest.approx(difference([3] * 9 + [1]), abs=1e-6)
    assert three["changed_ranks"] == []
    assert seven["image_difference"] == pytest.approx(difference([7] * 7 + [3] * 3), abs=1e-6)
    assert seven["text_difference"] == 0
    listed = {(one["direction"], one["query"]): one for one in seven["changed_ranks"]}
    assert set(listed) == {("image_to_text", f"k{n}") for n in range(7)} | {
        ("text_to_image", f"number {n}") for n in range(1, 8)
    }
    assert len(listed) == len(seven["changed_ranks"])
    for one in listed.values():
        assert (one["rank_before"], one["rank_after"]) == (1, 2)
        assert one["gap"] == pytest.approx(GAP, abs=1e-6)
    assert sum("rank 1 became 2" in line for line in printed) == 14
    assert code == 2
    assert not row["within"]
    assert f"differ by up to {difference([7] * 7 + [3] * 3):.1e} between batch sizes; expected at most 1e-05" in err


@pytest.mark.parametrize(("turn", "code"), [(0.0, 0), (1.4e-6, 0), (2.2e-6, 2)])
def test_the_tolerance_is_1e_5(pairs, run, turn, code):
    """Six more images in a batch turn by 8.4e-6 and 1.32e-5; the last numbers lie where the cosine moves 0.8 of it."""
    found, row, _, _ = run(pairs, "--sizes", "1", "7", turn=turn)
    assert found == code
    assert row["within"] is row["pairs"][0]["within"] is (code == 0)
    assert row["pairs"][0]["changed_ranks"] == []


def test_only_the_first_images(pairs, run):
    _, row, _, _ = run(pairs, "--images", "4", "--sizes", "1", "7")
    assert (row["images"], row["texts"]) == (4, 4)
    assert row["pairs"][0]["image_difference"] == pytest.approx(difference([4] * 4), abs=1e-6)


def test_changed_predictions_of_class_folders(run, tmp_path):
    for n in range(10):
        (tmp_path / "test" / str(n)).mkdir(parents=True)
        (tmp_path / "test" / str(n) / "one.png").write_bytes(png(n))
    code, row, printed, _ = run(f"{tmp_path}#test", "--sizes", "1", "7")
    assert code == 2
    assert (row["kind"], row["images"], row["texts"]) == ("classification", 10, 10)
    changed = row["pairs"][0]["changed_predictions"]
    assert [(one["image"], one["before"], one["after"]) for one in changed] == [
        (f"{n}/one.png", str(n), str(n + 1)) for n in range(7)
    ]
    np.testing.assert_allclose([one["gap"] for one in changed], GAP, atol=1e-6)
    assert "7 changed predictions" in printed[1]


def test_a_real_model_keeps_the_tolerance(pairs, tmp_path, capsys):
    tiny_composite().save(tmp_path / "m")
    main(["eval", "batch_size", "--model", str(tmp_path / "m"), "--data", pairs, "--json"])
    row = json.loads(capsys.readouterr().out.strip().splitlines()[-1])["results"][0]
    assert row["within"] is True
    assert [pair["sizes"] for pair in row["pairs"]] == [[1, 7], [1, 64]]


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--sizes", "1"], "expected two or more batch sizes, each once"),
        (["--sizes", "1", "7", "7"], "expected two or more batch sizes, each once"),
        (["--sizes", "0", "7"], "--sizes is 0; expected 1 or more"),
        (["--images", "-1"], "--images is -1; expected 0 or more"),
    ],
)
def test_bad_numbers_are_refused(pairs, run, words, sentence):
    code, _, _, err = run(pairs, *words)
    assert code == 2
    assert sentence in err
