from __future__ import annotations

import json

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from vlkd.active import read_pool, write_pool
from vlkd.errors import UserError

KEYS = ["a/1.jpg", "b/ü 2.jpg", "c"]
ROWS = np.array([[0.5, 0.5], [1, 0], [0.25, 0.75]])


def test_there_and_back(tmp_path):
    path, features = tmp_path / "new" / "pool.safetensors", np.arange(12.0).reshape(3, 4)
    write_pool(path, KEYS, ROWS, features, classes=["cat", "dog"])
    pool = read_pool(path)
    assert (pool.keys, pool.classes) == (tuple(KEYS), ("cat", "dog"))
    assert pool.probabilities.dtype == pool.features.dtype == np.float32
    np.testing.assert_array_equal(pool.probabilities, ROWS)
    np.testing.assert_array_equal(pool.features, features)
    assert set(load_file(path)) == {"probabilities", "features"}
    write_pool(path, KEYS, ROWS.astype(np.float16))
    assert read_pool(path).features is None
    assert [file.name for file in path.parent.iterdir()] == ["pool.safetensors"]


def test_slices_are_stored_as_they_are(tmp_path):
    write_pool(tmp_path / "p", KEYS, np.asfortranarray(ROWS), np.arange(24.0).reshape(3, 8)[:, ::2])
    pool = read_pool(tmp_path / "p")
    np.testing.assert_array_equal(pool.probabilities, ROWS)
    assert pool.features[1].tolist() == [8, 10, 12, 14]


def test_fingerprints(tmp_path):
    def fingerprint(keys, rows, features=None):
        write_pool(tmp_path / "p", keys, rows, features)
        return read_pool(tmp_path / "p").fingerprint()

    plain = fingerprint(KEYS, ROWS)
    others = [
        fingerprint(KEYS[::-1], ROWS), fingerprint(KEYS, ROWS[::-1]), fingerprint(KEYS, ROWS, np.ones((3, 1))),
        fingerprint(KEYS, ROWS, np.ones((3, 2))),
    ]  # fmt: skip
    assert fingerprint(KEYS, ROWS) == plain
    assert len({plain, *others}) == 5


@pytest.mark.parametrize(
    ("keys", "rows", "features", "message"),
    [
        (["a", "b", "a"], ROWS, None, "1 keys stand for more than one image"),
        (["a", "b", ""], ROWS, None, "the key ''"),
        (["a", "b\nc", "d"], ROWS, None, r"the key 'b\\nc'"),
        (["a", " b", "d"], ROWS, None, "the key ' b'"),
        (["a", "b"], ROWS, None, r"\(3, 2\) of float64 for 2 keys"),
        (KEYS, ROWS[0], None, r"\(2,\) of float64 for 3 keys"),
        (KEYS, ROWS.astype(int), None, "of int64"),
        ([], np.zeros((0, 2)), None, "at least one"),
        (KEYS, ROWS * [1, np.nan], None, "3 of 3 rows of probabilities hold NaN"),
        (
            KEYS,
            ROWS + np.array([[0, 0], [0, 0.01], [0, 0]]),
            None,
            r"1 of 3 rows .* first that of 'b/ü 2.jpg' with the sum 1.01",
        ),
        (KEYS, ROWS + np.array([[0, 0], [0.1, -0.1], [0, 0]]), None, "negative or do not sum to 1"),
        (KEYS, ROWS, np.ones((2, 4)), "features are"),
        (KEYS, ROWS, np.array([[1.0], [np.inf], [0.0]]), "rows of features hold NaN or infinity, first row 1"),
    ],
)
def test_refused_by_writer_and_reader(tmp_path, keys, rows, features, message):
    path = tmp_path / "pool.safetensors"
    with pytest.raises(UserError, match=message):
        write_pool(path, keys, rows, features)
    assert not path.exists()
    tensors = {"probabilities": np.asarray(rows)} | ({} if features is None else {"features": features})
    save_file(tensors, path, metadata={"keys": json.dumps(keys)})
    with pytest.raises(UserError, match=message):
        read_pool(path)


def test_classes_of_another_number(tmp_path):
    with pytest.raises(UserError, match="names 3 classes for 2 columns"):
        write_pool(tmp_path / "p", KEYS, ROWS, classes=["a", "b", "c"])


@pytest.mark.parametrize(
    "metadata", [None, {}, {"keys": "["}, {"keys": "{}"}, {"keys": "[1, 2, 3]"}, {"keys": "[" * 9999}]
)
def test_other_metadata(tmp_path, metadata):
    save_file({"probabilities": ROWS}, tmp_path / "p", metadata=metadata)
    with pytest.raises(UserError, match=r"no file of probabilities|no list of text"):
        read_pool(tmp_path / "p")


def test_other_files(tmp_path):
    (tmp_path / "text").write_text("hello")
    (tmp_path / "empty").write_bytes(b"")
    save_file({"logits": ROWS}, tmp_path / "lacks", metadata={"keys": json.dumps(KEYS)})
    for name in ("text", "empty", "lacks", "missing", "."):
        with pytest.raises(UserError, match="no file of probabilities"):
            read_pool(tmp_path / name)


def test_a_place_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written"):
        write_pool(tmp_path / "file" / "p", KEYS, ROWS)
