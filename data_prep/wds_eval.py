"""Turn any evaluation set into CLIP_benchmark's webdataset folder, which its users and DataComp's can read.

vlkd prep wds_eval --data photos#test --out wds_photos --split test

The data are class folders, a Karpathy JSON, a captions file, shards, or such a folder itself. Pictures keep their bytes
where they are JPEG, PNG or WebP. A picture that cannot be decoded ends the work: a set that lacks some is another set.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from vlkd.data.eval_set import KINDS, open_eval_set
from vlkd.data.eval_wds_writer import write_wds
from vlkd.data.labelled import read_templates
from vlkd.data.sources import place_of

EPILOG = """examples:
  vlkd prep wds_eval --data caltech101#test --out wds_caltech101 --templates templates.txt
  vlkd prep wds_eval --data coco/dataset_coco.json#test --out wds_coco --split test
"""


def main(argv: Sequence[str]) -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(
        prog="vlkd prep wds_eval",
        description=__doc__,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--data", required=True, metavar="PATH[#SPLIT]", help="the evaluation set")
    parser.add_argument(
        "--out", type=Path, required=True, help="new folder, or one of the same classes that lacks the split"
    )
    parser.add_argument("--split", help="name of the folder of tars (default: the split of --data, else test)")
    parser.add_argument("--kind", choices=[kind for kind in KINDS if kind != "selection"], help="what the set must be")
    parser.add_argument("--templates", type=Path, help="text file with one prompt per line, {c} for the class name")
    parser.add_argument("--samples-per-shard", type=int, default=10_000, help="pictures per tar (default %(default)s)")
    parser.add_argument("--json", action="store_true", help="print one line of strict JSON")
    args = parser.parse_args(argv)
    data = open_eval_set(args.data, kind=args.kind)
    if args.templates:
        data = replace(data, templates=read_templates(args.templates))
    split = args.split or place_of(args.data)[1] or "test"
    counts = write_wds(data, args.out, split=split, samples_per_shard=args.samples_per_shard, progress=not args.json)
    if args.json:
        print(json.dumps(counts, allow_nan=False))
        return
    print(", ".join(f"{name} {value}" for name, value in counts.items()))
    for problem in data.problems:
        print(f"left out: {problem}")
