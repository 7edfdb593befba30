"""Streamed pretraining from shards that are damaged, vanish or are exchanged, and from a server that misbehaves.

    python scripts/torture_shards.py
    python scripts/torture_shards.py --only remote --seed 1 --out runs/torture

The part of `torture_stream.py` that is about data. What is damaged is known from the tars themselves: exactly these
samples may be left out, they are named in the checkpoint and counted at the end, and all others come as planned. More
of them than a run takes end it in one sentence; with the shards restored, the same command goes on.
"""

from __future__ import annotations

import itertools
import json
import os
import re
import resource
import signal
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from random import Random

import vlkd.models  # noqa: F401 - before anything imports torchvision
from vlkd.cli.main import main as vlkd_main
from vlkd.data.download import download
from vlkd.data.local_copies import LocalCopies

# The tools of fault tests live with the tests.
sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from helpers.stage import BATCH, Row, Stage, members, perform, same
from helpers.trial import Child, TrialRun

HARMLESS = ("drop", "stall", "longer", "shorter", "garbage", "503")
KINDS = (*HARMLESS, "shifted", "flip")
"""What goes wrong with an answer; the last two are noticed by the hash alone."""


def flip(shard: Path, rng: Random, part: str) -> set[str]:
    """Flip a bit in a member with that extension, or in a `header`; the keys that it makes unusable."""
    key, _, header, data, size = rng.choice([one for one in members(shard) if part in (one[1], "header")])
    place = header + rng.randrange(512) if part == "header" else data + rng.randrange(size)
    content = bytearray(shard.read_bytes())
    content[place] ^= 1 << rng.randrange(8)
    shard.write_bytes(content)
    return set() if part == "header" else {key}


def cut(shard: Path, rng: Random) -> set[str]:
    """Truncate it in place; the keys that it makes unusable."""
    found = members(shard)
    end = rng.randrange(512, found[-1][3])
    os.truncate(shard, end)
    return {key for key, _, _, data, size in found if data + size > end}


def remove(shard: Path, _: Random) -> set[str]:
    """Remove it."""
    keys = {one[0] for one in members(shard)}
    shard.unlink()
    return keys


def exchange(shard: Path, _: Random) -> set[str]:
    """Put another file in its place: its bytes in reverse."""
    keys = {one[0] for one in members(shard)}
    other = shard.with_name("other")
    other.write_bytes(shard.read_bytes()[::-1])
    other.replace(shard)
    return keys


def check_bad(run: TrialRun, expected: set[str]) -> list[str]:
    """Whether exactly these keys were left out, named in the checkpoint, and counted at the end."""
    seen = {key for attempt in run.attempts for part in attempt.drawn for key in part.bad}
    states = sorted((run.out / "checkpoints").glob("step-*/state.json"))
    stored = set(json.loads(states[-1].read_text())["stream"]["bad"]) if states else set()
    told = re.search(r"cannot be used: (\d+) samples", run.attempts[-1].output)
    problems = [
        f"{len(keys)} keys {name} ({sorted(keys ^ expected)[:3]}), expected {len(expected)}"
        for name, keys in {"left out": seen, "stored": stored}.items()
        if keys != expected
    ]
    if int(told[1] if told else 0) != len(expected):
        problems.append(f"{told[1] if told else 0} samples are counted, expected {len(expected)}")
    return [*run.problems(), *problems]


def tars(stage: Stage) -> Iterator[Row]:
    """Shards that are damaged before a run, in the middle of it, and more than it takes."""
    rng, twin = Random(f"{stage.seed}/tars"), stage.twin()
    for part in ("header", "jpg", "json"):
        folder = stage.copy(part)
        run = stage.run(f"flipped-{part}", train=str(folder))
        bad = set[str]().union(*(flip(shard, rng, part) for shard in rng.sample(sorted(folder.glob("*.tar")), 6)))
        run.go()
        problems = check_bad(run, bad) + (same(run, twin) if part == "header" else [])
        found = f"{len(bad)} samples to be left out"
        yield Row(case="tars", what=f"6 bits flipped, each in a {part}", found=found, problems=problems)
    for harm, shards in itertools.product((cut, remove, exchange), (1, 4)):
        yield harmed_while_running(stage, harm, shards, rng)
    for workers in (0, 1):
        yield index_vanishes(stage, workers)
    folder = stage.copy("ranks")
    bad = set[str]().union(*(flip(shard, rng, "jpg") for shard in sorted(folder.glob("*.tar"))[::3]))
    run = stage.run("flipped-ranks", train=str(folder))
    run.go(ranks=2)
    found = f"{len(bad)} samples to be left out"
    yield Row(case="tars", what="14 bits flipped, on two ranks", found=found, problems=check_bad(run, bad))
    folder = stage.copy("before")
    for harm in (cut, remove):
        run, shard = stage.run(f"{harm.__name__}-before", train=str(folder)), rng.choice(sorted(folder.glob("*.tar")))
        whole = shard.read_bytes()
        harm(shard, rng)
        refused = run.go()
        shard.write_bytes(whole)
        run.go()
        problems = same(run, twin) + ([] if refused.code == 2 else ["it was not refused"])
        yield Row(
            case="tars", what=f"before the start: {harm.__name__}", found=short(refused.sentence), problems=problems
        )


def harmed_while_running(stage: Stage, harm: Callable[[Path, Random], set[str]], shards: int, rng: Random) -> Row:
    """Shards that were not opened yet are harmed after the sixth batch; four of them are more than a run takes."""
    name = f"{harm.__name__}-{shards}"
    folder = stage.copy(name)
    run, moment, seed = stage.run(name, given_tokenizer(stage), train=str(folder)), 5 * BATCH, rng.random()
    of_key = {one[0]: shard for shard in sorted(folder.glob("*.tar")) for one in members(shard)}
    opened = {of_key[key] for key in run.planned[: moment + BATCH]}
    chosen = rng.sample(sorted(set(of_key.values()) - opened), shards)
    kept = {shard: shard.read_bytes() for shard in chosen}

    def harm_all() -> set[str]:
        return set[str]().union(*(harm(shard, Random(f"{seed}/{shard.name}")) for shard in chosen))

    def restore() -> None:
        for shard, content in kept.items():
            shard.write_bytes(content)

    attempt = run.go(act=lambda start: start == moment and harm_all())
    restore()
    expected = harm_all()
    restore()
    found = short(attempt.sentence) or f"{len(expected)} samples to be left out"
    if shards == 1:
        problems = check_bad(run, expected)
    else:
        after = run.go()
        problems = run.problems() + ([] if attempt.code == 2 else [f"exit code {attempt.code}, expected 2"])
        found += f"; continued from {after.start}"
    return Row(case="tars", what=f"while running: {harm.__name__} {shards}", found=found, problems=problems)


def index_vanishes(stage: Stage, workers: int) -> Row:
    """An index that is needed later is removed, and put back."""
    folder = stage.copy(f"index-{workers}")
    run = stage.run(f"index-{workers}", given_tokenizer(stage), f"data.workers={workers}", train=str(folder))
    places = {one[0]: shard for shard in sorted(folder.glob("*.tar")) for one in members(shard)}
    index = places[run.planned[20 * BATCH - 1]].with_suffix(".index.safetensors")
    content = index.read_bytes()
    attempt = run.go(act=lambda start: start == 5 * BATCH and index.unlink())
    index.write_bytes(content)
    run.go()
    problems = same(run, stage.twin()) + ([] if attempt.code == 2 else [f"exit code {attempt.code}, expected 2"])
    return Row(
        case="tars", what=f"an index vanishes, {workers} workers", found=short(attempt.sentence), problems=problems
    )


def given_tokenizer(stage: Stage) -> str:
    """The setting that spares a run reading all captions, and so opening all shards, before the first batch."""
    return f"model.tokenizer={stage.twin().out / 'tokenizer.json'}"


def short(sentence: str) -> str:
    """The beginning of a sentence, its paths without folders."""
    return " ".join(word.rpartition("/")[2] for word in sentence.split())[:60]


class Server(ThreadingHTTPServer):
    """Serves tars in ranges; what `faults` lists for a name goes wrong with its first answers, the last one first."""

    daemon_threads = True

    def __init__(self, folder: Path, faults: Mapping[str, Sequence[str]], port: int) -> None:
        super().__init__(("127.0.0.1", port), _Handler)
        self.folder, self.rng = folder, Random(0)
        self.faults = {path.name: list(faults.get(path.name, ())) for path in folder.glob("*.tar")}

    def handle_error(self, *_: object) -> None:
        """Clients that hang up are what this is about."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Server

    def do_GET(self) -> None:
        name = self.path.rpartition("/")[2]
        faults = self.server.faults.get(name, [])
        fault = faults[0] if faults[:1] == ["flip for ever"] else faults.pop() if faults else ""
        if fault == "garbage":
            self.wfile.write(b"\x00\xff no status\r\n\r\n")
            self.close_connection = True
            return
        if name not in self.server.faults or fault == "503":
            self.send_error(503 if fault else 404)
            return
        whole = (self.server.folder / name).read_bytes()
        asked = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
        first, last = (int(asked[1]), min(int(asked[2]), len(whole) - 1)) if asked else (0, len(whole) - 1)
        body = bytearray(whole[first : last + 1])
        place = self.server.rng.randrange(len(body))
        if fault.startswith("flip"):
            body[place] ^= 1 << self.server.rng.randrange(8)
        if fault == "shifted":
            body = body[1:] + body[:1]
        self.send_response(206)
        self.send_header("Content-Range", f"bytes {first}-{last}/{len(whole)}")
        self.send_header("Content-Length", str(len(body) + {"longer": 7, "shorter": -7}.get(fault, 0)))
        self.end_headers()
        self.wfile.write(body[:place] if fault in ("drop", "stall") else body)
        if fault in ("drop", "stall", "longer", "shorter"):
            self.wfile.flush()
            if fault == "stall":
                # Longer than the client's time-out.
                self.connection.settimeout(10)
                self.rfile.read(1)
            self.close_connection = True

    def log_message(self, *_: object) -> None:
        """Nothing."""


@contextmanager
def serving(
    stage: Stage, faults: Mapping[str, Sequence[str]] | None = None, port: int = 0
) -> Iterator[tuple[int, Child]]:
    """A server of the shards in a process of its own, and its port."""
    server = Server(stage.folder / "drawn", faults or {}, port)
    child = Child(server.serve_forever)
    # Otherwise connections to a dead server would be taken by this process's socket, and wait.
    server.server_close()
    try:
        yield server.server_address[1], child
    finally:
        child.kill()


def impatient() -> None:
    """Shorter time-outs than a network needs, so that stalls do not take minutes."""
    for function in (LocalCopies.__init__, download):
        function.__kwdefaults__.update(timeout=2.0, attempts=4)


def remote(stage: Stage) -> Iterator[Row]:
    """From a server that is well, one that misbehaves, one with a damaged shard, and one that goes away."""
    rng, twin = Random(f"{stage.seed}/remote"), stage.twin()
    plans = {name: hostile(rng) for name in shard_names(stage)}
    bad = rng.choice(shard_names(stage))
    with serving(stage) as (port, _):
        problems = scan(stage, port, "scan")
        yield Row(case="remote", what="scan", found="the same shards", problems=problems)
        run = remote_run(stage, "good")
        run.go(prepare=impatient)
        yield Row(case="remote", what="a good server", found="as from files", problems=same(run, twin))
    with serving(stage, plans, port):
        run = remote_run(stage, "hostile")
        run.go(prepare=impatient)
        counts = Counter(fault for faults in plans.values() for fault in faults)
        found = ", ".join(f"{count} {fault}" for fault, count in counts.most_common())
        yield Row(case="remote", what="a server that lies", found=found, problems=same(run, twin))
    # A scan takes the bits that it is given: it has nothing to compare them with.
    with serving(stage, {name: rng.choices(HARMLESS, k=rng.choice((0, 1))) for name in shard_names(stage)}, port):
        problems = scan(stage, port, "hostile-scan")
        yield Row(case="remote", what="scan of a server that lies", found="the same shards", problems=problems)
    with serving(stage, {bad: ["flip for ever"]}, port):
        run = remote_run(stage, "damaged", given_tokenizer(stage))
        run.go(prepare=impatient)
    lost = {one[0] for one in members(stage.folder / "drawn" / bad)}
    found = f"{len(lost)} samples to be left out"
    yield Row(case="remote", what="a shard whose bits stay wrong", found=found, problems=check_bad(run, lost))
    yield goes_away(stage, port)
    with serving(stage, port=port):
        run = remote_run(stage, "no-room")
        room = min(path.stat().st_size for path in (stage.folder / "drawn").glob("*.tar")) - 1
        attempt = run.go(prepare=lambda: (impatient(), resource.setrlimit(resource.RLIMIT_FSIZE, (room, -1))))
        run.go(prepare=impatient)
        problems = same(run, twin) + ([] if attempt.code == 2 else [f"exit code {attempt.code}, expected 2"])
        yield Row(case="remote", what="no room for copies", found=short(attempt.sentence), problems=problems)


def hostile(rng: Random) -> list[str]:
    """What goes wrong with a shard; wrong bits at most once, as twice are a shard that has changed."""
    first = rng.choices(KINDS, k=rng.choice((0, 1, 1)))
    return [*first, *rng.choices(HARMLESS, k=rng.choice((0, 0, 1)))]


def goes_away(stage: Stage, port: int) -> Row:
    """The server dies in the middle, and is there again for the second start."""
    run = remote_run(stage, "gone", given_tokenizer(stage))
    with serving(stage, port=port) as (_, server):
        attempt = run.go(
            prepare=impatient, act=lambda start: start == 10 * BATCH and os.kill(server.pid, signal.SIGKILL)
        )
    with serving(stage, port=port):
        after = run.go(prepare=impatient)
    problems = run.problems() + ([] if attempt.code == 2 else [f"exit code {attempt.code}, expected 2"])
    found = f"{short(attempt.sentence)}; continued from {after.start}"
    return Row(case="remote", what="a server that goes away", found=found, problems=problems)


def shard_names(stage: Stage) -> list[str]:
    """Of the shards that are served."""
    return sorted(path.name for path in (stage.folder / "drawn").glob("*.tar"))


def scan(stage: Stage, port: int, name: str) -> list[str]:
    """`vlkd prep scan` of the URLs; whether it finds what the scan of the files found."""
    out, local = stage.folder / name, stage.folder / "drawn"
    url = f"http://127.0.0.1:{port}/{{000000..{len(shard_names(stage)) - 1:06d}}}.tar"
    words = ["prep", "scan", url, "--out", str(out), "--workers", "1"]
    child = Child(lambda: (impatient(), stage.command(words)))
    code = child.wait(180)
    child.kill()
    if code != 0:
        return [f"exit code {code}: {child.output()[-300:]}"]
    found, wanted = (json.loads((folder / "scan.json").read_text())["shards"] for folder in (out, local))
    alike = [[(row["sha256"], row["samples"], row["captions"]) for row in rows] for rows in (found, wanted)]
    return [] if alike[0] == alike[1] else ["it found other shards than among the files"]


def remote_run(stage: Stage, name: str, *words: str) -> TrialRun:
    """A run on what `scan` found, with copies of its own."""
    copies = stage.folder / "shard-copies" / name
    return stage.run(name, f"data.copies={copies}", *words, train=str(stage.folder / "scan"))


CASES = {"tars": tars, "remote": remote}

if __name__ == "__main__":
    perform(CASES, vlkd_main, __doc__)
