"""The three-step version of a generative model's run."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import torch

from vlkd.data.scenes import generate_scenes
from vlkd.data.vqa_writer import QA, VqaSample, write_vqa_shards
from vlkd.engine.vlm.settings import StageSettings, VlmData, VlmRun
from vlkd.models.llava_spec import LlavaSpec
from vlkd.models.load_generative import build_vlm

SCENES, IMAGE_SIZE = 48, 32
MODEL = LlavaSpec(
    image_size=IMAGE_SIZE,
    patch_size=8,
    vision_width=16,
    vision_layers=1,
    vision_heads=2,
    language_width=16,
    language_layers=1,
    language_heads=2,
    context_length=256,
    vocab_size=400,
)
"""Student and teacher alike, so that the switch path fits."""


def shrink_to_smoke(config: VlmRun, *, taught: bool = False) -> VlmRun:
    """Questions about drawn shapes, tiny models, three steps a stage; an untrained teacher if `taught` or named."""
    folder = Path(config.out)
    data = folder.with_name(folder.name + "-smoke-data")
    for split in ("train", "val"):
        if not (data / split / "manifest.json").is_file():
            write_vqa_shards(questions(split), data / split, name=split)
    teacher = untrained(data / "teacher") if taught or config.teacher.ref else ""
    stages: dict[str, Any] = {
        one.name: replace(value, samples=48 if value.samples else 0, batch_size=16, data=())
        for one in fields(config)
        if isinstance(value := getattr(config, one.name), StageSettings)
    }
    return replace(
        config,
        **stages,
        start="",
        data=VlmData(train=(f"{data}/train",), val=(f"{data}/val",)),
        model=MODEL,
        # An untrained teacher sees nothing.
        teacher=replace(config.teacher, ref=teacher, stored="", see=0, bridge=False),
        train=replace(config.train, log_steps=1, validations=1, val_questions=8, max_new_tokens=4, device="cpu",
                      precision="fp32"),
        report=replace(config.report, compare=()),
    )  # fmt: skip


def questions(split: str) -> Iterator[VqaSample]:
    """Drawn scenes with their questions."""
    for scene in generate_scenes("shapes", count=SCENES, seed=0, split=split, image_size=IMAGE_SIZE):
        asked: Any = scene.extra["questions"]
        qa = tuple(QA(question=question, answer=answer) for question, answer in asked)
        if qa:
            yield VqaSample(key=scene.key, image=scene.image, suffix=scene.extension, qa=qa)


def untrained(folder: Path) -> str:
    """A model of random weights, in a folder that keeps it."""
    if not folder.is_dir():
        torch.manual_seed(0)
        texts = [text for sample in questions("train") for qa in sample.qa for text in (qa.question, qa.answer)]
        build_vlm(MODEL, folder, texts=texts)
    return str(folder)
