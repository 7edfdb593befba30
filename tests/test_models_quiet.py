"""transformers' bars are gone inside and as they were behind, also after an error."""

from __future__ import annotations

import contextlib

import pytest
from transformers.utils import logging

from vlkd.models.quiet import without_bars


@pytest.mark.parametrize("shown", [True, False])
def test_bars_are_gone_inside_and_as_before_behind(shown):
    (logging.enable_progress_bar if shown else logging.disable_progress_bar)()
    try:
        seen = []
        with contextlib.suppress(KeyError), without_bars():
            seen.append(logging.is_progress_bar_enabled())
            raise KeyError
        assert seen == [False]
        assert logging.is_progress_bar_enabled() == shown
    finally:
        logging.enable_progress_bar()
