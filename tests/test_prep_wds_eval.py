"""`vlkd prep wds_eval`: any set in, CLIP_benchmark's folder out."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.pairs import noise
from helpers.wds import by_clip_benchmark

from vlkd.data.eval_set import open_eval_set
from vlkd.errors import UserError

Main = Callable[[Sequence[str]], None]


def script() -> Main:
    scope: dict[str, Any] = {"__name__": "wds_eval"}
    path = Path(__file__).parents[1] / "data_prep/wds_eval.py"
    exec(compile(path.read_text(encoding="utf-8"), str(path), "exec"), scope)
    return scope["main"]  # type: ignore[no-any-return]


main = script()


@pytest.fixture
def folder(tmp_path):
    for split, names in {"train": "abc", "test": "ac"}.items():
        for name in names:
            (tmp_path / "set" / split / name).mkdir(parents=True)
            for number in range(2):
                noise(number + ord(name)).save(tmp_path / "set" / split / name / f"{number}.jpg")
    return tmp_path / "set"


def test_class_folders(folder, tmp_path, capsys):
    (tmp_path / "t.txt").write_text("a {}\n")
    templates = ["--templates", str(tmp_path / "t.txt")]
    for split in ("test", "train"):
        main(["--data", f"{folder}#{split}", "--out", str(tmp_path / "out"), *templates, "--json"])
        counts = json.loads(capsys.readouterr().out)
        source, written = open_eval_set(folder, split=split), open_eval_set(tmp_path / "out", split=split)
        assert counts["samples"] == len(written) == len(source)
        assert written.classes == source.classes == ("a", "b", "c")
        assert written.templates == ("a {c}",)
        np.testing.assert_array_equal(written.labels, source.labels)
        assert [file.read() for file in written.files] == [file.read() for file in source.files]


def test_written_again_it_is_the_same(folder, tmp_path, capsys):
    main(["--data", f"{folder}#test", "--out", str(tmp_path / "one")])
    assert "samples 4" in capsys.readouterr().out
    main(["--data", f"{tmp_path / 'one'}#test", "--out", str(tmp_path / "two")])
    for path in (tmp_path / "one").rglob("*"):
        if path.is_file():
            assert (tmp_path / "two" / path.relative_to(tmp_path / "one")).read_bytes() == path.read_bytes()


def test_karpathy_by_clip_benchmark(tmp_path):
    noise(0).save(tmp_path / "0.png")
    noise(1).save(tmp_path / "1.png")
    texts = [["one", "uno"], ["two", "dos", "zwei"]]
    images = [
        {"filename": f"{i}.png", "split": "val", "sentences": [{"raw": text} for text in own]}
        for i, own in enumerate(texts)
    ]
    (tmp_path / "k.json").write_text(json.dumps({"images": images}))
    data = ["--data", f"{tmp_path / 'k.json'}#val", "--out", str(tmp_path / "out")]
    main([*data, "--split", "test", "--samples-per-shard", "1", "--kind", "retrieval"])
    read = list(by_clip_benchmark(tmp_path / "out"))
    assert [captions for _, captions in read] == texts
    np.testing.assert_array_equal(np.asarray(read[1][0]), np.asarray(noise(1)))


def test_another_kind_writes_nothing(folder, tmp_path):
    with pytest.raises(UserError, match="for classification, expected multilabel"):
        main(["--data", f"{folder}#test", "--out", str(tmp_path / "out"), "--kind", "multilabel"])
    assert not (tmp_path / "out").exists()
