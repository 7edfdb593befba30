"""What the preparation scripts share: picture records in, one folder of shards per split out, bad pictures listed."""

from __future__ import annotations

import argparse
import io
import json
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from vlkd.data.images import image_format, open_image
from vlkd.data.records import Record, record_keys
from vlkd.data.shard_writer import RawSample, new_folder, write_shards
from vlkd.errors import UserError

_VERBATIM = {"JPEG": "jpg", "PNG": "png", "WEBP": "webp"}
BAD_SAMPLES = "bad_samples.jsonl"


def add_output_arguments(parser: argparse.ArgumentParser) -> None:
    """`--out`, `--limit`, `--samples-per-shard` and `--json`."""
    parser.add_argument(
        "--out", type=Path, required=True, help="new folder; each split becomes a folder of shards in it"
    )
    parser.add_argument("--limit", type=int, help="at most so many pictures per split")
    parser.add_argument("--samples-per-shard", type=int, default=1000, help="pictures per tar (default %(default)s)")
    parser.add_argument("--json", action="store_true", help="end with one line of strict JSON instead of a table")


def add_picture_arguments(parser: argparse.ArgumentParser) -> None:
    """`--max-bad` and `--short-side`."""
    parser.add_argument(
        "--max-bad",
        type=float,
        default=0.05,
        help="refuse the data when more than this fraction of the pictures is unreadable (default %(default)s)",
    )
    parser.add_argument(
        "--short-side",
        type=int,
        help="shrink larger pictures to this short side, as JPEG of quality 90; else bytes are kept",
    )


def write_records(records: Sequence[Record], args: argparse.Namespace) -> dict[str, Any]:
    """Write one folder of shards per split below `args.out` and return the summary; see `write_splits`.

    Keys are those of `record_keys`; no picture may be named twice. Unreadable pictures are left out and listed in
    `bad_samples.jsonl`; when there are too many, that list is written beside `args.out`, which is not made.

    Raises:
        UserError: for no records, an unsafe split name, or too many unreadable pictures.
    """
    if args.limit is not None and args.limit < 1:
        raise UserError(f"--limit is {args.limit}; expected at least 1.")
    by_split: dict[str, list[Record]] = defaultdict(list)
    for record in records:
        by_split[record.split].append(record)
    chosen = {split: members[: args.limit] for split, members in by_split.items()}
    total = sum(map(len, chosen.values()))
    if not total:
        raise UserError("The data set is empty: no picture to prepare; check the file.")
    images = [record.image for members in chosen.values() for record in members]
    keys = dict(zip(images, record_keys(images), strict=True))
    bad: list[dict[str, str]] = []

    def samples(members: Sequence[Record]) -> Iterator[RawSample]:
        for record in members:
            try:
                image, extension = encode_picture(record.image, args.short_side)
            except UserError as error:
                bad.append({"image": str(record.image), "split": record.split, "reason": str(error)})
                if len(bad) > args.max_bad * total:
                    _refuse(bad, total, args)
                continue
            yield RawSample(
                key=keys[record.image], image=image, extension=extension, captions=record.captions, extra=record.extra
            )

    return write_splits({split: samples(members) for split, members in chosen.items()}, total, args, bad)


def write_splits(
    splits: Mapping[str, Iterable[RawSample]],
    total: int,
    args: argparse.Namespace,
    bad: Sequence[Mapping[str, str]] = (),
) -> dict[str, Any]:
    """Write `OUT/SPLIT/*.tar` with manifests and `OUT/bad_samples.jsonl`, all at once or not at all; return counts.

    Args:
        splits: samples by the split's name.
        total: their number, for the progress bar.
        args: `out` and `samples_per_shard`.
        bad: filled while the samples are read.
    """
    from tqdm import tqdm

    if args.samples_per_shard < 1:
        raise UserError(f"--samples-per-shard is {args.samples_per_shard}; expected at least 1.")
    counts = {}
    with new_folder(args.out) as folder, tqdm(total=total, unit="picture", desc=str(args.out)) as progress:
        for split, samples in splits.items():
            if not re.fullmatch(r"[A-Za-z0-9_-]+", split):
                raise UserError(f"The split {split!r} cannot name a folder; expected letters, digits, _ and -.")
            manifest = write_shards(
                _counted(samples, progress), folder / split, samples_per_shard=args.samples_per_shard
            )
            counts[split] = {name: manifest[name] for name in ("samples", "labelled", "captions")}
            counts[split]["shards"] = len(manifest["shards"])
        if bad:
            _write_lines(folder / BAD_SAMPLES, bad)
    return {"out": str(args.out), "splits": counts, "bad": len(bad)}


def encode_picture(path: Path, short_side: int | None = None) -> tuple[bytes, str]:
    """A picture's bytes for a shard and their extension, decoded once to be sure of it.

    JPEG, PNG and WebP bytes are kept as they are; other formats become PNG. With `short_side`, a picture whose shorter
    side is longer is shrunk to it (Lanczos) and becomes a JPEG of quality 90. Raises `BadImage`.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}); check the path.") from None
    image = open_image(data, size_hint=2 * short_side if short_side else None)
    kind = image_format(data)
    if short_side and min(image.size) > short_side:
        scale = short_side / min(image.size)
        size = (max(1, round(scale * image.width)), max(1, round(scale * image.height)))
        return _encoded(image.resize(size, Image.Resampling.LANCZOS), "JPEG", quality=90), "jpg"
    if kind in _VERBATIM:
        return data, _VERBATIM[kind]
    return _encoded(image, "PNG"), "png"


def print_summary(summary: Mapping[str, Any], *, as_json: bool) -> None:
    """One line of strict JSON, or a line per split."""
    if as_json:
        print(json.dumps(summary, allow_nan=False))
        return
    for split, counts in summary["splits"].items():
        print(f"{split}: " + ", ".join(f"{value} {name}" for name, value in counts.items()))
    if summary["bad"]:
        print(f"{summary['bad']} unreadable pictures are listed in {Path(summary['out']) / BAD_SAMPLES}")


def _encoded(image: Image.Image, kind: str, **options: Any) -> bytes:
    with io.BytesIO() as stream:
        image.save(stream, format=kind, **options)
        return stream.getvalue()


def _refuse(bad: Sequence[Mapping[str, str]], total: int, args: argparse.Namespace) -> None:
    out: Path = args.out.absolute()
    listing = out.parent / f"{out.name}-{BAD_SAMPLES}"
    listing.parent.mkdir(parents=True, exist_ok=True)
    _write_lines(listing, bad)
    raise UserError(
        f"{len(bad)} of {total} pictures are unreadable so far, more than --max-bad {args.max_bad} allows (first: "
        f"{bad[0]['reason']}); {listing} lists them: mend or remove them, or raise --max-bad."
    )


def _write_lines(path: Path, rows: Iterable[Mapping[str, str]]) -> None:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


def _counted(samples: Iterable[RawSample], progress: Any) -> Iterator[RawSample]:
    for sample in samples:
        yield sample
        progress.update()
