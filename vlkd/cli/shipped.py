"""Verbs whose words after the name belong to a file of data_prep/ or eval/."""

from __future__ import annotations

from collections.abc import Sequence

from vlkd import recipes


def run_shipped(verb: str, kind: str, argv: Sequence[str], *examples: str) -> None:
    """Call `main(argv)` of the named file; without a name, print what there is."""
    if not argv or argv[0] in ("-h", "--help"):
        print(f"usage: vlkd {verb} NAME ...\n")
        for name in recipes.names(kind):
            print(f"  {name:<12} {recipes.summary(recipes.find(kind, name))}")
        print("\nexamples:")
        for example in examples:
            print(f"  {example}")
        return
    recipes.load(recipes.find(kind, argv[0])).main(argv[1:])
