"""Remote shards against a loopback server that misbehaves: the bytes that were there, or one sentence."""

from __future__ import annotations

import base64
import errno
import hashlib
import itertools
import os
import pickle
import re
import resource
import subprocess
import sys
import threading
from pathlib import Path

import fsspec
import numpy as np
import pytest
from fsspec.implementations.memory import MemoryFileSystem
from helpers.bad_server import BadServer, Fault

from vlkd.data import download as module
from vlkd.data import remote as names
from vlkd.data.download import download, lock_of, part_of
from vlkd.data.local_copies import LocalCopies
from vlkd.data.remote import expand_remote, is_remote, wait_before
from vlkd.errors import UserError

pytest.importorskip("aiohttp")

PIECE, BLOCK = 256 * 1024, 64 * 1024
DATA = np.random.Generator(np.random.Philox(7)).bytes(3 * PIECE + 12_345)
HASH = hashlib.sha256(DATA).hexdigest()
NAME = "a/b.tar"
STALL = 1.0


def sha(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


@pytest.fixture(autouse=True)
def _small_pieces(monkeypatch):
    monkeypatch.setattr(module, "PIECE_BYTES", PIECE)
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def serve():
    servers: list[BadServer] = []

    def start(*args, **kwargs) -> BadServer:
        servers.append(BadServer(*args, **kwargs).__enter__())
        return servers[-1]

    yield start
    for server in servers:
        server.__exit__()


def starts(server: BadServer) -> list[int]:
    return [int(re.findall(r"\d+", ranges)[0]) for method, _, ranges in server.log if method == "GET"]


def get(server: BadServer, target: Path, **options) -> list[float]:
    """Download DATA; return the waits, which are skipped."""
    waits: list[float] = []
    known = {"size": len(DATA), "sha256": HASH, "timeout": STALL, "attempts": 4, **options}
    download(server.url(NAME), target, pause=waits.append, **known)
    assert target.read_bytes() == DATA
    return [wait for wait in waits if wait]


def left_over(folder: Path) -> list[str]:
    """All but copies and locks."""
    return sorted(path.name for path in folder.rglob("*") if path.suffix not in (".tar", ".lock"))


# One object


@pytest.mark.parametrize("known", [{}, {"size": None}, {"sha256": None}, {"size": None, "sha256": None}])
def test_an_object_arrives_in_ranges(serve, tmp_path, known):
    server = serve({NAME: DATA})
    assert get(server, tmp_path / "new" / "x.tar", **known) == []
    last = len(DATA) - 1 if known.get("size", 1) else 4 * PIECE - 1
    assert server.log[0] == ("GET", NAME, f"bytes=0-{PIECE - 1}")
    assert starts(server) == [0, PIECE, 2 * PIECE, 3 * PIECE]
    assert server.log[-1][2].endswith(f"-{min(last, len(DATA) - 1)}")
    assert left_over(tmp_path / "new") == []


FAULTS = {
    "drop before the body": (Fault("drop", 0), 0),
    "drop in a block": (Fault("drop", 1000), 0),
    "drop after two blocks": (Fault("drop", 2 * BLOCK + 10), 2 * BLOCK),
    "stall at once": (Fault("stall", 0), 0),
    "stall after a block": (Fault("stall", BLOCK + 1), BLOCK),
    "500": (Fault("status", 500), 0),
    "503": (Fault("status", 503), 0),
    "429": (Fault("status", 429), 0),
    "longer than said": (Fault("length", -5), 0),
    "shorter than said": (Fault("length", 5), 0),
    "other bytes, said": (Fault("shift", 100), 0),
    "another total": (Fault("total", 1), 0),
    "more than asked for": (Fault("more", 10), 0),
    "garbage": (Fault("garbage"), 0),
    "no content": (Fault("status", 204), 0),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_is_followed_by_a_request_from_the_failed_offset(serve, tmp_path, name):
    fault, kept = FAULTS[name]
    server = serve({NAME: DATA}, [None, fault])
    waits = get(server, tmp_path / "x.tar", sha256=None)
    assert starts(server)[:3] == [0, PIECE, PIECE + kept]
    assert starts(server)[3:] == [PIECE + kept + PIECE * i for i in (1, 2) if PIECE + kept + PIECE * i < len(DATA)]
    assert len(waits) == 1
    assert left_over(tmp_path) == []


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_without_end_ends_in_a_sentence(serve, tmp_path, name):
    fault, kept = FAULTS[name]
    server = serve({NAME: DATA}, itertools.repeat(fault))
    if kept:
        # Each attempt makes progress, so all of it arrives after all.
        assert get(server, tmp_path / "x.tar", timeout=0.3)
        return
    (tmp_path / "x.tar").write_bytes(b"old")
    with pytest.raises(UserError, match=r"could not be read at byte 0 in 3 attempts \(last: .+\); check the network"):
        get(server, tmp_path / "x.tar", attempts=3)
    assert len(server.log) == 3
    assert (tmp_path / "x.tar").read_bytes() == b"old"
    assert left_over(tmp_path) == []


@pytest.mark.parametrize(("status", "words"), [(404, "There is no"), (403, "is refused"), (400, "cannot be read")])
def test_what_no_retry_mends_is_not_retried(serve, tmp_path, status, words):
    server = serve({NAME: DATA}, itertools.repeat(Fault("status", status)))
    with pytest.raises(UserError, match=words):
        get(server, tmp_path / "x.tar")
    assert len(server.log) == 1
    assert not (tmp_path / "x.tar").exists()
    assert left_over(tmp_path) == []


def test_a_server_without_ranges_is_read_in_one_go_and_resumed_by_skipping(serve, tmp_path):
    server = serve({NAME: DATA}, itertools.repeat(Fault("whole")))
    assert get(server, tmp_path / "x.tar", size=None) == []
    assert len(server.log) == 1
    server = serve({NAME: DATA}, itertools.chain([Fault("drop", 2 * BLOCK)], itertools.repeat(Fault("whole"))))
    assert len(get(server, tmp_path / "y.tar", sha256=None)) == 1
    assert starts(server) == [0, 2 * BLOCK]


@pytest.mark.parametrize("change", [b"", DATA[:-1], DATA + b"1"])
def test_another_length_than_expected_is_refused(serve, tmp_path, change):
    for faults in ((), itertools.repeat(Fault("whole"))):
        server = serve({NAME: change}, faults)
        with pytest.raises(UserError, match=f"where {len(DATA)} was expected|HTTP 416"):
            get(server, tmp_path / "x.tar", sha256=None)
        assert left_over(tmp_path) == []


def test_an_empty_object_is_an_empty_file(serve, tmp_path):
    download(serve({"e": b""}).url("e"), tmp_path / "e", sha256=sha(b""), timeout=STALL)
    assert (tmp_path / "e").read_bytes() == b""


@pytest.mark.parametrize("fault", [Fault("flip", 70_000), Fault("unsaid", 9)])
def test_a_wrong_hash_is_fetched_once_more(serve, tmp_path, fault):
    server = serve({NAME: DATA}, [None, fault])
    assert get(server, tmp_path / "x.tar") == []
    assert starts(server) == [0, PIECE, 2 * PIECE, 3 * PIECE] * 2


def test_a_wrong_hash_twice_is_refused(serve, tmp_path):
    changed = bytes([DATA[0] ^ 1]) + DATA[1:]
    server = serve({NAME: changed})
    with pytest.raises(UserError, match=f"SHA-256 {sha(changed)} where {HASH} was expected, twice"):
        get(server, tmp_path / "x.tar")
    assert len(server.log) == 8
    assert list(tmp_path.glob("*.tar")) == []
    assert left_over(tmp_path) == []


def test_attempts_are_counted_without_progress_and_waits_double(serve, tmp_path):
    bad = Fault("status", 503)
    server = serve({NAME: DATA}, [bad, bad, bad, None, bad, bad, bad])
    waits = get(server, tmp_path / "x.tar", attempts=4)
    for wait, middle in zip(waits, [0.5, 1, 2, 0.5, 1, 2], strict=True):
        assert 0.5 * middle <= wait <= 1.5 * middle
    assert max(wait_before(failures) for failures in range(1, 60)) <= 45


def test_a_server_that_is_gone_ends_in_a_sentence(serve, tmp_path):
    server = BadServer({})
    server.server_close()
    with pytest.raises(UserError, match="in 2 attempts"):
        get(server, tmp_path / "x.tar", attempts=2)


def test_a_full_disk_ends_in_a_sentence(serve, tmp_path):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    for size in (None, len(DATA)):
        server = serve({NAME: DATA})
        resource.setrlimit(resource.RLIMIT_FSIZE, (PIECE + BLOCK + 1, limits[1]))
        try:
            with pytest.raises(UserError, match=rf"x\.tar cannot be written \({os.strerror(errno.EFBIG)}\); free"):
                get(server, tmp_path / "x.tar", size=size)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        assert left_over(tmp_path) == []
        assert list(tmp_path.glob("*.tar")) == []


def test_what_a_killed_download_left_is_overwritten(serve, tmp_path):
    part_of(tmp_path / "x.tar").write_bytes(b"z" * (len(DATA) + 1000))
    get(serve({NAME: DATA}), tmp_path / "x.tar", size=None)
    assert left_over(tmp_path) == []


def test_a_process_killed_in_mid_download_leaves_no_torn_file(serve, tmp_path):
    server = serve({NAME: DATA}, [None, Fault("stall", 10)])
    target = tmp_path / "x.tar"
    code = (
        "import sys, pathlib\nfrom vlkd.data import download as module\n"
        f"module.PIECE_BYTES = {PIECE}\n"
        "module.download(sys.argv[1], pathlib.Path(sys.argv[2]),"
        " pause=lambda seconds: print(seconds, flush=True))"
    )
    child = subprocess.Popen([sys.executable, "-c", code, server.url(NAME), target], stdout=subprocess.PIPE)
    # One line before each piece: the first is written when the second begins.
    assert [child.stdout.readline() for _ in range(2)] == [b"0\n", b"0\n"]
    child.kill()
    child.wait()
    child.stdout.close()
    assert not target.exists()
    assert part_of(target).stat().st_size == PIECE
    get(server, target)
    assert left_over(tmp_path) == []


def test_credentials_of_netrc_are_sent(serve, tmp_path, monkeypatch):
    (tmp_path / "netrc").write_text("machine 127.0.0.1 login me password hush\n")
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    server = serve({NAME: DATA})
    seen: list[str] = []
    handler = server.RequestHandlerClass

    class Listening(handler):
        def do_GET(self):
            seen.append(self.headers.get("Authorization", ""))
            super().do_GET()

    server.RequestHandlerClass = Listening
    get(server, tmp_path / "x.tar")
    assert set(seen) == {"Basic " + base64.b64encode(b"me:hush").decode()}


def test_messages_hold_no_credentials(serve, tmp_path):
    for fault in (Fault("status", 404), Fault("status", 403), Fault("status", 500), Fault("drop"), Fault("garbage")):
        server = serve({NAME: DATA}, itertools.repeat(fault))
        url = server.url(NAME + "?X-Signature=hush").replace("://", "://me:hush@")
        with pytest.raises(UserError) as caught:
            download(url, tmp_path / "x.tar", timeout=STALL, attempts=2, pause=lambda seconds: None)
        assert server.url(NAME) in str(caught.value)
        assert "hush" not in str(caught.value)
    with pytest.raises(UserError) as caught:
        expand_remote("s3n://me:hush@x/*.tar?hush", timeout=STALL)
    assert "hush" not in str(caught.value)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_forked_child_has_connections_of_its_own(serve, tmp_path):
    server = serve({NAME: DATA})
    get(server, tmp_path / "x.tar")
    child = os.fork()
    if child == 0:
        status = 1
        try:
            get(server, tmp_path / "child.tar")
            status = 0
        finally:
            os._exit(status)
    assert os.waitpid(child, 0)[1] == 0
    get(server, tmp_path / "y.tar")


# Other stores


@pytest.fixture
def memory():
    store = fsspec.filesystem("memory")
    store.pipe({"/vlkd/one/0.tar": DATA, "/vlkd/one/1.tar": DATA[:7], "/vlkd/two/0.tar": b"", "/vlkd/one/x": b"x"})
    yield store
    store.rm("/vlkd", recursive=True)


def test_another_store_is_listed_and_read(memory, tmp_path):
    assert expand_remote("memory://vlkd/*/0.tar") == ["memory://vlkd/one/0.tar", "memory://vlkd/two/0.tar"]
    found = expand_remote("memory://vlkd/{one,two}/?.tar")
    assert found == [f"memory://vlkd/{name}.tar" for name in ("one/0", "one/1", "two/0")]
    for url, data in zip(found, (DATA, DATA[:7], b""), strict=True):
        download(url, tmp_path / "x.tar", size=len(data), sha256=sha(data))
        assert (tmp_path / "x.tar").read_bytes() == data
    with pytest.raises(UserError, match=r"There is no memory://vlkd/one/2\.tar"):
        download("memory://vlkd/one/2.tar", tmp_path / "y.tar")
    with pytest.raises(UserError, match=f"a length of 7 bytes where {len(DATA)} was expected"):
        download("memory://vlkd/one/1.tar", tmp_path / "y.tar", size=len(DATA), attempts=1)
    assert left_over(tmp_path) == []


class Failing(MemoryFileSystem):
    """What each call answers: nothing special, an error, the first so many bytes, or (-1) one too many."""

    protocol = "vlkdfailing"
    answers = iter(())
    asked: list[int]

    @classmethod
    def _strip_protocol(cls, path):
        return super()._strip_protocol(path.replace("vlkdfailing://", "memory://"))

    def cat_file(self, path, start=None, end=None, **kwargs):
        self.asked.append(start)
        answer = next(self.answers, None)
        if isinstance(answer, Exception):
            raise answer
        data = super().cat_file(path, start, end, **kwargs)
        return data + b"!" if answer == -1 else data[:answer]


def test_another_store_is_retried_from_the_failed_offset(memory, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules["fsspec.registry"]._registry, "vlkdfailing", Failing)
    url, waits = "vlkdfailing://vlkd/one/0.tar", []
    Failing.asked, Failing.answers = [], iter([None, OSError(errno.EIO, "broken"), TimeoutError(), 10])
    download(url, tmp_path / "x.tar", size=len(DATA), sha256=HASH, pause=waits.append)
    assert (tmp_path / "x.tar").read_bytes() == DATA
    assert Failing.asked == [0, PIECE, PIECE, PIECE, PIECE + 10, 2 * PIECE + 10, 3 * PIECE + 10]
    assert len([wait for wait in waits if wait]) == 2
    Failing.answers = itertools.repeat(PermissionError("no", "s3://me:hush@x?hush"))
    with pytest.raises(UserError, match="is refused") as caught:
        download(url, tmp_path / "y.tar")
    assert "hush" not in str(caught.value)
    for wrong, words in ((0, "0 bytes where"), (-1, f"{PIECE + 1} bytes where")):
        Failing.answers = itertools.repeat(wrong)
        with pytest.raises(UserError, match=words):
            download(url, tmp_path / "y.tar", attempts=2, pause=waits.append)
    assert left_over(tmp_path) == []


# Names


def test_what_is_remote():
    for ref in (
        "http://h/a.tar",
        "HTTPS://h/a",
        "s3://b/{0..9}.tar",
        "gs://b/*.tar",
        "memory://x",
        "http://[::1]:80/a",
    ):
        assert is_remote(ref)
    for ref in ("a.tar", "/a/{0..9}.tar", "file:///a.tar", "a:b", "C:\\x", "data/a::b.tar"):
        assert not is_remote(ref)
    for ref in ("pipe:curl x", "pipe://x", "nowhere://x", "zip::s3://b/a.zip", "s3://b/a.tar::s3://b/b.tar"):
        with pytest.raises(UserError, match=r"; (give|expected) "):
            is_remote(ref)


def test_braces_are_written_out_without_asking():
    assert expand_remote("http://h/{b,a}-{08..10}.tar") == [
        f"http://h/{x}-{n}.tar" for x in "ab" for n in ("08", "09", "10")
    ]
    assert expand_remote("http://[::1]:80/a?.tar") == ["http://[::1]:80/a?.tar"]


@pytest.mark.parametrize("ref", ["http://h/{0..9", "http://h/{0..99999999999}.tar", "http://h/" + "{a,b}" * 30])
def test_braces_that_cannot_be_written_out_are_refused(ref, monkeypatch):
    monkeypatch.setattr(names, "MAX_MATCHES", 1000)
    with pytest.raises(UserError, match=r"unbalanced braces|more than 1000 URLs"):
        expand_remote(ref)


def test_a_page_of_links_is_matched(serve):
    server = serve({"s/00.tar": b"", "s/01.tar": b"", "s/x.json": b"", "t/02.tar": b""}, [Fault("status", 503)])
    waits: list[float] = []
    assert expand_remote(server.url("s/*.tar"), timeout=5, pause=waits.append) == [
        server.url("s/00.tar"),
        server.url("s/01.tar"),
    ]
    assert len(waits) == 1
    assert expand_remote(server.url("{s,t}/0[12].tar"), timeout=5) == [server.url("s/01.tar"), server.url("t/02.tar")]
    for pattern in ("s/*.png", "u/*.tar"):
        with pytest.raises(UserError, match="Nothing matches http"):
            expand_remote(server.url(pattern), timeout=5)
    server = serve({"s/00.tar": b""}, itertools.repeat(Fault("stall")))
    with pytest.raises(UserError, match="could not be listed in 1 attempts"):
        expand_remote(server.url("s/*.tar"), timeout=STALL, attempts=1)


def test_a_missing_package_is_named(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "s3fs", None)
    for call in (lambda: expand_remote("s3://b/*.tar"), lambda: download("s3://b/a.tar", tmp_path / "a.tar")):
        with pytest.raises(UserError, match=r"Install s3fs.*run `pip install s3fs`"):
            call()


# Local copies


def copies(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.glob("*.tar"))}


def test_copies_are_kept_by_their_full_url_and_content(serve, tmp_path):
    files = {"a/0.tar": b"a" * 100, "b/0.tar": b"b" * 100}
    server = serve(files)
    cache = pickle.loads(pickle.dumps(LocalCopies(tmp_path / "c", 1000, timeout=5)))
    for _ in range(2):
        for name, data in files.items():
            path = cache.path(server.url(name), 100, sha(data))
            assert path.read_bytes() == data
            assert path.name == f"{sha(server.url(name).encode())[:32]}-{sha(data)[:16]}.tar"
    assert len(server.log) == 2
    server.files["a/0.tar"] = b"c" * 100
    assert cache.path(server.url("a/0.tar"), 100, sha(b"c" * 100)).read_bytes() == b"c" * 100
    with pytest.raises(UserError, match="was expected, twice"):
        cache.path(server.url("b/0.tar"), 100, sha(b"d" * 100))
    assert len(copies(tmp_path / "c")) == 3
    assert left_over(tmp_path / "c") == []


@pytest.mark.parametrize("size", [0, 99, 101])
def test_a_copy_of_another_size_is_fetched_anew(serve, tmp_path, size):
    server = serve({NAME: b"a" * 100})
    cache = LocalCopies(tmp_path, 100, timeout=5)
    cache.path(server.url(NAME), 100, sha(b"a" * 100)).write_bytes(b"x" * size)
    assert cache.path(server.url(NAME), 100, sha(b"a" * 100)).read_bytes() == b"a" * 100
    assert len(server.log) == 2


def test_the_least_recently_used_make_room(serve, tmp_path):
    server = serve({str(i): bytes([i]) * 100 for i in range(4)})
    cache = LocalCopies(tmp_path, 350, timeout=5)
    (tmp_path / "mine.tar").write_bytes(b"x" * 1000)

    def ask(i: int) -> Path:
        return cache.path(server.url(str(i)), 100, sha(bytes([i]) * 100))

    for age, i in ((30, 0), (20, 1), (10, 2)):
        path = ask(i)
        moment = path.stat().st_mtime_ns - age * 10**9
        os.utime(path, ns=(moment, moment))
    opened = cache.open(server.url("1"), 100, sha(bytes([1]) * 100))
    os.utime(opened.name, ns=(0, 0))
    ask(0)
    ask(3)
    assert {path.read_bytes()[0] for path in tmp_path.glob("*-*.tar")} == {0, 2, 3}
    with opened:
        assert opened.read() == bytes([1]) * 100
    for i in (0, 1, 2, 3, 2, 1, 0):
        ask(i)
        assert sum(path.stat().st_size for path in tmp_path.glob("*-*.tar")) <= 350
    assert (tmp_path / "mine.tar").exists()
    with pytest.raises(UserError, match="has 351 bytes, more than the limit of 350"):
        cache.path(server.url("9"), 351, HASH)


def test_a_part_whose_owner_is_gone_makes_room_and_a_live_one_does_not(serve, tmp_path):
    server = serve({NAME: b"a" * 100})
    cache = LocalCopies(tmp_path, 150, timeout=5)
    other = tmp_path / f"{'0' * 32}-{'1' * 16}.tar"
    part_of(other).write_bytes(b"x" * 100)
    pauses: list[float] = []

    class Waited(Exception):
        pass

    def give_up(seconds: float) -> None:
        pauses.append(seconds)
        raise Waited

    target = cache._target(server.url(NAME), sha(b"a" * 100))
    with lock_of(other), pytest.raises(Waited):
        cache._ensure(target, server.url(NAME), 100, sha(b"a" * 100), give_up)
    assert len(pauses) == 1
    assert part_of(other).exists()
    cache.path(server.url(NAME), 100, sha(b"a" * 100))
    assert left_over(tmp_path) == []


CHILD = """
import pathlib, sys
from vlkd.data import download
from vlkd.data.local_copies import LocalCopies
cache = LocalCopies(pathlib.Path(sys.argv[1]), 10_000_000)
sys.stdin.readline()
print(cache.path(sys.argv[2], int(sys.argv[3]), sys.argv[4]).stat().st_size, "torch" in sys.modules)
"""


def test_two_processes_download_once(serve, tmp_path):
    server = serve({NAME: DATA}, [Fault("drop", BLOCK)])
    words = [sys.executable, "-c", CHILD, str(tmp_path), server.url(NAME), str(len(DATA)), HASH]
    children = [
        subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parents[1])
        for _ in range(2)
    ]
    for child in children:
        child.stdin.write("go\n")
        child.stdin.flush()
    assert [child.communicate()[0] for child in children] == [f"{len(DATA)} False\n"] * 2
    assert starts(server) == [0, BLOCK]


def test_threads_that_do_not_fit_together_wait_for_each_other(serve, tmp_path):
    files = {str(i): bytes([i]) * 100 for i in range(3)}
    server = serve(files)
    cache = LocalCopies(tmp_path, 100, timeout=5)
    read: list[bytes] = []

    def ask(name: str) -> None:
        with cache.open(server.url(name), 100, sha(files[name])) as stream:
            read.append(stream.read())

    threads = [threading.Thread(target=ask, args=(name,)) for name in files]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(read) == sorted(files.values())
    assert len(copies(tmp_path)) == 1


def test_prefetching_runs_ahead_and_no_further(serve, tmp_path):
    files = {str(i): bytes([i]) * 100 for i in range(6)}
    server = serve(files, [None, Fault("status", 404)])
    cache = LocalCopies(tmp_path, 1000, timeout=5)
    shards = [(server.url(name), 100, sha(data)) for name, data in files.items()]
    taken = [threading.Event() for _ in range(7)]

    def listed():
        for event, shard in zip(taken, shards, strict=False):
            event.set()
            yield shard
        taken[6].set()

    cache.prefetch(listed(), ahead=2)
    assert taken[2].wait(20)
    assert not taken[3].is_set()
    # The first is there, the second failed (its error is met here and mended), the third waits for its turn.
    assert [path for _, path, _ in server.log] == ["0", "1"]
    for i, shard in enumerate(shards):
        assert cache.path(*shard).read_bytes() == files[str(i)]
        assert taken[min(i + 3, 6)].wait(20)
    assert sorted(path for _, path, _ in server.log) == ["0", "1", "1", "2", "3", "4", "5"]
    cache.close()
    assert not [thread for thread in threading.enumerate() if thread.name == "prefetch"]


def test_closing_stops_a_prefetch_that_keeps_failing(serve, tmp_path):
    server = serve({NAME: DATA}, itertools.repeat(Fault("status", 503)))
    cache = LocalCopies(tmp_path, 10**7, timeout=5)
    reached = threading.Event()

    def listed():
        reached.set()
        yield server.url(NAME), len(DATA), HASH

    cache.prefetch(listed())
    assert reached.wait(20)
    cache.close()
    assert not [thread for thread in threading.enumerate() if thread.name == "prefetch"]
    assert left_over(tmp_path) == []
