"""Run CLIP_benchmark and vlkd on the same folders with the same small model, and print their figures side by side.

    python scripts/compare_clip_benchmark.py
    python scripts/compare_clip_benchmark.py --images 200 --seed 3 --json

Makes a random open_clip model and drawn pictures in the layouts that CLIP_benchmark reads: webdataset folders with 7, 5
and 3 classes, with several labels a picture, with five captions a picture, a SugarCrepe file, and pairs of two pictures
and two captions. CLIP_benchmark's own loader, data sets and `evaluate` functions run on the CPU, without amp.

Figures are equal if they differ by less than 1e-6, which is less than one query of a data set. Where the definitions
differ, the table says how, and the figure that follows from CLIP_benchmark's definition is checked. Any other
difference makes the exit code 1.
"""

from __future__ import annotations

import argparse
import io
import json
import math
import sys
import tarfile
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import vlkd.models  # noqa: F401 - before anything imports torchvision

# isort: split
import numpy as np
import open_clip
import torch
from clip_benchmark.datasets.builder import build_dataset, image_captions_collate_fn
from clip_benchmark.datasets.sugar_crepe import SugarCrepe
from clip_benchmark.metrics import image_caption_selection, zeroshot_classification, zeroshot_retrieval
from clip_benchmark.models.open_clip import load_open_clip
from PIL import Image, ImageDraw
from safetensors.torch import save_file
from torch.utils.data import DataLoader

from vlkd.data.eval_set import EvalSet, open_eval_set
from vlkd.models.load import load
from vlkd.protocols.measured import Measured
from vlkd.protocols.multilabel import multilabel
from vlkd.protocols.retrieval import retrieval
from vlkd.protocols.selection import ChoiceRows, selection
from vlkd.protocols.zero_shot import zero_shot
from vlkd.retrieval.encode import encode_images, encode_texts
from vlkd.retrieval.zero_shot import class_vectors

TOLERANCE = 1e-6
BATCH = 64
PER_SHARD = 25
PER_IMAGE = 5
COLOURS = ("red", "green", "blue", "orange", "purple", "black", "brown")
SHAPES = ("circle", "square", "line")
TEMPLATES = ("a drawing of a {c} thing", "{c}", "some {c} shape on noise")
KS = (1, 5, 10)


@dataclass(frozen=True, kw_only=True)
class Row:
    """One figure of one data set.

    Attributes:
        case: the data set.
        figure: the name in CLIP_benchmark.
        theirs: CLIP_benchmark's value, None for NaN or none.
        ours: vlkd's value, None where it has none.
        why: how the definitions differ.
        explained: whether the difference is the one that follows from that.
    """

    case: str
    figure: str
    theirs: float | None
    ours: float | None
    why: str = ""
    explained: bool = False

    @property
    def equal(self) -> bool:
        """Equal up to the rounding of float32."""
        return self.theirs is not None and self.ours is not None and abs(self.theirs - self.ours) < TOLERANCE

    @property
    def fine(self) -> bool:
        """Equal, or different for the reason that is given."""
        return self.equal or self.explained


def one_number(value: Any) -> float:
    """`float`, also of an array with one value, which NumPy 2.4 refuses and CLIP_benchmark 1.6.2 asks for."""
    return float(value.item() if isinstance(value, np.ndarray) else value)


zeroshot_classification.float = one_number


def compare(folder: Path, images: int, seed: int) -> list[Row]:
    """All rows, from data and a model that are written to `folder`."""
    model = write_model(folder / "model", seed)
    both = Both(model, np.random.default_rng(seed))
    rows: list[Row] = []
    for classes in (7, 5, 3):
        rows += both.classification(folder / f"classes{classes}", images, classes)
    rows += both.multilabel(folder / "multilabel", images, empty=False)
    rows += both.multilabel(folder / "multilabel_empty", images, empty=True)
    rows += both.retrieval(folder / "retrieval", images)
    rows += both.sugar_crepe(folder / "sugar_crepe", images)
    rows += both.winoground(folder / "winoground", images)
    return rows + collapsed(images)


def write_model(folder: Path, seed: int) -> Path:
    """A random CLIP with 32-pixel images as a folder of open_clip's `local-dir:` scheme."""
    vision = {"image_size": 32, "layers": 2, "width": 64, "patch_size": 8, "head_width": 16}
    text = {"context_length": 24, "vocab_size": 49408, "width": 64, "heads": 4, "layers": 2}
    config = {"embed_dim": 32, "vision_cfg": vision, "text_cfg": text}
    folder.mkdir(parents=True)
    named = folder / "tiny-compared.json"
    named.write_text(json.dumps(config))
    open_clip.add_model_config(named)
    torch.manual_seed(seed)
    model = open_clip.create_model("tiny-compared")
    named.unlink()
    preprocess = {"mean": [0.5] * 3, "std": [0.25] * 3, "interpolation": "bicubic", "resize_mode": "shortest"}
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": config, "preprocess_cfg": preprocess}))
    state = {name: value.contiguous() for name, value in model.state_dict().items()}
    save_file(state, str(folder / "open_clip_model.safetensors"))
    return folder


def draw(rng: np.random.Generator, colour: str) -> bytes:
    """A PNG of one shape of a colour on noise, of any proportions."""
    width, height = (int(side) for side in rng.integers(30, 70, 2))
    noise = rng.integers(0, 256, (max(2, height // 8), max(2, width // 8), 3), dtype=np.uint8)
    picture = Image.fromarray(noise).resize((width, height))
    shape, place = ImageDraw.Draw(picture), rng.integers(0, 25, 4)
    box = (int(place[0]), int(place[1]), width - int(place[2]) // 2, height - int(place[3]) // 2)
    box = (*box[:2], max(box[2], box[0] + 2), max(box[3], box[1] + 2))
    kind = SHAPES[int(rng.integers(len(SHAPES)))]
    if kind == "circle":
        shape.ellipse(box, fill=colour)
    elif kind == "square":
        shape.rectangle(box, fill=colour)
    else:
        shape.line(box, fill=colour, width=6)
    stream = io.BytesIO()
    picture.save(stream, "PNG")
    return stream.getvalue()


def write_wds(root: Path, samples: Sequence[tuple[bytes, str, bytes]], **texts: str) -> None:
    """A split `test` of CLIP_benchmark's layout from (picture, extension, label), and text files beside it."""
    split = root / "test"
    split.mkdir(parents=True)
    shards = [samples[start : start + PER_SHARD] for start in range(0, len(samples), PER_SHARD)]
    (split / "nshards.txt").write_text(str(len(shards)))
    for number, shard in enumerate(shards):
        with tarfile.open(split / f"{number}.tar", "w") as tar:
            for i, (picture, extension, label) in enumerate(shard):
                for name, data in (("png", picture), (extension, label)):
                    member = tarfile.TarInfo(f"s{number * PER_SHARD + i:07d}.{name}")
                    member.size = len(data)
                    tar.addfile(member, io.BytesIO(data))
    for name, text in texts.items():
        (root / f"{name}.txt").write_text(text)


def npy(vector: np.ndarray[Any, Any]) -> bytes:
    stream = io.BytesIO()
    np.save(stream, vector)
    return stream.getvalue()


def sentences(rng: np.random.Generator, count: int) -> list[str]:
    """Different captions: numbers make the embeddings of a random text tower differ, too."""
    numbers = rng.permutation(10 * count)[:count]
    return [
        f"{int(n)} a {COLOURS[int(n) % len(COLOURS)]} {SHAPES[int(n) % len(SHAPES)]} {int(n) % 13} wide"
        for n in numbers
    ]


class Both:
    """One model, loaded by each of the two; a method per kind of data writes a folder and compares the figures."""

    def __init__(self, folder: Path, rng: np.random.Generator) -> None:
        self.rng = rng
        self.model, self.transform, self.tokenizer = load_open_clip(f"local-dir:{folder}", None)
        self.model.eval()
        self.ours = load(str(folder))

    def theirs(self, root: Path, task: str) -> tuple[Any, Any]:
        """CLIP_benchmark's data set and loader, as its command makes them."""
        data = build_dataset("wds/compared", root=str(root), transform=self.transform, split="test", task=task)
        return data, DataLoader(data.batched(BATCH), batch_size=None, shuffle=False, num_workers=0)

    def their_classes(self, root: Path, templates: Any = None) -> dict[str, float]:
        data, loader = self.theirs(root, "zeroshot_classification")
        found: dict[str, float] = zeroshot_classification.evaluate(
            self.model, loader, self.tokenizer, data.classes, templates or data.templates, "cpu", amp=False
        )
        return found

    def images(self, data: EvalSet) -> torch.Tensor:
        return encode_images(self.ours, data, batch_size=BATCH, progress=False).embed

    def texts(self, texts: Sequence[str]) -> torch.Tensor:
        return encode_texts(self.ours, texts, batch_size=BATCH, progress=False)

    def classes(self, data: EvalSet, prompts: dict[str, list[str]] | None = None) -> torch.Tensor:
        return class_vectors(
            lambda texts: self.ours.encode_text(texts), data.classes, data.templates, prompts=prompts, batch_size=BATCH
        )

    def classification(self, root: Path, images: int, classes: int) -> list[Row]:
        """One label a picture, with templates and with sentences of each class."""
        names = COLOURS[:classes]
        labels = self.rng.integers(0, classes, images)
        samples = [(draw(self.rng, names[label]), "cls", str(label).encode()) for label in labels]
        lines = {"classnames": "\n".join(names), "zeroshot_classification_templates": "\n".join(TEMPLATES)}
        write_wds(root, samples, **lines)
        data = open_eval_set(root)
        own = {name: [f"{name} number {i}" for i in range(2 + place)] for place, name in enumerate(names)}
        rows: list[Row] = []
        for case, prompts in ((f"{classes} classes", None), (f"{classes} classes, own sentences", own)):
            found = zero_shot(
                self.images(data), self.classes(data, prompts), data.labels, classes=data.classes, logit_scale=100.0
            )
            for row in paired(case, self.their_classes(root, prompts), found):
                undefined = row.figure == "acc5" and row.theirs is None and row.ours is None and classes < 5
                rows.append(explain(row, "NaN below five classes; vlkd leaves it out") if undefined else row)
        return rows

    def multilabel(self, root: Path, images: int, *, empty: bool) -> list[Row]:
        """Several labels a picture; `empty` leaves the last class without any."""
        names = COLOURS[:6]
        labels = self.rng.random((images, len(names))) < 0.3
        labels[: len(names)] |= np.eye(len(names), dtype=bool)
        if empty:
            labels[:, -1] = False
        samples = [
            (draw(self.rng, names[int(row.argmax())] if row.any() else "white"), "npy", npy(row.astype(np.int64)))
            for row in labels
        ]
        lines = {"classnames": "\n".join(names), "zeroshot_classification_templates": "\n".join(TEMPLATES)}
        write_wds(root, samples, dataset_type="multilabel", **lines)
        data = open_eval_set(root)
        found = multilabel(self.images(data), self.classes(data), data.labels, classes=data.classes)
        case = "multilabel, a class without a picture" if empty else "multilabel"
        (row,) = paired(case, self.their_classes(root), found)
        if not empty or row.theirs is None or row.ours is None:
            return [row]
        counted = row.ours * (len(names) - 1) / len(names)
        right = abs(counted - row.theirs) < TOLERANCE
        return [explain(row, "counts the class as 0; vlkd takes the mean of the others", right)]

    def retrieval(self, root: Path, images: int) -> list[Row]:
        """Five captions a picture."""
        captions = sentences(self.rng, PER_IMAGE * images)
        groups = [captions[PER_IMAGE * i : PER_IMAGE * (i + 1)] for i in range(images)]
        samples = [
            (draw(self.rng, COLOURS[i % len(COLOURS)]), "txt", "\n".join(own).encode()) for i, own in enumerate(groups)
        ]
        write_wds(root, samples, dataset_type="retrieval")
        data = open_eval_set(root)
        texts = [caption for own in data.captions for caption in own]
        owner = np.repeat(np.arange(images), [len(own) for own in data.captions])
        found = retrieval(self.images(data), self.texts(texts), owner, texts, ks=KS)
        rows = []
        for case, ks in (("retrieval", {"recall_k_list": list(KS)}), ("retrieval, their default k", {})):
            _, loader = self.theirs(root, "zeroshot_retrieval")
            figures = zeroshot_retrieval.evaluate(self.model, loader, self.tokenizer, "cpu", amp=False, **ks)
            rows += paired(case, figures, found)
        return rows

    def sugar_crepe(self, root: Path, images: int) -> list[Row]:
        """One picture, a true and a false caption."""
        (root / "images").mkdir(parents=True)
        captions = sentences(self.rng, 2 * images)
        items = {}
        for i in range(images):
            (root / "images" / f"{i}.png").write_bytes(draw(self.rng, COLOURS[i % len(COLOURS)]))
            items[str(i)] = {
                "filename": f"{i}.png",
                "caption": captions[2 * i],
                "negative_caption": captions[2 * i + 1],
            }
        (root / "swap_att.json").write_text(json.dumps(items))
        data = SugarCrepe(str(root / "images"), str(root / "swap_att.json"), transform=self.transform)
        rows = []
        for row in self.chosen("SugarCrepe", data, open_eval_set(root)):
            alone = row.figure == "image_acc" and row.ours is None and row.theirs == 1.0
            rows.append(explain(row, "always 1 with one picture; vlkd leaves it out") if alone else row)
        return rows

    def winoground(self, root: Path, images: int) -> list[Row]:
        """Two pictures and two captions."""
        root.mkdir()
        captions = sentences(self.rng, 2 * (images // 2))
        lines, pictures = [], []
        for i in range(0, len(captions), 2):
            pictures.append([draw(self.rng, COLOURS[(i + side) % len(COLOURS)]) for side in (0, 1)])
            for side in (0, 1):
                (root / f"{i + side}.png").write_bytes(pictures[-1][side])
            lines.append(json.dumps({"images": [f"{i}.png", f"{i + 1}.png"], "captions": captions[i : i + 2]}))
        (root / "pairs.jsonl").write_text("\n".join(lines))
        data = [
            (
                torch.stack([self.transform(Image.open(io.BytesIO(picture))) for picture in pair]),
                captions[2 * i : 2 * i + 2],
            )
            for i, pair in enumerate(pictures)
        ]
        return self.chosen("two by two", data, open_eval_set(root / "pairs.jsonl"))

    def chosen(self, case: str, theirs: Any, ours: EvalSet) -> list[Row]:
        """The figures of a selection."""
        loader = DataLoader(theirs, batch_size=BATCH, collate_fn=image_captions_collate_fn)
        figures = image_caption_selection.evaluate(self.model, loader, self.tokenizer, "cpu", amp=False)
        texts = [caption for choice in ours.choices for caption in choice.captions]
        number = {text: i for i, text in enumerate(texts)}
        rows = [
            ChoiceRows(images=choice.images, texts=tuple(number[caption] for caption in choice.captions))
            for choice in ours.choices
        ]
        return paired(case, figures, selection(self.images(ours), self.texts(texts), rows))


class Collapsed:
    """A model for CLIP_benchmark that has collapsed to a point."""

    def encode_image(self, images: torch.Tensor) -> torch.Tensor:
        return torch.ones(len(images), 4)

    encode_text = encode_image


def collapsed(images: int) -> list[Row]:
    """What each makes of a model with one embedding for everything: ties alone."""
    points = torch.ones(images, 4)
    labels = np.zeros((images, 2), dtype=bool)
    labels[images // 2 :, 0] = labels[: images // 2, 1] = True
    pixels = torch.zeros(images, 3, 2, 2)
    encode: Callable[[Sequence[str]], torch.Tensor] = lambda texts: torch.zeros(len(texts), 1)  # noqa: E731
    batches = pixels.split(BATCH)

    loader = [(batch, [["true", "false"]] * len(batch)) for batch in batches]
    theirs = image_caption_selection.evaluate(Collapsed(), loader, encode, "cpu", amp=False)
    choices = [ChoiceRows(images=(i,), texts=(0, 1)) for i in range(images)]
    found = selection(points, points[:2], choices)
    (row,) = [row for row in paired("collapsed model, selection", theirs, found) if row.figure == "text_acc"]
    why = "an equal score is right for the first caption; vlkd counts an error"
    rows = [explain(row, why, (row.theirs, row.ours) == (1.0, 0.0))]

    loader = [(batch, [["caption"]] * len(batch)) for batch in batches]
    theirs = zeroshot_retrieval.evaluate(Collapsed(), loader, encode, "cpu", amp=False)
    found = retrieval(points, points, np.arange(images))
    why = "ties in the order of torch.topk; vlkd takes the smaller id, so 5 queries hit"
    rows += [
        explain(row, why, row.ours is not None and abs(row.ours * images - 5) < TOLERANCE)
        for row in paired("collapsed model, retrieval", theirs, found)
    ]

    tied = zeroshot_classification.average_precision_per_class(torch.zeros(images, 2), torch.from_numpy(labels))
    found = multilabel(points, points[:2], labels, classes=("late", "early"))
    (row,) = paired("collapsed model, multilabel", {"mean_average_precision": float(tied.mean())}, found)
    early = images // 2
    ranks = np.arange(1, images + 1)
    exact = (1 + float(np.mean((ranks[early:] - early) / ranks[early:]))) / 2
    why = "ties in the order of torch.sort; vlkd takes the smaller image number"
    right = row.ours is not None and abs(row.ours - exact) < TOLERANCE
    return [*rows, explain(row, why, right)]


def paired(case: str, theirs: dict[str, float], ours: Measured) -> list[Row]:
    """One row for each figure of CLIP_benchmark."""
    return [
        Row(case=case, figure=name, theirs=value if math.isfinite(value) else None, ours=ours.metrics.get(name))
        for name, value in theirs.items()
    ]


def explain(row: Row, why: str, explained: bool = True) -> Row:
    """The row with a reason."""
    return Row(**{**asdict(row), "why": why, "explained": explained})


def lines(rows: Sequence[Row]) -> Iterator[str]:
    """The table."""

    def text(value: float | None) -> str:
        return "-" if value is None else f"{value:.7f}"

    cells = [("data", "figure", "clip_benchmark", "vlkd", "")]
    for row in rows:
        verdict = "equal" if row.equal else row.why if row.explained else f"DIFFERENT {row.why}"
        cells.append((row.case, row.figure, text(row.theirs), text(row.ours), verdict))
    widths = [max(len(line[column]) for line in cells) for column in range(4)]
    for line in cells:
        yield "  ".join([*(cell.ljust(width) for cell, width in zip(line[:4], widths, strict=True)), line[4]]).rstrip()


def main(argv: Sequence[str]) -> int:
    """Compare and print; 1 if a difference has no explanation."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=90, help="of each data set")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", action="store_true", help="end with one line of strict JSON")
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as folder:
        rows = compare(Path(folder), args.images, args.seed)
    print(*lines(rows), sep="\n")
    bad = [row for row in rows if not row.fine]
    print(f"{sum(row.equal for row in rows)} figures equal, {len(bad)} different without an explanation")
    if args.json:
        table = [{**asdict(row), "equal": row.equal} for row in rows]
        print(json.dumps({"compare": "clip_benchmark", "rows": table, "unexplained": len(bad)}, allow_nan=False))
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
