"""`vlkd predict`: class probabilities of images from any student, as a table."""

from __future__ import annotations

import argparse
import csv
import io
import json
import os
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vlkd.errors import UserError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from vlkd.data.sources import Pairs
    from vlkd.engine.predict import Predictions

EPILOG = """RUN is a run's folder, whose student is taken, a model's folder, or any other reference of a model. A
classifier names its own classes, by the mix of its heads and by each head alone; a dual encoder needs --classes and
gives softmax(logit scale x cosine) over them.

IMAGES are files, folders at any depth, globs, FOLDER#SPLIT, shards, or a list of captions. The key of an image below
the data root of RUN is its path from there on, as train/CLASS/FILE.jpg; so is that of FOLDER#SPLIT and of a folder of
class folders that is called train, val, valid, validation or test. Elsewhere it is the path inside the folder. These
are the keys of `vlkd prep label_pool` and of data.shots=LIST.txt.

Images that cannot be read are listed beside --out, in predictions.bad.csv, and the others go on.

examples:
  vlkd predict runs/dho photos/ --out predictions.csv
  vlkd predict runs/retriever photos/*.jpg --classes "a cat,a dog,an empty room" --out predictions.jsonl
  vlkd predict runs/dho DATA#train --out pool.csv --save-probabilities pool.safetensors --json
"""
FORMATS = (".csv", ".jsonl")
HEADS = {"label": "label_head", "teacher": "teacher_head"}
LISTED = 20


def main(argv: Sequence[str]) -> None:
    """Run the command line."""
    args = parse(argv)
    started = time.perf_counter()

    from vlkd.data.given_images import open_given
    from vlkd.engine.predict import data_root, open_student, predict
    from vlkd.models.classifier_images import student_of

    ref = student_of(args.run)
    classes, templates = class_names(args.classes), template_lines(args.templates)
    images = open_given(args.images, data_root(args.run))
    check_places(args, images)
    student = open_student(ref, classes, templates, device=args.device)
    found = predict(student, images, batch_size=args.batch_size, workers=args.workers)
    names = student.classes
    bad_list = write(args.out, images, found, names, args.top)
    if args.save_probabilities:
        save_pool(args.save_probabilities, images, found, names)
    figures = {
        "command": "predict",
        "model": ref,
        "out": str(args.out),
        "images": len(images),
        "predicted": len(found.rows),
        "unreadable": len(found.bad),
        "left_out": list(images.problems),
        "bad_list": None if bad_list is None else str(bad_list),
        "probabilities": str(args.save_probabilities) if args.save_probabilities else None,
        "classes": len(names),
        "heads": 2 if found.heads else 1,
        "device": args.device,
        "seconds": round(time.perf_counter() - started, 3),
        "images_per_second": round(len(images) / max(found.seconds, 1e-9), 1),
    }
    report(figures, found)
    if args.json:
        print(json.dumps(figures, allow_nan=False))


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """The command line; raises `UserError` for numbers and places that cannot be."""
    parser = argparse.ArgumentParser(
        prog="vlkd predict",
        description="Class probabilities of images from any student.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("run", metavar="RUN", help="a run, a model's folder, or another reference")
    parser.add_argument(
        "images", nargs="+", metavar="IMAGES", help="files, folders, globs, FOLDER#SPLIT, shards, lists"
    )
    parser.add_argument("--out", required=True, type=Path, metavar="FILE", help="predictions, .csv or .jsonl")
    parser.add_argument("--classes", metavar="NAMES", help="for a dual encoder: a,b,c or FILE.txt with one a line")
    parser.add_argument("--templates", type=Path, metavar="FILE", help="prompts with {c} for the name, one a line")
    parser.add_argument(
        "--top", type=int, default=5, metavar="K", help="classes in a line of CSV (default %(default)s)"
    )
    parser.add_argument(
        "--save-probabilities", type=Path, metavar="FILE", help="all of them, and features, for `vlkd prep label_pool`"
    )
    parser.add_argument("--device", default="cpu", help="default %(default)s")
    parser.add_argument("--batch-size", type=int, default=64, help="default %(default)s")
    parser.add_argument("--workers", type=int, default=2, help="threads that decode (default %(default)s)")
    parser.add_argument("--json", action="store_true", help="end with one line of strict JSON")
    args = parser.parse_args(argv)
    for name in ("top", "batch_size", "workers"):
        if getattr(args, name) < 1:
            raise UserError(f"--{name.replace('_', '-')} is {getattr(args, name)}; expected 1 or more.")
    if args.out.suffix.lower() not in FORMATS:
        raise UserError(f"--out is {args.out}; expected a file that ends in .csv or .jsonl.")
    return args


def class_names(given: str | None) -> tuple[str, ...]:
    """The names in a line, or in a file; () for none."""
    if given is None:
        return ()
    file = Path(given)
    if file.suffix == ".txt" or file.is_file():
        from vlkd.data.labelled import read_names

        return read_names(file, None)
    names = tuple(name.strip() for name in given.split(","))
    if not all(names):
        raise UserError(f"--classes {given!r} has an empty name; expected names with one comma between them.")
    return names


def template_lines(file: Path | None) -> tuple[str, ...]:
    """The templates of a file; () for none."""
    if file is None:
        return ()
    from vlkd.data.labelled import read_templates

    return read_templates(file)


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


def write(out: Path, images: Pairs, found: Predictions, classes: Sequence[str], top: int) -> Path | None:
    """Write the predictions, and the list of bad images, where there are any; returns its place."""
    from vlkd.data.files import write_whole
    from vlkd.data.items import item_paths

    paths = item_paths(images)
    if out.suffix.lower() == ".csv":
        lines = csv_lines([header(found, classes, top), *csv_rows(images, paths, found, classes, top)])
    else:
        lines = "".join(
            json.dumps(row, allow_nan=False) + "\n" for row in json_rows(images, paths, found, unique(classes))
        )
    write_whole(out, lines.encode("utf-8", "surrogateescape"))
    bad_list = out.with_name(f"{out.stem}.bad.csv")
    if not found.bad:
        bad_list.unlink(missing_ok=True)  # One of an earlier run would accuse images that are sound by now.
        return None
    path_of = dict(zip(images.keys, paths, strict=True))
    rows = [["key", "path", "reason"], *([key, path_of[key], reason] for key, reason in found.bad)]
    write_whole(bad_list, csv_lines(rows).encode("utf-8", "surrogateescape"))
    return bad_list


def csv_lines(rows: Sequence[Sequence[str]]) -> str:
    """The text of a CSV."""
    with io.StringIO(newline="") as text:
        csv.writer(text, lineterminator="\n").writerows(rows)
        return text.getvalue()


def header(found: Predictions, classes: Sequence[str], top: int) -> list[str]:
    """The names of the columns."""
    heads = [f"{HEADS[head]}_{value}" for head in found.heads for value in ("class", "probability")]
    more = [f"{value}_{place}" for place in range(2, min(top, len(classes)) + 1) for value in ("class", "probability")]
    return ["key", "path", "class", "probability", *heads, *more]


def csv_rows(
    images: Pairs, paths: Sequence[str], found: Predictions, classes: Sequence[str], top: int
) -> Iterator[list[str]]:
    """A line per image: the most probable classes of the mix, between the first and the second each head's own."""
    import numpy as np

    for i, row in enumerate(found.rows.tolist()):
        order = np.argsort(-found.mix[i], kind="stable")[:top].tolist()
        first, *more = ([classes[k], number(found.mix[i, k])] for k in order)
        heads = [table[i] for table in found.heads.values()]
        own = [[classes[int(values.argmax())], number(values.max())] for values in heads]
        yield [images.keys[row], paths[row], *first, *(text for pair in (*own, *more) for text in pair)]


def json_rows(images: Pairs, paths: Sequence[str], found: Predictions, classes: Sequence[str]) -> Iterator[Any]:
    """An object per image with all probabilities of the mix and of each head."""

    def table(values: NDArray[np.float32]) -> dict[str, float]:
        return {name: float(number(value)) for name, value in zip(classes, values, strict=True)}

    for i, row in enumerate(found.rows.tolist()):
        best = int(found.mix[i].argmax())
        yield {
            "key": images.keys[row],
            "path": paths[row],
            "class": classes[best],
            "probability": float(number(found.mix[i, best])),
            "probabilities": table(found.mix[i]),
            **{HEADS[head]: table(values[i]) for head, values in found.heads.items()},
        }


def number(value: float | np.float32) -> str:
    """Six digits, however small."""
    return f"{float(value):.6g}"


def unique(classes: Sequence[str]) -> list[str]:
    """The names, with the class id behind those that stand twice."""
    often = Counter(classes)
    return [name if often[name] == 1 else f"{name} [{i}]" for i, name in enumerate(classes)]


def save_pool(place: Path, images: Pairs, found: Predictions, classes: Sequence[str]) -> None:
    """Keys, probabilities and features of the readable images."""
    from vlkd.active import write_pool

    keys = [images.keys[row] for row in found.rows.tolist()]
    write_pool(place, keys, found.mix, found.features, classes=classes)


def report(figures: dict[str, Any], found: Predictions) -> None:
    """What was left out, on the error stream, and one line about the table."""
    left_out = [f"unreadable: {key}: {reason}" for key, reason in found.bad]
    left_out += [f"left out: {problem}" for problem in figures["left_out"]]
    for line in left_out[:LISTED]:
        print(line, file=sys.stderr)
    if len(left_out) > LISTED:
        where = f"{figures['bad_list']} has all" if figures["bad_list"] else "--json lists all"
        print(f"and {len(left_out) - LISTED} more; {where}", file=sys.stderr)
    unreadable = f", {figures['unreadable']:,} unreadable in {figures['bad_list']}" if figures["unreadable"] else ""
    print(
        f"{figures['out']}: {figures['predicted']:,} of {figures['images']:,} images{unreadable}, "
        f"{figures['classes']:,} classes, {figures['images_per_second']:,} images/s"
    )
    if figures["probabilities"]:
        print(f"{figures['probabilities']}: their probabilities and features, for `vlkd prep label_pool`")
