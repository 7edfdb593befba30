"""CLIP_benchmark's folders: what its own writer's layout holds is read, what is written its own reader reads."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import webdataset
from helpers.pairs import noise
from helpers.wds import by_clip_benchmark

from vlkd.data.eval_set import EvalSet, open_eval_set
from vlkd.data.eval_wds_writer import write_wds
from vlkd.data.sources import ImageFile
from vlkd.errors import UserError

CLASSES = ("barn", "red fox", "crane", "crane")


def encoded(seed: int, kind: str = "PNG") -> bytes:
    with io.BytesIO() as stream:
        noise(seed).save(stream, format=kind)
        return stream.getvalue()


def npy(values: Sequence[object]) -> bytes:
    with io.BytesIO() as stream:
        np.save(stream, np.asarray(values))
        return stream.getvalue()


def hand_written(
    root: Path, labels: Sequence[Mapping[str, Any]], *, shards: int = 1, kind: str = "", split: str = "test"
) -> Path:
    """A folder as CLIP_benchmark's `convert_dataset` makes it, by webdataset's own writer; one label dict a sample."""
    (root / split).mkdir(parents=True)
    (root / "classnames.txt").write_text("".join(f"{name}\n" for name in CLASSES))
    (root / "zeroshot_classification_templates.txt").write_text("a photo of a {c}.\na {c}\n")
    if kind:
        (root / "dataset_type.txt").write_text(f"{kind}\n")
    (root / split / "nshards.txt").write_text(f"{shards}\n")
    per = -(-len(labels) // shards)
    for shard in range(shards):
        with webdataset.TarWriter(str(root / split / f"{shard}.tar")) as tar:
            for i in range(shard * per, min((shard + 1) * per, len(labels))):
                extension = ("webp", "png", "jpg")[i % 3]
                kinds = {"webp": "WEBP", "png": "PNG", "jpg": "JPEG"}
                tar.write({"__key__": f"s{i:07d}", extension: encoded(i, kinds[extension]), **labels[i]})
    return root


def raw_tar(path: Path, members: Sequence[tuple[str, bytes]]) -> None:
    with tarfile.open(path, "w") as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))


def in_memory(folder: Path, kind: str, count: int = 6, **more: Any) -> EvalSet:
    """Pictures of four formats on disk."""
    folder.mkdir(parents=True)
    files = []
    for i in range(count):
        name = ("JPEG", "PNG", "WEBP", "BMP")[i % 4]
        path = folder / f"p{i}.{name.lower()}"
        path.write_bytes(encoded(i, name))
        files.append(ImageFile(path))
    return EvalSet(kind=kind, keys=[file.path.stem for file in files], files=files, **more)  # type: ignore[arg-type]


CLS = [{"cls": i % 4} for i in range(7)]
CAPTIONS = [
    ("one", " two  words ", "one"),
    ("naïve “quotes”",),
    ("a", "b", "c", "d", "e", "f"),
    ("\\n",),
    ("x",),
    ("y", "z"),
]


def test_reads_a_classification_folder(tmp_path):
    root = hand_written(tmp_path / "set", CLS)
    data = open_eval_set(root)
    assert data.kind == "classification"
    assert data.classes == CLASSES
    assert data.templates == ("a photo of a {c}.", "a {c}")
    assert data.labels is not None
    assert data.labels.tolist() == [0, 1, 2, 3, 0, 1, 2]
    assert data.labels.dtype == np.int64
    assert data.keys == [f"s{i:07d}" for i in range(7)]
    assert data.captions == [()] * 7
    assert data.problems == ()
    np.testing.assert_array_equal(np.asarray(data.image(1)), np.asarray(noise(1)))
    for place, split in ((root / "test", ""), (f"{root}#test", ""), (root, "test")):
        assert open_eval_set(place, split=split).label_hash() == data.label_hash()


@pytest.mark.parametrize("shards", [2, 3, 7])
def test_any_number_of_shards_is_one_order(tmp_path, shards):
    one = open_eval_set(hand_written(tmp_path / "one", CLS))
    many = open_eval_set(hand_written(tmp_path / "many", CLS, shards=shards))
    assert many.label_hash() == one.label_hash()
    assert [file.read() for file in many.files] == [file.read() for file in one.files]


def test_eleven_shards_are_read_by_number_not_by_name(tmp_path):
    data = open_eval_set(hand_written(tmp_path / "set", [{"cls": i % 4} for i in range(11)], shards=11))
    assert data.keys == [f"s{i:07d}" for i in range(11)]


def test_reads_retrieval_exactly_as_clip_benchmark(tmp_path):
    labels = [{"txt": "\n".join(captions)} for captions in CAPTIONS]
    root = hand_written(tmp_path / "set", labels, kind="retrieval", shards=2)
    data = open_eval_set(root)
    assert data.kind == "retrieval"
    assert data.captions == CAPTIONS
    assert [tuple(captions) for _, captions in by_clip_benchmark(root)] == data.captions


@pytest.mark.parametrize("dtype", [np.int64, np.float32, np.bool_, np.uint8])
def test_reads_multilabel(tmp_path, dtype):
    wanted = np.array([[1, 0, 0, 1], [0, 0, 0, 0], [1, 1, 1, 1]], dtype=np.bool_)
    root = hand_written(tmp_path / "set", [{"npy": row.astype(dtype)} for row in wanted], kind="multilabel")
    data = open_eval_set(root)
    assert data.labels is not None
    assert data.labels.dtype == np.bool_
    np.testing.assert_array_equal(data.labels, wanted)
    (root / "dataset_type.txt").unlink()
    assert open_eval_set(root, kind="multilabel").label_hash() == data.label_hash()


def test_multilabel_equals_clip_benchmarks_reading(tmp_path):
    wanted = np.array([[1, 0, 0, 1], [0, 0, 1, 0]])
    root = hand_written(tmp_path / "set", [{"npy": row} for row in wanted], kind="multilabel")
    theirs = np.stack([label for _, label in by_clip_benchmark(root)])
    np.testing.assert_array_equal(open_eval_set(root).labels, theirs != 0)


@pytest.mark.parametrize("extension", ["npy", "metadata.npy"])
def test_reads_datacomps_groups(tmp_path, extension):
    ids = np.array([[3, 0], [1, 5], [-1, 2]])
    labels = [{"cls": i, extension: npy(row)} for i, row in enumerate(ids)]
    data = open_eval_set(hand_written(tmp_path / "set", labels))
    assert sorted(data.groups) == ["group0", "group1"]
    np.testing.assert_array_equal(np.stack([data.groups["group0"], data.groups["group1"]], 1), ids)


def test_label_sets_that_share_the_pictures(tmp_path):
    """DataComp's faces: no `.cls`; class names and templates begin with the word of their label set."""
    root = hand_written(tmp_path / "set", [{"npy": npy(row)} for row in ([3, 0], [1, 1])])
    (root / "classnames.txt").write_text("sex:man\nsex:woman\nage:0: baby\nage:old\nage:man\n")
    templates = root / "zeroshot_classification_templates.txt"
    templates.write_text("age:a photo of {c}\nsex:a {c}\nage:{}\n")
    data = open_eval_set(root, kind="classification")
    assert data.classes == ("sex:man", "sex:woman", "age:0: baby", "age:old", "age:man")
    assert data.objectives == {"sex": (0, 1), "age": (2, 3, 4)}
    assert data.prompts == {
        "sex:man": ("a man",), "sex:woman": ("a woman",), "age:0: baby": ("a photo of 0: baby", "0: baby"),
        "age:old": ("a photo of old", "old"), "age:man": ("a photo of man", "man"),
    }  # fmt: skip
    assert data.labels is None
    assert [data.groups[f"group{column}"].tolist() for column in range(2)] == [[3, 1], [0, 1]]
    templates.write_text("a photo of {c}\nsex:a {c}\nage:{}\n")
    with pytest.raises(UserError, match=r"\.cls was expected"):
        open_eval_set(root)
    templates.write_text("sex:a {c}\nage:{}\n")
    (root / "classnames.txt").write_text("sex:man\nsex:man\nage:old\n")
    with pytest.raises(UserError, match="a name twice in one label set"):
        open_eval_set(root)


def test_prompts_by_class(tmp_path):
    root = hand_written(tmp_path / "set", CLS)
    (root / "prompts.json").write_text('{"barn": ["b"], "red fox": ["f", "g"], "crane": ["c"], "more": []}')
    data = open_eval_set(root)
    assert data.prompts == {"barn": ("b",), "red fox": ("f", "g"), "crane": ("c",)}
    (root / "prompts.json").write_text('{"barn": ["b"], "red fox": [], "crane": ["c"]}')
    with pytest.raises(UserError, match=r"\[\] for the class 'red fox'"):
        open_eval_set(root)


def test_keys_that_begin_anew_in_each_shard(tmp_path):
    root = hand_written(tmp_path / "set", CLS[:2], shards=2)
    raw_tar(root / "test/1.tar", [("s0000000.png", encoded(5)), ("s0000000.cls", b"2")])
    data = open_eval_set(root)
    assert data.keys == ["0:s0000000", "1:s0000000"]
    assert data.labels is not None
    assert data.labels.tolist() == [0, 2]


def test_a_few_samples_without_picture_are_left_out_and_named(tmp_path):
    root = hand_written(tmp_path / "set", CLS)
    members = [(f"s{i:07d}.{e}", d) for i in range(30) for e, d in (("png", encoded(i)), ("cls", b"1"))]
    raw_tar(root / "test/0.tar", [*members[:4], ("s5000000.cls", b"1"), *members[4:], ("../evil.png", b"x")])
    data = open_eval_set(root)
    assert len(data) == 30
    assert [("s5000000" in p, "leaves the archive" in p) for p in sorted(data.problems)] == [
        (False, True),
        (True, False),
    ]
    raw_tar(root / "test/0.tar", [*members[:4], ("s7.cls", b"1"), ("s8.cls", b"1")])
    with pytest.raises(UserError, match="2 of 4 samples"):
        open_eval_set(root)


def with_file(name: str, content: str | None) -> Callable[[Path], object]:
    def change(root: Path) -> None:
        if content is None:
            (root / name).unlink()
        else:
            (root / name).write_text(content)

    return change


def with_members(*members: tuple[str, bytes]) -> Callable[[Path], object]:
    return lambda root: raw_tar(root / "test/0.tar", members)


PNG = ("s0.png", encoded(0))
HUGE = (
    b"\x93NUMPY\x01\x00v\x00"
    + b"{'descr': '<i8', 'fortran_order': False, 'shape': (99999999999,), }".ljust(117)
    + b"\n"
)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (with_file("test/nshards.txt", None), r"has no nshards\.txt"),
        (with_file("test/nshards.txt", "two\n"), r"says 'two'; expected the number of tars"),
        (with_file("test/nshards.txt", "0"), r"says '0'"),
        (with_file("test/nshards.txt", "3"), r"lacks 2 of the 3 tars .* first 1\.tar"),
        (with_file("classnames.txt", "a\nb\n"), r"has the label 2, but .* has 2 names \(0 to 1\)"),
        (with_file("classnames.txt", None), r"has no classnames\.txt"),
        (with_file("dataset_type.txt", "detection"), r"says 'detection'"),
        (with_file("dataset_type.txt", "retrieval"), r"has \.cls where \.txt was expected for retrieval"),
        (with_file("dataset_type.txt", "multilabel"), r"has \.cls where \.npy was expected"),
        (with_file("zeroshot_classification_templates.txt", "a photo"), r"expected \{c\}"),
        (with_members(PNG, ("s0.txt", b"a")), r"has \.txt where \.cls was expected"),
        (with_members(PNG), r"has no label where \.cls was expected"),
        (with_members(PNG, ("s0.cls", b"1.0")), r"has the label b'1\.0'; expected the number of a class"),
        (with_members(PNG, ("s0.cls", b"-1")), r"has the label b'-1'"),
        (with_members(PNG, ("s0.cls", b"")), r"has the label b''"),
        (with_members(), "holds no sample"),
        (with_members(("s0.cls", b"1")), "holds no sample with a picture"),
        (with_members(PNG, ("s0.cls", b"1"), PNG), "'s0' stands for two samples"),
        (with_members(PNG, ("s0.cls", b"1"), ("s0.npy", npy([0.5]))), "no whole numbers"),
        (with_members(PNG, ("s0.cls", b"1"), ("s0.npy", HUGE)), r"no vector of numbers \(128 bytes"),
        (with_members(PNG, ("s0.cls", b"1"), ("s0.npy", npy([{}]))), "no vector of numbers"),
        (with_members(PNG, ("s0.cls", b"1"), ("s0.npy", b"junk")), "no vector of numbers"),
        (with_members(PNG, ("s0.cls", b"1"), ("s0.npy", npy([1])), ("s1.png", PNG[1]), ("s1.cls", b"1")), "no .npy"),
        (lambda root: (root / "test").rename(root / "valid"), r"no split 'test'; it has valid"),
    ],
)
def test_refusals(tmp_path, change, sentence):
    root = hand_written(tmp_path / "set", CLS)
    change(root)
    with pytest.raises(UserError, match=sentence):
        open_eval_set(root, split="test")


@pytest.mark.parametrize(
    ("label", "sentence"),
    [
        (npy([1, 0, 0]), "has 3 labels for 4 class names"),
        (npy([1, 0, 0, 2]), "other than 0 and 1"),
        (npy([1, 0, 0, np.nan]), "NaN or infinity"),
        (npy([[1, 0], [0, 1]]), "no vector"),
    ],
)
def test_multilabel_refusals(tmp_path, label, sentence):
    root = hand_written(tmp_path / "set", [{"npy": label}], kind="multilabel")
    with pytest.raises(UserError, match=sentence):
        open_eval_set(root)


@pytest.mark.parametrize("text", ["", "\n", "  \n "])
def test_retrieval_without_a_caption(tmp_path, text):
    root = hand_written(tmp_path / "set", [{"txt": "a"}, {"txt": text}], kind="retrieval")
    with pytest.raises(UserError, match=r"s0000001 has no caption"):
        open_eval_set(root)


def test_another_kind_than_expected(tmp_path):
    root = hand_written(tmp_path / "set", [{"txt": "a"}], kind="retrieval")
    with pytest.raises(UserError, match="a set for retrieval, expected classification"):
        open_eval_set(root, kind="classification")


@pytest.mark.parametrize("keep", [1024, 1500, -1024, -700])
def test_a_cut_tar_is_never_a_smaller_set(tmp_path, keep):
    root = hand_written(tmp_path / "set", CLS)
    tar = root / "test/0.tar"
    with tarfile.open(tar) as opened:
        end = opened.getmembers()[-2].offset
    content = tar.read_bytes()
    tar.write_bytes(content[:keep] if keep > 0 else content[: end + (0 if keep == -1024 else 600)])
    with pytest.raises(UserError, match=r"is cut or damaged|no uncompressed tar that can be read"):
        open_eval_set(root)


def test_written_classification_is_read_by_clip_benchmark(tmp_path):
    labels = np.array([3, 0, 2, 1, 1, 0])
    groups = {"group0": np.array([5, 4, 3, 2, 1, 0])}
    data = in_memory(
        tmp_path / "in", "classification", classes=CLASSES, labels=labels, templates=("a {}.", "{c}"), groups=groups
    )
    counts = write_wds(data, tmp_path / "out", samples_per_shard=4)
    assert (counts["samples"], counts["shards"]) == (6, 2)
    theirs = by_clip_benchmark(tmp_path / "out")
    assert theirs.classes == list(CLASSES)
    assert theirs.templates == ["a {c}.", "{c}"]
    read = list(theirs)
    assert [label for _, label in read] == labels.tolist()
    for (image, _), i in zip(read, range(6), strict=True):
        np.testing.assert_array_equal(np.asarray(image.convert("RGB")), np.asarray(data.image(i)))
    ours = open_eval_set(tmp_path / "out")
    assert ours.labels is not None
    assert ours.labels.tolist() == labels.tolist()
    assert ours.groups["group0"].tolist() == [5, 4, 3, 2, 1, 0]
    assert [f.read() == g.read() for f, g in zip(ours.files, data.files, strict=True)] == [1, 1, 1, 0, 1, 1]


def test_written_retrieval_is_read_by_clip_benchmark(tmp_path):
    data = in_memory(tmp_path / "in", "retrieval", captions=[*CAPTIONS[:5], ("two\nlines\u2028or three", "z")])
    write_wds(data, tmp_path / "out", samples_per_shard=4)
    wanted = [*CAPTIONS[:5], ("two lines or three", "z")]
    assert [tuple(captions) for _, captions in by_clip_benchmark(tmp_path / "out")] == wanted
    assert open_eval_set(tmp_path / "out").captions == wanted


def test_written_multilabel_is_read_by_clip_benchmark(tmp_path):
    labels = np.random.default_rng(0).random((6, 4)) < 0.5
    groups = {"group0": np.arange(6)}
    data = in_memory(tmp_path / "in", "multilabel", classes=CLASSES, labels=labels, groups=groups)
    write_wds(data, tmp_path / "out")
    np.testing.assert_array_equal(np.stack([row for _, row in by_clip_benchmark(tmp_path / "out")]), labels)
    ours = open_eval_set(tmp_path / "out")
    np.testing.assert_array_equal(ours.labels, labels)
    assert ours.groups["group0"].tolist() == list(range(6))


def test_equal_sets_give_equal_bytes_and_shards_hold_both_limits(tmp_path):
    data = in_memory(tmp_path / "in", "classification", classes=CLASSES, labels=np.arange(6) % 4)
    sizes = [len(file.read()) for file in data.files]
    for name in ("a", "b"):
        write_wds(data, tmp_path / name, bytes_per_shard=max(sizes) + 1)
    files = sorted(path.relative_to(tmp_path / "a") for path in (tmp_path / "a").rglob("*") if path.is_file())
    assert [(tmp_path / "a" / f).read_bytes() for f in files] == [(tmp_path / "b" / f).read_bytes() for f in files]
    shards = int((tmp_path / "a/test/nshards.txt").read_text())
    assert shards == len(list((tmp_path / "a/test").glob("*.tar"))) > 1
    assert open_eval_set(tmp_path / "a").keys == [f"s{i:07d}" for i in range(6)]


def test_a_second_split_joins_only_the_same_classes(tmp_path):
    data = in_memory(tmp_path / "in", "classification", classes=CLASSES, labels=np.arange(6) % 4)
    write_wds(data, tmp_path / "out", split="train")
    write_wds(data, tmp_path / "out", split="test")
    assert len(open_eval_set(tmp_path / "out", split="train")) == 6
    with pytest.raises(UserError, match="already holds files"):
        write_wds(data, tmp_path / "out", split="test")
    with pytest.raises(UserError, match=r"has another classnames\.txt"):
        write_wds(replace(data, classes=("a", "b", "c", "d")), tmp_path / "out", split="val")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["classnames.txt", "test", "train"]


def test_nothing_is_left_of_a_failed_writing(tmp_path):
    data = in_memory(tmp_path / "in", "classification", classes=CLASSES, labels=np.arange(6) % 4)
    data.files[4].path.write_bytes(b"no picture")
    with pytest.raises(UserError, match="'p4' cannot be used, so nothing was written"):
        write_wds(data, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["in"]
    with pytest.raises(UserError, match="selection has no place"):
        write_wds(replace(data, kind="selection"), tmp_path / "out")
    for split in ("", "..", "a/b"):
        with pytest.raises(UserError, match="expected a name"):
            write_wds(data, tmp_path / "out", split=split)
