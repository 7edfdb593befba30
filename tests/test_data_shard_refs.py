"""How many shards a reference names: the counts of open_clip's test of the same, where a list stands for its `::`."""

from __future__ import annotations

import pytest

from vlkd.data.shard_refs import expand_shards

ONE, TEN, HUNDRED = "shard.tar", "shard_{000..009}.tar", "shard_{000..009}_{000..009}.tar"


@pytest.mark.parametrize(
    ("refs", "count"),
    [
        ([ONE], 1),
        (["shard_{000..000}.tar"], 1),
        ([TEN], 10),
        ([HUNDRED], 100),
        ([ONE, f"other_{TEN}"], 11),
        ([TEN, f"other_{TEN}"], 20),
        ([ONE, f"other_{ONE}"], 2),
        ([TEN, "shard_00?.tar"], 10),
    ],
)
def test_number_of_shards(refs, count, tmp_path):
    for name in ("shard", "shard_000", "shard_000_000", "other_shard", "other_shard_000"):
        (tmp_path / f"{name}.tar").touch()
    assert len(expand_shards([str(tmp_path / ref) for ref in refs])) == count
