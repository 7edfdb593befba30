"""Progress: few lines where nobody watches, and a rate that knows only what was really done."""

from __future__ import annotations

import io
import threading

import pytest

from vlkd.retrieval.progress import Progress


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_file_gets_a_line_each_ten_seconds_and_one_at_the_end():
    stream, clock = io.StringIO(), Clock()
    with Progress(1000, unit="image", description="images", stream=stream, clock=clock) as bar:
        for _ in range(200):
            clock.now += 0.125
            bar.advance(5)
    lines = stream.getvalue().splitlines()
    assert "\r" not in stream.getvalue()
    # 25 seconds at 40 a second; the first five came after an eighth of a second.
    assert lines == [
        "images: 40%, 405 of 1000, 40.00image/s, 00:10 gone, 00:14 left",
        "images: 80%, 805 of 1000, 40.00image/s, 00:20 gone, 00:04 left",
        "images: 100%, 1000 of 1000, 40.00image/s, 00:25 gone, 00:00 left",
    ]


def test_what_is_skipped_is_done_but_tells_nothing_of_the_rate():
    stream, clock = io.StringIO(), Clock()
    bar = Progress(1000, unit="image", stream=stream, clock=clock)
    bar.skip(500)
    bar.advance(50)
    clock.now += 10
    bar.describe("student: cars")
    bar.note("acc1 0.5")
    bar.advance(50)
    # 400 are left, at 10 a second.
    assert stream.getvalue() == "student: cars: 60%, 600 of 1000, 10.00image/s, 00:10 gone, 00:40 left, acc1 0.5\n"
    assert bar.done == 600


def test_the_first_line_waits_for_a_rate():
    stream, clock = io.StringIO(), Clock()
    bar = Progress(100, unit="image", stream=stream, clock=clock)
    clock.now += 20
    bar.advance()
    assert stream.getvalue() == ""
    clock.now += 10
    bar.advance(29)
    assert stream.getvalue() == "30%, 30 of 100, 1.00image/s, 00:30 gone, 01:10 left\n"


def test_nothing_done_or_nothing_shown_says_nothing():
    stream = io.StringIO()
    with Progress(5, unit="image", stream=stream):
        pass
    with Progress(5, unit="image", show=False, stream=stream) as bar:
        bar.advance(5)
        bar.write("a warning")
    assert stream.getvalue() == "a warning\n"
    assert bar.done == 5


def test_a_terminal_gets_a_bar():
    stream = Terminal()
    with Progress(8, unit="image", description="images", stream=stream) as bar:
        bar.skip(4)
        bar.advance(4)
        bar.write("a warning")
    assert "\r" in stream.getvalue()
    assert "100%|" in stream.getvalue()
    assert "a warning\n" in stream.getvalue()


@pytest.mark.parametrize("show", [True, False])
def test_threads_lose_no_count(show):
    bar = Progress(40_000, unit="image", show=show, stream=io.StringIO())
    threads = [threading.Thread(target=lambda: [bar.advance() for _ in range(10_000)]) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert bar.done == 40_000
