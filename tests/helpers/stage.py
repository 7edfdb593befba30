"""Shards of drawn scenes, runs of a tiny student on them, and the table of what fault tests found."""

from __future__ import annotations

import argparse
import json
import shutil
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from helpers.trial import TrialRun

from vlkd.data.plan import Plan
from vlkd.data.scan import scan_shards
from vlkd.data.scenes import generate_scenes
from vlkd.data.shard_table import open_shards
from vlkd.data.shards import write_shards
from vlkd.engine.run import joined

BATCH = 16
SHARDS = {"drawn": (40, 8), "more": (10, 8), "few": (2, 40)}
"""How many shards of how many samples each."""
STUDENT = (
    "model.image=test_vit", "model.image_size=32", 'model.image_kwargs={"img_size":32}', "model.text_width=32",
    "model.text_layers=1", "model.text_heads=2", "model.width=16", "model.image_projection=mlp",
    "model.text_projection=mlp", "model.projection_dropout=0.3", "student.vocab_size=300", "train.ema=0.9",
    "train.device=cpu", "train.log_steps=1", "train.save_steps=3", "data.shuffle_shards=4",
)  # fmt: skip
"""With dropout, so that the generators' states matter, and a checkpoint at every third step."""

Command = Callable[[Sequence[str]], None]


@dataclass(frozen=True, kw_only=True)
class Row:
    """One line of the table: what was done, what came of it, and what must never happen and did."""

    case: str
    what: str
    found: str
    problems: list[str] = field(default_factory=list)


class Stage:
    """Shards of drawn scenes, and runs on them.

    Args:
        folder: of everything; new or empty.
        command: runs `vlkd` in this process with the words it is given.
        seed: of what is done to runs.
        kills: how many of them.
    """

    def __init__(self, folder: Path, command: Command, *, seed: int, kills: int) -> None:
        self.folder, self.command, self.seed, self.kills = folder, command, seed, kills
        for number, (name, (shards, samples)) in enumerate(SHARDS.items()):
            scenes = generate_scenes("shapes", count=shards * samples, seed=number, split="train", image_size=32)
            write_shards(scenes, folder / name, samples_per_shard=samples)
            scan_shards([str(folder / name)], None, workers=1)
        write_shards(generate_scenes("shapes", count=24, seed=9, split="val", image_size=32), folder / "val")
        self._twins: dict[tuple[object, ...], TrialRun] = {}

    def run(
        self,
        name: str,
        *words: str,
        steps: int = 30,
        data: Sequence[str] = ("drawn",),
        weights: Sequence[float] = (),
        train: str = "",
    ) -> TrialRun:
        """A run that was not started yet.

        Args:
            name: of its folder.
            words: further settings.
            steps: of `BATCH` samples.
            data: names in `SHARDS`.
            weights: of these sources.
            train: where a copy of the data lies.
        """
        tables = [open_shards(str(self.folder / one)) for one in data]
        plan = Plan([table.sizes() for table in tables], seed=0, weights=weights, together=4)
        table = joined(tables, 4)
        train = train or ",".join(str(self.folder / one) for one in data)
        samples = steps * BATCH
        shared = [f"data.train={train}", f"data.val={self.folder / 'val'}", f"train.samples={samples}"]
        shared += [f"train.batch_size={BATCH}", f"data.weights={','.join(map(str, weights))}"]
        return TrialRun(
            out=self.folder / "runs" / name,
            command=self.command,
            words=("pretrain", *shared, *STUDENT, *words),
            planned=[table.key(plan.row(position)[0]) for position in range(samples)],
            batch_size=BATCH,
        )

    def twin(self, *words: str, ranks: int = 1, steps: int = 30, data: Sequence[str] = ("drawn",)) -> TrialRun:
        """The same run, finished, with nothing done to it; made once."""
        key = (words, ranks, steps, tuple(data))
        if key not in self._twins:
            twin = self.run(f"twin-{len(self._twins)}", *words, steps=steps, data=data)
            twin.go(ranks=ranks)
            self._twins[key] = twin
        return self._twins[key]

    def copy(self, name: str) -> Path:
        """The shards `drawn` once more, to be damaged."""
        target = self.folder / "copies" / name / "drawn"
        return Path(shutil.copytree(self.folder / "drawn", target, copy_function=shutil.copy2))


def same(run: TrialRun, twin: TrialRun) -> list[str]:
    """What differs between two finished runs, beside what went wrong in them."""
    found = [*run.problems(), *(f"twin: {text}" for text in (twin.problems() if twin.attempts else []))]
    if not run.weights() or run.weights() != twin.weights():
        found.append("its weights are not those of the twin")
    if found:
        return found
    if run.losses() != twin.losses():
        found.append("its losses are not those of the twin")
    if (run.out / "coverage.jsonl").read_bytes() != (twin.out / "coverage.jsonl").read_bytes():
        found.append("its coverage is not that of the twin")
    return found


def perform(
    cases: Mapping[str, Callable[[Stage], Iterator[Row]]],
    command: Command,
    description: str,
    argv: Sequence[str] | None = None,
) -> None:
    """The command line of a script of fault tests: run its cases, print a table, leave with 1 where anything broke.

    Args:
        cases: by name; each yields its rows.
        command: as of `Stage`.
        description: of the script.
        argv: words after its name; of this process where none are given.
    """
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=100, help="default %(default)s")
    parser.add_argument("--seed", type=int, default=0, help="of every random draw (default %(default)s)")
    parser.add_argument("--only", nargs="+", choices=tuple(cases), default=tuple(cases), metavar="NAME", help="cases")
    parser.add_argument("--out", type=Path, help="keep everything in this new folder (default: a temporary one)")
    parser.add_argument("--json", action="store_true", help="end with one line of strict JSON")
    args = parser.parse_args(argv)
    # Forked children inherit it; with several threads the order of sums would differ from run to run.
    torch.set_num_threads(1)
    rows: list[Row] = []
    started = time.monotonic()
    with _folder(args.out) as folder:
        stage = Stage(folder, command, seed=args.seed, kills=args.kills)
        for name in args.only:
            for row in cases[name](stage):
                rows.append(row)
                shown = f"{'FAILED' if row.problems else 'ok':<7}{row.case:<8}{row.what:<42}{row.found}"
                print(f"{time.monotonic() - started:6.0f} s  {shown}", flush=True)
    print(f"\n{'':<7}{'case':<8}{'what':<42}found")
    for row in rows:
        print(f"{'FAILED' if row.problems else 'ok':<7}{row.case:<8}{row.what:<42}{row.found}")
        for problem in row.problems[:8]:
            print(f"         {problem}")
    broken = sum(bool(row.problems) for row in rows)
    print(f"{broken} of {len(rows)} rows broken, seed {args.seed}, {time.monotonic() - started:.0f} s", flush=True)
    if args.json:
        print(json.dumps({"broken": broken, "seed": args.seed, "rows": [asdict(row) for row in rows]}, allow_nan=False))
    raise SystemExit(1 if broken else 0)


@contextmanager
def _folder(path: Path | None) -> Iterator[Path]:
    if path is not None:
        path.mkdir(parents=True)
        yield path.resolve()
        return
    with tempfile.TemporaryDirectory() as temporary:
        yield Path(temporary).resolve()


def members(shard: Path) -> list[tuple[str, str, int, int, int]]:
    """Key, extension, place of the header, place of the data and size of each member."""
    with tarfile.open(shard) as tar:
        return [(*found.name.split("."), found.offset, found.offset_data, found.size) for found in tar]
