"""The three-step version of any run."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch

from vlkd.data.scenes import generate_scenes
from vlkd.data.shards import write_shards
from vlkd.engine.settings import Run
from vlkd.models.spec import CompositeSpec, build_composite
from vlkd.models.tokenizer import train_tokenizer

SCENES = 48
MODEL = CompositeSpec(image="test_resnet", image_size=32, text_width=32, text_layers=1, text_heads=2, width=16)


def shrink_to_smoke(config: Run) -> Run:
    """Drawn shapes, tiny towers, an untrained teacher in place of each named one, three steps on the CPU."""
    folder = Path(config.out)
    data = folder.with_name(folder.name + "-smoke-data")
    for split in ("train", "val"):
        if not (data / split / "manifest.json").is_file():
            scenes = generate_scenes("shapes", count=SCENES, seed=0, split=split, image_size=48)
            write_shards(scenes, data / split)
    teachers = tuple(untrained_teacher(data / f"teacher{i}", i) for i, _ in enumerate(config.teachers.refs))
    return replace(
        config,
        data=replace(
            config.data,
            train=(f"{data}/train",),
            weights=(),
            val=(f"{data}/val",),
            test=(f"{data}/val",),
            zero_shot=(),
            workers=0,
        ),
        model=replace(MODEL, image_projection=config.model.image_projection, logit_bias=config.model.logit_bias),
        student=replace(config.student, start=""),
        teachers=replace(
            config.teachers, refs=teachers, folder=str(data / "features"), views=min(config.teachers.views, 2)
        ),
        train=replace(
            config.train, samples=48, batch_size=16, log_steps=1, device="cpu", precision="fp32", trackers=()
        ),
        report=replace(config.report, compare=()),
    )


def untrained_teacher(folder: Path, seed: int) -> str:
    """A tiny dual encoder with random weights, in a folder that keeps it."""
    if not folder.is_dir():
        captions = [
            text for scene in generate_scenes("shapes", count=20, seed=0, split="train") for text in scene.captions
        ]
        torch.manual_seed(seed)
        build_composite(MODEL, tokenizer=train_tokenizer(captions, vocab_size=200)).save(folder)
    return str(folder)
