"""Run CLIP_benchmark's own evaluation and vlkd's suite on the same model and data, their figures in one table.

python scripts/compare_clip_benchmark.py --model runs/student/student --data wds_grocery wds_coco sugar_crepe/swap.json

The data are webdataset folders, as `vlkd prep wds_eval` writes them, and selections. CLIP_benchmark reads the folders
and measures with its own unmodified functions, on the CPU without amp. It loads open_clip's models by itself; of others
it gets vlkd's towers. Selections are read by vlkd for both, since CLIP_benchmark downloads its own.

Figures are equal if they differ by less than 1e-6, the rounding of float32. Where the definitions differ, the table
says how, and CLIP_benchmark's figure must lie where that puts it. Any other difference makes the exit code 1.
"""

from __future__ import annotations

import argparse
import io
import json
import math
import sys
import tempfile
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import vlkd.models  # noqa: F401 - before anything imports torchvision

# isort: split
import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from vlkd.data.eval_set import EvalSet, open_eval_set
from vlkd.data.eval_wds import COUNT_FILE
from vlkd.data.sources import place_of, source_name
from vlkd.errors import UserError
from vlkd.models.load import load
from vlkd.retrieval.zero_shot import DEFAULT_TEMPLATES
from vlkd.suite.declaration import DataEntry, Suite
from vlkd.suite.results import read_results
from vlkd.suite.run import Job, run_suite
from vlkd.suite.subject import Encoding

try:
    from clip_benchmark.datasets.builder import build_wds_dataset, image_captions_collate_fn
    from clip_benchmark.metrics import image_caption_selection, zeroshot_classification, zeroshot_retrieval
    from clip_benchmark.models.open_clip import load_open_clip
except ImportError as error:
    sys.exit(f"CLIP_benchmark cannot be imported ({error}); run `pip install clip_benchmark requests`.")

TOLERANCE = 1e-6
BATCH = 64
KS = (1, 5, 10)
MAIN = {"classification": "zero_shot"}
"""The protocol of a kind that has another name."""
PROBE = "CLIP_benchmark's needs CUDA and stops AdamW after some epochs; vlkd's finds the optimum, on any device"


@dataclass(frozen=True, kw_only=True)
class Row:
    """One figure of one data set.

    Attributes:
        data: the data set.
        figure: CLIP_benchmark's name.
        theirs: CLIP_benchmark's value, None where it has none.
        ours: vlkd's value, None where it has none.
        why: how the definitions differ; "" where they do not.
        expected: the least and the most that CLIP_benchmark's definition then gives; None for no value.
    """

    data: str
    figure: str
    theirs: float | None
    ours: float | None
    why: str = ""
    expected: tuple[float, float] | None = None

    @property
    def equal(self) -> bool:
        """Up to the rounding of float32."""
        return self.theirs is not None and self.ours is not None and abs(self.theirs - self.ours) < TOLERANCE

    @property
    def explained(self) -> bool:
        """Not equal, and CLIP_benchmark's value is where the other definition puts it."""
        if self.equal or not self.why:
            return False
        if self.theirs is None or self.expected is None:
            return self.theirs is None and self.expected is None
        return self.expected[0] - TOLERANCE < self.theirs < self.expected[1] + TOLERANCE

    @property
    def verdict(self) -> str:
        """The last column of the table."""
        return "equal" if self.equal else self.why if self.explained else "DIFFERENT"


def one_number(value: Any) -> float:
    """`float`, also of an array with one value, which NumPy 2.4 refuses and CLIP_benchmark 1.6.2 asks for."""
    return float(value.item() if isinstance(value, np.ndarray) else value)


zeroshot_classification.float = one_number


@dataclass(frozen=True, kw_only=True)
class Theirs:
    """A model as CLIP_benchmark takes it: two towers, pictures to pixels, texts to tokens."""

    model: Any
    transform: Callable[[Image.Image], Tensor]
    tokenizer: Callable[[Sequence[str]], Tensor]


class Towers:
    """vlkd's towers under the names that CLIP_benchmark calls; tokens are ids and mask, (2, B, N)."""

    def __init__(self, model: Any) -> None:
        self.model = model

    def tokenize(self, texts: Sequence[str]) -> Tensor:
        found = self.model.preprocessing.tokenize(texts)
        return torch.stack([found["ids"], found["mask"].to(found["ids"].dtype)])

    def encode_image(self, pixels: Tensor) -> Tensor:
        return self.model.encode({"pixels": pixels}, ("image.embed",))["image.embed"]

    def encode_text(self, tokens: Tensor) -> Tensor:
        return self.model.encode({"ids": tokens[0], "mask": tokens[1].bool()}, ("text.embed",))["text.embed"]


def load_theirs(ref: str) -> Theirs:
    """By CLIP_benchmark's own loader where open_clip knows the model, else vlkd's towers."""
    own = load(ref)  # First, for it refuses what is pickled.
    source = ref.removeprefix("open_clip:")
    if (Path(source) / "open_clip_config.json").is_file():
        source = f"local-dir:{source}"
    elif source == ref:
        towers = Towers(own)
        return Theirs(model=towers, transform=own.preprocessing.image_transform, tokenizer=towers.tokenize)
    name, _, tag = source.partition("@")
    model, transform, tokenizer = load_open_clip(name, tag or None)
    return Theirs(model=model.eval(), transform=transform, tokenizer=tokenizer)


class Items(Dataset[tuple[Tensor, list[str]]]):
    """A selection as CLIP_benchmark's data sets give it: (N, 3, H, W) pixels and the captions of an item."""

    def __init__(self, data: EvalSet, transform: Callable[[Image.Image], Tensor]) -> None:
        self.data, self.transform = data, transform

    def __len__(self) -> int:
        return len(self.data.choices)

    def __getitem__(self, i: int) -> tuple[Tensor, list[str]]:
        choice = self.data.choices[i]
        return torch.stack([self.transform(self.data.image(row)) for row in choice.images]), list(choice.captions)


@dataclass(frozen=True, kw_only=True)
class Place:
    """Data that both can measure."""

    name: str
    path: Path
    split: str
    data: EvalSet


def open_place(name: str) -> Place:
    """Open `PATH#SPLIT`; raises `UserError` for a folder that CLIP_benchmark cannot read."""
    path, split = Path(place_of(name)[0]).absolute(), place_of(name)[1]
    data = open_eval_set(path, split=split)
    split = split if data.kind == "selection" else split or "test"
    if data.kind != "selection" and not (path / split / COUNT_FILE).is_file():
        raise UserError(f"{path} has no {split}/{COUNT_FILE}; write it with `vlkd prep wds_eval --data {path}`.")
    return Place(name=name, path=path, split=split, data=data)


def compare(ref: str, names: Sequence[str], work: Path) -> list[Row]:
    """All rows of one model; vlkd's results go into `work`.

    Raises:
        UserError: the model or the data cannot be opened, pictures cannot be read, or a folder is no webdataset.
    """
    theirs = load_theirs(ref)
    places = [open_place(name) for name in dict.fromkeys(names)]
    ours = suite_rows(ref, places, work)
    rows: list[Row] = []
    for place in places:
        counts, metrics = ours[place.name]["counts"], ours[place.name]["metrics"]
        about = source_name(place.name)
        for figure, value in their_figures(theirs, place, counts).items():
            found = metrics.get(figure)
            why, expected = definition(figure, found, place.data, counts)
            known = value if math.isfinite(value) else None
            rows.append(Row(data=about, figure=figure, theirs=known, ours=found, why=why, expected=expected))
        if place.data.kind == "classification" and (place.path / "train" / COUNT_FILE).is_file():
            rows.append(Row(data=about, figure="lp_acc1", theirs=None, ours=None, why=PROBE))
    return rows


def suite_rows(ref: str, places: Sequence[Place], out: Path) -> dict[str, dict[str, Any]]:
    """What vlkd's suite writes, by the name of the place; raises `UserError` for what either cannot measure."""
    entries = []
    for place in places:
        protocol = MAIN.get(place.data.kind, place.data.kind)
        paths = (str(place.path),)  # Absolute, so the suite's root does not matter.
        entries.append(DataEntry(name=place.name, paths=paths, split=place.split, protocols=(protocol,)))
    suite = Suite(name="compared", title="compared", entries=tuple(entries))
    out.mkdir(exist_ok=True)
    encoding = Encoding(batch_size=BATCH)
    run_suite(Job(suite=suite, root=out, refs=(ref,), out=out, store=out / "embeddings", encoding=encoding))
    rows = {str(row["dataset"]): row for row in read_results(out)}
    for name, row in rows.items():
        if row["status"] != "ok":
            raise UserError(f"{name}: {row['error']}")
        if row["unreadable"]:
            raise UserError(
                f"{row['unreadable']} pictures of {name} cannot be read, first {row['unreadable_keys'][0]!r}, and "
                "CLIP_benchmark leaves none out; mend or remove them."
            )
    return rows


def their_figures(theirs: Theirs, place: Place, counts: Mapping[str, int]) -> dict[str, float]:
    """What CLIP_benchmark's functions return."""
    data = place.data
    if data.kind == "selection":
        # One by one, for items may have different numbers of captions.
        loader = DataLoader(Items(data, theirs.transform), batch_size=1, collate_fn=image_captions_collate_fn)
        return image_caption_selection.evaluate(theirs.model, loader, theirs.tokenizer, "cpu", amp=False)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "WebDataset.shardshuffle", UserWarning)
        opened = build_wds_dataset("compared", theirs.transform, split=place.split, data_dir=str(place.path))
        loader = DataLoader(opened.batched(BATCH), batch_size=None, shuffle=False, num_workers=0)
        if data.kind == "retrieval":
            ks = [k for k in KS if k <= min(counts["images"], counts["captions"])]
            return zeroshot_retrieval.evaluate(
                theirs.model, loader, theirs.tokenizer, "cpu", amp=False, recall_k_list=ks
            )
        prompts: Any = opened.templates or list(DEFAULT_TEMPLATES)
        if data.prompts is not None:
            prompts = {name: list(own) for name, own in data.prompts.items()}
        return zeroshot_classification.evaluate(
            theirs.model, loader, theirs.tokenizer, opened.classes, prompts, "cpu", amp=False
        )


def definition(
    figure: str, ours: float | None, data: EvalSet, counts: Mapping[str, int]
) -> tuple[str, tuple[float, float] | None]:
    """How CLIP_benchmark defines the figure otherwise, and between which values that puts it.

    Args:
        figure: CLIP_benchmark's name.
        ours: vlkd's value.
        data: the data set.
        counts: of vlkd's result: sizes and ties.
    """
    own = ours or 0.0
    if data.kind == "multilabel":
        empty = counts["classes_without_images"]
        value = own * (1 - empty / counts["classes"])
        return f"{empty} classes without a picture count as 0; vlkd takes the mean of the others", (value, value)
    if data.kind == "retrieval":
        direction, queries = ("image_to_text", "images") if figure.startswith("text") else ("text_to_image", "captions")
        ties = counts[f"{direction}_ties@{figure.partition('@')[2]}"]
        why = f"{ties} queries have equal scores at the cut: torch.topk takes any of them, vlkd the smaller id"
        return why, (own - ties / counts[queries], own + ties / counts[queries])
    if data.kind == "selection":
        return chosen(figure, own, data, counts)
    if figure == "acc5" and len(data.classes) < 5:
        return "not defined below five classes: NaN; vlkd leaves it out", None
    often = Counter(data.classes)
    twice = np.array([often[name] > 1 for name in data.classes])
    share = float(twice[np.unique(data.labels) if figure == "mean_per_class_recall" else data.labels].mean())
    why = f"{twice.sum()} classes share their names: torch takes any of equal scores, vlkd the smaller class id"
    return why, (own - share, own + share)


def chosen(figure: str, ours: float, data: EvalSet, counts: Mapping[str, int]) -> tuple[str, tuple[float, float]]:
    """`definition` of a selection's figures: without a choice an item is right, and so are some equal scores."""
    items, ties = counts["items"], counts["ties"]
    sides = {"image_acc": "images", "text_acc": "captions"}
    alone = sum(len(getattr(choice, sides[figure])) == 1 for choice in data.choices) if figure in sides else 0
    value = (ours * (items - alone) + alone) / items
    ties = 0 if alone == items else ties
    why = f"{ties} equal scores may count as right, for the first wins; vlkd counts an error"
    if alone:
        why = f"{alone} items have nothing to choose from and are right; vlkd leaves them out" + f"; {why}" * (ties > 0)
    return why, (value, value + ties / items)


def decoded_otherwise(data: EvalSet) -> int:
    """How many pictures CLIP_benchmark sees otherwise: transparent ones, not on white, and those turned by EXIF."""

    def stored(i: int) -> Image.Image:
        with Image.open(io.BytesIO(data.files[i].read())) as image:
            return image.convert("RGB")

    pairs = ((stored(i), data.image(i)) for i in range(len(data)))
    return sum(one.size != other.size or one.tobytes() != other.tobytes() for one, other in pairs)


def lines(rows: Sequence[Row]) -> Iterator[str]:
    """The table."""
    cells = [("data", "figure", "CLIP_benchmark", "vlkd", "")]
    for row in rows:
        numbers = ["-" if value is None else f"{value:.7f}" for value in (row.theirs, row.ours)]
        cells.append((row.data, row.figure, *numbers, row.verdict))
    widths = [max(len(line[column]) for line in cells) for column in range(4)]
    for line in cells:
        yield "  ".join([*(cell.ljust(width) for cell, width in zip(line[:4], widths, strict=True)), line[4]]).rstrip()


def main(argv: Sequence[str]) -> int:
    """Compare and print; 1 if a difference has no explanation."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, metavar="REF", help="a model with both towers, as vlkd names it")
    parser.add_argument("--data", required=True, nargs="+", metavar="PATH[#SPLIT]", help="webdatasets and selections")
    parser.add_argument("--json", action="store_true", help="end with one line of strict JSON")
    args = parser.parse_args(argv)
    try:
        with tempfile.TemporaryDirectory() as folder:
            rows = compare(args.model, args.data, Path(folder))
    except UserError as error:
        sys.exit(str(error))
    print(*lines(rows), sep="\n")
    bad = [row for row in rows if row.verdict == "DIFFERENT"]
    explained = sum(row.explained for row in rows)
    print(f"{sum(row.equal for row in rows)} figures equal, {explained} explained, {len(bad)} DIFFERENT")
    for place in args.data:
        if any(row.data == source_name(place) for row in bad) and (count := decoded_otherwise(open_eval_set(place))):
            print(f"{place}: CLIP_benchmark decodes {count} pictures otherwise: transparent ones, or turned by EXIF")
    if args.json:
        names = ("data", "figure", "theirs", "ours", "verdict")
        table = [{name: getattr(row, name) for name in names} for row in rows]
        print(json.dumps({"compare": "clip_benchmark", "rows": table, "different": len(bad)}, allow_nan=False))
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
