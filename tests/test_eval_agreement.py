"""The `eval agreement` command on tiny models, drawn folders and captions."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest
from helpers.tiny_models import CAPTIONS, tiny_composite, tiny_images

from vlkd.errors import UserError
from vlkd.models.load import load

SCRIPT = Path(__file__).parents[1] / "eval" / "agreement.py"


@pytest.fixture
def command():
    spec = importlib.util.spec_from_file_location("eval_agreement_under_test", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def refs(tmp_path):
    for seed in (0, 1):
        tiny_composite(seed=seed).save(tmp_path / f"m{seed}")
    return [str(tmp_path / f"m{seed}") for seed in (0, 1)]


@pytest.fixture
def captioned(tmp_path):
    """Four images, the first with two captions."""
    images = tiny_images(4)
    lines = []
    for i, image in enumerate(images):
        image.save(tmp_path / f"{i}.png")
        lines.append(json.dumps({"image": f"{i}.png", "captions": CAPTIONS[i : i + 1] if i else list(CAPTIONS[:5:4])}))
    (tmp_path / "captions.jsonl").write_text("\n".join(lines) + "\n")
    return str(tmp_path / "captions.jsonl"), images, [CAPTIONS[0], CAPTIONS[4], *CAPTIONS[1:4]]


def run(command, capsys, teacher, students, data, *words):
    command.main(["--teacher", teacher, "--model", *students, "--data", data, "--json", *words])
    printed = capsys.readouterr().out.splitlines()
    return printed, json.loads(printed[-1], parse_constant=pytest.fail)["results"]


def test_captions_are_the_candidates_of_retrieval(command, refs, captioned, capsys):
    path, images, captions = captioned
    printed, rows = run(command, capsys, refs[0], refs, path, "-k", "2")
    itself, other = rows
    assert itself["metrics"] == pytest.approx(
        {"top1_agreement": 1, "top2_overlap": 1, "kl": 0, "kendall_tau": 1, "cka": 1, "retention": 1}, abs=1e-5
    )
    assert other["counts"] == {"images": 4, "candidates": 5}
    best = []
    for ref in refs:
        model = load(ref)
        image, text = (model.encode_image(images, normalize=True), model.encode_text(captions, normalize=True))
        best.append((image @ text.T).argmax(dim=1).numpy())
    assert other["metrics"]["top1_agreement"] == np.mean(best[0] == best[1])
    assert other["notes"]["teacher_logit_scale"] == pytest.approx(load(refs[0]).scale_features()["logit_scale"].item())
    assert "4 images x 5 candidates" in printed[0]
    assert len(printed) == 5


def test_classes_are_the_candidates_of_classification(command, refs, tmp_path, capsys):
    for i, image in enumerate(tiny_images(6)):
        folder = tmp_path / "set" / "test" / ("cat", "dog", "star")[i % 3]
        folder.mkdir(parents=True, exist_ok=True)
        image.save(folder / f"{i}.png")
    _, rows = run(command, capsys, refs[0], refs[1:], f"{tmp_path / 'set'}#test")
    row = rows[0]
    assert (row["kind"], row["counts"], row["random_score"]) == (
        "classification", {"images": 6, "candidates": 3}, pytest.approx(1 / 3),
    )  # fmt: skip
    assert "top5_overlap" not in row["metrics"]
    if row["teacher_score"]:
        assert row["metrics"]["retention"] == row["student_score"] / row["teacher_score"]


def test_a_student_that_cannot_be_loaded_takes_no_other_away(command, refs, captioned, capsys):
    (Path(refs[1]) / "model.safetensors").write_bytes(b"no weights")
    words = ["--teacher", refs[0], "--model", refs[1], refs[0], "--data", captioned[0], "--json"]
    with pytest.raises(UserError, match=r"m1 was left out: .*model\.safetensors"):
        command.main(words)
    (row,) = json.loads(capsys.readouterr().out.splitlines()[-1])["results"]
    assert row["model"] == refs[0]


def test_selections_are_refused(command, refs):
    with pytest.raises(UserError, match="x is a set for selection"):
        command.check_kind(type("Set", (), {"kind": "selection"})(), "x")
