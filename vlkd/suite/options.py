"""Options that several commands of `eval/` have in common, and the least that a number may be."""

from __future__ import annotations

import argparse

from vlkd.errors import UserError

PRECISIONS = ("fp32", "bf16")


def add_encoding_options(parser: argparse.ArgumentParser) -> None:
    """How models encode, and `--json`."""
    parser.add_argument("--batch-size", type=int, default=64, help="default %(default)s")
    parser.add_argument("--workers", type=int, default=2, help="threads that decode (default %(default)s)")
    parser.add_argument("--precision", default="fp32", choices=PRECISIONS, help="of the encoders")
    parser.add_argument("--device", default="cpu", help="default %(default)s")
    parser.add_argument("--seed", type=int, default=0, help="of probes and bootstraps (default %(default)s)")
    parser.add_argument("--json", action="store_true", help="end with one line of strict JSON")


def check_file(args: argparse.Namespace, *names: str) -> None:
    """Refuse a folder where a file is to be written, before the work and not after it.

    Raises:
        UserError: one of the options names a folder.
    """
    for name in names:
        path = getattr(args, name)
        if path is not None and path.is_dir():
            raise UserError(f"--{name} {path} is a folder; expected a file: name one in it.")


def check_numbers(args: argparse.Namespace, **least: int) -> None:
    """Refuse options that are below their least, as in `check_numbers(args, batch_size=1, seed=0)`.

    Raises:
        UserError: one is; lists are looked through.
    """
    for name, low in least.items():
        found = getattr(args, name)
        for value in found if isinstance(found, list) else [found]:
            if value < low:
                option = f"-{name}" if len(name) == 1 else f"--{name.replace('_', '-')}"
                raise UserError(f"{option} is {value}; expected {low} or more.")
