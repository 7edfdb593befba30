"""Make balanced questions from labelled boxes (COCO instances): is there a dog, how many cups, which of these.

vlkd prep box_questions instances_train.json images --out vqa/coco_train --name train

Kinds: presence (yes or no, as many of each for every category; no is asked of pictures that look as if they might have
it), count (1 to 4), choice (one of four lettered options). No question can be answered from its words: the closing
lines say how often the most common answer to each text is right. Boxes below half a percent of the picture are not
asked for, and crowds are not counted. Pictures are copied as they are unless --short-side is given.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vlkd.data.vqa_writer import QA, VqaSample

EPILOG = """examples:
  vlkd prep box_questions instances_train.json images --out vqa/coco_train --name train
  vlkd prep box_questions instances_val.json images --out vqa/coco_val --name val --per-image 6 --short-side 224
"""


def main(argv: Sequence[str]) -> None:
    """Run the command line."""
    args = _parser().parse_args(argv)

    from vlkd.data.box_questions import box_questions, read_instances
    from vlkd.data.prepare_vqa import check_new, print_vqa_summary, unreadable, write_vqa_splits
    from vlkd.data.records import record_keys, resolve_inside
    from vlkd.errors import UserError

    check_new(args.out)
    if args.limit is not None and args.limit < 1:
        raise UserError(f"--limit is {args.limit}; expected at least 1.")
    images = read_instances(args.instances)[: args.limit]
    paths = [resolve_inside(args.images, image.file, str(args.instances)) for image in images]
    # Before questions are made: they come in groups of pictures, which one that is missing would unbalance.
    bad = unreadable(paths, args.max_bad)
    good = [(path, image) for path, image in zip(paths, images, strict=True) if path not in bad]
    questions = box_questions([image for _, image in good], per_image=args.per_image, seed=args.seed)
    keys = record_keys([path for path, _ in good])
    asked = [(key, path, qa) for key, (path, _), qa in zip(keys, good, questions, strict=True) if qa]
    if not asked:
        raise UserError(
            f"No balanced question can be made of the {len(good)} pictures of {args.instances}; expected kinds of "
            "things that some pictures show and others do not: give more pictures."
        )
    summary = write_vqa_splits({args.name: _samples(asked, args.short_side)}, len(asked), args, bad, flat=True)
    summary["without_questions"] = len(good) - len(asked)
    train, val = (args.out, "VAL") if args.name == "train" else ("TRAIN", args.out)
    next_command = f"vlkd train vlm data.train={train} data.val={val} out=runs/boxes"
    print_vqa_summary(summary, next_command=next_command, as_json=args.json)


def _parser() -> argparse.ArgumentParser:
    from vlkd.data.prepare import add_output_arguments, add_picture_arguments

    parser = argparse.ArgumentParser(
        prog="vlkd prep box_questions",
        description=__doc__,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("instances", type=Path, help="COCO's instances_*.json")
    parser.add_argument("images", type=Path, help="folder of its pictures")
    parser.add_argument(
        "--name", default="train", help="of the split, with which the shards begin (default %(default)s)"
    )
    parser.add_argument("--seed", type=int, default=0, help="another seed, other questions (default %(default)s)")
    parser.add_argument(
        "--per-image", type=int, default=4, help="questions of a picture at most, half presence (default %(default)s)"
    )
    add_output_arguments(parser)
    add_picture_arguments(parser)
    return parser


def _samples(asked: Sequence[tuple[str, Path, tuple[QA, ...]]], short_side: int | None) -> Iterator[VqaSample]:
    from vlkd.data.prepare import encode_picture
    from vlkd.data.vqa_writer import VqaSample

    for key, path, qa in asked:
        image, suffix = encode_picture(path, short_side)
        yield VqaSample(key=key, image=image, suffix=suffix, qa=qa)
