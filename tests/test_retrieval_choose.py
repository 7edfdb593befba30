"""The kind of index chosen by number, width and memory."""

from __future__ import annotations

import pytest

from vlkd.errors import UserError
from vlkd.retrieval.choose import choose_kind, usable_memory

GB = 1_000_000_000


@pytest.mark.parametrize(
    ("n", "width", "memory", "kind"),
    [
        (1, 1, 1, "flat"),
        (200_000, 256, GB, "flat"),
        (200_001, 256, GB, "hnsw"),
        (100_001, 512, GB, "hnsw"),
        (200_000, 256, 100_000_000, "ivf_pq"),
        # (4 * 256 + 8 * 32) bytes each: exactly the limit, then one byte less
        (1_000_000, 256, 1_280_000_000, "hnsw"),
        (1_000_000, 256, 1_279_999_999, "ivf_pq"),
    ],
)
def test_the_kind_and_its_reason(n, width, memory, kind):
    settings, why = choose_kind(n, width, memory)
    assert settings.kind == kind
    assert why.startswith(f"{kind}: ")
    assert f"{n:,} vectors of width {width}" in why


def test_nothing_is_refused_and_the_machine_has_memory():
    with pytest.raises(UserError, match="each is 1 or more"):
        choose_kind(0, 256, GB)
    assert usable_memory() > 100_000_000
