"""Lay out the real data of the suite's evidence under one root: links to class folders, lists and prompts.

python scripts/evidence_suite.py DATA --root suite_data
vlkd eval suite --suite scripts/evidence_suite.toml --data suite_data --model ... --out runs/suite

DATA holds `caltech101`, `grocery`, `coco`, `emoji`, `clipart`, as docs/evidence.md describes them.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np

from vlkd.data.eval_set import EvalSet
from vlkd.data.eval_wds_writer import write_wds
from vlkd.data.sources import ImageFile

LEFT_OUT = ("Faces_easy",)
"""The same people as `Faces`: zero-shot classification cannot tell the two names apart."""
SPLITS = ("train", "val", "test")


def main() -> None:
    """Make the root."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("--root", type=Path, required=True)
    args = parser.parse_args()
    args.root.mkdir(parents=True, exist_ok=True)
    data = args.data.resolve()
    link_classes(data / "caltech101", args.root / "caltech101")
    link_classes(data / "grocery", args.root / "grocery")
    describe(data / "grocery" / "classes.json", args.root)
    for name in ("coco", "emoji", "clipart"):
        link(args.root / name, data / name)
    objects(data / "coco", args.root / "coco_objects")


def link(place: Path, target: Path) -> None:
    """A link, if it is not there yet."""
    if not place.exists():
        place.symlink_to(target, target_is_directory=True)


def link_classes(source: Path, place: Path) -> None:
    """The class folders of every split, without those that are left out, and their names in words."""
    names: set[str] = set()
    for split in SPLITS:
        folders = [one for one in (source / split).glob("*") if one.is_dir() and one.name not in LEFT_OUT]
        for folder in folders:
            (place / split).mkdir(parents=True, exist_ok=True)
            link(place / split / folder.name, folder)
        names |= {folder.name for folder in folders}
    words = [name.replace("_", " ").replace("-", " ").lower() for name in sorted(names)]
    (place / "classnames.txt").write_text("".join(f"{word}\n" for word in words), encoding="utf-8")


def describe(classes: Path, root: Path) -> None:
    """Prompts by description, one per class: the name, and the shop's sentence about it."""
    about = json.loads(classes.read_text(encoding="utf-8"))
    names = (root / "grocery" / "classnames.txt").read_text(encoding="utf-8").splitlines()
    prompts = {
        name: [f"a photo of {name}, {about[key]['coarse'].replace('-', ' ').lower()}. {about[key]['description']}"]
        for key, name in zip(sorted(about), names, strict=True)
    }
    (root / "grocery_descriptions.json").write_text(json.dumps(prompts, indent=1) + "\n", encoding="utf-8")


def objects(coco: Path, out: Path) -> None:
    """Which of the 80 classes are in each test photo, as a webdataset folder."""
    about = json.loads((coco / "instances_test.json").read_text(encoding="utf-8"))
    number = {category["id"]: i for i, category in enumerate(about["categories"])}
    row = {image["id"]: i for i, image in enumerate(about["images"])}
    labels = np.zeros((len(row), len(number)), bool)
    for box in about["annotations"]:
        labels[row[box["image_id"]], number[box["category_id"]]] = True
    write_wds(
        EvalSet(
            kind="multilabel",
            keys=[image["file_name"] for image in about["images"]],
            files=[ImageFile(coco / "images" / Path(image["file_name"]).name) for image in about["images"]],
            classes=tuple(category["name"] for category in about["categories"]),
            labels=labels,
            captions=[()] * len(row),
        ),
        out,
    )


if __name__ == "__main__":
    main()
