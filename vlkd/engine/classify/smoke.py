"""The three-step version of a classifier's run."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from vlkd.data.pool import PoolData
from vlkd.data.scenes import generate_scenes
from vlkd.data.shards import RawSample
from vlkd.engine.classify.settings import ClassifierRun
from vlkd.engine.smoke import untrained_teacher
from vlkd.models.classifier_spec import ClassifierSpec

SCENES = 60
SPLITS = ("train", "val", "test")


def shrink_to_smoke(config: ClassifierRun) -> ClassifierRun:
    """Drawn shapes whose shape is their class, a tiny trunk, an untrained teacher, three steps on the CPU."""
    folder = Path(config.out)
    data = folder.with_name(folder.name + "-smoke-data")
    draw_classes(data / "images")
    start = untrained_teacher(data / "start", 1) if config.model.start else ""
    model = ClassifierSpec(
        image="mobilenetv3_small_100" if start else "test_resnet",
        start=start,
        image_size=32,
        heads=config.model.heads,
        language_init=config.model.language_init,
        align=config.model.align,
    )
    return replace(
        config,
        data=PoolData(root=str(data / "images"), shots="1"),
        model=model,
        teacher=replace(
            config.teacher,
            ref=untrained_teacher(data / "teacher", 0) if config.teacher.ref else "",
            folder=str(data / "features"),
            views=min(config.teacher.views, 2),
        ),
        train=replace(
            config.train,
            samples=48,
            batch_size=16,
            log_steps=1,
            validations=2,
            device="cpu",
            precision="fp32",
        ),
        report=replace(config.report, compare=()),
    )


def first_noun(scene: RawSample) -> str:
    """What the first object of a scene is."""
    objects: Any = scene.extra["objects"]
    return str(objects[0]["noun"])


def draw_classes(root: Path) -> None:
    """`ROOT/SPLIT/CLASS/*.jpg` of drawn scenes, by the words of their first object."""
    if (root / "whole").is_file():
        return
    for split in SPLITS:
        for number, scene in enumerate(generate_scenes("shapes", count=SCENES, seed=0, split=split, image_size=48)):
            folder = root / split / first_noun(scene)
            folder.mkdir(parents=True, exist_ok=True)
            (folder / f"{number:03d}.jpg").write_bytes(scene.image)
    (root / "whole").touch()
