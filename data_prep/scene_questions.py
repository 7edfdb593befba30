"""Draw scenes from a seed, with questions about what lies where and a description each, into train, val and test.

vlkd prep scene_questions --out vqa/scenes

One question of each kind that a scene allows: presence, count, colour, object, size, position, relation, neighbour
("What is above the red circle?" - "a small blue square"), description ("Describe the picture."). Answers follow from
the drawn objects; a question with two answers is not asked, and yes is as common as no. `icons` needs
`pip install "vlkd[demo]"`.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from random import Random
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vlkd.data.vqa_writer import VqaSample

SPLITS = {"train": 4000, "val": 400, "test": 400}
EPILOG = """examples:
  vlkd prep scene_questions --out vqa/scenes
  vlkd prep scene_questions --world icons --vocabulary 100 --train 20000 --image-size 128 --out vqa/icons
"""


def main(argv: Sequence[str]) -> None:
    """Run the command line."""
    args = _parser().parse_args(argv)

    from vlkd.data.prepare_vqa import print_vqa_summary, write_vqa_splits
    from vlkd.errors import UserError

    if args.vocabulary is not None and args.world != "icons":
        raise UserError(f"--vocabulary {args.vocabulary} goes with --world icons; the shapes are always ten.")
    counts = {split: getattr(args, split) for split in SPLITS}
    if args.limit is not None:
        counts = {split: min(count, args.limit) for split, count in counts.items()}
    if counts["train"] < 1 or min(counts.values()) < 0:
        raise UserError(f"Found {counts} scenes; expected at least one of train, and 0 or more of val and test.")
    samples = {split: _samples(args, split, count) for split, count in counts.items() if count}
    summary = write_vqa_splits(samples, sum(counts.values()), args)
    held_out = next((split for split in ("val", "test") if split in samples), "train")
    next_command = f"vlkd train vlm data.train={args.out}/train data.val={args.out}/{held_out} out=runs/scenes"
    print_vqa_summary(summary, next_command=next_command, as_json=args.json)


def _parser() -> argparse.ArgumentParser:
    from vlkd.data.prepare import add_output_arguments

    parser = argparse.ArgumentParser(
        prog="vlkd prep scene_questions",
        description=__doc__,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--world", choices=("shapes", "icons"), default="shapes", help="default %(default)s")
    for split, count in SPLITS.items():
        parser.add_argument(f"--{split}", type=int, default=count, help=f"scenes of {split} (default %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="another seed, other scenes (default %(default)s)")
    parser.add_argument("--image-size", type=int, default=96, help="side in pixels (default %(default)s)")
    parser.add_argument("--vocabulary", type=int, help="only the so many most common nouns (icons; default all)")
    add_output_arguments(parser)
    return parser


def _samples(args: argparse.Namespace, split: str, count: int) -> Iterator[VqaSample]:
    from vlkd.data.scene_questions import scene_questions
    from vlkd.data.scene_words import SceneObject
    from vlkd.data.scenes import generate_scenes
    from vlkd.data.vqa_writer import VqaSample

    nouns = _nouns(args.world, args.vocabulary)
    scenes = generate_scenes(
        args.world, count=count, seed=args.seed, split=split, image_size=args.image_size, vocabulary=args.vocabulary
    )
    # Yes and no by turns, also where only some scenes have such a question.
    truth = {"presence": True, "relation": True}
    for scene in scenes:
        objects: Any = scene.extra["objects"]
        qa = scene_questions(
            [SceneObject(**thing) for thing in objects],
            args.image_size,
            nouns,
            Random(f"questions/{scene.key}"),
            present=truth["presence"],
            related=truth["relation"],
        )
        truth |= {entry.kind: not truth[entry.kind] for entry in qa if entry.kind in truth}
        yield VqaSample(key=scene.key, image=scene.image, suffix=scene.extension, qa=qa)


def _nouns(world: str, vocabulary: int | None) -> list[str]:
    """What a training scene may show."""
    from vlkd.data import icons
    from vlkd.data.scene_splits import is_held_out_noun
    from vlkd.data.shapes import SHAPES

    every = SHAPES if world == "shapes" else tuple(icons.catalogue())[:vocabulary]
    return [noun for noun in every if not is_held_out_noun(noun)]
