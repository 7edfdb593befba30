"""Two models item by item on stored results: paired intervals, wins and losses by class, pictures that changed.

vlkd eval compare results/ --a runs/student --b teachers/large --out compare.html
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from vlkd.errors import UserError
from vlkd.suite.options import check_file, check_numbers

if TYPE_CHECKING:
    from vlkd.suite.results import Row

EXAMPLES = """examples:
  vlkd eval compare results/ --a runs/student --b teachers/large --out compare.html
  vlkd eval compare results/before results/after --json
"""


def main(argv: Sequence[str]) -> None:
    """Read two results, compare them, and write the page if one is asked for; see `--help`."""
    parser = argparse.ArgumentParser(
        prog="vlkd eval compare",
        description=__doc__,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("results", nargs="+", type=Path, metavar="RESULTS", help="one folder for both models, or two")
    parser.add_argument("--a", metavar="REF", help="the first model; not needed where a folder holds one")
    parser.add_argument("--b", metavar="REF", help="the second model")
    parser.add_argument("--out", type=Path, metavar="FILE", help="write a page with the pictures that changed")
    parser.add_argument("--seed", type=int, default=0, help="of the bootstrap")
    parser.add_argument("--json", action="store_true", help="end with one line of strict JSON")
    args = parser.parse_args(argv)
    if len(args.results) > 2:
        raise UserError(f"{len(args.results)} results are named; expected one folder or two.")
    check_numbers(args, seed=0)
    check_file(args, "out")

    from vlkd.suite.compare import compare_results
    from vlkd.suite.compare_page import comparison_markdown, comparison_page

    (rows_a, folder_a), (rows_b, folder_b) = choose(args.results, args.a, args.b)
    comparison = compare_results(rows_a, folder_a, rows_b, folder_b, seed=args.seed)
    print(comparison_markdown(comparison))
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        comparison_page(comparison).write(args.out)
        print(f"\nThe page is {args.out}.")
    if args.json:
        results = [one.as_row() for one in comparison.compared]
        done = {"command": "eval compare", "a": comparison.a, "b": comparison.b, "results": results}
        print(json.dumps(done | {"refused": list(comparison.refused)}, allow_nan=False))


def choose(results: Sequence[Path], a: str | None, b: str | None) -> tuple[tuple[list[Row], Path], ...]:
    """The rows of the two models and the folders of their items.

    A model that is not named is the only one of its folder, or, of one folder with two models, the other one.
    """
    from vlkd.suite.results import read_results
    from vlkd.suite.table import find_model

    chosen: list[tuple[list[Row], Path]] = []
    for path, ref, other in ((results[0], a, b), (results[-1], b, a)):
        rows = read_results(path)
        models = list(dict.fromkeys(str(row["model_ref"]) for row in rows))
        if ref is None and len(results) == 1 and len(models) == 2:
            named = find_model(models, other) if other is not None else models[1 if chosen else 0]
            ref = named if other is None else next(model for model in models if model != named)
        if ref is None and len(models) != 1:
            raise UserError(f"{path} holds {len(models)} models; name --a and --b among {', '.join(models)}.")
        model = models[0] if ref is None else find_model(models, ref)
        chosen.append(([row for row in rows if row["model_ref"] == model], path if path.is_dir() else path.parent))
    if len(results) == 1 and chosen[0][0] == chosen[1][0]:
        raise UserError("Both sides are the same model; name two with --a and --b.")
    return tuple(chosen)
