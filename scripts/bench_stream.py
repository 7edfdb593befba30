"""Ratios in one run, interleaved: the streaming loader, resuming, stored features beside it, students on a device.

    python scripts/bench_stream.py SHARDS --json
    python scripts/bench_stream.py SHARDS --parts models --device cuda --workers 8 --batch-size 512

SHARDS is a folder that `vlkd prep scan` may index; without it, drawn scenes of 288 px are written to a passing folder.

`loader`: images/s of `BatchStream` (crops, flips, captions, hashes of all captions, tokens) over those of three other
loops with the same workers, batches and prefetching, the first batches left out. `bare` reads the same members in the
same order by offset, decodes with the same `open_image`, makes the same tensors, and does nothing else. The two of
`webdataset` read the shards as they come, mix 1,000 undecoded samples, crop, flip, draw a caption and tokenise as the
stream does; one decodes by itself, `webdataset, open_image` as the stream does.

`resume`: 1,000 shards of 10,000 samples. The indexes and `scan.json` are synthetic; every shard is the same file under
another name, and an index of it repeats its members, so that what is read are real pictures (in the page cache, as are
the indexes). Processes begin anew; their time runs from `open_shards` to the first batch, in the middle of epoch 3.
Memory is the growth of the process by its plan, `scan.json` and 64 open indexes, for each sample of these.

`cache`: the loop with the features of two teachers (512 wide, four views, float16) read for each batch, and stored
views applied, over the one without; alone, and with a small student's step.

`models`: students with two teachers, stored or beside them, from the stream and on one batch that is kept.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import json
import os
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
from accelerate import Accelerator
from safetensors.numpy import load_file
from torch.utils.data import DataLoader, Dataset

import vlkd.models  # noqa: F401 - before anything imports torchvision
from vlkd import recipes
from vlkd.config import override
from vlkd.data.images import open_image
from vlkd.data.loader import BatchStream, _RankPositions
from vlkd.data.plan import Plan
from vlkd.data.samples import Batch, Consumer, SampleSequence
from vlkd.data.scan import Scan, ShardEntry, _write_scan
from vlkd.data.scenes import generate_scenes
from vlkd.data.shard_rows import SUFFIX, read_header, read_rows, write_columns
from vlkd.data.shard_table import OPENED, ShardTable, open_shards
from vlkd.data.shard_writer import write_shards
from vlkd.data.views import View, ViewSettings, geometry
from vlkd.distill.cache import CacheSpec, ensure_cache
from vlkd.distill.distiller import Distiller
from vlkd.distill.teachers import CachedTeacher, OnlineTeacher, Teacher
from vlkd.engine.step import backward_step
from vlkd.models.base import channels_last
from vlkd.models.composite import CompositeModel
from vlkd.models.preprocessing import CompositePreprocessing, PixelSettings
from vlkd.models.spec import CompositeSpec, build_composite
from vlkd.models.tokenizer import CompactTokenizer, train_tokenizer
from vlkd.weighting import Fixed

PARTS = ("loader", "resume", "cache", "models")
SMALL = CompositeSpec(
    image="resnet10t", image_kwargs='{"channels":[32,64,128,216]}', image_size=64, text_width=192, text_layers=2
)
STORED = replace(SMALL, image_kwargs='{"channels":[8,16,24,32]}', image_size=32, text_width=64, width=512)
"""Whose features are stored: reading them takes the same time whoever computed them."""
NAMES = ("t0", "t1")
WANT = ("image.embed", "text.embed", "logit_scale")
SHARDS, SAMPLES, WITHIN = 1000, 10_000, 3.5
"""Of the synthetic data; where they are resumed, in epochs."""

Rates = dict[str, list[float]]


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shards", nargs="?", help="a folder of shards, indexed in place where it is not")
    parser.add_argument("--parts", default="loader,resume,cache", help="of " + ", ".join(PARTS))
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--batches", type=int, default=8, help="per row and round")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--sizes", default="64,224", help="of the loader's pixels")
    parser.add_argument("--loader-workers", default="0,1,2")
    parser.add_argument("--workers", type=int, default=0, help="of cache and models")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--students", default="vit_tiny_patch16_224,vit_base_patch16_224", help="timm names")
    parser.add_argument("--teacher", default="vit_base_patch16_224", help="timm name of both teachers of `models`")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--resumed", help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    if args.resumed:
        print(json.dumps(first_batch(Path(args.resumed), args.batch_size)))
        return
    figures: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as folder:
        shards = args.shards or drawn_shards(Path(folder) / "shards")
        bench = Bench(open_shards(shards), Path(folder), args)
        parts = {"loader": bench.loader, "resume": bench.resume, "cache": bench.stored, "models": bench.students}
        for name in args.parts.split(","):
            print(f"-- {name}", flush=True)
            figures |= parts[name]()
    if args.json:
        print(json.dumps({"batch_size": args.batch_size, "threads": args.threads} | figures, allow_nan=False))


def drawn_shards(folder: Path) -> str:
    """Scenes of the size of small photos."""
    scenes = generate_scenes("shapes", count=2000, seed=0, split="train", image_size=288)
    write_shards(scenes, folder, samples_per_shard=250)
    return str(folder)


class Bench:
    """The declared data and models; each part prints its rows and gives its figures."""

    def __init__(self, table: ShardTable, folder: Path, args: argparse.Namespace) -> None:
        self.table, self.folder, self.args = table, folder, args
        rows = range(min(len(table), 2000))
        self.tokenizer: CompactTokenizer = train_tokenizer(
            [caption for row in rows for caption in table.captions_of(row)], vocab_size=4000
        )
        self.plan = Plan([table.sizes()], seed=0)
        cuda = args.device == "cuda"
        self.accelerator = Accelerator(cpu=not cuda, mixed_precision="bf16" if cuda else "no")

    def measure(self, rows: dict[str, Callable[[], float]]) -> Rates:
        """Every row once per round."""
        rates: Rates = {name: [] for name in rows}
        for _ in range(self.args.rounds):
            for name, row in rows.items():
                rates[name].append(row())
        for name, values in rates.items():
            print(f"{name:<44} {statistics.median(values):9.1f} /s  ({min(values):.1f} to {max(values):.1f})")
        return rates

    # The loader

    def loader(self) -> dict[str, float]:
        """The stream over other loops."""
        figures: dict[str, float] = {}
        for size, workers in itertools.product(*(map(int, text.split(",")) for text in self.loops())):
            transform = preprocessing(size, self.tokenizer)
            loops = {
                "stream": lambda t=transform, w=workers: iter(self.stream({"student": student_of(t)}, w)),
                "bare": lambda t=transform, w=workers: iter(self.bare(t, w)),
                "webdataset": lambda t=transform, w=workers: iter(self.webdataset(t, w, own_decoder=True)),
                "webdataset, open_image": lambda t=transform, w=workers: iter(self.webdataset(t, w, own_decoder=False)),
            }
            label = f"{size} px, {workers} workers"
            rates = self.measure({f"{label}: {name}": self.timed(loop, workers) for name, loop in loops.items()})
            for other in list(loops)[1:]:
                over = ratio(rates, f"{label}: stream", f"{label}: {other}")
                figures[f"{label}: stream over {other}"] = over
                print(f"  {label}: stream over {other:<24} {over:7.3f}  >= {0.95 if other == 'bare' else 1.0}")
        return figures

    def loops(self) -> tuple[str, str]:
        """Sizes and workers that are measured."""
        return self.args.sizes, self.args.loader_workers

    def timed(self, loop: Callable[[], Iterator[Any]], workers: int) -> Callable[[], float]:
        """Images/s of a loop, begun anew, without its first batches."""

        def row() -> float:
            batches = loop()
            for _ in range(1 + workers):
                next(batches)
            started = time.perf_counter()
            for _ in range(self.args.batches):
                next(batches)
            seconds = time.perf_counter() - started
            del batches
            gc.collect()
            return float(self.args.batches * self.args.batch_size / seconds)

        return row

    def stream(
        self, consumers: dict[str, Consumer], workers: int, view: Callable[[int, int], View] | None = None
    ) -> BatchStream:
        """The product's loader; stored views come round after four epochs."""
        cycle = 4 if view else 0
        sequence = SampleSequence(
            self.table, consumers, ViewSettings(), seed=0, plan=self.plan, view_cycle=cycle, stored_view=view
        )
        return BatchStream(sequence, batch_size=self.args.batch_size, samples=10**9, workers=workers)

    def bare(self, transform: CompositePreprocessing, workers: int) -> DataLoader[torch.Tensor]:
        """The same pictures, decoded and resized."""
        positions = _RankPositions(0, 10**9, self.args.batch_size, 0, 1)
        prefetch = 4 if workers else None
        pictures = _Pictures(self.table, self.plan, transform)
        return DataLoader(pictures, batch_sampler=positions, num_workers=workers, prefetch_factor=prefetch)

    def webdataset(self, transform: CompositePreprocessing, workers: int, own_decoder: bool) -> Iterator[Any]:
        """Its usual pipeline, endless."""
        import webdataset

        hint = 2 * max(transform.image_size)

        def prepare(sample: tuple[Any, Any]) -> tuple[torch.Tensor, str]:
            picture, text = sample
            image = picture if own_decoder else open_image(picture, size_hint=hint)
            captions = (text if own_decoder else json.loads(text))["captions"]
            return transform.view_transform(geometry(image, random_view())), random.choice(captions)

        def collate(samples: Sequence[tuple[torch.Tensor, str]]) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
            pixels, captions = zip(*samples, strict=True)
            return torch.stack(pixels), transform.tokenize(captions)

        urls = [shard.place for shard in self.table.shards]
        samples = webdataset.WebDataset(urls, shardshuffle=len(urls), empty_check=False).repeat().shuffle(1000)
        decoded = samples.decode("pil") if own_decoder else samples
        batches = decoded.to_tuple("jpg;png;webp", "json").map(prepare)
        batches = batches.batched(self.args.batch_size, collation_fn=collate, partial=False)
        prefetch = 4 if workers else None
        return webdataset.WebLoader(batches, batch_size=None, num_workers=workers, prefetch_factor=prefetch)

    # Resuming

    def resume(self) -> dict[str, float]:
        """Seconds to the first batch, and bytes per sample."""
        folder = self.folder / "many"
        entry = write_many(folder, self.table)
        self.tokenizer.save(folder)
        command = [sys.executable, __file__, "--resumed", str(folder), "--batch-size", str(self.args.batch_size)]
        found = [
            json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[-1])
            for _ in range(self.args.rounds)
        ]
        figures = {name: statistics.median(row[name] for row in found) for name in found[0]}
        figures["index, bytes on disk per sample"] = (folder / entry.index).stat().st_size / SAMPLES
        limits = ("< 2", "", "< 2", "< 64", "", "")
        for (name, value), limit in zip(figures.items(), limits, strict=True):
            print(f"{name:<52} {value:8.3f}  {limit}")
        return figures

    # Stored features

    def stored(self) -> dict[str, float]:
        """What reading them takes."""
        teachers = self.cached()
        student = channels_last(build_composite(SMALL, tokenizer=self.tokenizer))
        consumers = {"student": student_of(student.preprocessing)}
        plain = iter(self.stream(consumers, self.args.workers))
        applied = iter(self.stream(consumers, self.args.workers, teachers["t0"].view))
        step = self.step(student, {})

        def read(batch: Batch) -> Batch:
            for teacher in teachers.values():
                teacher.targets(batch, WANT)
            return batch

        rows: dict[str, Callable[[], object]] = {
            "stream": lambda: next(plain),
            "stream, stored features": lambda: read(next(applied)),
            "step": lambda: step(next(plain)),
            "step, stored features": lambda: step(read(next(applied))),
            "features alone": lambda kept=next(applied): read(kept),
        }
        rates = self.measure({name: self.repeated(row) for name, row in rows.items()})
        figures = {f"{name}: with stored features over without": 0.0 for name in ("stream", "step")}
        for (name, limit), key in zip((("stream", ""), ("step", ">= 0.97")), figures, strict=True):
            figures[key] = ratio(rates, f"{name}, stored features", name)
            print(f"  {key:<44} {figures[key]:7.3f}  {limit}")
        return figures

    def repeated(self, row: Callable[[], object]) -> Callable[[], float]:
        """Images/s of a call for each batch, the first left out."""

        def rate() -> float:
            row()
            self.wait()
            started = time.perf_counter()
            for _ in range(self.args.batches):
                row()
            self.wait()
            return float(self.args.batches * self.args.batch_size / (time.perf_counter() - started))

        return rate

    def wait(self) -> None:
        """Until the device is idle."""
        if self.accelerator.device.type == "cuda":
            torch.cuda.synchronize()

    def cached(self) -> dict[str, CachedTeacher]:
        """Two teachers' features of four views."""
        spec = CacheSpec(features=WANT[:2], views=4, view_settings=ViewSettings(), dtype="float16")
        found = {}
        for name in NAMES:
            model = build_composite(STORED, tokenizer=self.tokenizer, name=name).to(self.accelerator.device)
            reader = ensure_cache(self.folder / "cache" / name, name, model, self.table, spec)
            found[name] = CachedTeacher(name, model.width, [reader])
        return found

    # Students

    def step(self, student: CompositeModel, teachers: dict[str, Any]) -> Callable[[Batch], None]:
        """One step as the engine does it, with CLIP's loss and embeddings matched."""
        recipe = recipes.load(recipes.find("tasks", "pretrain"))
        words = [f"teachers.refs={','.join(teachers)}", "method.matching=8"] if teachers else []
        terms = recipe.terms(override(recipe.config(), words))
        sources: dict[str, Teacher] = dict(teachers)
        distiller = Distiller(student, terms, sources).to(self.accelerator.device).train()
        optimizer = torch.optim.AdamW(distiller.parameters(), lr=1e-4)
        weighting = Fixed([1 / len(teachers)] * len(teachers) if teachers else [1.0])

        def step(batch: Batch) -> None:
            moved = batch.to(self.accelerator.device)
            optimizer.zero_grad(set_to_none=True)
            backward_step(distiller, moved, weighting, self.accelerator)
            torch.nn.utils.clip_grad_norm_(distiller.parameters(), 1.0)
            optimizer.step()

        return step
