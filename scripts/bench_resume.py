"""Seconds to the first batch after a resume, and bytes of the index for each sample, at 1,000 shards x 10,000 samples.

    python scripts/bench_resume.py SHARDS --json

The indexes and `scan.json` are synthetic: every shard is the same file under another name, the first of SHARDS, and its
index repeats that file's members under keys of 12 letters. What is read are real pictures; indexes and pictures are in
the page cache. Without SHARDS, scenes of 288 px are drawn.

Processes begin anew; their time runs, imports and tokenizer behind them, from `open_shards` to the first batch in the
middle of epoch 3. A further process measures what 64 open indexes add to the memory that is its own alone, with
`scan.json` and the plan, for each sample of these indexes.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path

import numpy as np
import psutil
import torch
from safetensors.numpy import load_file

import vlkd.models  # noqa: F401 - before anything imports torchvision
from vlkd.data.loader import BatchStream
from vlkd.data.plan import Plan
from vlkd.data.samples import Consumer, SampleSequence
from vlkd.data.scan import Scan, ShardEntry, _write_scan
from vlkd.data.scenes import generate_scenes
from vlkd.data.shard_rows import SUFFIX, read_header, write_columns
from vlkd.data.shard_table import OPENED, ShardTable, open_shards
from vlkd.data.shard_writer import write_shards
from vlkd.data.views import ViewSettings
from vlkd.models.preprocessing import CompositePreprocessing, PixelSettings
from vlkd.models.tokenizer import CompactTokenizer, train_tokenizer

EPOCHS = 2.5
"""Passed before the resume, which so lies in the middle of the third."""


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "data", nargs="?", metavar="SHARDS", help="a folder of shards, indexed in place where it is not"
    )
    parser.add_argument("--shards", type=int, default=1000)
    parser.add_argument("--samples", type=int, default=10_000, help="of each shard")
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--size", type=int, default=224, help="of the pixels")
    parser.add_argument("--workers", default="0,2")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--measure", choices=("time", "memory"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.measure:
        print(json.dumps(first_batch(args) if args.measure == "time" else memory(args.data)))
        return
    figures: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "many"
        real = open_shards(args.data or drawn_shards(Path(temporary) / "shards"))
        write_many(folder, real, args.shards, args.samples)
        for workers in args.workers.split(","):
            more = ("--workers", workers, "--size", str(args.size), "--batch-size", str(args.batch_size))
            found = [measured("time", folder, *more) for _ in range(args.rounds)]
            for name in found[0]:
                values = [row[name] for row in found]
                value = figures[f"{workers} workers: {name}"] = statistics.median(values)
                print(f"{workers} workers: {name:<42} {value:7.3f}  ({min(values):.3f} to {max(values):.3f})")
        figures |= measured("memory", folder)
        size = (folder / f"0000{SUFFIX}").stat().st_size
        figures["index on disk, bytes per sample"] = size / args.samples
    print("                                            the first batch is wanted below 2 s")
    for name, value in list(figures.items())[-4:]:
        print(f"{name:<53} {value:7.2f}  {'< 64' if 'growth' in name else ''}")
    if args.json:
        print(json.dumps({"shards": args.shards, "samples": args.samples} | figures, allow_nan=False))


def measured(what: str, folder: Path, *more: str) -> dict[str, float]:
    """What a process of its own found."""
    # Settings of the allocator may keep what was freed, which is no index.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MALLOC_")}
    command = [sys.executable, __file__, str(folder), "--measure", what, *more]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=environment)
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def drawn_shards(folder: Path) -> str:
    """Scenes of the size of small photos."""
    write_shards(generate_scenes("shapes", count=1000, seed=0, split="train", image_size=288), folder)
    return str(folder)


def write_many(folder: Path, real: ShardTable, shards: int, samples: int) -> None:
    """The synthetic scan, and the tokenizer of its captions."""
    folder.mkdir()
    first = real.shards[0]
    columns = load_file(first.index)
    shutil.copy(first.place, folder / "0000.tar")
    # An index tells of no more samples than the shard has headers for: zeros behind the end of a tar are no harm.
    size = max(os.path.getsize(first.place), 512 * samples)
    os.truncate(folder / "0000.tar", size)
    rows = np.arange(samples) % len(columns["captions"])
    columns = {name: column[rows] for name, column in columns.items() if name not in ("keys", "key_ends")}
    columns["key_ends"] = (12 * np.arange(1, samples + 1)).astype(np.uint32)
    counts = columns["captions"]
    totals = {
        "bytes": size,
        "samples": samples,
        "labelled": int((counts > 0).sum()),
        "captions": int(counts.sum()),
        "most_captions": int(counts.max()),
    }
    header, entries = read_header(first.index), []
    for number in range(shards):
        name = f"{number:04d}.tar"
        if number:
            os.link(folder / "0000.tar", folder / name)
        keys = "".join(f"{number:04d}{row:08d}" for row in range(samples))
        columns["keys"] = np.frombuffer(keys.encode(), np.uint8)
        own = asdict(header) | totals | {"file": name, "problems": {}, "problem_list": ()}
        entry = ShardEntry(place=name, index=f"{number:04d}{SUFFIX}", sha256=header.sha256, **totals)
        write_columns(folder / entry.index, type(header)(**own), columns)
        entries.append(entry)
    _write_scan(Scan(folder, tuple(entries), unique_keys=True))
    captions = [caption for row in range(min(len(real), 1000)) for caption in real.captions_of(row)]
    train_tokenizer(captions, vocab_size=4000).save(folder)


def first_batch(args: argparse.Namespace) -> dict[str, float]:
    """What a resumed run does until its first batch is there."""
    pixels = PixelSettings(size=args.size, mean=(0.5,) * 3, std=(0.5,) * 3, interpolation="bicubic", crop_fraction=1)
    tokenizer = CompactTokenizer.load(Path(args.data) / "tokenizer.json")
    transform = CompositePreprocessing(pixels, tokenizer, context_length=32)
    consumers = {"student": Consumer(preprocessing=transform, image=True, text=True, student=True)}
    started = time.perf_counter()
    table = open_shards(args.data)
    opened = time.perf_counter()
    plan = Plan([table.sizes()], seed=0)
    sequence = SampleSequence(table, consumers, ViewSettings(), seed=0, plan=plan)
    stream = BatchStream(sequence, batch_size=args.batch_size, samples=10**12, workers=int(args.workers))
    stream.load_state_dict(stream.state_dict() | {"samples": int(EPOCHS * len(table))})
    batches = iter(stream)
    batch = next(batches)
    ended = time.perf_counter()
    assert len(batch.keys) == args.batch_size
    return {"scan opened, s": opened - started, "first batch, s": ended - started}


def memory(folder: str) -> dict[str, float]:
    """Bytes per sample of as many indexes as are held open."""
    process = psutil.Process()
    gc.collect()
    before = process.memory_full_info()
    table = open_shards(folder)
    plan = Plan([table.sizes()], seed=0)
    plan.row(int(EPOCHS * len(table)))
    shards = min(OPENED, len(table.shards))
    ends = [0, *table.ends]
    for number in range(shards):
        table.key(ends[number])
    gc.collect()
    after = process.memory_full_info()
    held = sum(index.nbytes for index in table._rows.values())
    rows = ends[shards]
    return {
        "index in memory, bytes per sample": held / rows,
        "growth of the process (USS), bytes per sample": (after.uss - before.uss) / rows,
        "growth of the process (RSS), bytes per sample": (after.rss - before.rss) / rows,
    }


if __name__ == "__main__":
    main()
