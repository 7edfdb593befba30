"""`vlkd ls`: what can be run."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from vlkd import recipes

VERBS = {"tasks": "train", "data_prep": "prep", "eval": "eval"}
EPILOG = """examples:
  vlkd ls
  vlkd train retriever --settings
"""


def main(argv: Sequence[str]) -> None:
    """Print each file's name and the first line of its docstring."""
    parser = argparse.ArgumentParser(
        prog="vlkd ls",
        description="What can be run, by verb.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.parse_args(argv)
    for kind, verb in VERBS.items():
        print(f"vlkd {verb}")
        for name in recipes.names(kind):
            print(f"  {name:<16} {recipes.summary(recipes.find(kind, name))}")
