"""Step rates in one run, interleaved: the student alone, with two teachers' features in memory, with an online teacher.

    python scripts/bench_distill.py --json

Student: timm resnet10t (1.1 M, 64 px) and a compact text tower, both trained; batch 128. Teachers: timm's
tf_efficientnet_lite0 at 224 px and a compact text tower of six layers, random weights (the rate does not depend on
them). The online row is open_clip's `DistillClipLoss` on the same student and batches, its teacher run under no_grad.
All rows decode and augment the same drawn scenes through the same loader.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

import vlkd.models  # noqa: F401 - before anything imports torchvision
from vlkd.data.loader import Batch, BatchStream, Consumer, Decoded, SampleSequence
from vlkd.data.scenes import generate_scenes
from vlkd.data.shards import write_shards
from vlkd.data.sources import Pairs, open_pairs
from vlkd.data.views import ViewSettings
from vlkd.distill.distiller import Distiller
from vlkd.distill.teachers import OnlineTeacher, StoredTeacher, Teacher
from vlkd.distill.term import Term
from vlkd.models.composite import CompositeModel
from vlkd.models.spec import CompositeSpec, build_composite
from vlkd.models.tokenizer import CompactTokenizer, train_tokenizer
from vlkd.objectives import embedding_mse, info_nce, relational_kl

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
OWN = ("student.image.embed", "student.text.embed")


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--steps", type=int, default=6, help="per row and round")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="bf16")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        scenes = generate_scenes("shapes", count=4 * args.batch_size, seed=0, split="train", image_size=96)
        write_shards(scenes, Path(folder) / "train")
        rows = build_rows(open_pairs(f"{folder}/train"), args)
        rates: dict[str, list[float]] = {name: [] for name in rows}
        for step in rows.values():
            step()
        for _ in range(args.rounds):
            for name, step in rows.items():
                started = time.perf_counter()
                for _ in range(args.steps):
                    step()
                rates[name].append(args.steps * args.batch_size / (time.perf_counter() - started))
    report(rates, args)


def build_rows(pairs: Pairs, args: argparse.Namespace) -> dict[str, Callable[[], None]]:
    """Per row a function that does one step."""
    tokenizer = train_tokenizer(pairs.texts(), vocab_size=500)
    teacher = build_composite(TEACHER, tokenizer=tokenizer).to(memory_format=torch.channels_last)
    texts = len(pairs.texts())
    stored = {
        f"t{m}": StoredTeacher(
            f"t{m}",
            256,
            {
                "image.embed": torch.randn(4, len(pairs), 256),
                "text.embed": torch.randn(texts, 256),
                "logit_scale": torch.tensor(20.0),
            },
        )
        for m in range(2)
    }
    contrastive = Term(name="contrastive", objective=info_nce, features=(*OWN, "student.logit_scale"), match=True)
    distilled = [contrastive, *(term for name in stored for term in teacher_terms(name))]
    online = OnlineTeacher("online", teacher)
    return {
        "student alone": row(pairs, tokenizer, [contrastive], {}, args),
        "two teachers in memory": row(pairs, tokenizer, distilled, stored, args),
        "open_clip, online teacher": open_clip_row(pairs, tokenizer, online, args),
    }


def teacher_terms(name: str) -> list[Term]:
    """Matching of both embeddings and the relational KL."""
    matching = [
        Term(
            name=f"{name}/{side}",
            objective=embedding_mse,
            features=(f"projected.{side}.embed", f"teacher.{side}.embed"),
            teacher=name,
        )
        for side in ("image", "text")
    ]
    features = (*OWN, "teacher.image.embed", "teacher.text.embed", "student.logit_scale", "teacher.logit_scale")
    return [*matching, Term(name=f"{name}/relational", objective=relational_kl, features=features, teacher=name)]


def student_of(tokenizer: CompactTokenizer) -> CompositeModel:
    """The declared student."""
    return build_composite(STUDENT, tokenizer=tokenizer).to(memory_format=torch.channels_last)


def batches(pairs: Pairs, student: CompositeModel, online: Teacher | None, batch_size: int) -> Iterator[Batch]:
    """The endless stream that every row reads."""
    consumers = {"student": Consumer(preprocessing=student.preprocessing, image=True, text=True, student=True)}
    if online is not None and online.preprocessing is not None:
        consumers["online"] = Consumer(preprocessing=online.preprocessing, image=True, text=True)
    sequence = SampleSequence(pairs, consumers, ViewSettings(), seed=0, view_cycle=4, decoded=Decoded(pairs, 96))
    return iter(BatchStream(sequence, batch_size=batch_size, samples=10**9))


def row(
    pairs: Pairs,
    tokenizer: CompactTokenizer,
    terms: list[Term],
    teachers: dict[str, StoredTeacher],
    args: argparse.Namespace,
) -> Callable[[], None]:
    """One step as the engine does it."""
    student = student_of(tokenizer)
    distiller = Distiller(student, terms, teachers, [1 / max(1, len(teachers))] * len(teachers)).train()
    optimizer = torch.optim.AdamW(distiller.parameters(), lr=1e-4)
    stream = batches(pairs, student, None, args.batch_size)

    def step() -> None:
        with torch.autocast("cpu", torch.bfloat16, enabled=args.precision == "bf16"):
            losses = distiller(next(stream))
        optimizer.zero_grad(set_to_none=True)
        distiller.total(losses).backward()
        torch.nn.utils.clip_grad_norm_(distiller.parameters(), 1.0)
        optimizer.step()

    return step


def open_clip_row(
    pairs: Pairs, tokenizer: CompactTokenizer, teacher: OnlineTeacher, args: argparse.Namespace
) -> Callable[[], None]:
    """One step of open_clip's distillation loss."""
    from open_clip.loss import DistillClipLoss

    student = student_of(tokenizer).train()
    loss = DistillClipLoss()
    optimizer = torch.optim.AdamW(student.parameters(), lr=1e-4)
    stream = batches(pairs, student, teacher, args.batch_size)
    want = ("image.embed", "text.embed", "logit_scale")

    def step() -> None:
        batch = next(stream)
        with torch.autocast("cpu", torch.bfloat16, enabled=args.precision == "bf16"):
            own = student.encode(batch.inputs["student"], want)
            target = teacher.targets(batch, want)
        unit = [
            torch.nn.functional.normalize(part[name].float(), dim=-1) for part in (own, target) for name in want[:2]
        ]
        total = sum(loss(*unit[:2], own["logit_scale"], *unit[2:], target["logit_scale"]))
        optimizer.zero_grad(set_to_none=True)
        total.backward()
        torch.nn.utils.clip_grad_norm_(student.parameters(), 1.0)
        optimizer.step()

    return step


def report(rates: dict[str, list[float]], args: argparse.Namespace) -> None:
    """Medians and the ratios within each round."""
    medians = {name: statistics.median(values) for name, values in rates.items()}
    for name, value in medians.items():
        print(f"{name:<28} {value:8.1f} samples/s  (lowest {min(rates[name]):.1f}, highest {max(rates[name]):.1f})")

    def ratio(a: str, b: str) -> float:
        return statistics.median(x / y for x, y in zip(rates[a], rates[b], strict=True))

    memory = ratio("two teachers in memory", "student alone")
    online = ratio("two teachers in memory", "open_clip, online teacher")
    print(f"in memory / student alone: {memory:.3f}   in memory (M = 2) / open_clip online (M = 1): {online:.1f}")
    if args.json:
        figures = {"samples_per_second": medians, "memory_over_alone": memory, "memory_over_open_clip": online}
        print(json.dumps(figures | {"batch_size": args.batch_size, "threads": args.threads}, allow_nan=False))


if __name__ == "__main__":
    main()
