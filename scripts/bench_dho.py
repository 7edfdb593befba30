"""What the second head and the cached teacher cost, in one run, interleaved step by step.

    python scripts/bench_dho.py data.root=DATA teacher.ref=runs/teacher/student model.image=mobilenetv3_small_100 --json

Words with "=" are settings of `vlkd train dho`. Rows, of the same student, batch and student images per step: labels
alone (one part), one head from labels and a cached teacher, two heads from labels and a cached teacher. Ready rows step
on one batch held in memory: the cost of the head. Loader rows read the engine's own streams, decoding and augmentation
included, those of both parts: the cost of the teacher per image. All rows go in turn, one step each, so that whatever
else the machine does meets them alike; figures are medians over rounds of ratios within a round.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path

import torch

import vlkd.models  # noqa: F401 - before anything imports torchvision
from vlkd import recipes
from vlkd.config import override
from vlkd.data.pool import open_pool
from vlkd.data.samples import Batch
from vlkd.distill.class_distiller import ClassDistiller
from vlkd.distill.class_terms import heads_trained
from vlkd.engine.classify.run import build_student, open_accelerator, open_streams
from vlkd.engine.classify.step import backward_step
from vlkd.engine.classify.teaching import prepare_teacher
from vlkd.engine.distributed import clip_gradients
from vlkd.engine.optim import parameter_groups

LABELS, ONE, TWO = "labels alone", "one head", "two heads"
CHANGES = {LABELS: ["method.distillation=0", "teacher.ref="], ONE: ["model.heads=one"], TWO: ["model.heads=two"]}
READY, LOADER = "ready batch", "loader"
STILL = "train.lr=1e-9"
"""Thousands of steps on one batch would end in gradients of zero; weights that stay keep every step alike."""
WANTED = {"second_head_time": "<= 1.03", "two_heads_over_labels_rate": ">= 0.97"}


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("settings", nargs="+", metavar="KEY=VALUE")
    parser.add_argument("--steps", type=int, default=10, help="per row and round")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    if min(args.steps, args.rounds, args.threads) < 1:
        parser.error("--steps, --rounds and --threads must be 1 or more")
    torch.set_num_threads(args.threads)
    with tempfile.TemporaryDirectory() as folder:
        rows = Bench(args.settings, Path(folder)).rows()
        for _ in range(2):
            for step in rows.values():
                step()
        rounds: list[dict[str, float]] = []
        images = {}
        for _ in range(args.rounds):
            seconds = dict.fromkeys(rows, 0.0)
            images = dict.fromkeys(rows, 0)
            for number in range(args.steps):
                # Every other time in the other order: what follows on what is the same for all.
                for name, step in reversed(rows.items()) if number % 2 else rows.items():
                    started = time.perf_counter()
                    images[name] += step()
                    if torch.cuda.is_available():
                        torch.cuda.synchronize()
                    seconds[name] += time.perf_counter() - started
            rounds.append({name: seconds[name] / images[name] for name in rows})
    report(rounds, images[f"{TWO}, {READY}"] // args.steps, args)


class Bench:
    """The data, the teacher and its stored features, and for each row a function that makes a step."""

    def __init__(self, settings: list[str], folder: Path) -> None:
        self.recipe = recipes.load(recipes.find("tasks", "dho"))
        self.settings, self.folder = settings, folder
        # What the caller sets comes after and wins.
        stored = [f"teacher.folder={folder / 'features'}"]
        self.config = override(self.recipe.config(), [*stored, *settings, STILL])
        # Streams that no bench will end.
        self.config = replace(
            self.config, train=replace(self.config.train, samples=self.config.train.batch_size * 10**6)
        )
        self.accelerator = open_accelerator(self.config)
        self.pool = open_pool(self.config.data, seed=self.config.seed)
        self.teaching = prepare_teacher(self.config, self.pool, self.accelerator)

    def rows(self) -> dict[str, Callable[[], int]]:
        """Each makes one step and says how many images the student saw."""
        found = {}
        for name, changes in CHANGES.items():
            distiller, batches = self.opened(changes)
            ready = next(batches)
            # Alike in memory for all: each row has an optimiser of its own.
            optimizer = torch.optim.AdamW(
                parameter_groups(distiller, self.config.train.weight_decay), lr=self.config.train.lr
            )
            found[f"{name}, {READY}"] = self.stepping(distiller, optimizer, lambda ready=ready: ready)
            found[f"{name}, {LOADER}"] = self.stepping(distiller, optimizer, batches.__next__)
        return {name: found[name] for kind in (READY, LOADER) for name in found if name.endswith(kind)}

    def opened(self, changes: list[str]) -> tuple[ClassDistiller, Iterator[dict[str, Batch]]]:
        """A method's student and its batches, on the device."""
        config = override(self.config, changes)
        terms = self.recipe.terms(config)
        teaching = self.teaching if config.teacher.ref else None
        torch.manual_seed(config.seed)
        student = build_student(config, self.pool, self.folder, heads_trained(terms), teaching)
        distiller = ClassDistiller(
            student, terms, torch.from_numpy(self.pool.labels), teaching.teacher if teaching else None
        )
        distiller.to(self.accelerator.device).train()
        if distiller.teacher is not None:
            distiller.teacher.to(self.accelerator.device)
        streams = open_streams(config, self.pool, student, terms, teaching, self.accelerator)
        return distiller, self.joined({part: iter(stream) for part, stream in streams.items()})

    def joined(self, streams: Mapping[str, Iterator[Batch]]) -> Iterator[dict[str, Batch]]:
        """The batches of all parts."""
        while True:
            yield {part: next(own).to(self.accelerator.device) for part, own in streams.items()}

    def stepping(
        self, distiller: ClassDistiller, optimizer: torch.optim.Optimizer, batches: Callable[[], dict[str, Batch]]
    ) -> Callable[[], int]:
        """Batch, forward, backward, update, as the engine does it."""

        def step() -> int:
            batch = batches()
            optimizer.zero_grad(set_to_none=True)
            backward_step(distiller, batch, self.accelerator)
            clip_gradients(distiller, self.config.train.clip or float("inf"))
            optimizer.step()
            return sum(len(part.keys) for part in batch.values())

        return step


def report(rounds: list[dict[str, float]], batch_size: int, args: argparse.Namespace) -> None:
    """Medians, and the medians of the ratios within each round."""
    milliseconds = {name: 1000 * statistics.median(one[name] for one in rounds) for name in rounds[0]}
    for name, value in milliseconds.items():
        own = [1000 * one[name] for one in rounds]
        rate = 1000 / value
        print(f"{name:<26} {value:8.3f} ms per image ({min(own):.3f} to {max(own):.3f}), {rate:8.1f} images/s")

    def ratio(first: str, second: str) -> float:
        return statistics.median(one[first] / one[second] for one in rounds)

    figures = {
        "second_head_time": ratio(f"{TWO}, {READY}", f"{ONE}, {READY}"),
        "one_head_over_labels_time": ratio(f"{ONE}, {READY}", f"{LABELS}, {READY}"),
        "two_heads_over_labels_rate": ratio(f"{LABELS}, {LOADER}", f"{TWO}, {LOADER}"),
        "one_head_over_labels_rate": ratio(f"{LABELS}, {LOADER}", f"{ONE}, {LOADER}"),
    }
    for name, value in figures.items():
        print(f"{name:<28} {value:8.4f}  {WANTED.get(name, '')}")
    if args.json:
        line = {"ms_per_image": milliseconds, "batch_size": batch_size, "threads": args.threads, "rounds": args.rounds}
        print(json.dumps(line | {"settings": args.settings} | figures, allow_nan=False))


if __name__ == "__main__":
    main()
