"""Train the small teacher that `vlkd demo` ships: a CLIP-like model on drawn icon scenes, far longer than the demo.

    python scripts/make_demo_teacher.py runs/demo_teacher --samples 400000

Writes `student/` in the run's folder; copy it to vlkd/assets/demo_teacher (about 6 MB in float16).
"""

from __future__ import annotations

import argparse
from pathlib import Path

import vlkd.models  # noqa: F401 - before anything imports torchvision
from vlkd import recipes
from vlkd.data.scenes import generate_scenes
from vlkd.data.shards import write_shards
from vlkd.engine.run import run_recipe

SCENES = {"train": 40_000, "val": 500}
VOCABULARY = 300


def main() -> None:
    """Draw the scenes once, then train (the same command continues)."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--samples", type=int, default=400_000)
    args = parser.parse_args()
    data = args.out.with_name(args.out.name + "-scenes")
    for split, count in SCENES.items():
        if not (data / split / "manifest.json").is_file():
            # The demo draws its own scenes from another seed: the teacher has seen none of them.
            scenes = generate_scenes("icons", count=count, seed=1, split=split, image_size=72, vocabulary=VOCABULARY)
            write_shards(scenes, data / split, samples_per_shard=10_000)
    run_recipe(
        recipes.load(recipes.find("tasks", "retriever")),
        [
            f"out={args.out}",
            f"data.train={data}/train",
            f"data.val={data}/val",
            "data.keep_short_side=72",
            "views.flip=0",
            "views.crop_scale=0.8,1",
            "model.image=resnet10t",
            'model.image_kwargs={"channels":[48,96,160,256]}',
            "model.image_size=64",
            "model.text_width=192",
            "model.text_layers=2",
            "model.width=192",
            "student.vocab_size=2000",
            "student.dtype=float16",
            f"train.samples={args.samples}",
            "train.batch_size=256",
            "train.lr=0.0015",
            "train.ema=0.998",
            "train.precision=bf16",
            "train.eval_samples=40000",
        ],
    )


if __name__ == "__main__":
    main()
