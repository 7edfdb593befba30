"""Ratios in one run, interleaved: the streaming loader, stored features read beside it, students on a device.

    python scripts/bench_stream.py SHARDS --json
    python scripts/bench_stream.py SHARDS --parts models --device cuda --workers 8 --batch-size 512

SHARDS is a folder that `vlkd prep scan` may index; without it, drawn scenes of 288 px are written to a passing folder.

`loader`: images/s of `BatchStream` (crops, flips, captions, hashes of all captions, tokens) over those of three other
loops with the same workers, batches and prefetching. `bare` reads the same members in the same order by offset, decodes
with the same `open_image`, makes the same tensors, and does nothing else. The two of `webdataset` mix 1,000 undecoded
samples, crop, flip, draw a caption and tokenise as the stream does; one decodes by itself, `webdataset, open_image` as
the stream does. The words of the captions are known to the tokenizer, as they soon are in a run.

`cache`: the loop with the features of two teachers (512 wide, four views, float16) read for each batch, and their views
applied, over the one without; alone, and with a small student's step.

`models`: students alone, and with two teachers, stored or beside them; from the stream, and on one batch that is kept.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import json
import math
import os
import random
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

import vlkd.models  # noqa: F401 - before anything imports torchvision
from vlkd import recipes
from vlkd.config import override
from vlkd.data.images import open_image
from vlkd.data.loader import BatchStream
from vlkd.data.plan import Plan
from vlkd.data.samples import Batch, Consumer, SampleSequence
from vlkd.data.scenes import generate_scenes
from vlkd.data.shard_rows import Extent, read_rows
from vlkd.data.shard_table import ShardTable, open_shards
from vlkd.data.shard_writer import write_shards
from vlkd.data.views import View, ViewSettings, geometry
from vlkd.distill.cache import CacheSpec, ensure_cache
from vlkd.distill.distiller import Distiller
from vlkd.distill.teachers import CachedTeacher, OnlineTeacher
from vlkd.engine.step import backward_step
from vlkd.features import Preprocessing
from vlkd.models.base import channels_last
from vlkd.models.composite import CompositeModel
from vlkd.models.preprocessing import CompositePreprocessing, PixelSettings
from vlkd.models.spec import CompositeSpec, build_composite
from vlkd.models.tokenizer import train_tokenizer
from vlkd.weighting import Fixed

PARTS, VIEWS = ("loader", "cache", "models"), 4
SMALL = CompositeSpec(
    image="resnet10t", image_kwargs='{"channels":[32,64,128,216]}', image_size=64, text_width=192, text_layers=2
)
STORED = replace(SMALL, image_kwargs='{"channels":[8,16,24,32]}', image_size=32, text_width=64, width=512)
"""Whose features are stored: reading them takes the same time whoever computed them."""
WANT = ("image.embed", "text.embed", "logit_scale")

Begin = Callable[[], Callable[[], object]]
"""Begins a loop, and gives what does its next batch."""
Teachers = dict[str, CachedTeacher] | dict[str, OnlineTeacher]


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shards", nargs="?", help="a folder of shards, indexed in place where it is not")
    parser.add_argument("--parts", default="loader,cache", help="of " + ", ".join(PARTS))
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
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    figures: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(open_shards(args.shards or drawn_shards(Path(folder) / "shards")), Path(folder), args)
        parts = dict(zip(PARTS, (bench.loader, bench.cache, bench.models), strict=True))
        for name in args.parts.split(","):
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
        texts = [caption for row in range(min(len(table), 2000)) for caption in table.captions_of(row)]
        self.tokenizer = train_tokenizer(texts, vocab_size=4000)
        self.tokenizer.tokenize(texts, 32)  # which makes their words known
        self.plan = Plan([table.sizes()], seed=0)
        cpu = args.device == "cpu"
        self.accelerator = Accelerator(cpu=cpu, mixed_precision="no" if cpu else "bf16")
        self.device = self.accelerator.device

    def measure(self, rows: dict[str, Begin], workers: int) -> dict[str, list[float]]:
        """Images/s of every row once per round, without the batches that fill its loop."""
        rates: dict[str, list[float]] = {name: [] for name in rows}
        for _ in range(self.args.rounds):
            for name, begin in rows.items():
                step = begin()
                for _ in range(1 + workers):
                    step()
                self.wait()
                started = time.perf_counter()
                for _ in range(self.args.batches):
                    step()
                self.wait()
                rates[name].append(self.args.batches * self.args.batch_size / (time.perf_counter() - started))
                del step
                gc.collect()
        for name, values in rates.items():
            print(f"{name:<42} {statistics.median(values):8.1f} images/s  ({min(values):.1f} to {max(values):.1f})")
        return rates

    def wait(self) -> None:
        """Until the device is idle."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def loader(self) -> dict[str, float]:
        """The stream over other loops."""
        figures: dict[str, float] = {}
        sizes, counts = (map(int, text.split(",")) for text in (self.args.sizes, self.args.loader_workers))
        for size, workers in itertools.product(sizes, counts):
            pixels = PixelSettings(size=size, mean=(0.5,) * 3, std=(0.5,) * 3, interpolation="bicubic", crop_fraction=1)
            transform = CompositePreprocessing(pixels, self.tokenizer, context_length=32)
            loops = {
                "stream": self.stream(transform, workers),
                "bare": self.bare(transform, workers),
                "webdataset": self.webdataset(transform, workers, own_decoder=True),
                "webdataset, open_image": self.webdataset(transform, workers, own_decoder=False),
            }
            label = f"{size} px, {workers} workers: "
            rows: dict[str, Begin] = {label + name: lambda it=loop: iter(it).__next__ for name, loop in loops.items()}
            rates = self.measure(rows, workers)
            for other in list(loops)[1:]:
                limit = 0.95 if other == "bare" else 1.0
                figures |= compared(rates, label + "stream", label + other, f">= {limit}")
        return figures

    def stream(
        self,
        preprocessing: Preprocessing,
        workers: int,
        view: Callable[[int, int], View] | None = None,
        beside: dict[str, Consumer] | None = None,
    ) -> BatchStream:
        """The product's loader, for a student and teachers beside it; stored views come round."""
        student = Consumer(preprocessing=preprocessing, image=True, text=True, student=True)
        consumers, cycle = {"student": student} | (beside or {}), VIEWS if view else 0
        sequence = SampleSequence(
            self.table, consumers, ViewSettings(), seed=0, plan=self.plan, view_cycle=cycle, stored_view=view
        )
        return BatchStream(sequence, batch_size=self.args.batch_size, samples=10**9, workers=workers)

    def bare(self, transform: CompositePreprocessing, workers: int) -> DataLoader[Tensor]:
        """The same pictures, decoded and resized."""
        size = self.args.batch_size
        positions = (range(first, first + size) for first in itertools.count(0, size))
        pictures = _Pictures(self.table, self.plan, transform)
        prefetch = 4 if workers else None
        return DataLoader(pictures, batch_sampler=positions, num_workers=workers, prefetch_factor=prefetch)

    def webdataset(self, transform: CompositePreprocessing, workers: int, *, own_decoder: bool) -> Iterable[Any]:
        """Its usual pipeline, endless."""
        import webdataset

        hint = 2 * max(transform.image_size)

        def prepare(sample: tuple[Any, Any]) -> tuple[Tensor, str]:
            picture, text = sample
            image = picture if own_decoder else open_image(picture, size_hint=hint)
            captions = (text if own_decoder else json.loads(text))["captions"]
            return transform.view_transform(geometry(image, random_view())), random.choice(captions)

        def collate(samples: Sequence[tuple[Tensor, str]]) -> tuple[Tensor, dict[str, Tensor]]:
            pixels, captions = zip(*samples, strict=True)
            return torch.stack(pixels), transform.tokenize(captions)

        urls = [shard.place for shard in self.table.shards]
        samples = webdataset.WebDataset(urls, shardshuffle=len(urls), empty_check=False).repeat().shuffle(1000)
        decoded = samples.decode("pil") if own_decoder else samples
        batches = decoded.to_tuple("jpg;png;webp", "json").map(prepare)
        batches = batches.batched(self.args.batch_size, collation_fn=collate, partial=False)
        prefetch = 4 if workers else None
        return webdataset.WebLoader(batches, batch_size=None, num_workers=workers, prefetch_factor=prefetch)

    def cache(self) -> dict[str, float]:
        """What reading stored features takes."""
        teachers, workers = self.cached, self.args.workers
        student = channels_last(build_composite(SMALL, tokenizer=self.tokenizer)).to(self.device)
        step = self.step(student, {})
        plain = self.stream(student.preprocessing, workers)
        stored = self.stream(student.preprocessing, workers, teachers["t0"].view)

        def read(batch: Batch) -> Batch:
            for teacher in teachers.values():
                teacher.targets(batch, WANT)
            return batch

        def kept() -> Callable[[], object]:
            batch = next(iter(stored))
            return lambda: read(batch)

        rows: dict[str, Begin] = {
            "stream": lambda: each(plain, lambda batch: batch),
            "stream, stored features": lambda: each(stored, read),
            "step": lambda: each(plain, step),
            "step, stored features": lambda: each(stored, lambda batch: step(read(batch))),
            "stored features alone": kept,
        }
        rates = self.measure(rows, workers)
        alone = compared(rates, "stream, stored features", "stream", "")
        return alone | compared(rates, "step, stored features", "step", ">= 0.97")

    @cached_property
    def cached(self) -> dict[str, CachedTeacher]:
        """Two teachers' features."""
        spec = CacheSpec(features=WANT[:2], views=VIEWS, view_settings=ViewSettings(), dtype="float16")
        found = {}
        for name in ("t0", "t1"):
            model = build_composite(STORED, tokenizer=self.tokenizer, name=name).to(self.device)
            reader = ensure_cache(self.folder / "cache" / name, name, model, self.table, spec)
            found[name] = CachedTeacher(name, model.width, [reader])
        return found

    def step(self, student: CompositeModel, teachers: Teachers) -> Callable[[Batch], None]:
        """One step as the engine does it: CLIP's loss, and the teachers' embeddings matched."""
        recipe = recipes.load(recipes.find("tasks", "pretrain"))
        words = [f"teachers.refs={','.join(teachers)}", "method.matching=8"] if teachers else []
        distiller = Distiller(student, recipe.terms(override(recipe.config(), words)), teachers)
        distiller.to(self.device).train()
        optimizer = torch.optim.AdamW(distiller.parameters(), lr=1e-4)
        weighting = Fixed([1 / max(1, len(teachers))] * max(1, len(teachers)))

        def step(batch: Batch) -> None:
            optimizer.zero_grad(set_to_none=True)
            backward_step(distiller, batch.to(self.device), weighting, self.accelerator)
            torch.nn.utils.clip_grad_norm_(distiller.parameters(), 1.0)
            optimizer.step()

        return step

    def models(self) -> dict[str, float]:
        """Students alone, with stored features, and with teachers beside them."""
        cached, workers = self.cached, self.args.workers
        spec = CompositeSpec(image=self.args.teacher, text_width=512, text_layers=6, text_heads=8)
        online: dict[str, OnlineTeacher] = {}
        for name in cached:
            model = channels_last(build_composite(spec, tokenizer=self.tokenizer, name=name)).to(self.device)
            online[name] = OnlineTeacher(name, model)
        seen = model.preprocessing
        consumers = {name: Consumer(preprocessing=seen, image=True, text=True) for name in online}
        figures: dict[str, float] = {}
        for image in self.args.students.split(","):
            rows: dict[str, Begin] = {}
            for label, teachers in (("alone", {}), ("cached", cached), ("online", online)):
                student = channels_last(build_composite(replace(spec, image=image), tokenizer=self.tokenizer))
                step = self.step(student.to(self.device), teachers)
                view = cached["t0"].view if label == "cached" else None
                stream = self.stream(student.preprocessing, workers, view, consumers if label == "online" else None)
                batch = next(iter(stream)).to(self.device)
                rows[f"{image}, {label}"] = lambda it=stream, step=step: each(it, step)
                rows[f"{image}, {label}, prepared"] = lambda batch=batch, step=step: lambda: step(batch)
            rates = self.measure(rows, workers)
            figures |= {name: statistics.median(values) for name, values in rates.items()}
            for end in ("", ", prepared"):
                figures |= compared(rates, f"{image}, cached{end}", f"{image}, online{end}", "")
        return figures


class _Pictures(Dataset[Tensor]):
    """Pictures by position, read and resized, nothing else."""

    def __init__(self, table: ShardTable, plan: Plan, transform: CompositePreprocessing) -> None:
        self.plan, self.transform = plan, transform
        self.rows: list[tuple[str, Extent]] = []
        for shard in table.shards:
            index = read_rows(shard.index)
            self.rows += [(shard.place, index.image(i)) for i in range(len(index))]
        self.files: dict[str, int] = {}

    def __getitem__(self, position: int) -> Tensor:
        place, extent = self.rows[self.plan.row(position)[0]]
        if place not in self.files:
            self.files[place] = os.open(place, os.O_RDONLY)
        data = os.pread(self.files[place], extent.size, extent.offset)
        return self.transform.view_transform(open_image(data, size_hint=2 * max(self.transform.image_size)))


def each(stream: BatchStream, use: Callable[[Batch], object]) -> Callable[[], object]:
    """The stream, begun anew, each batch used."""
    batches = iter(stream)
    return lambda: use(next(batches))


def random_view() -> View:
    """A crop and flip as the stream's, in plain Python."""
    settings = ViewSettings()
    area, low = random.uniform(*settings.crop_scale), math.log(settings.crop_ratio[0])
    ratio = math.exp(min(max(random.uniform(low, -low), math.log(area)), -math.log(area)))
    width, height = min(1.0, math.sqrt(area * ratio)), min(1.0, math.sqrt(area / ratio))
    left, top = random.random() * (1 - width), random.random() * (1 - height)
    return View((left, top, left + width, top + height), random.random() < settings.flip, (1.0, 1.0, 1.0))


def compared(rates: dict[str, list[float]], one: str, other: str, limit: str) -> dict[str, float]:
    """The median of the ratios within each round, printed."""
    name = f"{one} over {other.rpartition(': ')[2]}"
    value = statistics.median(x / y for x, y in zip(rates[one], rates[other], strict=True))
    print(f"  {name:<60} {value:7.3f}  {limit}", flush=True)
    return {name: value}


if __name__ == "__main__":
    main()
