"""Quality of an index: closed forms, ties, and the command that measures indexes of a model."""

from __future__ import annotations

import json

import faiss
import numpy as np
import pytest
import torch
from helpers.tiny_models import tiny_composite, tiny_images

from vlkd.cli.main import main
from vlkd.errors import UserError
from vlkd.retrieval.kinds import IndexSettings
from vlkd.retrieval.quality import (
    bytes_per_vector,
    exact_neighbours,
    measure_index,
    one_thread,
    recall,
    search_each,
    timed_build,
)


def vectors(n, seed=0, width=16):
    return np.random.default_rng(seed).normal(size=(n, width)).astype(np.float32)


def test_flat_finds_everything():
    index, seconds = timed_build(vectors(400), IndexSettings())
    quality = measure_index(index, vectors(30, 1) + 1, vectors(400), 10)
    assert (quality.recall, quality.self_recall) == (1, 1)
    assert 0 < quality.p50_ms <= quality.p99_ms
    assert seconds > 0
    assert len(quality.found) == 30


def test_bytes_of_one_more_vector_are_those_of_its_numbers_and_its_id():
    for settings, size in ((IndexSettings(), 16 * 4), (IndexSettings(storage="int8"), 16), (IndexSettings(dims=8), 32)):
        small, large = (timed_build(vectors(n), settings)[0] for n in (100, 300))
        assert bytes_per_vector(large) * 300 - bytes_per_vector(small) * 100 == pytest.approx(200 * (size + 8))


def test_recall_of_hand_made_lists():
    truth = exact_neighbours(torch.eye(3)[:1], torch.tensor([[1.0, 0, 0], [1, 1, 0], [0, 1, 0], [1, 1, 0]]), 2)
    assert truth.ids.tolist() == [[0, 1]]
    # Item 3 equals item 1 and is as good; item 2 is not; what comes after the first k does not count.
    for found, share in (([0, 1], 1), ([0, 3], 1), ([3, 1], 1), ([0, 2], 0.5), ([2], 0), ([2, 2, 0], 0), ([], 0)):
        assert recall([found], truth) == share


def test_all_equal_vectors_have_recall_one():
    index, _ = timed_build(np.ones((50, 4), np.float32), IndexSettings(kind="hnsw"))
    assert measure_index(index, np.ones((3, 4), np.float32), np.ones((50, 4), np.float32), 5).recall == 1


def test_recall_of_an_index_is_the_overlap_with_numpy():
    gallery, queries = vectors(500), vectors(20, 1) + 0.5
    index, _ = timed_build(gallery, IndexSettings(storage="binary"))
    best = np.argsort(-queries @ (gallery / np.linalg.norm(gallery, axis=1, keepdims=True)).T, axis=1)[:, :5]
    found, times = search_each(index, torch.from_numpy(queries), 5)
    overlap = np.mean([len({*f} & {*b}) / 5 for f, b in zip(found, best.tolist(), strict=True)])
    assert measure_index(index, queries, gallery, 5).recall == pytest.approx(overlap)
    assert times.shape == (20,)


def test_more_neighbours_than_items_and_other_galleries():
    index, _ = timed_build(vectors(5), IndexSettings())
    assert measure_index(index, vectors(2, 1), vectors(5), 10).recall == 1
    with pytest.raises(UserError, match="holds 5 items, the gallery 6"):
        measure_index(index, vectors(2, 1), vectors(6), 3)


def test_threads_are_given_back():
    before = faiss.omp_get_max_threads(), torch.get_num_threads()
    with one_thread():
        assert (faiss.omp_get_max_threads(), torch.get_num_threads()) == (1, 1)
    assert (faiss.omp_get_max_threads(), torch.get_num_threads()) == before


def test_the_command_measures_indexes_and_reranks(tmp_path, capsys):
    for seed, name in ((0, "student"), (5, "teacher")):
        tiny_composite(seed=seed, width=16).save(tmp_path / name)
    lines = []
    for i, image in enumerate(tiny_images(12)):
        image.save(tmp_path / f"{i}.png")
        lines.append(json.dumps({"image": f"{i}.png", "captions": [f"picture {i}", f"a photo of {i}"]}))
    (tmp_path / "pairs.jsonl").write_text("\n".join(lines))
    main(
        ["eval", "index_quality", "--model", str(tmp_path / "student"), "--data", str(tmp_path / "pairs.jsonl"),
         "--types", "flat", "hnsw", "ivf_pq", "--storage", "float32", "binary", "--dims", "8", "-k", "3",
         "--teacher", str(tmp_path / "teacher"), "--shortlist", "4", "50",
         "--out", str(tmp_path / "rows.jsonl"), "--json"]
    )  # fmt: skip
    out = capsys.readouterr().out
    rows = json.loads(out.splitlines()[-1])["results"]
    assert rows == [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    indexes = {row["index"]: row for row in rows if row["task"] == "index_quality"}
    assert list(indexes) == ["flat", "flat-binary", "flat-8", "flat-binary-8", "hnsw", "hnsw-8", "ivf_pq", "ivf_pq-8"]
    assert "256 to be trained" in indexes["ivf_pq"]["error"]
    flat = indexes["flat"]
    assert (flat["recall_text_queries"], flat["recall_image_queries"], flat["hit_loss"]) == (1, 1, 0)
    assert flat["queries"] == 24
    again = [row for row in rows if row["task"] == "rerank"]
    assert [(row["search"], row["teacher_calls"]) for row in again] == [
        ("student", 0), ("re-ranked", 4), ("re-ranked", 12), ("teacher", 12),
    ]  # fmt: skip
    assert again[0]["hit@3"] == flat["exact_hit"]
    assert again[2]["hit@3"] == again[3]["hit@3"]
    assert again[3]["teacher_recall@3"] == 1


def test_more_numbers_than_vectors_have_are_refused_before_anything_is_encoded(tmp_path, capsys, monkeypatch):
    tiny_composite(seed=0, width=16).save(tmp_path / "student")
    tiny_images(1)[0].save(tmp_path / "0.png")
    (tmp_path / "pairs.jsonl").write_text(json.dumps({"image": "0.png", "captions": ["one"]}))
    monkeypatch.setattr("vlkd.retrieval.encode.encode_pairs", lambda *_, **__: pytest.fail("encoded"))
    words = ["--model", str(tmp_path / "student"), "--data", str(tmp_path / "pairs.jsonl"), "--dims", "8", "17"]
    with pytest.raises(SystemExit) as stop:
        main(["eval", "index_quality", *words])
    assert stop.value.code == 2
    assert "--dims is 17, but vectors of" in capsys.readouterr().err
