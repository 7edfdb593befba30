"""`vlkd VERB ...`: finds the verb, runs it, and turns a user's error into one sentence and exit code 2."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Sequence

from vlkd import __version__
from vlkd.cli.memory import keep_freed_memory
from vlkd.errors import UserError

VERBS = {
    "demo": "the whole journey offline: drawn scenes, a teacher, a student, search, a report (about three minutes)",
    "ls": "what can be run",
    "cp": "an editable copy of a recipe",
    "train": "run a recipe; the same command continues its output folder",
    "prep": "prepare data: shards, splits, scenes",
    "cache": "teachers' features, computed once and stored",
    "eval": "measure models by one protocol",
    "predict": "use a student: class probabilities of images, or answers to a question, as CSV or JSON lines",
    "index": "build a FAISS index of images, add to it or remove from it",
    "search": "search an index by text or by image",
    "doctor": "check the environment, the devices and models",
}
EXAMPLES = """examples:
  vlkd demo
  vlkd train retriever data.train=shards/train data.val=shards/val out=runs/first
"""


def usage() -> str:
    """The help text."""
    verbs = "\n".join(f"  {name:<8} {summary}" for name, summary in VERBS.items())
    title = f"vlkd {__version__}: large vision-language teachers into small models"
    return f"{title}\n\nusage: vlkd VERB ...\n\n{verbs}\n\n{EXAMPLES}"


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line and exit: 0, or 2 for the user's error, or 1 for ours."""
    words = list(sys.argv[1:] if argv is None else argv)
    if not words or words[0] in ("-h", "--help"):
        print(usage())
        return
    if words[0] == "--version":
        print(__version__)
        return
    try:
        if words[0] not in VERBS:
            raise UserError(f"vlkd has no verb {words[0]!r}; there are {', '.join(VERBS)}.")
        keep_freed_memory()
        calm_bars()
        importlib.import_module(f"vlkd.cli.{words[0]}").main(words[1:])
    except UserError as error:
        say(f"vlkd: {error}")
        raise SystemExit(2) from None
    except KeyboardInterrupt:
        say("vlkd: stopped; the same command continues a training run.")
        raise SystemExit(130) from None
    except BrokenPipeError:
        raise SystemExit(0) from None
    except OSError as error:
        place = error.filename or "A file"
        say(
            f"vlkd: {place} cannot be read or written ({error.strerror or error}); check the path, its rights and the "
            "space on its disk, then run the same command again."
        )
        raise SystemExit(2) from error


def calm_bars() -> None:
    """Progress that goes to a file is written each ten seconds; the user's own TQDM_MININTERVAL stays."""
    if not sys.stderr.isatty():
        os.environ.setdefault("TQDM_MININTERVAL", "10")


def say(sentence: str) -> None:
    """Print it on the error stream, on a line of its own where a bar of progress still stands."""
    if tqdm := sys.modules.get("tqdm"):
        tqdm.tqdm.write(sentence, file=sys.stderr)
    else:
        print(sentence, file=sys.stderr)


if __name__ == "__main__":
    main()
