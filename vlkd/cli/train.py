"""`vlkd train`: run a recipe."""

from __future__ import annotations

import argparse
import dataclasses
import inspect
import json
import textwrap
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

from vlkd import recipes

EPILOG = """Settings are named section.key=value; `vlkd train RECIPE --settings` lists them with meaning and value.

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
    parser.add_argument(
        "--settings", action="store_true", dest="show", help="list the settings, what they mean, and stop"
    )
    parser.add_argument("--json", action="store_true", help="end with one line of strict JSON: the folder, the figures")
    args = parser.parse_args(argv)
    path = recipes.find("tasks", args.recipe)
    if args.show:
        from vlkd.config import override

        show(override(recipes.load(path).config(), args.settings))
        return
    folder = run(recipes.load(path), args.settings)
    if args.json:
        results = folder / "results.jsonl"
        rows = [json.loads(line) for line in results.read_text().splitlines()] if results.is_file() else []
        print(json.dumps({"command": "train", "out": str(folder), "results": rows}, allow_nan=False))


def run(recipe: ModuleType, assignments: Sequence[str]) -> Path:
    """Run a recipe by the kind of its settings; returns its folder."""
    import vlkd.models  # noqa: F401 - before anything imports torchvision
    from vlkd.engine.classify.run import run_classifier
    from vlkd.engine.classify.settings import ClassifierRun
    from vlkd.engine.run import run_recipe
    from vlkd.engine.vlm.run import run_vlm
    from vlkd.engine.vlm.settings import VlmRun

    settings = recipe.config()
    if isinstance(settings, ClassifierRun):
        return run_classifier(recipe, assignments)
    return (run_vlm if isinstance(settings, VlmRun) else run_recipe)(recipe, assignments)


def show(settings: object, prefix: str = "") -> None:
    """Print nested settings as assignments, each behind what it means."""
    meanings = described(settings)
    for field in dataclasses.fields(settings):  # type: ignore[arg-type]
        value = getattr(settings, field.name)
        if dataclasses.is_dataclass(value):
            show(value, f"{prefix}{field.name}.")
            continue
        words = ",".join(map(str, value)) if isinstance(value, tuple) else value
        print(textwrap.fill(meanings.get(field.name, ""), 110, initial_indent="# ", subsequent_indent="# "))
        print(f"{prefix}{field.name}={words}\n")


def described(settings: object) -> dict[str, str]:
    """What the docstring of a settings class, and of those it inherits from, says of each setting."""
    found: dict[str, str] = {}
    for kind in reversed(type(settings).__mro__):
        lines = inspect.cleandoc(kind.__doc__ or "").partition("Args:\n")[2].splitlines()
        name = ""
        for line in lines:
            head, colon, text = line.strip().partition(": ")
            if line.startswith("    ") and not line.startswith("     ") and colon:
                name = head
                found[name] = text
            elif line.startswith("        ") and name:
                found[name] += " " + line.strip()
            else:
                break
    return found
