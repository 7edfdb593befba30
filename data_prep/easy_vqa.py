"""Turn easy-VQA, questions about single drawn shapes, into shards of train, val and test.

vlkd prep easy_vqa data/easy_vqa --out vqa/easy

DATA holds qa.jsonl, a line {"image": PATH, "qa": [[question, answer], ...], "split": "train" or "test"} a picture, or
what the repository vzhou842/easy-VQA keeps in easy_vqa/data: train/ and test/, each with images/ID.png and
questions.json, a list of [question, answer, ID]. val is drawn from the training pictures.

Kinds, from the answer: shape, colour, yes/no. Of the yes/no questions four in five need no picture: a colour that is
asked for is one of eight, and mostly absent. The closing lines say what the words alone tell.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vlkd.data.vqa_writer import VqaSample

KINDS = {
    **dict.fromkeys(("yes", "no"), "yes/no"),
    **dict.fromkeys(("circle", "rectangle", "triangle"), "shape"),
    **dict.fromkeys(("black", "blue", "brown", "gray", "green", "red", "teal", "yellow"), "colour"),
}
"""All answers of easy-VQA."""
EPILOG = """examples:
  vlkd prep easy_vqa data/easy_vqa --out vqa/easy
  vlkd prep easy_vqa easy-VQA/easy_vqa/data --val 200 --seed 1 --out vqa/easy_small --limit 1000
"""


@dataclass(frozen=True, kw_only=True)
class Picture:
    """One picture with its questions and answers."""

    image: Path
    split: str
    qa: tuple[tuple[str, str], ...]


def main(argv: Sequence[str]) -> None:
    """Run the command line."""
    args = _parser().parse_args(argv)

    from vlkd.data.prepare_vqa import check_new, print_vqa_summary, unreadable, write_vqa_splits
    from vlkd.errors import UserError

    check_new(args.out)
    if (args.limit is not None and args.limit < 1) or args.val < 0:
        raise UserError(f"Found --limit {args.limit} and --val {args.val}; expected at least 1, and 0 or more.")
    pictures = read_folder(args.data) if (args.data / "train").is_dir() else read_lines(args.data / "qa.jsonl")
    asked = [picture for picture in pictures if picture.qa]
    bad = unreadable([picture.image for picture in asked], args.max_bad)
    splits = _split([picture for picture in asked if picture.image not in bad], args.val, args.seed)
    chosen = {split: members[: args.limit] for split, members in splits.items() if members}
    samples = {split: _samples(members, args.short_side) for split, members in chosen.items()}
    summary = write_vqa_splits(samples, sum(map(len, chosen.values())), args, bad)
    summary["without_questions"] = len(pictures) - len(asked)
    # Without --val, the run chooses on test.
    held_out = "val" if "val" in chosen else "test"
    next_command = f"vlkd train vlm data.train={args.out}/train data.val={args.out}/{held_out} out=runs/easy_vqa"
    print_vqa_summary(summary, next_command=next_command, as_json=args.json)


def _parser() -> argparse.ArgumentParser:
    from vlkd.data.prepare import add_output_arguments, add_picture_arguments

    parser = argparse.ArgumentParser(
        prog="vlkd prep easy_vqa",
        description=__doc__,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("data", type=Path, help="folder with qa.jsonl, or with train/ and test/")
    parser.add_argument("--val", type=int, default=500, help="training pictures set aside (default %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="which ones (default %(default)s)")
    add_output_arguments(parser)
    add_picture_arguments(parser)
    return parser


def read_lines(file: Path) -> list[Picture]:
    """The pictures of qa.jsonl, in its order.

    Raises:
        UserError: no file, or a line that is not as expected.
    """
    from vlkd.data.files import strict_json
    from vlkd.data.records import resolve_inside
    from vlkd.errors import UserError

    found = []
    for number, line in enumerate(_read(file).split("\n"), 1):
        if not line.strip():
            continue
        try:
            entry = strict_json(line)
            image, split, qa = entry["image"], entry["split"], entry["qa"]
            pairs = tuple((str(question), str(answer)) for question, answer in qa)
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(
                f'{file}, line {number}: {error!r:.100}; expected {{"image": PATH, "qa": [[question, answer], ...], '
                '"split": "train" or "test"}.'
            ) from None
        if split not in ("train", "test"):
            raise UserError(f"{file}, line {number}: the split {split!r}; expected train or test.")
        found.append(Picture(image=resolve_inside(file.parent, str(image), str(file)), split=split, qa=pairs))
    return found


def read_folder(root: Path) -> list[Picture]:
    """The pictures of the original layout, in the order of their first question; train before test.

    Raises:
        UserError: no questions.json, or one that is not as expected.
    """
    from vlkd.data.files import strict_json
    from vlkd.errors import UserError

    found = []
    for split in ("train", "test"):
        file = root / split / "questions.json"
        by_image: dict[int, list[tuple[str, str]]] = {}
        try:
            for question, answer, number in strict_json(_read(file)):
                by_image.setdefault(int(number), []).append((str(question), str(answer)))
        except (ValueError, TypeError) as error:
            raise UserError(f"{file}: {error!r:.100}; expected a list of [question, answer, ID].") from None
        images = root / split / "images"
        found += [Picture(image=images / f"{n}.png", split=split, qa=tuple(qa)) for n, qa in by_image.items()]
    return found


def _read(file: Path) -> str:
    from vlkd.errors import UserError

    try:
        return file.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", error)
        raise UserError(
            f"{file} cannot be read ({reason}); give the folder of qa.jsonl, or that of train/ and test/."
        ) from None


def _split(pictures: Sequence[Picture], val: int, seed: int) -> dict[str, list[Picture]]:
    """train, val and test; val is drawn by the seed, each keeps the order of the data."""
    from vlkd.errors import UserError

    train = [picture for picture in pictures if picture.split == "train"]
    if val >= len(train):
        raise UserError(f"Found --val {val} with {len(train)} training pictures; expected fewer, so that some train.")
    drawn = set(Random(f"easy_vqa/{seed}").sample(range(len(train)), val))
    return {
        "train": [picture for row, picture in enumerate(train) if row not in drawn],
        "val": [train[row] for row in sorted(drawn)],
        "test": [picture for picture in pictures if picture.split == "test"],
    }


def _samples(pictures: Sequence[Picture], short_side: int | None) -> Iterator[VqaSample]:
    from vlkd.data.prepare import encode_picture
    from vlkd.data.records import record_keys
    from vlkd.data.vqa_writer import VqaSample

    keys = record_keys([picture.image for picture in pictures])
    for key, picture in zip(keys, pictures, strict=True):
        image, suffix = encode_picture(picture.image, short_side)
        qa = tuple(_qa(question, answer, picture.image) for question, answer in picture.qa)
        yield VqaSample(key=key, image=image, suffix=suffix, qa=qa)


def _qa(question: str, answer: str, image: Path) -> Any:
    from vlkd.data.vqa_writer import QA
    from vlkd.errors import UserError

    if answer not in KINDS:
        raise UserError(
            f"{image}: the answer {answer!r} to {question!r} is none of easy-VQA's {', '.join(KINDS)}; mend it, or "
            "write other questions with `write_vqa_shards`."
        )
    return QA(question=question, answer=answer, kind=KINDS[answer])
