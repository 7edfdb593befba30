"""Step rates in one run, interleaved: the student alone, two cached teachers (uniform, balanced), two online teachers.

    python scripts/bench_distill.py --json

Student: timm resnet10t (1.1 M, 64 px) and a compact text tower of two layers, both trained; batch 128. Teachers: two of
timm's tf_efficientnet_lite0 at 224 px with a compact text tower of six layers, random weights (the rate does not depend
on them). Cached rows are AMMKD's terms with the batch's class vectors on both towers, through the engine's own step.
The online row is open_clip's `DistillClipLoss` for each teacher on the same student and batches, teachers under
no_grad.
All rows decode and augment the same drawn scenes through the same loader.

The cost model says that a step takes the student's time plus each teacher's forward pass; the last lines compare what
it predicts for online over cached with what was measured, and building the cache with the bare pass, decoding included.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from accelerate import Accelerator
from torch.utils.data import DataLoader

import vlkd.models  # noqa: F401 - before anything imports torchvision
from vlkd import recipes
from vlkd.config import override
from vlkd.data.loader import BatchStream
from vlkd.data.samples import Batch, Consumer, SampleSequence
from vlkd.data.scenes import generate_scenes
from vlkd.data.shards import write_shards
from vlkd.data.sources import Pairs, open_pairs
from vlkd.data.views import ViewSettings, geometry, view_of
from vlkd.distill.cache import CacheSpec, ensure_cache
from vlkd.distill.distiller import Distiller
from vlkd.distill.teachers import CachedTeacher, OnlineTeacher
from vlkd.distill.term import Term
from vlkd.engine.step import backward_step
from vlkd.models.composite import CompositeModel
from vlkd.models.spec import CompositeSpec, build_composite
from vlkd.models.tokenizer import CompactTokenizer, train_tokenizer
from vlkd.weighting import Fixed, GradientBalanced, Weighting

STUDENT = CompositeSpec(
    image="resnet10t",
    image_kwargs='{"channels":[32,64,128,216]}',
    image_size=64,
    text_width=192,
    text_layers=2,
    context_length=20,
    width=256,
)
TEACHER = CompositeSpec(image="tf_efficientnet_lite0", image_size=224, text_width=384, text_layers=6, text_heads=6)
NAMES = ("t0", "t1")
WANT = ("image.embed", "text.embed", "logit_scale")
ALONE, UNIFORM, BALANCED, ONLINE = "student alone", "cached, uniform", "cached, balanced", "open_clip, online"
TEACHERS, BUILD = "bare teachers on batches", "cache build"
PASS = "bare teacher with decoding"


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--steps", type=int, default=6, help="per row and round")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="bf16")
    parser.add_argument("--device", choices=("cpu", "auto"), default="cpu", help="auto takes a GPU where there is one")
    parser.add_argument("--student", default="", help="another timm image tower, for instance vit_tiny_patch16_224")
    parser.add_argument("--teacher", default="", help="another timm image tower, for instance vit_large_patch14_224")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        scenes = generate_scenes("shapes", count=4 * args.batch_size, seed=0, split="train", image_size=96)
        write_shards(scenes, Path(folder) / "train")
        bench = Bench(open_pairs(f"{folder}/train"), Path(folder), args)
        rows = {name: (args.steps, step) for name, step in bench.steps().items()}
        rows |= {name: (1, step) for name, step in bench.passes().items()}
        rates: dict[str, list[float]] = {name: [] for name in rows}
        for _, step in rows.values():
            step()
        for _ in range(args.rounds):
            for name, (count, step) in rows.items():
                started = time.perf_counter()
                samples = sum(step() for _ in range(count))
                if torch.cuda.is_available():
                    torch.cuda.synchronize()
                rates[name].append(samples / (time.perf_counter() - started))
    report(rates, args)


class Bench:
    """The declared models and their data; each row is a function that does its work once and returns its samples."""

    def __init__(self, pairs: Pairs, folder: Path, args: argparse.Namespace) -> None:
        self.pairs, self.folder, self.args = pairs, folder, args
        self.tokenizer: CompactTokenizer = train_tokenizer(pairs.texts(), vocab_size=500)
        self.accelerator = Accelerator(
            cpu=args.device == "cpu", mixed_precision="bf16" if args.precision == "bf16" else "no"
        )
        device = self.accelerator.device
        teacher = replace(TEACHER, image=args.teacher or TEACHER.image)
        self.student = STUDENT
        if args.student:
            self.student = replace(STUDENT, image=args.student, image_kwargs="", image_size=224)
        self.models = {
            name: channels_last(build_composite(teacher, tokenizer=self.tokenizer)).to(device) for name in NAMES
        }
        self.online = {name: OnlineTeacher(name, model) for name, model in self.models.items()}
        self.cached = {name: self.cache(name, folder / "cache" / name) for name in NAMES}
        self.builds = 0

    def new_student(self) -> CompositeModel:
        """The declared student, or the one that was asked for."""
        return channels_last(build_composite(self.student, tokenizer=self.tokenizer)).to(self.accelerator.device)

    def cache(self, name: str, folder: Path, views: int = 4) -> CachedTeacher:
        """A teacher's stored features of all images."""
        spec = CacheSpec(
            features=("image.embed", "text.embed"),
            views=views,
            view_settings=ViewSettings(),
            precision=self.args.precision,
        )
        model = self.models[name]
        return CachedTeacher(name, model.width, [ensure_cache(folder, name, model, self.pairs, spec)])

    def steps(self) -> dict[str, Callable[[], int]]:
        """The rows that train, and the teachers alone on the same batches."""
        recipe = recipes.load(recipes.find("tasks", "ammkd"))
        terms = recipe.terms(override(recipe.config(), [f"teachers.refs={','.join(NAMES)}"]))
        alone = [term for term in terms if not term.teacher]
        return {
            ALONE: self.engine_step(alone, {}, Fixed([1.0])),
            UNIFORM: self.engine_step(terms, self.cached, Fixed([0.5, 0.5])),
            BALANCED: self.engine_step(terms, self.cached, GradientBalanced(0.6)),
            ONLINE: self.open_clip_step(),
            TEACHERS: self.teachers_step(),
        }

    def passes(self) -> dict[str, Callable[[], int]]:
        """Building a cache of one view, and the bare pass over the same."""
        return {BUILD: self.build_once, PASS: self.pass_once}

    def batches(self, online: bool) -> Iterator[Batch]:
        """The endless stream that every row reads."""
        student = self.new_student()
        consumers = {"student": Consumer(preprocessing=student.preprocessing, image=True, text=True, student=True)}
        if online:
            for name, model in self.models.items():
                consumers[name] = Consumer(preprocessing=model.preprocessing, image=True, text=True)
        stored = None if online else next(iter(self.cached.values())).view
        sequence = SampleSequence(self.pairs, consumers, ViewSettings(), seed=0, view_cycle=4, stored_view=stored)
        return iter(BatchStream(sequence, batch_size=self.args.batch_size, samples=10**9))

    def engine_step(
        self, terms: Sequence[Term], teachers: dict[str, CachedTeacher], weighting: Weighting
    ) -> Callable[[], int]:
        """One step as the engine does it."""
        distiller = Distiller(self.new_student(), terms, teachers).train()
        optimizer = torch.optim.AdamW(distiller.parameters(), lr=1e-4)
        stream = self.batches(online=False)

        def step() -> int:
            batch = next(stream).to(self.accelerator.device)
            optimizer.zero_grad(set_to_none=True)
            backward_step(distiller, batch, weighting, self.accelerator)
            torch.nn.utils.clip_grad_norm_(distiller.parameters(), 1.0)
            optimizer.step()
            return len(batch.keys)

        return step

    def open_clip_step(self) -> Callable[[], int]:
        """One step of open_clip's distillation loss, once per teacher."""
        from open_clip.loss import DistillClipLoss

        student = self.new_student().train()
        loss = DistillClipLoss()
        optimizer = torch.optim.AdamW(student.parameters(), lr=1e-4)
        stream = self.batches(online=True)

        def unit(features: dict[str, torch.Tensor]) -> list[torch.Tensor]:
            return [torch.nn.functional.normalize(features[name].float(), dim=-1) for name in WANT[:2]]

        def step() -> int:
            batch = next(stream).to(self.accelerator.device)
            with self.accelerator.autocast():
                own = student.encode(batch.inputs["student"], WANT)
                targets = [teacher.targets(batch, WANT) for teacher in self.online.values()]
            total = torch.zeros((), device=self.accelerator.device)
            for target in targets:
                contrastive, distilled = loss(*unit(own), own["logit_scale"], *unit(target), target["logit_scale"])
                total = total + contrastive + distilled
            optimizer.zero_grad(set_to_none=True)
            total.backward()
            torch.nn.utils.clip_grad_norm_(student.parameters(), 1.0)
            optimizer.step()
            return len(batch.keys)

        return step

    def teachers_step(self) -> Callable[[], int]:
        """The teachers' forward passes on a prepared batch: the model's second part."""
        batch = next(self.batches(online=True)).to(self.accelerator.device)

        def step() -> int:
            with self.accelerator.autocast():
                for teacher in self.online.values():
                    teacher.targets(batch, WANT)
            return len(batch.keys)

        return step

    def build_once(self) -> int:
        """A new cache of one view of every image and of all captions."""
        self.builds += 1
        self.cache("t0", self.folder / f"build-{self.builds}", views=1)
        return len(self.pairs)

    @torch.no_grad()
    def pass_once(self) -> int:
        """The same views and captions through the bare model, nothing stored."""
        model, pairs = self.models["t0"], self.pairs
        loader = DataLoader(_Views(pairs, model), batch_size=64)
        with self.accelerator.autocast():
            for pixels in loader:
                model.encode({"pixels": pixels.to(model.device)}, ("image.embed",))
            texts = list(dict.fromkeys(pairs.texts()))
            for start in range(0, len(texts), 256):
                tokens = model.preprocessing.tokenize(texts[start : start + 256])
                model.encode({key: value.to(model.device) for key, value in tokens.items()}, ("text.embed",))
        return len(pairs)


class _Views:
    def __init__(self, pairs: Pairs, model: CompositeModel) -> None:
        self.pairs, self.transform = pairs, model.preprocessing

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, i: int) -> torch.Tensor:
        image = self.pairs.image(i, size_hint=2 * max(self.transform.image_size))
        return self.transform.view_transform(geometry(image, view_of(ViewSettings(), 0, self.pairs.keys[i], 0)))


def channels_last(model: CompositeModel) -> CompositeModel:
    """As the engine lays models out."""
    return model.to(memory_format=torch.channels_last)


def report(rates: dict[str, list[float]], args: argparse.Namespace) -> None:
    """Medians, and the medians of the ratios within each round."""
    medians = {name: statistics.median(values) for name, values in rates.items()}
    for name, value in medians.items():
        print(f"{name:<28} {value:8.1f} samples/s  (lowest {min(rates[name]):.1f}, highest {max(rates[name]):.1f})")

    def ratio(a: str, b: str) -> float:
        return statistics.median(x / y for x, y in zip(rates[a], rates[b], strict=True))

    predicted = statistics.median(
        1 + alone / teachers for alone, teachers in zip(rates[ALONE], rates[TEACHERS], strict=True)
    )
    figures = {
        "cached_over_alone": ratio(UNIFORM, ALONE),
        "balanced_over_uniform_time": ratio(UNIFORM, BALANCED),
        "cached_over_open_clip": ratio(BALANCED, ONLINE),
        "cost_model": predicted,
        "measured_over_model": ratio(BALANCED, ONLINE) / predicted,
        "build_over_bare": ratio(BUILD, PASS),
    }
    wanted = {"cached_over_alone": ">= 0.95", "balanced_over_uniform_time": "<= 1.05"}
    wanted |= {"measured_over_model": ">= 0.85", "build_over_bare": ">= 0.9"}
    for name, value in figures.items():
        print(f"{name:<28} {value:8.3f}  {wanted.get(name, '')}")
    if args.json:
        line = {"samples_per_second": medians, "batch_size": args.batch_size, "threads": args.threads} | figures
        print(json.dumps(line, allow_nan=False))


if __name__ == "__main__":
    main()
