"""Choose which images of a pool a person should label next, round by round.

vlkd prep label_pool --pool photos --probabilities pool.safetensors --strategy pcoreset --count 100 --out rounds

The probabilities are a model's: `vlkd predict RUN photos --save-probabilities pool.safetensors`; of a DHO student those
of the mix that validation chose, where ActiveKD takes both heads evenly. The choice is
rounds/round-001.txt, one key a line in the order of choice; round-001.csv says beside it what the model thought. Label
the images, train, predict anew and run the command again: new probabilities make the next round, and images of earlier
rounds are not chosen again. The same command twice changes nothing. A run leaves the keys whose labels it used in
RUN/labelled.txt (--labelled), and those that it kept for validation, if any, in RUN/held_out.txt (--leave-out).

Strategies: pcoreset, images that cover the model's class probabilities (k-centre in probability space, ActiveKD, Kang
et al., 2025, arXiv:2506.00910); feature_k_centre, the same on features; entropy and margin, the least certain images;
random, the baseline of all. Images that are chosen or labelled already count as covered.
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import io
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from vlkd.active import PoolFile

STRATEGIES = ("pcoreset", "random", "entropy", "margin", "feature_k_centre")
ROUND = re.compile(r"round-(\d{3,})\.txt")
EPILOG = """examples:
  vlkd prep label_pool --pool photos --probabilities pool.safetensors --strategy pcoreset --count 100 --out rounds
  vlkd prep label_pool --pool photos --probabilities pool-2.safetensors --strategy entropy --count 50 \\
    --labelled runs/first/labelled.txt --leave-out runs/first/held_out.txt --out rounds_entropy --seed 1 --json
"""


def main(argv: Sequence[str]) -> None:
    """Run the command line."""
    args = _parser().parse_args(argv)

    from vlkd.active import read_pool
    from vlkd.errors import UserError

    if args.seed < 0:
        raise UserError(f"Found --seed {args.seed}; expected 0 or more.")
    whole = read_pool(args.probabilities)
    pool = _without(whole, args.leave_out)
    number, earlier = _round(args.out, args.round, whole.fingerprint())
    chosen, sizes = _chosen_rows(pool, whole.keys, [*args.labelled, *earlier], args.probabilities)
    missing = _check_pool(args.pool, whole, {pool.keys[row] for row in chosen}, args.probabilities)
    settings = {
        "strategy": args.strategy,
        "count": args.count,
        "seed": args.seed,
        "probabilities": whole.fingerprint(),
        "images": len(pool.keys),
        "labelled": len(chosen),
        "labelled_keys": hashlib.sha256(json.dumps(sorted(pool.keys[row] for row in chosen)).encode()).hexdigest()[:16],
    }
    place = args.out / f"round-{number:03}.txt"
    done = _is_done(place, settings)
    if not done:
        rows = _choose(pool, args.strategy, args.count, chosen, args.seed, progress=not args.json)
        try:
            args.out.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"{args.out} cannot be made ({error.strerror}); give another --out.") from None
        _write(place, pool, rows, settings)
    if args.json:
        row = {"command": "prep label_pool", "round": number, "list": str(place), "new": not done, **settings}
        print(json.dumps(row, allow_nan=False))
        return
    for file, size in sizes:
        print(f"{file}: {size} images that count as labelled")
    if len(pool.keys) < len(whole.keys):
        print(f"{len(whole.keys) - len(pool.keys)} images are left out")
    if missing:
        print(f"{len(missing)} images of {args.pool} have no probabilities and cannot be chosen, first {missing[0]}")
    if done:
        print(f"{place} is there already, made with these settings; nothing is changed. Label its images, then predict")
        print(f"anew for the next round, or add --round {number + 1} to choose once more from the same probabilities.")
    else:
        left = len(pool.keys) - len(chosen) - args.count
        print(f"{place}: {args.count} images to label ({args.strategy}), {left} stay unlabelled; see also the .csv")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="vlkd prep label_pool",
        description=__doc__,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--pool", required=True, metavar="PATH[#SPLIT]", help="the images: a folder, shards or a list")
    parser.add_argument(
        "--probabilities", type=Path, required=True, metavar="FILE", help="from `vlkd predict --save-probabilities`"
    )
    parser.add_argument("--strategy", required=True, choices=STRATEGIES, help="how images are chosen")
    parser.add_argument("--count", type=int, required=True, help="images to choose")
    parser.add_argument(
        "--labelled", type=Path, action="append", default=[], metavar="LIST.txt",
        help="keys that are labelled already, one a line; may be given several times",
    )  # fmt: skip
    parser.add_argument(
        "--leave-out", type=Path, action="append", default=[], metavar="LIST.txt",
        help="keys that are never chosen and count for nothing, such as validation images; may be given several times",
    )  # fmt: skip
    parser.add_argument("--out", type=Path, required=True, metavar="FOLDER", help="folder of the rounds")
    parser.add_argument(
        "--round", type=int, metavar="N",
        help="number of the round (default: the one that used these probabilities, else the next)",
    )  # fmt: skip
    parser.add_argument(
        "--seed", type=int, default=0, help="of random, and of the first image where none is labelled (default 0)"
    )
    parser.add_argument("--json", action="store_true", help="print one line of strict JSON")
    return parser


def _round(folder: Path, asked: int | None, fingerprint: str) -> tuple[int, list[Path]]:
    """The number of this round, and the lists of those before it."""
    from vlkd.errors import UserError

    lists = {int(found[1]): path for path in folder.glob("round-*.txt") if (found := ROUND.fullmatch(path.name))}
    last = max(lists, default=0)
    number = asked
    if number is None:
        # One more than there are lists: a killed run may have left the settings of a round alone.
        same = [n for n in range(1, last + 2) if (_stored(folder, n) or {}).get("probabilities") == fingerprint]
        number = max(same, default=last + 1)
    if not 1 <= number <= last + 1:
        raise UserError(f"Found --round {number}; expected 1 to {last + 1}, as {folder} holds {last} rounds.")
    return number, [path for n, path in sorted(lists.items()) if n < number]


def _stored(folder: Path, number: int) -> dict[str, Any] | None:
    """The settings of a round, None without."""
    from vlkd.data.files import strict_json
    from vlkd.errors import UserError

    path = folder / f"round-{number:03}.json"
    if not path.exists():
        return None
    try:
        settings = strict_json(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read ({error}); remove that round's files or give another --out.") from None
    if not isinstance(settings, dict):
        raise UserError(f"{path} holds no settings of a round; remove that round's files or give another --out.")
    return settings


def _is_done(place: Path, settings: dict[str, Any]) -> bool:
    """Whether the round is there, whole, with these settings."""
    from vlkd.errors import UserError

    stored = _stored(place.parent, int(place.stem.partition("-")[2]))
    another = "add --round N for a further round, give another --out, or remove the files of this one"
    if stored is None:
        if place.exists():
            raise UserError(f"{place} is there without its settings, {place.stem}.json; {another}.")
        return False
    different = [
        f"{name} {stored.get(name)} (now {value})" for name, value in settings.items() if stored.get(name) != value
    ]
    if different:
        raise UserError(f"{place} was made with {', '.join(different)}; give the same settings, {another}.")
    return place.exists() and place.with_suffix(".csv").exists()


def _without(pool: PoolFile, lists: Sequence[Path]) -> PoolFile:
    """The pool without the images of the lists; raises `UserError` for a list that names none of them."""
    from dataclasses import replace

    from vlkd.data.labelled import read_lines
    from vlkd.errors import UserError

    gone: set[str] = set()
    for path in lists:
        keys = {key for key in read_lines(path) if key}
        if not keys & set(pool.keys):
            raise UserError(
                f"--leave-out {path}: none of its {len(keys)} keys has probabilities; expected keys such as "
                f"{pool.keys[0]!r}: mend the list, or leave it out."
            )
        gone |= keys
    rows = [row for row, key in enumerate(pool.keys) if key not in gone]
    if not rows:
        raise UserError(f"--leave-out names all {len(pool.keys)} images that have probabilities; shorten the lists.")
    return replace(
        pool,
        keys=tuple(pool.keys[row] for row in rows),
        probabilities=pool.probabilities[rows],
        features=None if pool.features is None else pool.features[rows],
    )


def _chosen_rows(
    pool: PoolFile, known: Sequence[str], lists: Sequence[Path], probabilities: Path
) -> tuple[NDArray[np.int64], list[tuple[Path, int]]]:
    """The rows of listed keys, ascending, and how many each list names; `known` ones without a row are left out."""
    import numpy as np

    from vlkd.data.labelled import read_lines
    from vlkd.errors import UserError

    row_of = {key: row for row, key in enumerate(pool.keys)}
    rows: set[int] = set()
    sizes = []
    for path in lists:
        keys = {key for key in read_lines(path) if key}
        unknown = sorted(keys - set(known))
        if unknown:
            raise UserError(
                f"{path}: {len(unknown)} of {len(keys)} keys have no row in {probabilities}, first {unknown[0]!r}; "
                f"expected keys such as {known[0]!r}: predict the labelled images, too, or mend the list."
            )
        rows |= {row_of[key] for key in keys & row_of.keys()}
        sizes.append((path, len(keys)))
    return np.array(sorted(rows), dtype=np.int64), sizes


def _check_pool(ref: str, pool: PoolFile, labelled: set[str], probabilities: Path) -> list[str]:
    """Images of the pool without a row; raises `UserError` for rows that are neither of the pool nor labelled."""
    from vlkd.data.sources import open_pairs, place_of
    from vlkd.errors import UserError

    keys = open_pairs(ref).keys
    place, split = place_of(ref)
    split = split or (Path(place).absolute().name if Path(place).is_dir() else "")
    # A key below the root has the split's folder in front.
    forms = [{key, f"{split}/{key}"} if split else {key} for key in keys]
    known = set[str]().union(*forms)
    strange = [key for key in pool.keys if key not in known and key not in labelled]
    if strange:
        raise UserError(
            f"{len(strange)} of {len(pool.keys)} keys of {probabilities} are no images of {ref}, first {strange[0]!r}; "
            f"expected keys such as {keys[0]!r}: predict the images of the pool."
        )
    rows = set(pool.keys)
    return [key for key, form in zip(keys, forms, strict=True) if not form & rows]


def _choose(
    pool: PoolFile, strategy: str, count: int, chosen: NDArray[np.int64], seed: int, *, progress: bool
) -> NDArray[np.int64]:
    """Row numbers in the order of choice."""
    from tqdm import tqdm

    from vlkd.active import entropy, k_centre, margin, most_uncertain, random_choice
    from vlkd.errors import UserError

    if strategy == "random":
        return random_choice(len(pool.keys), count, chosen, seed=seed)
    if strategy in ("entropy", "margin"):
        value = entropy(pool.probabilities) if strategy == "entropy" else -margin(pool.probabilities)
        return most_uncertain(value, count, chosen)
    points = pool.features if strategy == "feature_k_centre" else pool.probabilities
    if points is None:
        raise UserError(
            "The file of probabilities has no features, which feature_k_centre needs; predict again with features, or "
            "take pcoreset, which needs none."
        )
    with tqdm(total=count, desc=strategy, unit="choice", disable=not progress) as bar:
        return k_centre(points, count, chosen, seed=seed, on_pick=bar.update)


def _write(place: Path, pool: PoolFile, rows: NDArray[np.int64], settings: dict[str, Any]) -> None:
    """The settings first and the list last, so that a killed run is completed and its half is no round."""
    from vlkd.active import entropy
    from vlkd.data.files import write_whole

    probabilities = pool.probabilities[rows]
    with io.StringIO(newline="") as text:
        table = csv.writer(text, lineterminator="\n")
        table.writerow(["key", "class", "probability", "entropy"])
        for row, own, uncertain in zip(rows, probabilities, entropy(probabilities), strict=True):
            best = int(own.argmax())
            name = pool.classes[best] if pool.classes else best
            table.writerow([pool.keys[row], name, f"{own[best]:.6f}", f"{uncertain:.6f}"])
        lines = text.getvalue()
    write_whole(place.with_suffix(".json"), (json.dumps(settings, indent=2) + "\n").encode())
    write_whole(place.with_suffix(".csv"), lines.encode())
    write_whole(place, "".join(f"{pool.keys[row]}\n" for row in rows).encode())
