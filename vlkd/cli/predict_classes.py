"""`vlkd predict` with a classifier or a dual encoder: class probabilities of images."""

from __future__ import annotations

import argparse
import json
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vlkd.cli.predict_tables import base_figures, check_places, csv_lines, report_left_out, summary, write_table
from vlkd.errors import UserError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from vlkd.data.sources import Pairs
    from vlkd.engine.predict import Predictions

HEADS = {"label": "label_head", "teacher": "teacher_head"}
BATCH = 64
"""Images at a time, where nobody says."""


def predict_classes(args: argparse.Namespace) -> None:
    """Everything after the command line."""
    started = time.perf_counter()

    from vlkd.data.given_images import open_given
    from vlkd.engine.predict import data_root, open_student, predict
    from vlkd.models.classifier_images import student_of

    ref = student_of(args.run)
    classes, templates = class_names(args.classes), template_lines(args.templates)
    images = open_given(args.images, data_root(args.run))
    check_places(args, images)
    student = open_student(ref, classes, templates, device=args.device)
    found = predict(student, images, batch_size=args.batch_size or BATCH, workers=args.workers)
    names = student.classes
    bad_list = write_table(args.out, table(args.out, images, found, names, args.top), images, found.bad)
    if args.save_probabilities:
        save_pool(args.save_probabilities, images, found, names)
    figures = base_figures(args, ref, images, found.bad, bad_list) | {
        "probabilities": str(args.save_probabilities) if args.save_probabilities else None,
        "classes": len(names),
        "heads": 2 if found.heads else 1,
        "seconds": round(time.perf_counter() - started, 3),
        "images_per_second": round(len(images) / max(found.seconds, 1e-9), 1),
    }
    report_left_out(figures, found.bad)
    print(summary(figures, f"{figures['classes']:,} classes"))
    if args.save_probabilities:
        print(f"{args.save_probabilities}: their probabilities and features, for `vlkd prep label_pool`")
    if args.json:
        print(json.dumps(figures, allow_nan=False))


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


def table(out: Path, images: Pairs, found: Predictions, classes: Sequence[str], top: int) -> str:
    """The predictions as CSV, or as one JSON object a line."""
    from vlkd.data.items import item_paths

    paths = item_paths(images)
    if out.suffix.lower() == ".csv":
        return csv_lines([header(found, classes, top), *csv_rows(images, paths, found, classes, top)])
    rows = json_rows(images, paths, found, unique(classes))
    return "".join(json.dumps(row, allow_nan=False) + "\n" for row in rows)


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
