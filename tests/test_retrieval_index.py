"""The FAISS index against brute force, through additions, removals, kills and damaged folders."""

from __future__ import annotations

import json
import math
from pathlib import Path

import faiss
import numpy as np
import pytest

from vlkd.errors import UserError
from vlkd.retrieval.folder import read_description
from vlkd.retrieval.index import SearchIndex
from vlkd.retrieval.kinds import IndexSettings
from vlkd.retrieval.search import topk

KINDS = ("flat", "hnsw", "ivf")
"""Those that hold their vectors whole."""
SMALL = (
    {"storage": "int8"}, {"storage": "binary"}, {"dims": 8}, {"kind": "hnsw", "dims": 8}, {"kind": "ivf_pq"},
    {"storage": "int8", "dims": 8},
)  # fmt: skip


def vectors(n, seed=0, width=16):
    return np.random.default_rng(seed).normal(size=(n, width)).astype(np.float32)


def names(numbers):
    return [f"photos/{i:04d}.jpg" for i in numbers]


def unit(x):
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def built(kind, n=300, **settings):
    return SearchIndex.build(vectors(n), names(range(n)), model="m", settings=IndexSettings(kind=kind, **settings))


def test_flat_equals_brute_force():
    queries = vectors(20, 1)
    index = built("flat")
    scores, ids = topk(queries, vectors(300), 10)
    for i, query in enumerate(queries):
        hits = index.search(query, 10)
        assert [hit.id for hit in hits] == ids[i].tolist()
        assert [hit.score for hit in hits] == pytest.approx(scores[i].tolist(), abs=1e-6)
        assert [hit.path for hit in hits] == names(ids[i].tolist())


@pytest.mark.parametrize("kind", KINDS)
def test_add_remove_save_load_search(kind, tmp_path):
    index = built(kind)
    assert index.add(vectors(20, 2), names(range(300, 320))) == list(range(300, 320))
    gone = [3, 100, 310]
    assert index.remove([3, "photos/0100.jpg", 310]) == 3
    index.save(tmp_path / "idx")
    everything = np.concatenate([vectors(300), vectors(20, 2)])
    live = [i for i in range(320) if i not in gone]
    for held in (index, SearchIndex.load(tmp_path / "idx")):
        assert len(held) == 317
        assert list(held.items) == live
        assert np.allclose(held.vectors(), unit(everything[live]), atol=1e-6)
        for i in live[::7]:
            hit = held.search(everything[i], 1)[0]
            assert (hit.id, hit.path) == (i, f"photos/{i:04d}.jpg")
            assert hit.score == pytest.approx(1, abs=1e-5)
        for i in gone:
            assert i not in [hit.id for hit in held.search(everything[i], 317)]
        # Ids are never used twice, and a removed path may come back.
        assert held.add(everything[[3]], ["photos/0003.jpg"]) == [320]
        assert held.search(everything[3], 1)[0].id == 320


@pytest.mark.parametrize("kind", KINDS)
def test_more_than_all_returns_all_without_padding(kind):
    index = built(kind, 120, ivf_probes=1, hnsw_search_effort=1)
    index.remove(range(10))
    hits = index.search(vectors(1, 3)[0], 1000)
    assert sorted(hit.id for hit in hits) == list(range(10, 120))
    scores = unit(vectors(120)) @ unit(vectors(1, 3))[0]
    assert [hit.score for hit in hits] == pytest.approx([scores[hit.id] for hit in hits], abs=1e-6)
    assert [hit.score for hit in hits] == sorted((hit.score for hit in hits), reverse=True)


@pytest.mark.parametrize("kind", ["hnsw", "ivf"])
def test_approximate_kinds_find_most_neighbours_of_another_distribution(kind):
    queries = vectors(40, 4) + 0.5
    index, exact = built(kind, 2000), built("flat", 2000)
    agreed = [
        len({hit.id for hit in index.search(query, 10)} & {hit.id for hit in exact.search(query, 10)}) / 10
        for query in queries
    ]
    assert np.mean(agreed) > (0.95 if kind == "hnsw" else 0.5)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("k", [1, 3, 5, 50])
def test_equal_vectors_come_in_the_order_of_their_ids(kind, k):
    x = vectors(60)
    x[20:40] = x[20]
    index = SearchIndex.build(x, names(range(60)), model="m", settings=IndexSettings(kind=kind))
    expected = topk(x[[20]], x, k)[1][0].tolist()
    assert [hit.id for hit in index.search(x[20], k)] == expected


def test_hnsw_removal_hides_first_and_rebuilds_past_a_fifth():
    index = built("hnsw", 200)
    index.remove(range(40))
    assert index._index.ntotal == 200
    index.remove([40])
    assert index._index.ntotal == len(index) == 159
    assert index.search(vectors(200)[41], 1)[0].id == 41


def test_rebuild_as_another_kind_keeps_ids_and_vectors():
    index = built("flat")
    index.remove([5])
    for kind in ("hnsw", "ivf", "flat"):
        index = index.rebuild(IndexSettings(kind=kind))
        assert index.settings.kind == kind
        assert [index.search(vectors(300)[i], 1)[0].id for i in (0, 150, 299)] == [0, 150, 299]
    assert np.allclose(index.vectors(), unit(vectors(300)[[i for i in range(300) if i != 5]]), atol=1e-6)
    assert index.add(vectors(1, 5), ["new"]) == [300]


@pytest.mark.parametrize("kind", KINDS)
def test_everything_can_be_removed_and_saved(kind, tmp_path):
    index = built(kind, 50)
    index.remove(range(50))
    index.save(tmp_path / "idx")
    index = SearchIndex.load(tmp_path / "idx")
    assert index.search(vectors(1)[0], 5) == []
    index.add(vectors(50)[:2], ["a", "b"])
    assert [hit.path for hit in index.search(vectors(50)[1], 1)] == ["b"]


@pytest.mark.parametrize("settings", SMALL, ids=lambda s: IndexSettings(**s).name)
def test_small_vectors_through_add_remove_save_load(settings, tmp_path):
    x = vectors(600)
    index = SearchIndex.build(x, names(range(600)), model="m", settings=IndexSettings(**settings))
    assert index.add(vectors(5, 2), names(range(600, 605))) == list(range(600, 605))
    index.remove([3, "photos/0100.jpg"])
    index.save(tmp_path / "idx")
    loaded = SearchIndex.load(tmp_path / "idx")
    assert (loaded.width, loaded.settings, len(loaded)) == (16, IndexSettings(**settings), 603)
    for held in (index, loaded):
        assert held.search(vectors(5, 2)[4], 1)[0].id == 604
        assert {3, 100}.isdisjoint(hit.id for hit in held.search(x[3], 50))
        assert np.allclose(np.linalg.norm(held.vectors(), axis=1), 1, atol=1e-5)
        with pytest.raises(UserError, match="does not hold its vectors whole"):
            held.rebuild(IndexSettings(kind="ivf"))
    assert loaded.add(x[[3]], ["back"]) == [605]
    with pytest.raises(UserError, match="expected vectors of width 16, found 8"):
        loaded.search(x[0, :8], 1)


def test_fewer_dims_are_the_cosine_of_what_is_kept():
    x, query = vectors(300), vectors(1, 1)[0]
    hits = SearchIndex.build(x, names(range(300)), model="m", settings=IndexSettings(dims=8)).search(query, 10)
    scores = unit(x[:, :8]) @ unit(query[:8])
    assert [hit.id for hit in hits] == np.argsort(-scores)[:10].tolist()
    assert [hit.score for hit in hits] == pytest.approx(np.sort(scores)[::-1][:10].tolist(), abs=1e-6)


def test_binary_counts_equal_signs():
    x, query = vectors(300), vectors(1, 1)[0]
    hits = SearchIndex.build(x, names(range(300)), model="m", settings=IndexSettings(storage="binary")).search(
        query, 10
    )
    different = ((x >= 0) != (query >= 0)).sum(1)
    assert [hit.id for hit in hits] == np.argsort(different, kind="stable")[:10].tolist()
    assert [hit.score for hit in hits] == pytest.approx(np.cos(math.pi * np.sort(different)[:10] / 16).tolist())


def test_int8_stays_near_the_cosine_also_for_vectors_added_to_a_few():
    x, query = vectors(300, width=64), vectors(1, 1, width=64)[0]
    index = SearchIndex.build(x[:2], ["a", "b"], model="m", settings=IndexSettings(storage="int8"))
    index.add(x[2:], names(range(2, 300)))
    hits = index.search(query, 300)
    scores = unit(x) @ unit(query)
    assert np.abs([hit.score - scores[hit.id] for hit in hits]).max() < 0.01


def test_a_flat_index_becomes_small(tmp_path):
    sizes = []
    for settings in ({}, {"storage": "int8"}, {"storage": "binary"}, {"kind": "ivf_pq"}):
        built("flat", 300).rebuild(IndexSettings(**settings)).save(tmp_path / "idx")
        sizes.append((tmp_path / "idx" / "index.faiss").stat().st_size)
    ids = 300 * 8
    assert sizes[0] - sizes[1] > 300 * 16 * 3 - 500
    assert sizes[2] < ids + 300 * 2 + 500


def test_a_folder_of_the_first_version_is_read(tmp_path):
    place = tmp_path / "idx"
    built("hnsw", 30, hnsw_search_effort=77).save(place)
    about = json.loads((place / "index.json").read_text())
    assert about["format_version"] == 2
    for name in ("dims", "storage", "pq_bytes"):
        del about["settings"][name]
    (place / "index.json").write_text(json.dumps(about | {"format_version": 1}))
    index = SearchIndex.load(place)
    assert index.settings == IndexSettings(kind="hnsw", hnsw_search_effort=77)
    assert index.search(vectors(30)[7], 1)[0].id == 7


def test_description_says_what_is_inside(tmp_path):
    built("ivf").save(tmp_path / "idx")
    about = json.loads((tmp_path / "idx" / "index.json").read_text())
    assert (about["model"], about["count"], about["width"], about["settings"]["kind"]) == ("m", 300, 16, "ivf")
    assert about["versions"]["faiss"] == faiss.__version__
    assert {path.name for path in tmp_path.iterdir()} == {"idx"}
    assert {path.name for path in (tmp_path / "idx").iterdir()} == {"index.faiss", "items.jsonl", "index.json"}


class Killed(BaseException):
    """Stands for the end of the process: no handler of ours may catch it."""


@pytest.mark.parametrize("moment", range(5))
def test_a_killed_save_leaves_a_whole_index(moment, tmp_path, monkeypatch):
    place = tmp_path / "idx"
    built("flat", 30).save(place)
    bigger = built("flat", 40)

    def die(*args, **kwargs):
        raise Killed

    rename = Path.rename

    def die_at_second_rename(path, target):
        if path.name.endswith("saving"):
            raise Killed
        return rename(path, target)

    with monkeypatch.context() as patch:
        if moment == 0:
            patch.setattr("vlkd.retrieval.index.faiss.write_index", die)
        elif moment == 1:
            patch.setattr("vlkd.retrieval.folder.os.fsync", die)
        elif moment == 2:
            patch.setattr(Path, "rename", die)
        elif moment == 3:
            patch.setattr(Path, "rename", die_at_second_rename)
        else:
            patch.setattr(SearchIndex, "_description", die)
        with pytest.raises(Killed):
            bigger.save(place)
    assert len(SearchIndex.load(place)) == 30
    bigger.save(place)
    assert len(SearchIndex.load(place)) == 40
    assert {path.name for path in tmp_path.iterdir()} == {"idx"}


@pytest.mark.parametrize("name", ["index.faiss", "items.jsonl"])
@pytest.mark.parametrize("damage", ["cut", "flip", "gone"])
def test_damaged_files_are_refused(name, damage, tmp_path):
    built("flat", 30).save(tmp_path / "idx")
    path = tmp_path / "idx" / name
    data = bytearray(path.read_bytes())
    if damage == "cut":
        path.write_bytes(data[: len(data) // 2])
    elif damage == "flip":
        data[len(data) // 2] ^= 1
        path.write_bytes(data)
    else:
        path.unlink()
    with pytest.raises(UserError, match=f"{name} is missing or not what index.json describes"):
        SearchIndex.load(tmp_path / "idx")


def test_missing_foreign_and_other_versions_are_refused(tmp_path):
    with pytest.raises(UserError, match=r"holds no index\.json"):
        SearchIndex.load(tmp_path / "nowhere")
    place = tmp_path / "idx"
    built("flat", 30).save(place)
    about = json.loads((place / "index.json").read_text())
    (place / "index.json").write_text("{")
    with pytest.raises(UserError, match="cannot be read"):
        read_description(place)
    for change in ({"format": "other"}, {"format_version": 99}):
        (place / "index.json").write_text(json.dumps(about | change))
        with pytest.raises(UserError, match="does not describe a vlkd-index"):
            SearchIndex.load(place)
    (place / "index.json").write_text(json.dumps(about | {"count": 29}))
    with pytest.raises(UserError, match="do not match"):
        SearchIndex.load(place)
    (place / "index.json").write_text(json.dumps(about | {"settings": {"kind": "flat"}}))
    with pytest.raises(UserError, match="settings of another version"):
        SearchIndex.load(place)


def test_a_folder_of_the_user_is_not_overwritten(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match="is not a vlkd index"):
        built("flat", 30).save(tmp_path)
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_bad_input_changes_nothing():
    index = built("flat", 30)
    nan = vectors(2)
    nan[1, 0] = np.nan
    cases = [
        (lambda: index.add(nan, ["x", "y"]), "row 1 holds NaN"),
        (lambda: index.add(vectors(1, width=8), ["x"]), "expected vectors of width 16, found 8"),
        (lambda: index.add(vectors(1), names([3])), "already in the index"),
        (lambda: index.add(vectors(2), ["x", "x"]), "already in the index"),
        (lambda: index.add(vectors(2), ["x"]), "one path per embedding"),
        (lambda: index.remove([1, 99]), "99 is not in the index"),
        (lambda: index.remove(["nothing.jpg"]), "'nothing.jpg' is not in the index"),
        (lambda: index.search(vectors(1)[0] * 0, 1), "length zero"),
        (lambda: index.search(vectors(1, width=8)[0], 1), "expected vectors of width 16, found 8"),
        (lambda: index.search(vectors(2), 1), "one at a time"),
        (lambda: index.search(vectors(1)[0], 0), "1 or more"),
        (lambda: built("tree"), "No index is of kind 'tree'"),
        (lambda: built("ivf", 5, ivf_lists=6), "at most one list per vector"),
        (lambda: built("ivf_pq", 255), "it needs 256 to be trained"),
        (lambda: built("ivf_pq", 300, pq_bytes=5), "divisor of the width"),
        (lambda: built("flat", dims=17), "dims = 17 of vectors of width 16"),
        (lambda: built("flat", storage="int4"), "No index stores 'int4'"),
        (lambda: built("hnsw", storage="int8"), "hnsw stores no int8 vectors"),
    ]
    for call, sentence in cases:
        with pytest.raises(UserError, match=sentence):
            call()
    assert len(index) == 30
    assert index._index.ntotal == 30
