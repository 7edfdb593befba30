"""`vlkd cp`: an editable copy of a recipe."""

from __future__ import annotations

import argparse
import shutil
from collections.abc import Sequence
from pathlib import Path

from vlkd import recipes
from vlkd.errors import UserError

EPILOG = """examples:
  vlkd cp retriever my_retriever.py
  vlkd train ./my_retriever.py smoke=true out=runs/mine
"""


def main(argv: Sequence[str]) -> None:
    """Copy a file of tasks/."""
    parser = argparse.ArgumentParser(
        prog="vlkd cp",
        description="Copy a recipe of the installed version to a file of your own.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("recipe", help=f"one of {', '.join(recipes.names('tasks'))}")
    parser.add_argument("file", type=Path, help="where to; an existing file is never overwritten")
    args = parser.parse_args(argv)
    source = recipes.find("tasks", args.recipe)
    if args.file.exists():
        raise UserError(f"{args.file} exists; give another name or remove it first.")
    if args.file.suffix != ".py" or not args.file.resolve().parent.is_dir():
        raise UserError(f"Found {args.file}, expected a new .py file in a folder that exists.")
    shutil.copyfile(source, args.file)
    print(f"{args.file}: run it with `vlkd train {args.file}`")
