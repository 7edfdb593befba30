"""Index shards for streaming: a sidecar per tar and one scan.json, in parallel, continued where it was stopped.

vlkd prep scan data/train

Every tar is read once and left as it is. Truncated tars, half samples, duplicate or interleaved keys, samples without a
picture, links and other oddities are told by kind; no sample with one is ever streamed. Pictures without captions are
unlabelled, which is no problem. A manifest.json beside the shards is compared with what is there.
"""

from __future__ import annotations

import argparse
import json
import os
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vlkd.data.scan import Scan

EPILOG = """examples:
  vlkd prep scan data/coco/train
  vlkd prep scan 'data/cc3m/{00000..00331}.tar' 'https://host/more/{000..099}.tar' --out data/scans/all --workers 8
"""
SHOWN = 3
ADVICE = {
    "refused": "members that are links, devices, too large or outside of the archive are never read; rewrite the shard",
    "duplicate": "members of a sample must lie side by side under one key; sort the tar by name, rename equal keys",
    "images": "keep one picture per key; keys end at the first dot of the name, so rename keys with dots",
    "no-image": "a picture is missing, or has another extension than jpg, jpeg, png or webp",
    "captions": 'expected UTF-8, and JSON such as {"captions": ["..."]}; mend these members',
    "half": "the tar was cut in this sample; copy or download the shard again",
    "truncated": "the tar was cut; copy or download the shard again",
    "no-end": "the tar has no end, as after a killed writer; copy the shard again or write it anew",
    "damaged": "the rest of the shard cannot be read; copy or download it again",
    "trailing": "data after the end of the archive are never read; use `tar --ignore-zeros` to join tars",
}


def main(argv: Sequence[str]) -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(
        prog="vlkd prep scan", description=__doc__, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("shards", nargs="+", help="folders of tars, tars, patterns with * or {000..099}, or URLs")
    parser.add_argument("--out", type=Path, help="folder of the indexes and scan.json (default: that of local shards)")
    parser.add_argument(
        "--workers", type=int, default=min(8, os.cpu_count() or 1), help="processes that read (default %(default)s)"
    )
    parser.add_argument("--again", action="store_true", help="read shards that have an index, too")
    parser.add_argument("--json", action="store_true", help="end with one line of strict JSON instead of a table")
    args = parser.parse_args(argv)

    from vlkd.data.scan import scan_shards

    scan = scan_shards(args.shards, args.out, workers=args.workers, again=args.again)
    differences = list(_manifest_differences(scan))
    if args.json:
        print(json.dumps(_summary(scan, differences), allow_nan=False))
    else:
        _print_table(scan, differences)


def _summary(scan: Scan, differences: Sequence[str]) -> dict[str, Any]:
    return {
        "command": "prep scan",
        "out": str(scan.folder),
        "shards": len(scan.shards),
        **{name: scan.total(name) for name in ("samples", "labelled", "captions", "bytes")},
        "problems": scan.problem_counts(),
        "left_out": [{"place": row.place, "reason": row.reason} for row in scan.left_out],
        "unique_keys": scan.unique_keys,
        "manifest": list(differences),
    }


def _print_table(scan: Scan, differences: Sequence[str]) -> None:
    from vlkd.data.scan import SCAN_FILE

    samples, labelled = scan.total("samples"), scan.total("labelled")
    for name, value, remark in (
        ("shards", len(scan.shards), f"{len(scan.left_out)} left out" if scan.left_out else ""),
        ("samples", samples, f"{samples - labelled} unlabelled" if labelled < samples else ""),
        ("labelled", labelled, ""),
        ("captions", scan.total("captions"), f"at most {max(row.most_captions for row in scan.shards)} of a sample"),
        ("bytes", scan.total("bytes"), ""),
    ):
        print(f"{name:<10}{value:>18,}  {remark}".rstrip())
    examples = _examples(scan)
    for kind, count in sorted(scan.problem_counts().items(), key=lambda item: -item[1]):
        print(f"\n{kind}: {count}; {ADVICE.get(kind, 'the samples are left out')}")
        for example in examples[kind]:
            print(f"  {example}")
    for row in scan.left_out:
        print(f"\nleft out: {row.reason}")
    for difference in differences:
        print(f"\nmanifest: {difference}")
    if not scan.unique_keys:
        print(f"\nwarning: {scan.repeated}; such keys get the shard's name in front when they are streamed")
    print(f"\n{scan.folder / SCAN_FILE} is written; train with data.train={scan.folder}")


def _examples(scan: Scan) -> dict[str, list[str]]:
    """The first problems of each kind, with their shards."""
    from vlkd.data.shard_refs import shown
    from vlkd.data.shard_rows import read_header

    found: dict[str, list[str]] = defaultdict(list)
    for entry in scan.shards:
        if any(len(found[kind]) < SHOWN for kind in entry.problems):
            for problem in read_header(scan.folder / entry.index).problem_list:
                kind, _, name = problem.partition(": ")
                if len(found[kind]) < SHOWN:
                    found[kind].append(f"{shown(entry.place)}: {name}")
    return found


def _manifest_differences(scan: Scan) -> Iterator[str]:
    """What a manifest.json beside local shards says otherwise."""
    from vlkd.data.files import strict_json
    from vlkd.data.scan import entry_place

    entries = {Path(place): entry for entry in scan.shards if "://" not in (place := entry_place(scan, entry))}
    for folder in sorted({place.parent for place in entries}):
        path = folder / "manifest.json"
        try:
            listed = {row["file"]: row for row in strict_json(path.read_text(encoding="utf-8"))["shards"]}
        except FileNotFoundError:
            continue
        except (OSError, ValueError, KeyError, TypeError) as error:
            yield f"{path} cannot be read ({error}); it is passed over."
            continue
        for file, row in listed.items():
            entry = entries.get(folder / str(file))
            if entry is None:
                if not (folder / str(file)).exists():
                    yield f"{path} names {file}, which is not there; copy or make it again."
            elif row.get("samples") != entry.samples:
                yield f"{file} has {entry.samples} usable samples, {path} says {row.get('samples')}; copy it again."
            elif row.get("sha256") != entry.sha256:
                yield f"{file} has other bytes than {path} says; copy it again, or remove the manifest."
