"""Golden embeddings: passed by the same model, refused after tampering."""

from __future__ import annotations

import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from helpers.tiny_models import tiny_composite
from safetensors.torch import load_file, save_file

from vlkd.errors import UserError
from vlkd.models.golden import check_golden, probe_images
from vlkd.models.load import load


@pytest.fixture
def folder(tmp_path):
    tiny_composite().save(tmp_path / "model", golden=True)
    return tmp_path / "model"


def test_an_untouched_model_passes_in_another_process(folder):
    code = f"import vlkd; print(vlkd.load({str(folder)!r}).width)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "24"


@pytest.mark.parametrize("key", ["image_tower.conv1.0.weight", "text_tower.token_embedding.weight"])
def test_changed_weights_are_refused(folder, key):
    weights = load_file(folder / "model.safetensors")
    weights[key] = weights[key] * 1.05
    save_file(weights, folder / "model.safetensors")
    with pytest.raises(UserError, match=f"{key.partition('_')[0]}.embed of the golden inputs differs"):
        load(str(folder))


def test_changed_preprocessing_is_refused(folder):
    layout = json.loads((folder / "model.json").read_text())
    layout["preprocessing"]["mean"] = [0.5, 0.5, 0.5]
    (folder / "model.json").write_text(json.dumps(layout))
    with pytest.raises(UserError, match="differs by"):
        load(str(folder))


def test_the_message_names_changed_versions(folder, monkeypatch):
    monkeypatch.setattr("vlkd.models.golden.installed_version", lambda name: "99" if name == "timm" else "1")
    model = tiny_composite(seed=1)
    with pytest.raises(UserError, match=r"timm \S+ then, 99 now"):
        check_golden(model, folder)


def test_nan_and_other_widths_are_refused(folder):
    model = tiny_composite()
    with torch.no_grad():
        model.image_projection[0].weight.fill_(float("nan"))
    with pytest.raises(UserError, match="differs by nan"):
        check_golden(model, folder)
    with pytest.raises(UserError, match="differs by inf"):
        check_golden(tiny_composite(width=12), folder)


def test_a_damaged_file_is_refused(folder):
    (folder / "golden.safetensors").write_bytes(b"cut")
    with pytest.raises(UserError, match="damaged"):
        load(str(folder))


def test_probe_images_are_fixed():
    sums = [int(np.asarray(image, dtype=np.int64).sum()) for image in probe_images()]
    assert [image.size for image in probe_images()] == [(320, 240), (180, 300)]
    assert sums == [27760009, 19011967]
