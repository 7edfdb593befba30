"""What the preparations of questions share: pictures checked, shards written, kinds and blind guesses counted."""

from __future__ import annotations

import argparse
import json
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from vlkd.data.images import BadImage, open_image
from vlkd.data.prepare import BAD_SAMPLES
from vlkd.data.shard_writer import new_folder
from vlkd.data.vqa_writer import QA, VqaSample, write_vqa_shards
from vlkd.errors import UserError

Tally = Counter[tuple[str, str, str]]
"""How often (kind, question, answer) occurs."""


def check_new(out: Path) -> None:
    """Raise `UserError` when `out` exists and is not an empty folder, before any work is done."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out} already holds files; give a new or empty folder, or remove it first.")


def unreadable(images: Sequence[Path], max_bad: float) -> dict[Path, str]:
    """Pictures that cannot be decoded, each with the reason; a JPEG is decoded small, but read to its end all the same.

    Raises:
        UserError: more than the fraction `max_bad` of them.
    """
    from tqdm import tqdm

    bad: dict[Path, str] = {}
    for path in tqdm(images, unit="picture", desc="checking"):
        try:
            open_image(path, size_hint=32)
        except BadImage as error:
            bad[path] = str(error)
    if len(bad) > max_bad * len(images):
        raise UserError(
            f"{len(bad)} of {len(images)} pictures are unreadable, more than --max-bad {max_bad} allows (first: "
            f"{next(iter(bad.values()))}); mend or remove them, or raise --max-bad."
        )
    return bad


def write_vqa_splits(
    splits: Mapping[str, Iterable[VqaSample]],
    total: int,
    args: argparse.Namespace,
    bad: Mapping[Path, str] | None = None,
    *,
    flat: bool = False,
) -> dict[str, Any]:
    """Write `OUT/SPLIT/SPLIT-000000.tar`, ... and `OUT/bad_samples.jsonl`, all at once or not at all; return counts.

    Args:
        splits: samples by the split's name; the first split is the one that guesses without pictures learn from.
        total: their number, for the progress bar.
        args: `out` and `samples_per_shard`.
        bad: pictures left out, with the reason.
        flat: the only split's shards lie in OUT itself.
    """
    from tqdm import tqdm

    if args.samples_per_shard < 1:
        raise UserError(f"--samples-per-shard is {args.samples_per_shard}; expected at least 1.")
    tallies: dict[str, Tally] = {}
    counts: dict[str, dict[str, Any]] = {}
    with new_folder(args.out) as folder, tqdm(total=total, unit="picture", desc=str(args.out)) as progress:
        for split, samples in splits.items():
            if not re.fullmatch(r"[A-Za-z0-9_-]+", split):
                raise UserError(f"The split {split!r} cannot name shards; expected letters, digits, _ and -.")
            tallies[split] = Counter()
            manifest = write_vqa_shards(
                _counted(samples, tallies[split], progress),
                folder if flat else folder / split,
                name=split,
                shard_size=args.samples_per_shard,
            )
            counts[split] = {"pictures": manifest["samples"], "questions": manifest["questions"]}
        if bad:
            rows = [json.dumps({"image": str(path), "reason": reason}) + "\n" for path, reason in bad.items()]
            (folder / BAD_SAMPLES).write_text("".join(rows), encoding="utf-8")
    learned = next(iter(tallies.values()))
    for split, tally in tallies.items():
        counts[split]["kinds"] = _kinds(tally)
        counts[split]["text_only"] = {kind: round(x, 4) for kind, x in text_only_accuracy(learned, tally).items()}
    return {"out": str(args.out), "splits": counts, "bad": len(bad or {})}


def text_only_accuracy(learned: Tally, asked: Tally) -> dict[str, float]:
    """By kind, the accuracy of the most common answer to each question's text, learned from one split, on another.

    A text that `learned` lacks gets the most common answer of its kind. On the split it was learned from it is the best
    that any guess without the picture reaches.
    """
    by_text: dict[tuple[str, str], Counter[str]] = defaultdict(Counter)
    by_kind: dict[str, Counter[str]] = defaultdict(Counter)
    for (kind, question, answer), count in learned.items():
        by_text[kind, question][answer] += count
        by_kind[kind][answer] += count
    right: Counter[str] = Counter()
    for (kind, question, answer), count in asked.items():
        seen = by_text.get((kind, question)) or by_kind[kind]
        right[kind] += count * (_most_common(seen) == answer)
    return {kind: right[kind] / count for kind, count in _kinds(asked).items()}


def print_vqa_summary(summary: Mapping[str, Any], *, next_command: str, as_json: bool) -> None:
    """One line of strict JSON, or a line per split with its kinds, and the command that comes next."""
    if as_json:
        print(json.dumps(summary, allow_nan=False))
        return
    for split, counts in summary["splits"].items():
        kinds = ", ".join(f"{count} {kind}" for kind, count in counts["kinds"].items())
        print(f"{split}: {counts['pictures']} pictures, {counts['questions']} questions ({kinds})")
        guesses = ", ".join(f"{kind} {100 * value:.1f} %" for kind, value in counts["text_only"].items())
        print(f"  most common answer to each text, without the picture: {guesses}")
    if summary.get("without_questions"):
        print(f"{summary['without_questions']} pictures have no question and are left out")
    if summary["bad"]:
        print(f"{summary['bad']} unreadable pictures are listed in {Path(summary['out']) / BAD_SAMPLES}")
    print(f"next: {next_command}")


def _counted(samples: Iterable[VqaSample], tally: Tally, progress: Any) -> Iterator[VqaSample]:
    for sample in samples:
        tally.update(map(_entry, sample.qa))
        yield sample
        progress.update()


def _entry(qa: QA) -> tuple[str, str, str]:
    return qa.kind, qa.question, qa.answer


def _kinds(tally: Tally) -> dict[str, int]:
    kinds: Counter[str] = Counter()
    for (kind, _, _), count in tally.items():
        kinds[kind] += count
    return dict(sorted(kinds.items()))


def _most_common(answers: Counter[str]) -> str:
    """Ties go to the answer first in the alphabet."""
    return min(answers, key=lambda answer: (-answers[answer], answer), default="")
