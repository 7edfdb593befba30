"""Draw captioned scenes from a seed into shards: data with true labels, offline, with held-out combinations and nouns.

vlkd prep scenes --kind shapes --train 5000 --test 500 --out data/shapes

`shapes` needs nothing; `icons` needs `pip install "vlkd[demo]"`. A scene of test_combination holds a pair, (colour,
noun) or (noun, noun), that no other split but test_noun shows; the nouns of test_noun occur nowhere else.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from vlkd.data.prepare import add_output_arguments, print_summary, write_splits
from vlkd.data.scene_splits import SPLITS
from vlkd.errors import UserError

DEFAULTS = {"train": 5000, "val": 500, "test": 500, "test_combination": 500, "test_noun": 500}
EPILOG = """examples:
  vlkd prep scenes --kind shapes --out data/shapes
  vlkd prep scenes --kind icons --vocabulary 1000 --train 20000 --image-size 128 --out data/icons
"""


def main(argv: Sequence[str]) -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(
        prog="vlkd prep scenes",
        description=__doc__,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--kind", choices=("shapes", "icons"), default="shapes", help="default %(default)s")
    for split in SPLITS:
        option = f"--{split.replace('_', '-')}"
        parser.add_argument(option, type=int, default=DEFAULTS[split], help=f"scenes of {split} (default %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="another seed, other scenes (default %(default)s)")
    parser.add_argument("--image-size", type=int, default=96, help="side in pixels (default %(default)s)")
    parser.add_argument("--vocabulary", type=int, help="only the so many most common nouns (icons; default all)")
    add_output_arguments(parser)
    args = parser.parse_args(argv)
    if args.vocabulary is not None and args.kind != "icons":
        raise UserError(f"--vocabulary {args.vocabulary} goes with --kind icons; the shapes are always ten.")
    counts = {split: getattr(args, split) for split in SPLITS}
    if args.limit is not None:
        counts = {split: min(count, args.limit) for split, count in counts.items()}
    counts = {split: count for split, count in counts.items() if count > 0}
    if not counts:
        raise UserError("Every split has 0 scenes; ask for at least one, such as --train 100.")

    from vlkd.data.scenes import generate_scenes

    scenes = {
        split: generate_scenes(
            args.kind,
            count=count,
            seed=args.seed,
            split=split,
            image_size=args.image_size,
            vocabulary=args.vocabulary,
        )
        for split, count in counts.items()
    }
    print_summary(write_splits(scenes, sum(counts.values()), args), as_json=args.json)
