"""What `vlkd predict` has in common for all kinds of students: places that are refused, tables, what was left out."""

from __future__ import annotations

import argparse
import csv
import io
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vlkd.errors import UserError

if TYPE_CHECKING:
    from vlkd.data.sources import Pairs

LISTED = 20


def check_places(args: argparse.Namespace, images: Pairs) -> None:
    """Refuse what would be lost after a long run, or would overwrite what is read."""
    places = [place for place in (args.out, args.save_probabilities) if place is not None]
    if len({os.path.abspath(place) for place in places}) < len(places):
        raise UserError(f"--out and --save-probabilities are both {args.out}; name two files.")
    sources = {os.path.abspath(ref) for ref in args.images} | {os.path.abspath(file.path) for file in images.files}
    for place in places:
        if os.path.abspath(place) in sources:
            raise UserError(f"{place} is among IMAGES and would be overwritten; name another file.")
        if place.is_dir():
            raise UserError(f"{place} is a folder; expected the name of a file.")
        try:
            place.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"{place.parent} cannot be made ({error.strerror}); name another place.") from None
        if not os.access(place.parent, os.W_OK):
            raise UserError(f"Nothing may be written in {place.parent}; name another place, or change its rights.")


def write_table(out: Path, text: str, images: Pairs, bad: Sequence[tuple[str, str]]) -> Path | None:
    """Write the predictions, and the list of bad images beside them, where there are any; returns its place."""
    from vlkd.data.files import write_whole
    from vlkd.data.items import item_paths

    write_whole(out, text.encode("utf-8", "surrogateescape"))
    bad_list = out.with_name(f"{out.stem}.bad.csv")
    if not bad:
        bad_list.unlink(missing_ok=True)  # One of an earlier run would accuse images that are sound by now.
        return None
    path_of = dict(zip(images.keys, item_paths(images), strict=True))
    rows = [["key", "path", "reason"], *([key, path_of[key], reason] for key, reason in bad)]
    write_whole(bad_list, csv_lines(rows).encode("utf-8", "surrogateescape"))
    return bad_list


def csv_lines(rows: Sequence[Sequence[str]]) -> str:
    """The text of a CSV."""
    with io.StringIO(newline="") as text:
        csv.writer(text, lineterminator="\n").writerows(rows)
        return text.getvalue()


def base_figures(
    args: argparse.Namespace, ref: str, images: Pairs, bad: Sequence[tuple[str, str]], bad_list: Path | None
) -> dict[str, Any]:
    """What the line of JSON says whatever was predicted, but for the times."""
    return {
        "command": "predict",
        "model": ref,
        "out": str(args.out),
        "images": len(images),
        "predicted": len(images) - len(bad),
        "unreadable": len(bad),
        "left_out": list(images.problems),
        "bad_list": None if bad_list is None else str(bad_list),
        "device": args.device,
    }


def report_left_out(figures: Mapping[str, Any], bad: Sequence[tuple[str, str]]) -> None:
    """What was left out, on the error stream."""
    left_out = [f"unreadable: {key}: {reason}" for key, reason in bad]
    left_out += [f"left out: {problem}" for problem in figures["left_out"]]
    for line in left_out[:LISTED]:
        print(line, file=sys.stderr)
    if len(left_out) > LISTED:
        where = f"{figures['bad_list']} has all" if figures["bad_list"] else "--json lists all"
        print(f"and {len(left_out) - LISTED} more; {where}", file=sys.stderr)


def summary(figures: Mapping[str, Any], what: str) -> str:
    """One line about the table."""
    unreadable = f", {figures['unreadable']:,} unreadable in {figures['bad_list']}" if figures["unreadable"] else ""
    return (
        f"{figures['out']}: {figures['predicted']:,} of {figures['images']:,} images{unreadable}, {what}, "
        f"{figures['images_per_second']:,} images/s"
    )
