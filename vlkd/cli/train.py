"""`vlkd train`: run a recipe."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence

from vlkd import recipes

EPILOG = """Settings are named section.key=value; `vlkd train RECIPE --settings` lists them with their values.

examples:
  vlkd train retriever data.train=shards/train data.val=shards/val train.samples=100000 out=runs/first
  vlkd train ./my_recipe.py smoke=true out=runs/smoke
"""


def main(argv: Sequence[str]) -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(
        prog="vlkd train",
        description="Run a recipe. The same command continues its output folder.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("recipe", help=f"a name ({', '.join(recipes.names('tasks'))}) or your own .py file")
    parser.add_argument("settings", nargs="*", metavar="key=value", help="changes of its settings")
    parser.add_argument("--settings", action="store_true", dest="show", help="list the settings and stop")
    parser.add_argument("--json", action="store_true", help="end with one line of strict JSON: the folder, the figures")
    args = parser.parse_args(argv)
    path = recipes.find("tasks", args.recipe)
    if args.show:
        from vlkd.config import override, to_json

        show(to_json(override(recipes.load(path).config(), args.settings)))
        return
    import vlkd.models  # noqa: F401 - before anything imports torchvision
    from vlkd.engine.run import run_recipe

    folder = run_recipe(recipes.load(path), args.settings)
    if args.json:
        results = folder / "results.jsonl"
        rows = [json.loads(line) for line in results.read_text().splitlines()] if results.is_file() else []
        print(json.dumps({"command": "train", "out": str(folder), "results": rows}, allow_nan=False))


def show(settings: dict[str, object], prefix: str = "") -> None:
    """Print nested settings as assignments."""
    for key, value in settings.items():
        if isinstance(value, dict):
            show(value, f"{prefix}{key}.")
        else:
            words = ",".join(map(str, value)) if isinstance(value, list) else value
            print(f"{prefix}{key}={words}")
