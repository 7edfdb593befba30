"""Journey 1 offline: scenes drawn from named icons, the shipped teacher, two students, an index, a report."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from pathlib import Path

from vlkd import recipes
from vlkd.data.scenes import generate_scenes
from vlkd.data.shards import write_shards
from vlkd.data.sources import open_pairs
from vlkd.engine.run import run_recipe
from vlkd.models.fingerprint import model_fingerprint
from vlkd.models.load import load
from vlkd.retrieval.encode import encode_images
from vlkd.retrieval.index import SearchIndex

TEACHER = Path(__file__).resolve().parent.parent / "assets" / "demo_teacher"
VOCABULARY = 300
SCENES = {"train": 4_000, "val": 200, "test": 500}
STUDENT = (
    "data.keep_short_side=64",
    "views.flip=0",
    "views.crop_scale=0.8,1",
    "model.image=resnet10t",
    'model.image_kwargs={"channels":[24,48,96,128]}',
    "model.image_size=64",
    "model.text_width=128",
    "model.text_layers=1",
    "model.context_length=24",
    "model.width=128",
    "student.vocab_size=1500",
    "train.batch_size=128",
    "train.lr=0.003",
    "train.eval_samples=6000",
    "train.save_minutes=1",
)


@dataclass(frozen=True, kw_only=True)
class DemoResult:
    """Test figures of the two students, both directions' mean hit@1 and hit@10, and where things are.

    Attributes:
        distilled: of the student with the teacher.
        alone: of the same student without.
        teacher: of the teacher.
        report: the page.
        index: the searchable folder.
        seconds: wall time.
    """

    distilled: dict[str, float]
    alone: dict[str, float]
    teacher: dict[str, float]
    report: Path
    index: Path
    seconds: float


def run_demo(out: Path, *, seed: int = 0, samples: int = 24_000) -> DemoResult:
    """Draw the scenes, train both students on the same samples, evaluate, index the test pictures.

    Args:
        out: the folder of everything; the same call continues.
        seed: of scenes, weights and order.
        samples: that each student sees.
    """
    started = time.perf_counter()
    print("1/4  drawing scenes of named icons", flush=True)
    for split, count in SCENES.items():
        if not (out / "scenes" / split / "manifest.json").is_file():
            scenes = generate_scenes(
                "icons", count=count, seed=100 + seed, split=split, image_size=64, vocabulary=VOCABULARY
            )
            write_shards(scenes, out / "scenes" / split)
    data = [f"data.train={out}/scenes/train", f"data.val={out}/scenes/val", f"data.test={out}/scenes/test"]
    shared = [*data, *STUDENT, f"seed={seed}", f"train.samples={samples}", f"train.precision={fast_precision()}"]
    recipe = recipes.load(recipes.find("tasks", "retriever"))
    print("2/4  the student without a teacher", flush=True)
    alone = run_recipe(recipe, [*shared, f"out={out}/alone"])
    print("3/4  the same student with a teacher", flush=True)
    distilled = run_recipe(
        recipe,
        [
            *shared,
            f"out={out}/distilled",
            f"teachers.refs={TEACHER}",
            "teachers.views=2",
            f"teachers.folder={out}/teacher_features",
            "method.matching=4",
            "method.relational=1",
            f"report.compare={alone}/student",
        ],
    )
    print("4/4  indexing the test pictures", flush=True)
    index = build_index(out, distilled / "student")
    rows = [json.loads(line) for line in (distilled / "results.jsonl").read_text().splitlines()]
    figures = {row["role"]: {key: row[key] for key in ("mean_hit@1", "mean_hit@10")} for row in rows}
    return DemoResult(
        distilled=figures["student"],
        alone=figures["compared"],
        teacher=figures["teacher"],
        report=distilled / "report.html",
        index=index,
        seconds=time.perf_counter() - started,
    )


def fast_precision() -> str:
    """bf16 where the processor computes in it, else fp32."""
    import torch

    onednn = torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
    return "bf16" if onednn and torch.cpu._is_avx512_bf16_supported() else "fp32"


def build_index(out: Path, student: Path) -> Path:
    """A FAISS index of the test pictures, which are also written out as files to look at."""
    pairs = open_pairs(str(out / "scenes" / "test"))
    pictures = (out / "pictures").resolve()
    pictures.mkdir(exist_ok=True)
    paths = [str(pictures / f"{key}.jpg") for key in pairs.keys]
    for path, file in zip(paths, pairs.files, strict=True):
        Path(path).write_bytes(file.read())
    model = load(str(student))
    encoded = encode_images(model, pairs)
    found = [paths[i] for i in encoded.index.tolist()]
    place, fingerprint = str(student.resolve()), model_fingerprint(model)
    SearchIndex.build(encoded.embed, found, model=place, fingerprint=fingerprint).save(out / "index")
    return out / "index"
