"""`vlkd index` and `vlkd search` against the model's own cosines, computed here with numpy."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.tiny_models import tiny_composite, tiny_images
from PIL import Image

from vlkd.cli import index as index_verb
from vlkd.cli.main import main
from vlkd.data.items import item_paths, open_item
from vlkd.data.shards import RawSample, write_shards
from vlkd.data.sources import open_pairs
from vlkd.models.load import load
from vlkd.retrieval.index import SearchIndex
from vlkd.retrieval.kinds import KINDS, STORAGES

QUERIES = ("a blue circle", "two green triangles and a small yellow star")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "tiny"
    tiny_composite().save(folder)
    return folder


@pytest.fixture
def photos(tmp_path):
    folder = tmp_path / "photos"
    (folder / "more").mkdir(parents=True)
    for number, image in enumerate(tiny_images(6)):
        image.save(folder / ("more" if number > 3 else "") / f"{number}.png")
    return folder


def run(capsys, *words) -> str:
    main([str(word) for word in words])
    return capsys.readouterr().out


def run_json(capsys, *words) -> dict:
    return json.loads(run(capsys, *words, "--json").splitlines()[-1])


def refused(capsys, *words) -> str:
    with pytest.raises(SystemExit) as stop:
        main([str(word) for word in words])
    assert stop.value.code == 2
    sentence = capsys.readouterr().err.splitlines()[-1]
    assert sentence.startswith("vlkd: ")
    return sentence


def expected(model_folder: Path, paths: list[Path], query: np.ndarray) -> list[tuple[str, float]]:
    encoder = load(str(model_folder))
    images = encoder.encode_image([Image.open(path).convert("RGB") for path in paths]).numpy()
    cosines = images @ query / np.linalg.norm(images, axis=1) / np.linalg.norm(query)
    order = np.argsort(-cosines, kind="stable")
    return [(str(paths[i]), float(cosines[i])) for i in order]


@pytest.mark.parametrize("kind", ["flat", "hnsw", "ivf"])
def test_search_prints_what_the_cosines_say(kind, model, photos, tmp_path, capsys):
    built = run_json(capsys, "index", "--model", model, "--images", photos, "--out", tmp_path / "idx", "--type", kind)
    assert (built["items"], built["added"], built["kind"]) == (6, 6, kind)
    assert built["bytes"] == sum(path.stat().st_size for path in (tmp_path / "idx").iterdir())

    found = run_json(capsys, "search", tmp_path / "idx", *QUERIES, "-k", "4")
    assert [result["query"] for result in found["results"]] == list(QUERIES)
    paths = sorted(photos.rglob("*.png"))
    for result, vector in zip(found["results"], load(str(model)).encode_text(QUERIES).numpy(), strict=True):
        wanted = expected(model, paths, vector)[:4]
        assert [hit["path"] for hit in result["hits"]] == [path for path, _ in wanted]
        np.testing.assert_allclose([hit["score"] for hit in result["hits"]], [s for _, s in wanted], atol=1e-5)


def test_an_image_finds_itself_first_and_the_text_output_has_rank_score_and_path(model, photos, tmp_path, capsys):
    run(capsys, "index", "--model", model, "--images", photos, "--out", tmp_path / "idx")
    lines = run(capsys, "search", tmp_path / "idx", "--image", photos / "2.png", "-k", "2").splitlines()
    assert lines[0] == f"like {photos / '2.png'}"
    assert lines[1].split() == ["1", "1.000", str(photos / "2.png")]
    assert len(lines) == 3


def test_another_model_answers_when_it_is_named(model, photos, tmp_path, capsys):
    tiny_composite(seed=5).save(tmp_path / "other")
    run(capsys, "index", "--model", model, "--images", photos, "--out", tmp_path / "idx")
    hits = run_json(capsys, "search", tmp_path / "idx", QUERIES[0], "--model", tmp_path / "other")["results"][0]["hits"]
    vector = load(str(tmp_path / "other")).encode_text(QUERIES[:1]).numpy()[0]
    wanted = expected(model, sorted(photos.rglob("*.png")), vector)
    np.testing.assert_allclose([hit["score"] for hit in hits], [score for _, score in wanted], atol=1e-5)


def test_adding_and_removing_keeps_ids(model, photos, tmp_path, capsys):
    out = tmp_path / "idx"
    run(capsys, "index", "--model", model, "--images", photos / "more", "--out", out)
    first = SearchIndex.load(out).items
    assert first == {0: str(photos / "more" / "4.png"), 1: str(photos / "more" / "5.png")}

    added = run_json(capsys, "index", "--images", photos, "--out", out, "--add")
    assert (added["added"], added["already_there"], added["items"]) == (4, 2, 6)
    grown = SearchIndex.load(out).items
    assert {number: grown[number] for number in first} == first

    removed = run_json(capsys, "index", "--out", out, "--remove", "0", photos / "1.png")
    assert (removed["removed"], removed["items"]) == (2, 4)
    left = SearchIndex.load(out).items
    assert left == {n: path for n, path in grown.items() if n != 0 and path != str(photos / "1.png")}

    back = run_json(capsys, "index", "--images", photos, "--out", out, "--add", "--type", "hnsw")
    assert (back["added"], back["kind"]) == (2, "hnsw")
    assert sorted(set(SearchIndex.load(out).items) - set(left)) == [6, 7]


def test_unreadable_images_are_listed_and_left_out(model, photos, tmp_path, capsys):
    (photos / "broken.png").write_bytes(b"no picture")
    main(["index", "--model", str(model), "--images", str(photos), "--out", str(tmp_path / "idx"), "--json"])
    captured = capsys.readouterr()
    figures = json.loads(captured.out.splitlines()[-1])
    assert figures["items"] == 6
    assert [path for path, _ in figures["unreadable"]] == [str(photos / "broken.png")]
    assert f"unreadable: {photos / 'broken.png'}: " in captured.err


def test_items_of_shards_are_found_again(model, photos, tmp_path, capsys):
    samples = [
        RawSample(key=f"scene{i}", image=path.read_bytes(), extension="png", captions=("a red dog",))
        for i, path in enumerate(sorted(photos.rglob("*.png")))
    ]
    write_shards(samples, tmp_path / "shards")
    shard = next((tmp_path / "shards").glob("*.tar"))
    run(capsys, "index", "--model", model, "--images", tmp_path / "shards", "--out", tmp_path / "idx")
    assert list(SearchIndex.load(tmp_path / "idx").items.values()) == [f"{shard}/scene{i}" for i in range(6)]

    pairs = open_pairs(str(tmp_path / "shards"))
    for i, item in enumerate(item_paths(pairs)):
        np.testing.assert_array_equal(np.asarray(open_item(item)), np.asarray(pairs.image(i)))

    run(capsys, "search", tmp_path / "idx", *QUERIES, "-k", "3", "--gallery", tmp_path / "found.html",
        "--contact-sheet", tmp_path / "found.png")  # fmt: skip
    page = (tmp_path / "found.html").read_text()
    assert page.count("data:image/jpeg;base64,") == 6
    assert all(query in page for query in QUERIES)
    with Image.open(tmp_path / "found.png") as sheet:
        assert sheet.size[0] > 3 * 128
        assert sheet.size[1] > 2 * 128


def test_a_gone_image_leaves_a_grey_place(model, photos, tmp_path, capsys):
    run(capsys, "index", "--model", model, "--images", photos, "--out", tmp_path / "idx")
    (photos / "0.png").unlink()
    main(["search", str(tmp_path / "idx"), "a blue circle", "--gallery", str(tmp_path / "found.html")])
    assert "no thumbnail: There is no file" in capsys.readouterr().err
    assert (tmp_path / "found.html").read_text().count("data:image/jpeg;base64,") == 6


def test_index_refuses_in_one_sentence(model, photos, tmp_path, capsys):
    out = tmp_path / "idx"
    assert "--model" in refused(capsys, "index", "--images", photos, "--out", out)
    assert "--images" in refused(capsys, "index", "--model", model, "--out", out)
    assert "nothing at" in refused(capsys, "index", "--model", model, "--images", tmp_path / "gone", "--out", out)
    assert "Found no model" in refused(capsys, "index", "--model", "nobody", "--images", photos, "--out", out)
    assert not out.exists()
    (tmp_path / "empty").mkdir()
    assert "no usable image" in refused(capsys, "index", "--model", model, "--images", tmp_path / "empty", "--out", out)
    run(capsys, "index", "--model", model, "--images", photos, "--out", out)
    assert "exists" in refused(capsys, "index", "--model", model, "--images", photos, "--out", out)
    assert "not in the index" in refused(capsys, "index", "--out", out, "--remove", "99")
    assert "do not compare" in refused(
        capsys, "index", "--model", "hf:other", "--images", photos, "--out", out, "--add"
    )
    assert len(SearchIndex.load(out)) == 6


def test_search_refuses_in_one_sentence(model, photos, tmp_path, capsys):
    out = tmp_path / "idx"
    assert "no index.json" in refused(capsys, "search", out, "a dog")
    run(capsys, "index", "--model", model, "--images", photos, "--out", out)
    assert "Nothing is asked" in refused(capsys, "search", out)
    assert "empty" in refused(capsys, "search", out, " ")
    assert "-k is 0" in refused(capsys, "search", out, "a dog", "-k", "0")
    assert "There is no file" in refused(capsys, "search", out, "--image", tmp_path / "gone.jpg")
    assert "does not exist" in refused(capsys, "search", out, "a dog", "--gallery", tmp_path / "gone" / "x.html")
    tiny_composite(width=40).save(tmp_path / "wide")
    assert "width 40" in refused(capsys, "search", out, "a dog", "--model", tmp_path / "wide")


def test_the_help_names_every_kind():
    assert tuple(index_verb.KINDS[1:]) == KINDS
    assert index_verb.STORAGES == STORAGES


def test_auto_says_why_and_small_vectors_say_what_they_are(model, photos, tmp_path, capsys):
    words = ("index", "--model", model, "--images", photos, "--out")
    out = run(capsys, *words, tmp_path / "idx")
    assert "few enough to compare every one" in out.splitlines()[0]
    assert "approximate" not in out
    out = run(capsys, *words, tmp_path / "small", "--dims", "8", "--storage", "int8")
    assert f"Kept of each vector: 8 of {load(str(model)).width} numbers as int8" in out
    built = SearchIndex.load(tmp_path / "small")
    assert (built.settings.kind, built.settings.dims, built.settings.storage) == ("flat", 8, "int8")
    assert len(run_json(capsys, "search", tmp_path / "small", QUERIES[0])["results"][0]["hits"]) == 6
    assert "does not hold its vectors whole" in refused(
        capsys, "index", "--out", tmp_path / "small", "--remove", "0", "--type", "hnsw"
    )
    changed = run_json(capsys, "index", "--out", tmp_path / "idx", "--remove", "0", "--storage", "binary")
    assert (changed["items"], changed["storage"]) == (5, "binary")
    assert "stores no int8" in refused(capsys, *words, tmp_path / "no", "--type", "hnsw", "--storage", "int8")
    assert "256 to be trained" in refused(capsys, *words, tmp_path / "no", "--type", "ivf_pq")
    run(capsys, *words, tmp_path / "graph", "--type", "hnsw")
    back = run_json(capsys, "index", "--out", tmp_path / "graph", "--remove", "1", "--type", "auto")
    assert (back["kind"], back["items"]) == ("flat", 5)
    assert "few enough" in back["why"]


def test_a_teacher_puts_the_shortlist_in_its_order(model, photos, tmp_path, capsys):
    tiny_composite(seed=5, width=40).save(tmp_path / "teacher")
    run(capsys, "index", "--model", model, "--images", photos, "--out", tmp_path / "idx")
    words = ("search", tmp_path / "idx", QUERIES[0], "--rerank", tmp_path / "teacher")
    wanted = run_json(capsys, "search", tmp_path / "idx", QUERIES[0], "-k", "4")["results"][0]["hits"]
    short = {hit["path"] for hit in wanted}
    vector = load(str(tmp_path / "teacher")).encode_text(QUERIES[:1]).numpy()[0]
    by_teacher = expected(tmp_path / "teacher", sorted(photos.rglob("*.png")), vector)
    for extra, order in (
        (("--shortlist", "4"), [p for p, _ in by_teacher if p in short]),
        ((), [p for p, _ in by_teacher]),
    ):
        found = run_json(capsys, *words, "-k", "3", *extra)
        assert [hit["path"] for hit in found["results"][0]["hits"]] == order[:3]
        scores = dict(by_teacher)
        np.testing.assert_allclose(
            [hit["score"] for hit in found["results"][0]["hits"]], [scores[p] for p in order[:3]], atol=1e-5
        )
    first = run_json(capsys, "search", tmp_path / "idx", "--image", photos / "2.png", "--rerank", tmp_path / "teacher")
    assert first["results"][0]["hits"][0]["path"] == str(photos / "2.png")
    (photos / "0.png").unlink()
    found = run_json(capsys, *words)
    assert (found["not_reranked"], len(found["results"][0]["hits"])) == (1, 5)
    assert "--shortlist is 2" in refused(capsys, *words, "--shortlist", "2")


def test_an_index_of_a_model_that_was_trained_on_since_is_refused(tmp_path, photos, capsys):
    folder = tmp_path / "student"
    tiny_composite().save(folder)
    run(capsys, "index", "--model", folder, "--images", photos, "--out", tmp_path / "idx")
    other = tiny_composite()
    with torch.no_grad():
        next(other.image_tower.parameters()).add_(0.5)
    other.save(folder)
    assert "other weights than when the index was built" in refused(capsys, "search", tmp_path / "idx", QUERIES[0])
    assert run_json(capsys, "search", tmp_path / "idx", QUERIES[0], "--model", folder)["results"]
