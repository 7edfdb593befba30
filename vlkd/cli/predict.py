"""`vlkd predict`: class probabilities of images from any student, or answers to a question about each, as a table."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from vlkd.errors import UserError

EPILOG = """RUN is a run's folder, whose student is taken, a model's folder, or any other reference of a model. A
classifier names its own classes, by the mix of its heads and by each head alone; a dual encoder needs --classes and
gives softmax(logit scale x cosine) over them; a generative model needs --question and answers it about each picture.

IMAGES are files, folders at any depth, globs, FOLDER#SPLIT, shards, or a list of captions. The key of an image below
the data root of RUN is its path from there on, as train/CLASS/FILE.jpg; so is that of FOLDER#SPLIT and of a folder of
class folders that is called train, val, valid, validation or test. Elsewhere it is the path inside the folder. These
are the keys of `vlkd prep label_pool` and of data.shots=LIST.txt.

Images that cannot be read are listed beside --out, in predictions.bad.csv, and the others go on.

examples:
  vlkd predict runs/dho photos/ --out predictions.csv
  vlkd predict runs/retriever photos/*.jpg --classes "a cat,a dog,an empty room" --out predictions.jsonl
  vlkd predict runs/dho DATA#train --out pool.csv --save-probabilities pool.safetensors --json
  vlkd predict runs/switch photos/ --question "How many people are there?" --out answers.csv
"""
FORMATS = (".csv", ".jsonl")
FOR_CLASSES = ("classes", "templates", "save_probabilities")
"""Options that mean nothing with a question."""


def main(argv: Sequence[str]) -> None:
    """Run the command line."""
    args = parse(argv)

    from vlkd.models.generative_refs import generative_folder

    folder = generative_folder(args.run)
    if args.question is None:
        if folder is not None:
            raise UserError(
                f"{args.run} is a generative model, which names no classes; give --question, or name a classifier."
            )
        from vlkd.cli.predict_classes import predict_classes

        predict_classes(args)
        return

    from vlkd.cli.predict_answers import predict_answers

    predict_answers(args, folder or named_model(args.run))


def named_model(ref: str) -> str:
    """A name that is no folder, which may be that of a generative model; raises `UserError` for any folder."""
    from vlkd.models.classifier_images import student_of

    if Path(ref).is_dir():
        raise UserError(
            f"{student_of(ref)} holds no generative model, which --question needs; leave --question out, or name "
            "another run."
        )
    return ref


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """The command line; raises `UserError` for numbers and places that cannot be."""
    parser = argparse.ArgumentParser(
        prog="vlkd predict",
        description="Class probabilities of images from any student, or its answers to a question about each.",
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
    parser.add_argument("--question", metavar="TEXT", help="for a generative model: asked about each image")
    parser.add_argument("--max-new-tokens", type=int, default=32, help="of an answer (default %(default)s)")
    parser.add_argument("--device", default="cpu", help="default %(default)s")
    parser.add_argument("--batch-size", type=int, help="default 64, with --question 16")
    parser.add_argument("--workers", type=int, default=2, help="threads that decode (default %(default)s)")
    parser.add_argument("--json", action="store_true", help="end with one line of strict JSON")
    args = parser.parse_args(argv)
    for name in ("top", "batch_size", "workers", "max_new_tokens"):
        value = getattr(args, name)
        if value is not None and value < 1:
            raise UserError(f"--{name.replace('_', '-')} is {value}; expected 1 or more.")
    if args.out.suffix.lower() not in FORMATS:
        raise UserError(f"--out is {args.out}; expected a file that ends in .csv or .jsonl.")
    if args.question is not None:
        if not args.question.strip():
            raise UserError("--question is empty; expected the words of a question.")
        if given := [name for name in FOR_CLASSES if getattr(args, name) is not None]:
            option = f"--{given[0].replace('_', '-')}"
            raise UserError(f"{option} is for class probabilities, and --question asks for words; leave one out.")
    return args
