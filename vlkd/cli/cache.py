"""`vlkd cache`: compute teachers' features once, and check what is stored."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vlkd.data.views import ViewSettings
from vlkd.errors import UserError

if TYPE_CHECKING:
    import torch

    from vlkd.data.sources import Pairs
    from vlkd.distill.cache import CacheReader, CacheSpec
    from vlkd.models.base import DualEncoderModule

EXAMPLES = """examples:
  vlkd cache embeddings --teacher runs/teacher/student --data shards/train --out cache --views 4
  vlkd cache embeddings --teacher runs/teacher/student --data shards/train --out cache --views 4 --verify
"""
EPILOG = f"""A cache is CACHE/TEACHER/SOURCE/, one per teacher and source, and `vlkd train` reads it with
teachers.folder=CACHE teachers.views=K. The same command continues a build that was stopped.

{EXAMPLES}"""
USAGE = f"""usage: vlkd cache embeddings|answers ...

  embeddings   run teachers over K augmented views of every image and over every caption, and store what they give
  answers      run a generative teacher over conversations, and store the K likeliest tokens at each answer token

{EXAMPLES}  vlkd cache answers --teacher runs/teacher/student --data vqa/train --out runs/answers --top 32
"""
DTYPES = ("float32", "float16", "bfloat16", "int8")
LEAST_COSINE = 0.999


def main(argv: Sequence[str]) -> None:
    """Run the command line."""
    if not argv or argv[0] in ("-h", "--help"):
        print(USAGE)
        return
    if argv[0] == "answers":
        from vlkd.cli import cache_answers

        cache_answers.main(argv[1:])
        return
    if argv[0] != "embeddings":
        raise UserError(f"vlkd cache has no {argv[0]!r}; there are embeddings and answers.")
    args = parse(argv[1:])
    rows = embeddings(args)
    print_table(rows)
    if args.json:
        print(json.dumps({"command": "cache embeddings", "out": str(args.out), "caches": rows}, allow_nan=False))
    wrong = [row for row in rows if args.verify and not row["lowest_cosine"] >= LEAST_COSINE]
    if wrong:
        row = min(wrong, key=lambda row: float(row["lowest_cosine"]))
        raise UserError(
            f"The stored features of {row['teacher']} in {row['folder']} are not those computed anew (lowest cosine "
            f"{row['lowest_cosine']:.4f}, expected {LEAST_COSINE} or more); remove the folder and build it again."
        )


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """The command line; raises `UserError` for a value outside its range."""
    parser = argparse.ArgumentParser(
        prog="vlkd cache embeddings",
        description="Run teachers over K augmented views of every image and over every caption, once, and store that.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    views = ViewSettings()
    # One flag may be given several times, or have several values.
    several: dict[str, Any] = {"required": True, "nargs": "+", "action": "extend"}
    parser.add_argument("--teacher", metavar="REF", help="models; of a run, its folder `student`", **several)
    parser.add_argument("--data", metavar="PATH[#SPLIT]", help="shards, captions files, image folders", **several)
    parser.add_argument("--out", required=True, type=Path, metavar="CACHE", help="folder of all caches")
    parser.add_argument("--views", type=int, default=4, metavar="K", help="views per image, default %(default)s")
    for name, (low, high) in (("scale", views.crop_scale), ("ratio", views.crop_ratio)):
        parser.add_argument(
            f"--crop-{name}", type=_range, default=(low, high), metavar="LOW,HIGH", help="as views.* of a recipe"
        )
    parser.add_argument("--flip", type=float, default=views.flip, metavar="P", help="share of mirrored views")
    parser.add_argument("--dtype", choices=DTYPES, default="float16", help="of storage, default %(default)s")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32", help="of the pass")
    parser.add_argument("--features", nargs="+", default=["image.embed", "text.embed"], metavar="NAME")
    parser.add_argument("--batch-size", type=int, default=64, help="views per forward pass, default %(default)s")
    parser.add_argument("--workers", type=int, default=0, help="processes that decode")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--verify", action="store_true", help="build nothing: check hashes, recompute a sample")
    parser.add_argument("--sample", type=int, default=64, metavar="N", help="views and captions that --verify computes")
    parser.add_argument("--json", action="store_true", help="end with one line of strict JSON")
    args = parser.parse_args(argv)
    for name in ("views", "batch_size", "sample"):
        if getattr(args, name) < 1:
            raise UserError(f"--{name.replace('_', '-')} is {getattr(args, name)}; expected 1 or more.")
    if not 0 <= args.flip <= 1 or args.workers < 0:
        raise UserError(f"Found --flip {args.flip} and --workers {args.workers}; expected 0 to 1, and 0 or more.")
    if not 0 < args.crop_scale[0] <= args.crop_scale[1] <= 1 or not 0 < args.crop_ratio[0] <= args.crop_ratio[1]:
        raise UserError(
            f"Found --crop-scale {args.crop_scale} and --crop-ratio {args.crop_ratio}; expected two ascending numbers "
            "above 0 each, scales at most 1."
        )
    return args


def _range(text: str) -> tuple[float, float]:
    try:
        low, high = (float(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"found {text!r}, expected two numbers, for instance 0.5,1") from None
    return low, high


def embeddings(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Build or verify every cache; one row of figures each."""
    import torch

    from vlkd.data.sources import open_sources, source_name
    from vlkd.distill.cache import CacheSpec
    from vlkd.engine.settings import teacher_names
    from vlkd.models.load import load

    sources = dict(zip((source_name(ref) for ref in args.data), open_sources(args.data), strict=False))
    if len(sources) < len(args.data):
        raise UserError(f"Two of {', '.join(args.data)} have the same last two path parts; call with one at a time.")
    spec = CacheSpec(
        features=tuple(args.features),
        views=args.views,
        view_settings=ViewSettings(crop_scale=args.crop_scale, crop_ratio=args.crop_ratio, flip=args.flip),
        precision=args.precision,
        dtype=args.dtype,
    )
    device = device_of(args.device)
    refs = [ref for refs in args.teacher for ref in refs.split(",") if ref]
    # All of them before work is spent on the first.
    models = [load(ref) for ref in refs]
    rows = []
    for name, model in zip(teacher_names(refs), models, strict=True):
        model.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        rows += [one_cache(args, args.out / name / place, name, model, pairs, spec) for place, pairs in sources.items()]
        model.cpu()
    return rows


def device_of(wanted: str) -> torch.device:
    """The device of a pass; raises `UserError` for a GPU that is not there."""
    import torch

    if wanted == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: torch finds no GPU here; leave it out, or give --device cpu.")
    return torch.device(("cuda" if torch.cuda.is_available() else "cpu") if wanted == "auto" else wanted)


def one_cache(
    args: argparse.Namespace, folder: Path, name: str, model: DualEncoderModule, pairs: Pairs, spec: CacheSpec
) -> dict[str, Any]:
    """The figures of one cache, built, continued, opened or verified."""
    from vlkd.distill.cache import ensure_cache, open_cache, verify_cache

    for problem in pairs.problems[:3]:
        print(f"left out: {problem}", file=sys.stderr)
    if not args.verify:
        reader = ensure_cache(folder, name, model, pairs, spec, workers=args.workers, batch_size=args.batch_size)
        return figures(reader)
    reader = open_cache(folder, name, model, pairs, spec)
    lowest = verify_cache(reader, model, pairs, sample=args.sample)
    for feature, cosine in lowest.items():
        print(f"{folder}: {feature}: lowest cosine {cosine:.6f} of {args.sample} sampled, all hashes as written")
    return figures(reader) | {"cosines": lowest, "lowest_cosine": min(lowest.values(), default=1.0)}


def figures(reader: CacheReader) -> dict[str, Any]:
    """What a manifest tells, for the table."""
    manifest = reader.manifest
    size = sum(entry["bytes"] for entry in manifest["shards"])
    images = manifest["data"]["images"]
    computed = manifest["computed"] * reader.views
    return {
        "teacher": reader.name,
        "source": reader.folder.name,
        "folder": str(reader.folder),
        "images": images,
        "captions": manifest["data"]["captions"],
        "views": reader.views,
        "unreadable": sum(entry["unreadable"] for entry in manifest["shards"]),
        "bytes": size,
        "bytes_per_image": size / images,
        "dtype": manifest["dtype"],
        "error": manifest["error"],
        "views_per_second": computed / manifest["seconds"] if computed and manifest["seconds"] else None,
    }


def print_table(rows: Sequence[dict[str, Any]]) -> None:
    """One line per cache; the error is the largest |stored - float32| / |float32| of a row of any feature."""
    headers = ("teacher", "source", "images", "unreadable", "views", "MB", "bytes/image", "error", "views/s")
    table = [headers]
    for row in rows:
        error = max((values["max_relative_l2"] for values in row["error"].values()), default=0.0)
        rate = row["views_per_second"]
        table.append(
            (
                row["teacher"],
                row["source"],
                f"{row['images']:,}",
                str(row["unreadable"]),
                str(row["views"]),
                f"{row['bytes'] / 1e6:.2f}",
                f"{row['bytes_per_image']:,.0f}",
                f"{error:.1e}",
                f"{rate:,.0f}" if rate else "-",
            )
        )
    widths = [max(len(line[i]) for line in table) for i in range(len(headers))]
    for line in table:
        cells = [
            cell.ljust(width) if i < 2 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        ]
        print("  ".join(cells).rstrip())
