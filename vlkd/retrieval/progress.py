"""How far a long loop is: a bar on a terminal, and a line now and then where stderr is a file or a pipe."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable
from types import TracebackType
from typing import Any, Self, TextIO

from tqdm import tqdm

SECONDS = 10.0
"""Between two lines in a file."""
_LINE = "{desc}{percentage:.0f}%, {n_fmt} of {total_fmt}, {rate_fmt}, {elapsed} gone, {remaining} left{postfix}"


class Progress:
    """Progress with rate and time left, closed by a `with` block; several threads may advance it.

    What is skipped counts as done, but not in the rate, from which the time left follows.

    Args:
        total: how much there is to do.
        unit: the name of one.
        description: what is done.
        show: False counts and shows nothing; `write` still writes.
        stream: where to; by default stderr.
        clock: seconds.
    """

    def __init__(
        self,
        total: int,
        *,
        unit: str,
        description: str = "",
        show: bool = True,
        stream: TextIO | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.done = 0
        self._total, self._unit, self._description, self._note = total, unit, description, ""
        self._stream = sys.stderr if stream is None else stream
        self._clock, self._lock = clock, threading.Lock()
        self._skipped = 0
        self._begin = self._told = clock()
        terminal = show and self._stream.isatty()
        self._lines = show and not terminal
        self._bar: Any = (
            tqdm(total=total, unit=unit, desc=description or None, smoothing=0, file=self._stream) if terminal else None
        )

    def advance(self, count: int = 1) -> None:
        """So many more are done."""
        with self._lock:
            if self.done == self._skipped:
                self._told = self._clock()  # What came before was loading, of which no rate follows.
            self.done += count
            if self._bar is not None:
                self._bar.update(count)
            elif self._lines and self._clock() - self._told >= SECONDS:
                self._tell()

    def skip(self, count: int) -> None:
        """So many need not be done."""
        with self._lock:
            self.done += count
            self._skipped += count
            if self._bar is not None:
                self._bar.initial += count
                self._bar.update(count)
            elif self._lines and self._clock() - self._told >= SECONDS:
                self._tell()

    def describe(self, description: str) -> None:
        """Say what is done now."""
        self._description = description
        if self._bar is not None:
            self._bar.set_description(description)

    def note(self, text: str) -> None:
        """Say something behind the figures."""
        self._note = text
        if self._bar is not None:
            self._bar.set_postfix_str(text)

    def write(self, line: str) -> None:
        """A line of its own, above the bar."""
        if self._bar is not None:
            self._bar.write(line, file=self._stream)
        else:
            print(line, file=self._stream, flush=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.close()
        elif self._lines and self.done:
            self._tell()

    def _tell(self) -> None:
        self._told = self._clock()
        prefix = f"{self._description}: " if self._description else ""
        line = tqdm.format_meter(
            self.done, self._total, self._told - self._begin, prefix=prefix, unit=self._unit,
            initial=self._skipped, postfix=self._note or None, bar_format=_LINE,
        )  # fmt: skip
        print(" ".join(line.split()), file=self._stream, flush=True)
