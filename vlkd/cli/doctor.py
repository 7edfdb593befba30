"""`vlkd doctor`: what is installed, what the machine has, whether models are sound, and what a run would take."""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
from collections.abc import Sequence
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vlkd.cli.doctor_generative import generative_facts
from vlkd.cli.doctor_plan import plan, print_plan
from vlkd.errors import UserError

if TYPE_CHECKING:
    from vlkd.data.sources import Pairs
    from vlkd.models.base import DualEncoderModule
    from vlkd.models.self_check import SelfCheckReport

EPILOG = """examples:
  vlkd doctor
  vlkd doctor runs/teacher/student open_clip:ViT-B-16@datacomp_xl_s13b_b90k --data shards/val
  vlkd doctor runs/small --data vqa/val
  vlkd doctor --plan pretrain data.train=shards/train data.workers=8 teachers.refs=runs/a/student method.matching=8
"""
PACKAGES = ("torch", "torchvision", "open_clip_torch", "transformers", "timm", "accelerate", "faiss-cpu", "webdataset")
EXTRAS = {"demo": "qtawesome", "log": "tensorboard"}
CHECKED_PAIRS = 128


def main(argv: Sequence[str]) -> None:
    """Run the command line; a broken model is the user's error, told after all others were looked at."""
    parser = argparse.ArgumentParser(
        prog="vlkd doctor",
        description="Check the environment, the devices, and models; measure what a run would take.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("models", nargs="*", metavar="REF", help="models to load and check")
    parser.add_argument(
        "--data", metavar="PATH[#SPLIT]", help="captioned images, or questions, to compare pairs with shuffled ones"
    )
    parser.add_argument(
        "--plan",
        nargs="+",
        metavar=("TASK", "key=value"),
        help="memory, images/s, time and disk of `vlkd train TASK key=value ...`, measured for about a minute",
    )
    parser.add_argument("--ranks", type=int, default=1, metavar="N", help="processes of that run, default %(default)s")
    parser.add_argument("--json", action="store_true", help="end with one line of strict JSON")
    args = parser.parse_args(argv)
    if args.data and not args.models:
        raise UserError("--data is there to check models with; name at least one REF.")
    if args.ranks < 1:
        raise UserError(f"--ranks is {args.ranks}; expected 1 or more.")
    found = environment()
    for name, value in found.items():
        print(f"{name:<16} {value}")
    rows = check_models(args.models, args.data) if args.models else []
    told: dict[str, Any] = {"command": "doctor", "environment": found, "models": rows}
    if args.plan:
        task, *settings = args.plan
        told["plan"] = plan(task, settings, memory=memory_bytes(), cores=cores(), ranks=args.ranks)
        print_plan(told["plan"])
    if args.json:
        print(json.dumps(told, allow_nan=False))
    broken = [str(row["model"]) for row in rows if row["error"]]
    if broken:
        raise UserError(f"{len(broken)} of {len(rows)} models cannot be used ({', '.join(broken)}); see above.")


def environment() -> dict[str, str]:
    """Versions, processor, memory and devices, each in words."""
    import torch

    found = {"python": f"{platform.python_version()} on {platform.system()} {platform.machine()}"}
    found |= {name: installed(name) for name in PACKAGES}
    found["cores"] = f"{cores()} usable of {os.cpu_count()}; torch uses {torch.get_num_threads()} threads"
    found["memory"] = f"{memory_bytes() / 2**30:.1f} GiB"
    found["devices"] = ", ".join(["cpu", *devices()])
    found["torchvision ops"] = torchvision_operators()
    for extra, package in EXTRAS.items():
        there = installed(package)
        missing = there == "not installed"
        found[f"extra [{extra}]"] = f'missing; pip install "vlkd[{extra}]"' if missing else f"{package} {there}"
    return found


def installed(package: str) -> str:
    """The version of an installed package, or "not installed"."""
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def memory_bytes() -> int:
    """The machine's memory, or a container's smaller limit."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limit = Path("/sys/fs/cgroup/memory.max")
    words = limit.read_text().strip() if limit.is_file() else ""
    return min(total, int(words)) if words.isdecimal() else total


def devices() -> list[str]:
    """Accelerators that torch can use."""
    import torch

    found = [
        f"cuda:{i} {torch.cuda.get_device_name(i)} ({torch.cuda.get_device_properties(i).total_memory / 2**30:.0f} GiB)"
        for i in range(torch.cuda.device_count())
    ]
    return [*found, "mps"] if torch.backends.mps.is_available() else found


def torchvision_operators() -> str:
    """Whether torchvision's compiled operators load; transforms, all that vlkd uses of it, work without."""
    import torch

    import vlkd.models  # noqa: F401 - makes torchvision importable without its operators

    if find_spec("torchvision") is None:
        return "not installed"
    import_module("torchvision")
    boxes, scores = torch.tensor([[0.0, 0.0, 1.0, 1.0]]), torch.ones(1)
    try:
        torch.ops.torchvision.nms(boxes, scores, 0.5)
    except (RuntimeError, NotImplementedError, AttributeError):
        return "do not load: torch and torchvision are of different builds (vlkd does not need them)"
    return "load"


def check_models(refs: Sequence[str], data: str | None) -> list[dict[str, Any]]:
    """One row per model, printed as it is found; `error` is "" for a sound one."""
    from vlkd.data.sources import open_pairs
    from vlkd.models.generative_refs import generative_folder

    answering = {ref: folder for ref in refs if (folder := generative_folder(ref))}
    pairs = open_pairs(data) if data and len(answering) < len(set(refs)) else None
    rows = []
    for ref in refs:
        row: dict[str, Any] = {"model": ref, "error": ""}
        print(f"\n{ref}")
        try:
            facts = generative_facts(answering[ref], data) if ref in answering else model_facts(ref, pairs)
            for name, value in facts.items():
                row[name] = value
                print(f"  {name:<14} {value}")
        except UserError as error:
            row["error"] = str(error)
            print(f"  broken         {error}", file=sys.stderr)
        rows.append(row)
    return rows


def model_facts(ref: str, pairs: Pairs | None) -> dict[str, str]:
    """Load a model and check preprocessing, outputs and, with pairs, that captions belong to their images.

    Raises:
        UserError: a check failed.
    """
    from vlkd.models.classifier_images import student_of
    from vlkd.models.golden import GOLDEN, SENTENCES, probe_images
    from vlkd.models.load import load
    from vlkd.models.self_check import check_outputs, check_preprocessing

    ref = student_of(ref)
    model = load(ref)
    golden = "equal to those it was saved with" if (Path(ref) / GOLDEN).is_file() else "none stored"
    check_preprocessing(model)
    check_outputs(f"{ref}: image.embed", model.encode_image(probe_images()))
    check_outputs(f"{ref}: text.embed", model.encode_text(SENTENCES))
    counts = model.parameter_counts()
    height, width = model.preprocessing.image_size
    context = model.preprocessing.context_length
    facts = {
        "width": str(model.width),
        "parameters": f"{counts['image']:,} image, {counts['text']:,} text",
        "preprocessing": f"{height} x {width} px, {normalisation(model)}, at most {context} tokens",
        "golden": golden,
        "outputs": "finite, and different for different inputs",
    }
    if pairs is not None:
        report = check_pairs(model, pairs)
        facts["pairs"] = (
            f"mean cosine {report.matched:.3f} of {report.pairs} pairs, {report.mismatched:.3f} of others, "
            f"z = {report.z:.1f}"
        )
        if report.warnings:
            facts["warning"] = " ".join(report.warnings)
    return facts


def normalisation(model: DualEncoderModule) -> str:
    """Mean and std as the model applies them, measured."""
    from vlkd.models.self_check import measured_normalisation

    mean, std = ([round(float(value), 3) for value in values] for values in measured_normalisation(model))
    return f"mean {mean}, std {std}"


def check_pairs(model: DualEncoderModule, pairs: Pairs) -> SelfCheckReport:
    """The self-check on up to 128 captioned images, spread over the data; unreadable ones are passed over."""
    from vlkd.models.self_check import self_check

    rows = [i for i, captions in enumerate(pairs.captions) if captions]
    images, captions = [], []
    for i in rows[:: max(1, len(rows) // CHECKED_PAIRS)][:CHECKED_PAIRS]:
        try:
            images.append(pairs.image(i))
        except UserError:
            continue
        captions.append(pairs.captions[i][0])
    if not images:
        raise UserError("No image with a caption can be read from --data; give captioned images.")
    return self_check(model, images, captions)
