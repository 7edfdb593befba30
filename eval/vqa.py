"""Questions about pictures: exact match, yes or no, multiple choice, each kind's accuracy, every answer saved.

vlkd eval vqa --model runs/switch --data data/vqa/test --out runs/eval/vqa/results.jsonl
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vlkd.data.questions import Question
    from vlkd.protocols.vqa import MeasuredAnswers

EXAMPLES = """Questions are those of LLaVA's JSON and of shards; `vlkd.protocols.vqa` says how options are written into
one, `vlkd.metrics.answers` how an answer is read. Models answer greedily in float32; answers do not depend on the batch
size. Kinds of several sources carry the source's name. Rows stand with those of other protocols in --out, for
`vlkd eval table` and `vlkd eval compare`.

examples:
  vlkd eval vqa --model runs/switch --data data/vqa/test --report answers.html
  vlkd eval vqa --model hf:llava-hf/llava-1.5-7b-hf --data pope.json@coco/val2014 --limit 500 --device cuda --json
"""


def main(argv: Sequence[str]) -> None:
    """Ask the model everything, save its answers, and print the figures; see `--help`."""
    args = parse(argv)

    from vlkd.data.files import write_whole
    from vlkd.data.images import open_image
    from vlkd.data.questions import open_questions
    from vlkd.suite.results import append_row, write_items
    from vlkd.suite.vqa_page import answers_markdown, answers_page

    questions = drawn(open_questions(args.data), args.limit, args.seed)
    images = {question.key: question.image for question in questions}
    row, found = measured_row(args, questions)
    answers = answers_file(args, row)
    write_whole(answers, lines(questions, found).encode())
    row["answers"] = str(answers)
    row["items"] = write_items(args.out, row, found.measured.per_item, [own.key for own in found.rows])
    append_row(args.out, row)
    print(answers_markdown(found))
    print(f"{answers}: all {len(questions):,} answers, {row['questions_per_second']:,} a second")
    if args.report:
        about = {name: row[name] for name in ("model_ref", "dataset", "device", "batch_size")} | row["settings"]
        page = answers_page(
            found, lambda key: open_image(images[key].read()), model=Path(args.model).name, settings=about
        )
        page.write(args.report)
        print(f"The page is {args.report}.")
    if args.json:
        print(json.dumps({"command": "eval vqa", "results": [row]}, allow_nan=False))


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """The command line, with the results' folder as `out`; raises `UserError` for numbers and places that cannot be."""
    from vlkd.suite.options import check_file, check_numbers

    parser = argparse.ArgumentParser(
        prog="vlkd eval vqa",
        description=__doc__,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--model", required=True, metavar="REF", help="a run, a model's folder, or hf:OWNER/NAME")
    parser.add_argument("--data", required=True, nargs="+", metavar="REF", help="LLaVA JSON, FILE@ROOT, or shards")
    parser.add_argument(
        "--out", type=Path, default=Path("runs/eval/vqa"), metavar="PATH",
        help="results.jsonl, or its folder, to which a row is added (default %(default)s)",
    )  # fmt: skip
    parser.add_argument("--answers", type=Path, metavar="FILE", help="all answers as JSON lines; else beside --out")
    parser.add_argument("--report", type=Path, metavar="FILE", help="a page with pictures and answers")
    parser.add_argument("--batch-size", type=int, default=16, help="questions at a time (default %(default)s)")
    parser.add_argument("--max-new-tokens", type=int, default=32, help="of an answer (default %(default)s)")
    parser.add_argument("--limit", type=int, default=0, metavar="N", help="questions drawn by --seed; 0 is all")
    parser.add_argument("--seed", type=int, default=0, help="of --limit (default %(default)s)")
    parser.add_argument("--workers", type=int, default=2, help="threads that decode (default %(default)s)")
    parser.add_argument("--device", default="cpu", help="default %(default)s")
    parser.add_argument("--json", action="store_true", help="end with one line of strict JSON")
    args = parser.parse_args(argv)
    check_numbers(args, batch_size=1, max_new_tokens=1, limit=0, seed=0, workers=1)
    check_file(args, "answers", "report")
    if args.out.suffix == ".jsonl":
        args.out = results_folder(args.out)
    # A place that cannot be is told before hours of answers, not after.
    for folder in (args.out, *(file.parent for file in (args.answers, args.report) if file)):
        folder.mkdir(parents=True, exist_ok=True)
    return args


def results_folder(file: Path) -> Path:
    """The folder of a results file."""
    from vlkd.errors import UserError
    from vlkd.suite.results import RESULTS

    if file.name != RESULTS:
        raise UserError(f"--out is {file}; expected a folder, or a file called {RESULTS}, as `vlkd eval table` reads.")
    return file.parent


def drawn(questions: Sequence[Question], limit: int, seed: int) -> list[Question]:
    """`limit` of the questions, drawn by the seed, in their order; all for 0."""
    import numpy as np

    if not 0 < limit < len(questions):
        return list(questions)
    places = np.random.default_rng(seed).choice(len(questions), size=limit, replace=False)
    return [questions[place] for place in sorted(places.tolist())]


def measured_row(args: argparse.Namespace, questions: Sequence[Question]) -> tuple[dict[str, Any], MeasuredAnswers]:
    """Ask the model; its row of results as those of `eval suite`, without answers and items."""
    from functools import partial

    from vlkd.data.images import open_image
    from vlkd.data.sources import source_name
    from vlkd.models.load_generative import load_generative
    from vlkd.protocols.vqa import measure_vqa, too_long
    from vlkd.suite.job import LISTED
    from vlkd.suite.results import measured_columns, model_columns, versions

    model = load_generative(args.model, device=args.device)
    if problem := too_long(questions, model.count_tokens([one.answer for one in questions]), args.max_new_tokens):
        print(problem, file=sys.stderr)
    started = time.perf_counter()
    found = measure_vqa(
        partial(model.answer, batch_size=args.batch_size, max_new_tokens=args.max_new_tokens),
        questions,
        lambda place: open_image(questions[place].image.read()),
        batch_size=args.batch_size,
        workers=args.workers,
    )
    seconds = time.perf_counter() - started
    places = [ref if Path(ref).exists() else ref.partition("@")[0] for ref in args.data]
    kinds = {
        name: {
            "questions": own.questions, "right": own.right, "accuracy": own.accuracy,
            "interval": list(own.interval), "parse_failures": own.parse_failures,
        }
        for name, own in found.kinds.items()
    }  # fmt: skip
    row = {
        "dataset": "+".join(source_name(place) for place in places), **model_columns(args.model), "language": "en",
        **measured_columns(found.measured), "model_ref": args.model, "fingerprint": model.fingerprint(),
        "parameters": sum(value.numel() for value in model.parameters()), "precision": "fp32", "dtype": "float32",
        "device": args.device, "batch_size": args.batch_size, "seed": args.seed, "versions": versions(),
        "settings": {"limit": args.limit, "seed": args.seed, "max_new_tokens": args.max_new_tokens},
        "data": {"path": " ".join(args.data), "split": "", "kind": "vqa", "train": ""},
        "data_hash": data_hash(questions), "kinds": kinds, "unreadable": len(found.unreadable),
        "unreadable_keys": [key for key, _ in found.unreadable[:LISTED]], "seconds": round(seconds, 3),
        "questions_per_second": round(len(questions) / max(seconds, 1e-9), 1),
    }  # fmt: skip
    return row, found


def data_hash(questions: Sequence[Question]) -> str:
    """A hash of what is asked, and of each picture's length and middle bytes."""
    from vlkd.errors import UserError

    state, pictures = hashlib.sha256(), dict[Any, str]()
    for question in questions:
        if question.image not in pictures:
            try:
                pictures[question.image] = f"{question.image.length()} {question.image.middle().hex()}"
            except UserError:
                pictures[question.image] = "unreadable"
        asked = (question.key, question.text, question.answer, question.kind, list(question.choices))
        state.update(json.dumps([*asked, pictures[question.image]]).encode())
    return state.hexdigest()[:16]


def answers_file(args: argparse.Namespace, row: dict[str, Any]) -> Path:
    """Where the answers go: as asked, or named after model and data below the results' folder."""
    name = hashlib.sha256(f"{row['model_ref']}\n{row['dataset']}".encode()).hexdigest()[:16]
    place: Path = args.answers or args.out / "answers" / f"{name}.jsonl"
    place.parent.mkdir(parents=True, exist_ok=True)
    return place


def lines(questions: Sequence[Question], found: MeasuredAnswers) -> str:
    """One JSON object per question in the data's order; one whose picture cannot be read says why."""
    rows = {row.key: row.as_row() for row in found.rows}
    rows |= {key: {"key": key, "unreadable": reason} for key, reason in found.unreadable}
    return "".join(json.dumps(rows[question.key], allow_nan=False) + "\n" for question in questions)
