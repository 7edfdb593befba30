"""`vlkd index`: build a FAISS index of images, add to it, remove from it."""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vlkd.errors import UserError

if TYPE_CHECKING:
    from vlkd.data.sources import Pairs
    from vlkd.retrieval.index import SearchIndex
    from vlkd.retrieval.kinds import IndexSettings

EPILOG = """Images get ids in order, which are never given twice. --add skips images that are in the index already;
--remove takes ids, or paths as `vlkd search` prints them. --dims and --storage make the index smaller and its scores
approximate; `vlkd eval index_quality` measures what they lose.

examples:
  vlkd index --model runs/retriever/student --images photos/ --out photos.index
  vlkd index --images photos/ --out photos.index --add --remove 17 photos/blurred.jpg
  vlkd index --model runs/retriever/student --images photos/ --out small.index --dims 128 --storage int8
"""
KINDS = ("auto", "flat", "hnsw", "ivf", "ivf_pq")
STORAGES = ("float32", "int8", "binary")
LISTED = 20


def main(argv: Sequence[str]) -> None:
    """Run the command line."""
    args = parse(argv)
    started = time.perf_counter()
    index = open_index(args)
    removed = remove(index, args.remove) if index is not None and args.remove else 0
    figures: dict[str, Any] = {"added": 0, "already_there": 0, "unreadable": [], "left_out": []}
    if args.images:
        index, figures = add_images(index, args)
    assert index is not None
    index = settle(index, args, figures)
    index.save(args.out)
    figures = {"command": "index", "out": str(args.out), "model": index.model, "kind": index.settings.kind} | figures
    figures |= {"storage": index.settings.storage, "dims": index.settings.dims or index.width}
    figures |= {
        "removed": removed,
        "items": len(index),
        "width": index.width,
        "bytes": sum(path.stat().st_size for path in args.out.iterdir()),
        "seconds": round(time.perf_counter() - started, 3),
    }
    report(figures)
    if args.json:
        print(json.dumps(figures, allow_nan=False))


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """The command line; raises `UserError` where its words do not go together."""
    parser = argparse.ArgumentParser(
        prog="vlkd index",
        description="Build a FAISS index of images, add to it or remove from it.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--model", metavar="REF", help="encodes the images; an index knows its own")
    parser.add_argument("--images", metavar="PATH[#SPLIT]", help="folder of images, shards, captions file")
    parser.add_argument("--out", required=True, type=Path, metavar="IDX", help="the index, a folder")
    parser.add_argument("--type", choices=KINDS, help="default auto for a new index: by size, with the reason")
    parser.add_argument("--dims", type=int, metavar="N", help="keep the first N numbers of each vector; approximate")
    parser.add_argument("--storage", choices=STORAGES, help="of flat; int8: 1/4 the size, binary: 1/32; approximate")
    parser.add_argument("--add", action="store_true", help="add to the index at --out")
    parser.add_argument("--remove", nargs="+", default=[], metavar="ID_OR_PATH", help="remove from the index at --out")
    parser.add_argument("--batch-size", type=int, default=64, help="default %(default)s")
    parser.add_argument("--json", action="store_true", help="end with one line of strict JSON")
    args = parser.parse_args(argv)
    if args.batch_size < 1:
        raise UserError(f"--batch-size is {args.batch_size}; expected 1 or more.")
    if not args.images and (args.add or not args.remove):
        raise UserError("No images are named; give --images PATH (or only --remove ID_OR_PATH).")
    if args.dims is not None and args.dims < 1:
        raise UserError(f"--dims is {args.dims}; expected 1 or more numbers of each vector.")
    if args.storage in STORAGES[1:] and args.type not in (None, "auto", "flat"):
        raise UserError(
            f"--type {args.type} stores no {args.storage} vectors; leave --storage out, or take --type flat."
        )
    changes = args.add or args.remove
    if not changes and not args.model:
        raise UserError("A new index needs --model REF; for instance the folder `student` of a run.")
    if not changes and args.out.is_dir() and any(args.out.iterdir()):
        raise UserError(f"{args.out} exists; change it with --add or --remove, or give another --out.")
    return args


def open_index(args: argparse.Namespace) -> SearchIndex | None:
    """The index to be changed, in the kind asked for; None where a new one is to be built."""
    if not (args.add or args.remove):
        return None
    from vlkd.retrieval.index import SearchIndex

    index = SearchIndex.load(args.out)
    if args.model and model_reference(args.model) != index.model:
        raise UserError(
            f"{args.out} was made with the model {index.model}, not {args.model}; leave --model out, or build another "
            "index: vectors of two models do not compare."
        )
    now = index.settings
    kind = now.kind if args.type in (None, "auto") else args.type
    wanted = replace(now, kind=kind, dims=args.dims or now.dims, storage=args.storage or now.storage)
    return index if wanted == now else index.rebuild(wanted)


def settle(index: SearchIndex, args: argparse.Namespace, figures: dict[str, Any]) -> SearchIndex:
    """The changed index in the kind that `--type auto` takes for its size, and a word about approximate vectors."""
    if args.type == "auto" and (args.add or args.remove) and len(index) and not index.settings.lossy:
        settings, figures["why"] = chosen(len(index), index.width, args)
        if settings.kind != index.settings.kind:
            index = index.rebuild(settings)
    if "why" in figures:
        print(figures["why"])
    if index.settings.dims or index.settings.storage != "float32":
        print(
            f"Kept of each vector: {index.settings.dims or index.width} of {index.width} numbers as "
            f"{index.settings.storage}; scores and order are approximate."
        )
    return index


def chosen(count: int, width: int, args: argparse.Namespace) -> tuple[IndexSettings, str]:
    """Settings for a new index of so many vectors as `--type auto` takes them, and why."""
    from vlkd.retrieval.choose import choose_kind, usable_memory
    from vlkd.retrieval.kinds import IndexSettings

    settings, why = choose_kind(count, min(width, args.dims or width), usable_memory())
    if args.storage in STORAGES[1:]:
        settings, why = IndexSettings(kind="flat"), f"flat: it is the kind that stores {args.storage} vectors."
    return settings, why


def remove(index: SearchIndex, which: Sequence[str]) -> int:
    """Remove by id (a number) or by path; a relative path is looked for from here."""
    known = set(index.items.values())
    return index.remove([int(item) if item.isdecimal() else _known_path(item, known) for item in which])


def _known_path(item: str, known: set[str]) -> str:
    return item if item in known else os.path.abspath(item)


def add_images(index: SearchIndex | None, args: argparse.Namespace) -> tuple[SearchIndex, dict[str, Any]]:
    """Encode what is not in the index yet and add it; returns the index and what happened."""
    from vlkd.data.items import item_paths
    from vlkd.data.sources import Pairs, open_pairs

    pairs = open_pairs(args.images)
    known = set(index.items.values()) if index is not None else set()
    paths = item_paths(pairs)
    new = [i for i, path in enumerate(paths) if path not in known]
    # Under their paths, so that an unreadable one is reported by a name that can be found.
    source = Pairs([paths[i] for i in new], [()] * len(new), [pairs.files[i] for i in new], pairs.problems)
    figures: dict[str, Any] = {
        "added": 0,
        "already_there": len(pairs) - len(new),
        "unreadable": [],
        "left_out": list(pairs.problems),
    }
    if index is not None and not new:
        return index, figures
    return _encode_into(index, source, args, figures)


def _encode_into(
    index: SearchIndex | None, source: Pairs, args: argparse.Namespace, figures: dict[str, Any]
) -> tuple[SearchIndex, dict[str, Any]]:
    from vlkd.models.fingerprint import model_fingerprint
    from vlkd.models.load import load
    from vlkd.retrieval.encode import encode_images
    from vlkd.retrieval.index import SearchIndex
    from vlkd.retrieval.kinds import IndexSettings

    reference = index.model if index is not None else model_reference(args.model)
    model = load(reference)
    fingerprint = model_fingerprint(model)
    if index is not None:
        check_fingerprint(index, fingerprint)
    encoded = encode_images(model, source, batch_size=args.batch_size)
    paths = [source.keys[i] for i in encoded.index]
    if index is None:
        if args.type in (None, "auto"):
            settings, figures["why"] = chosen(len(paths), encoded.embed.shape[1], args)
        else:
            settings = IndexSettings(kind=args.type)
        settings = replace(settings, dims=args.dims or 0, storage=args.storage or "float32")
        index = SearchIndex.build(encoded.embed, paths, model=reference, fingerprint=fingerprint, settings=settings)
    else:
        index.add(encoded.embed, paths)
    return index, figures | {"added": len(paths), "unreadable": [list(bad) for bad in encoded.bad]}


def check_fingerprint(index: SearchIndex, fingerprint: str) -> None:
    """Raise `UserError` if the model behind the index's reference has other weights than when the index was built."""
    if index.fingerprint and index.fingerprint != fingerprint:
        raise UserError(
            f"The model {index.model} has other weights than when the index was built (found {fingerprint}, expected "
            f"{index.fingerprint}); build the index again."
        )


def model_reference(ref: str) -> str:
    """A folder by its absolute path, so that the index can be searched from anywhere; other references as they are."""
    return os.path.abspath(ref) if Path(ref).is_dir() else ref


def report(figures: dict[str, Any]) -> None:
    """What was left out, on the error stream, and one line about the index."""
    left_out = [f"unreadable: {path}: {reason}" for path, reason in figures["unreadable"]]
    left_out += [f"left out: {problem}" for problem in figures["left_out"]]
    for line in left_out[:LISTED]:
        print(line, file=sys.stderr)
    if len(left_out) > LISTED:
        print(f"and {len(left_out) - LISTED} more; --json lists all", file=sys.stderr)
    print(
        f"{figures['out']}: {figures['items']:,} images ({figures['added']:,} added, {figures['removed']:,} removed, "
        f"{figures['already_there']:,} already there, {len(left_out):,} left out), {figures['kind']}, "
        f"width {figures['width']}, {figures['bytes']:,} bytes"
    )
