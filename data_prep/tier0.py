"""Draw the four small data sets of the offline suite tier0: retrieval, classes, several labels, choices.

vlkd prep tier0 --out data/tier0

They take seconds, need nothing but vlkd, and are the same for the same seed. `vlkd eval suite --suite tier0 --data
data/tier0` runs on them.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from random import Random

    from vlkd.data.eval_set import EvalSet
    from vlkd.data.scene_words import SceneObject
    from vlkd.data.shard_writer import RawSample

RETRIEVAL, TRAIN, TEST, MULTILABEL, CHOICES = 100, 200, 100, 128, 100
TEMPLATES = ("a {c}", "a picture of a {c}", "a {c} on a plain background")
EPILOG = """examples:
  vlkd prep tier0 --out data/tier0
  vlkd prep tier0 --seed 1 --image-size 64 --out data/other --json
"""


def main(argv: Sequence[str]) -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(
        prog="vlkd prep tier0",
        description=__doc__,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--out", type=Path, required=True, help="new folder: the data root of the suite")
    parser.add_argument("--seed", type=int, default=0, help="another seed, other pictures (default %(default)s)")
    parser.add_argument("--image-size", type=int, default=96, help="side in pixels (default %(default)s)")
    parser.add_argument("--json", action="store_true", help="end with one line of strict JSON")
    args = parser.parse_args(argv)

    from vlkd.data.shard_writer import new_folder, write_shards

    with new_folder(args.out) as folder:
        scenes = list(_retrieval(args.seed, args.image_size))
        write_shards(scenes, folder / "shapes_retrieval" / "test")
        write_classes(folder / "shapes_classes", args.seed, args.image_size)
        write_multilabel(folder / "shapes_multilabel", args.seed, args.image_size)
        write_choices(folder / "shapes_choices", args.seed, args.image_size)
    counts = {
        "shapes_retrieval": RETRIEVAL,
        "shapes_classes": TRAIN + TEST,
        "shapes_multilabel": MULTILABEL,
        "shapes_choices": CHOICES,
    }
    if args.json:
        print(json.dumps({"command": "prep tier0", "out": str(args.out), "seed": args.seed, "pictures": counts}))
    else:
        print(f"{args.out}: " + ", ".join(f"{name} {count} pictures" for name, count in counts.items()))


def _scenes(split: str, seed: int, image_size: int, least: int) -> Iterator[RawSample]:
    """Scenes of at least so many objects, without end."""
    from vlkd.data.scenes import generate_scenes

    for scene in generate_scenes("shapes", count=1_000_000, seed=seed, split=split, image_size=image_size):
        if len(_objects(scene)) >= least:
            yield scene


def _objects(scene: RawSample) -> list[SceneObject]:
    from vlkd.data.scene_words import SceneObject

    objects: Any = scene.extra["objects"]
    return [SceneObject(**thing) for thing in objects]


def _retrieval(seed: int, image_size: int) -> Iterator[RawSample]:
    """No two show the same objects, so that a caption that names them is true of one picture alone."""
    seen: set[tuple[str, ...]] = set()
    for scene in _scenes("test", seed, image_size, 2):
        content = tuple(sorted(thing.phrase for thing in _objects(scene)))
        if content not in seen:
            seen.add(content)
            yield scene
        if len(seen) == RETRIEVAL:
            return


def write_classes(out: Path, seed: int, image_size: int) -> None:
    """One shape a picture, as many of each; the group is its colour."""
    from vlkd.data.eval_wds_writer import write_wds

    for split, count in (("train", TRAIN), ("test", TEST)):
        with tempfile.TemporaryDirectory() as pictures:
            write_wds(_single_shapes(Path(pictures), split, count, seed, image_size), out, split=split)


def _single_shapes(folder: Path, split: str, count: int, seed: int, image_size: int) -> EvalSet:
    from random import Random

    import numpy as np

    from vlkd.data.scene_words import COLOURS
    from vlkd.data.shapes import SHAPES

    labels = np.arange(count) % len(SHAPES)
    images, colours = [], []
    for index in range(count):
        rng = Random(f"tier0/{seed}/{split}/{index}")
        colours.append(rng.randrange(len(COLOURS)))
        images.append(_draw(SHAPES[labels[index]], tuple(COLOURS)[colours[-1]], image_size, rng))
    return _eval_set(folder, images, "classification", labels, groups={"colour": np.array(colours, dtype=np.int64)})


def _draw(noun: str, colour: str, image_size: int, rng: Random) -> bytes:
    import io

    from vlkd.data.scenes import BACKGROUNDS, background, paste
    from vlkd.data.shapes import shape_mask

    image = background(rng.choice(tuple(BACKGROUNDS)), image_size, rng)
    paste(image, shape_mask(noun), colour, rng.uniform(0.4, 0.7) * image_size, None, rng)
    with io.BytesIO() as stream:
        image.save(stream, format="JPEG", quality=92, subsampling=0)
        return stream.getvalue()


def write_multilabel(out: Path, seed: int, image_size: int) -> None:
    """Scenes of two or three shapes, a quarter of them with the two that no other scene has."""
    import numpy as np

    from vlkd.data.eval_wds_writer import write_wds
    from vlkd.data.shapes import SHAPES

    unseen = MULTILABEL // 4
    scenes = list(
        chain(
            islice(_scenes("test", seed, image_size, 2), MULTILABEL - unseen),
            islice(_scenes("test_noun", seed, image_size, 1), unseen),
        )
    )
    shown = [{thing.noun for thing in _objects(scene)} for scene in scenes]
    labels = np.array([[noun in nouns for noun in SHAPES] for nouns in shown])
    with tempfile.TemporaryDirectory() as pictures:
        write_wds(_eval_set(Path(pictures), [scene.image for scene in scenes], "multilabel", labels), out)


def _eval_set(folder: Path, images: Iterable[bytes], kind: Any, labels: Any, **more: Any) -> EvalSet:
    from vlkd.data.eval_set import EvalSet
    from vlkd.data.shapes import SHAPES
    from vlkd.data.sources import ImageFile

    files = []
    for index, data in enumerate(images):
        path = folder / f"{index:06d}.jpg"
        path.write_bytes(data)
        files.append(ImageFile(path))
    keys = [file.path.stem for file in files]
    return EvalSet(kind=kind, keys=keys, files=files, classes=SHAPES, templates=TEMPLATES, labels=labels, **more)


def write_choices(out: Path, seed: int, image_size: int) -> None:
    """`test.jsonl` and its pictures; a wrong caption has the colours (swap_att) or the shapes (swap_obj) exchanged."""
    lines = []
    (out / "images").mkdir(parents=True)
    for scene in _scenes("test", seed, image_size, 2):
        attribute, group = (("colour", "swap_att"), ("noun", "swap_obj"))[len(lines) % 2]
        wrong = _swapped(scene, attribute, image_size)
        if wrong is None:
            continue
        name = f"{scene.key}.{scene.extension}"
        (out / "images" / name).write_bytes(scene.image)
        item = {"filename": name, "caption": scene.captions[0], "negative_caption": wrong, "group": group}
        lines.append(json.dumps(item) + "\n")
        if len(lines) == CHOICES:
            break
    (out / "test.jsonl").write_text("".join(lines), encoding="utf-8")


def _swapped(scene: RawSample, attribute: str, image_size: int) -> str | None:
    """The first caption with an attribute of the two objects exchanged; None where that would leave it true."""
    from dataclasses import replace
    from random import Random

    from vlkd.data.scene_words import captions

    objects = _objects(scene)
    if len(objects) != 2 or objects[0].colour == objects[1].colour:
        return None
    one, two = objects
    changed = [
        replace(one, **{attribute: getattr(two, attribute)}),
        replace(two, **{attribute: getattr(one, attribute)}),
    ]
    return captions(changed, str(scene.extra["background"]), image_size, Random(0))[0]
