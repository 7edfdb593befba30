"""Evaluation pictures that are also in the training data: equal files, re-encoded, resized and mirrored copies.

vlkd eval duplicates --train data/shards#train --data benchmarks/pets#test --out duplicates.html
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vlkd.errors import UserError
from vlkd.suite.options import check_file, check_numbers

if TYPE_CHECKING:
    from vlkd.suite.duplicates import Found, Pictures

EXAMPLES = """examples:
  vlkd eval duplicates --train data/shards#train --data benchmarks/pets#test --out duplicates.html
  vlkd eval duplicates --train data/shards#train --data data/shards#test --model runs/student --similarity 0.95 --json
"""
LISTED = 10


def main(argv: Sequence[str]) -> None:
    """Compare two sets of pictures and say what they share; see `--help`."""
    parser = argparse.ArgumentParser(
        prog="vlkd eval duplicates",
        description=__doc__,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--train", required=True, metavar="PATH[#SPLIT]", help="training data: shards, captions, images"
    )
    parser.add_argument("--data", required=True, metavar="PATH[#SPLIT]", help="the evaluation set, of any form")
    parser.add_argument("--threshold", type=float, help="thumbnail distance up to which pictures are the same (0.25)")
    parser.add_argument("--model", metavar="REF", help="also list the nearest pictures by its embeddings")
    parser.add_argument("--similarity", type=float, default=0.95, help="lowest cosine that is listed, with --model")
    parser.add_argument("--workers", type=int, default=2, help="threads that decode")
    parser.add_argument("--out", type=Path, metavar="FILE", help="write a page with the pairs side by side")
    parser.add_argument("--json", action="store_true", help="end with one line of strict JSON")
    args = parser.parse_args(argv)
    check_numbers(args, workers=1)
    check_file(args, "out")
    if args.threshold is not None and not 0 <= args.threshold < 1:
        raise UserError(f"--threshold is {args.threshold}; expected 0 (equal thumbnails) to below 1.")
    if not -1 <= args.similarity <= 1:
        raise UserError(f"--similarity is {args.similarity}; expected a cosine from -1 to 1.")

    from vlkd.suite.duplicates import THRESHOLD, find_duplicates
    from vlkd.suite.duplicates_page import duplicates_page

    train, data = open_pictures(args.train), open_pictures(args.data)
    threshold = THRESHOLD if args.threshold is None else args.threshold
    found = find_duplicates(train, data, threshold=threshold, workers=args.workers)
    if args.model:
        found = with_similar(args.model, args.similarity, train, data, found)
    print(summary(found, train, data))
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        duplicates_page(found, train, data, args.train, args.data).write(args.out)
        print(f"The page is {args.out}.")
    if args.json:
        print(json.dumps(as_json(found, train, data, args, threshold), allow_nan=False))


def open_pictures(ref: str) -> Pictures:
    """Open training or evaluation data of any form; captions and labels are not needed."""
    from vlkd.data.eval_set import open_eval_set
    from vlkd.data.eval_wds import is_wds
    from vlkd.data.selection import is_selection
    from vlkd.data.sources import open_pairs, place_of

    place, split = place_of(ref)
    if is_wds(Path(place), split) or is_selection(Path(place)):
        return open_eval_set(place, split=split)
    return open_pairs(ref)


def with_similar(ref: str, similarity: float, train: Pictures, data: Pictures, found: Found) -> Found:
    """Add what a model finds."""
    import dataclasses

    from vlkd.models.load import load_image_encoder
    from vlkd.suite.duplicates import find_similar

    more = find_similar(load_image_encoder(ref), train, data, found.duplicates, similarity=similarity)
    return dataclasses.replace(
        found, duplicates=tuple(sorted((*found.duplicates, *more), key=lambda pair: (pair.data, pair.train)))
    )


def summary(found: Found, train: Pictures, data: Pictures) -> str:
    """Counts by kind, and the first pairs."""
    from vlkd.suite.duplicates_page import KINDS

    total = len({pair.data for pair in found.duplicates})
    bad = len(found.unreadable_train), len(found.unreadable_data)
    kinds = ", ".join(f"{found.images(kind)} {kind}" for kind in KINDS)
    lines = [
        f"{total} of {len(data)} evaluation pictures are among the {len(train)} training pictures ({kinds}); "
        f"unreadable: {bad[0]} training, {bad[1]} evaluation"
    ]
    first = found.duplicates[:LISTED]
    lines += [f"  {pair.kind:<9}  {train.keys[pair.train]}  {data.keys[pair.data]}" for pair in first]
    if len(found.duplicates) > LISTED:
        lines.append(f"  and {len(found.duplicates) - LISTED} more pairs; --out or --json has them")
    return "\n".join(lines)


def as_json(
    found: Found, train: Pictures, data: Pictures, args: argparse.Namespace, threshold: float
) -> dict[str, Any]:
    """All pairs by the pictures' names."""
    from vlkd.suite.duplicates_page import KINDS

    pairs = [
        {"train": train.keys[pair.train], "data": data.keys[pair.data], "kind": pair.kind, "distance": pair.distance,
         "similarity": pair.similarity}
        for pair in found.duplicates
    ]  # fmt: skip
    return {
        "command": "eval duplicates", "train": args.train, "data": args.data, "threshold": threshold,
        "train_images": len(train), "data_images": len(data), "pairs": pairs,
        "data_images_by_kind": {kind: found.images(kind) for kind in KINDS},
        "unreadable_train": len(found.unreadable_train), "unreadable_data": len(found.unreadable_data),
    }  # fmt: skip
