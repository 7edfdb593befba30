"""`vlkd cache answers`: a generative teacher's distributions over answer tokens, computed once and stored."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vlkd.cli.cache import device_of
from vlkd.errors import UserError

if TYPE_CHECKING:
    from vlkd.distill.answers.read import StoredAnswers

EXAMPLES = """examples:
  vlkd cache answers --teacher runs/teacher/student --data vqa/train --out runs/answers --top 32
  vlkd cache answers --teacher runs/teacher/student --data vqa/train --out runs/answers --top 32 --verify
"""
EPILOG = f"""`vlkd train switch_kd` reads the folder with teacher.stored=DIR, for terms that compare answers alone.
The same command continues where it was stopped.

{EXAMPLES}"""
LARGEST_KL = 0.01
"""Nats by which a stored distribution may differ from one computed anew."""


def main(argv: Sequence[str]) -> None:
    """Store or verify the answers, and print what they are."""
    args = parse(argv)
    from vlkd.data.conversations import open_conversations
    from vlkd.distill.answers.build import build_answers
    from vlkd.distill.answers.fidelity import verify_answers
    from vlkd.distill.answers.format import AnswerSpec
    from vlkd.distill.answers.read import open_answers
    from vlkd.models.load_generative import load_generative

    spec = AnswerSpec(top=args.top, precision=args.precision, dtype=args.dtype)
    conversations = open_conversations(args.data)
    teacher = load_generative(args.teacher, device=device_of(args.device))
    if not args.verify:
        stored = build_answers(args.out, teacher, conversations, spec, workers=args.workers, batch_size=args.batch_size)
        found = figures(stored)
    else:
        stored = open_answers(args.out, teacher, conversations)
        found = figures(stored) | {"verified": verify_answers(stored, teacher, conversations, sample=args.sample)}
    print_figures(found)
    if args.json:
        print(json.dumps({"command": "cache answers", "out": str(args.out)} | found, allow_nan=False))
    if args.verify and not found["verified"]["kl"] <= LARGEST_KL:
        raise UserError(
            f"The answers in {args.out} are not those computed anew (largest KL {found['verified']['kl']:.2g} nats, "
            f"expected {LARGEST_KL} or less); remove the folder and store them again."
        )


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """The command line; raises `UserError` for a value outside its range."""
    parser = argparse.ArgumentParser(
        prog="vlkd cache answers",
        description="Run a generative teacher over conversations once, and store its K likeliest tokens at each answer "
        "token with their log probabilities.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--teacher", required=True, metavar="REF", help="a model; of a run, its folder `student`")
    parser.add_argument(
        "--data",
        required=True,
        nargs="+",
        action="extend",
        metavar="PATH",
        help="LLaVA JSON or VQA shards, as in data.train",
    )
    parser.add_argument("--out", required=True, type=Path, metavar="DIR", help="folder of these answers")
    parser.add_argument("--top", type=int, default=32, metavar="K", help="tokens kept, default %(default)s")
    parser.add_argument(
        "--dtype", choices=("float32", "float16"), default="float16", help="of storage, default %(default)s"
    )
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32", help="of the pass")
    parser.add_argument("--batch-size", type=int, default=32, help="conversations per pass, default %(default)s")
    parser.add_argument("--workers", type=int, default=0, help="processes that decode")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--verify", action="store_true", help="store nothing: check hashes, recompute a sample")
    parser.add_argument("--sample", type=int, default=64, metavar="N", help="conversations that --verify computes")
    parser.add_argument("--json", action="store_true", help="end with one line of strict JSON")
    args = parser.parse_args(argv)
    for name in ("top", "batch_size", "sample"):
        if getattr(args, name) < 1:
            raise UserError(f"--{name.replace('_', '-')} is {getattr(args, name)}; expected 1 or more.")
    if args.workers < 0:
        raise UserError(f"--workers is {args.workers}; expected 0 or more.")
    return args


def figures(stored: StoredAnswers) -> dict[str, Any]:
    """What a manifest of answers tells."""
    manifest = stored.manifest
    size, tokens = sum(entry["bytes"] for entry in manifest["shards"]), manifest["tokens"]
    rate = manifest["computed"] / manifest["seconds"] if manifest["computed"] and manifest["seconds"] else None
    return {
        "teacher": manifest["teacher"],
        "conversations": manifest["conversations"],
        "tokens": tokens,
        "left_out": len(manifest["left_out"]),
        "top": manifest["identity"]["top"],
        "dtype": manifest["identity"]["dtype"],
        "bytes": size,
        "bytes_per_token": size / max(tokens, 1),
        "conversations_per_second": rate,
        "error": manifest["error"],
    }


def print_figures(found: dict[str, Any]) -> None:
    """The figures in words, one line each."""
    rate = found["conversations_per_second"]
    print(
        f"{found['teacher']}: {found['tokens']:,} answer tokens of {found['conversations']:,} conversations "
        f"({found['left_out']} left out), {found['top']} kept of each in {found['dtype']}: "
        f"{found['bytes'] / 1e6:.2f} MB, {found['bytes_per_token']:.0f} bytes a token"
        + (f", {rate:.1f} conversations/s" if rate else "")
    )
    error = found["error"]
    print(
        f"error on {error['tokens']:.0f} tokens: {error.get('kept', 0):.4f} of the probability kept, KL from the full "
        f"distribution {error.get('kl', 0):.2e}"
    )
    for name in sorted({key.partition("/")[0] for key in error if "/" in key}):
        value, change = (error[f"{name}/{part}"] for part in ("value", "difference"))
        print(f"  {name}: {value:.4f}, changed by {change:.2e}")
    if "verified" in found:
        verified = found["verified"]
        print(f"verified: largest KL {verified['kl']:.2e} of {verified['tokens']:.0f} tokens, all hashes as written")
