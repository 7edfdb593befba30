"""Training images of which some show their class, beside validation and test images that are proved to be others.

A key is the image's path below the root, as `train/CLASS/FILE.jpg`: splits often number their files alike, so that
`CLASS/FILE.jpg` alone would stand for two pictures.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from vlkd.data.disjoint import ImageSet, copies, disjoint
from vlkd.data.labelled import Labelled, open_split, read_templates
from vlkd.data.shots import NUMBER, choose_shots, listed_keys, split_validation
from vlkd.data.sources import ImageFile, Pairs, open_pairs
from vlkd.errors import UserError

Ids = NDArray[np.int64]

VALIDATION_SEED = 0
"""Held-out images are the same for every seed of a run: its pool, and teacher features stored of it, stay the same."""
_LISTED = 5


@dataclass(frozen=True, kw_only=True)
class PoolData:
    """What is read.

    Args:
        root: folder ROOT/SPLIT/CLASS/*.jpg.
        train: the split that is trained on; "" for ROOT/CLASS/*.jpg.
        val: the split on which settings are chosen; "", or one that has no folder, holds out a part of `train`.
        test: the split of the final figures; "" for none.
        shots: labels to use: a number per class, a share such as 10%, all, or a text file of keys, one a line.
        shots_seed: by which they are drawn; -1 takes the run's seed.
        val_share: the part of `train` that is held out, where there is no split for validation.
        unlabelled: more sources of images (shards, lists, folders), whose captions and folder names are not used.
        leave_out: class folders that are left out of every split.
        templates: file of prompts with `{c}` or `{}` for the class name; "" for those that come with the data.
        keep_short_side: hold all training images in memory, reduced to this short side; 0 decodes anew each time.
        workers: processes that decode training images.
    """

    root: str = ""
    train: str = "train"
    val: str = "val"
    test: str = "test"
    shots: str = "16"
    shots_seed: int = -1
    val_share: float = 0.2
    unlabelled: tuple[str, ...] = ()
    leave_out: tuple[str, ...] = ()
    templates: str = ""
    keep_short_side: int = 0
    workers: int = 0

    def __post_init__(self) -> None:
        for name, lowest in (("shots_seed", -1), ("keep_short_side", 0), ("workers", 0)):
            if getattr(self, name) < lowest:
                raise UserError(f"data.{name}={getattr(self, name)}: expected {lowest} or more.")
        if not 0 < self.val_share < 1:
            raise UserError(f"data.val_share={self.val_share}: expected more than 0 and below 1.")
        used = {"train": self.train} | {name: split for name in ("val", "test") if (split := getattr(self, name))}
        taken: dict[Path, str] = {}
        for name, split in used.items():
            other = taken.setdefault(Path(split), name)
            if other != name:
                raise UserError(
                    f"data.{other} and data.{name} are both the split {split!r}; expected two that share no image: "
                    "name another one, or none (data.val='' holds out a part of train, data.test='' has no test)."
                )


@dataclass(frozen=True)
class LabelledPool:
    """N training images, C classes.

    Attributes:
        pairs: all training images without captions, those of the training split first; keys differ.
        labels: (N,) true class id, -1 for images of further sources.
        labelled: (L,) ascending rows whose label may be used; those of all other rows are for evaluation alone.
        classes: (C,) names in words.
        templates: prompts with `{c}` or `{}`, or ().
        val: images to choose settings on, of the same class ids; it may lack classes.
        test: images for the final figures, None without.
        held_out: keys of the training split that validation took; () where it has a split of its own.
        told: what was found, in sentences for a report.
    """

    pairs: Pairs
    labels: Ids
    labelled: Ids
    classes: tuple[str, ...]
    templates: tuple[str, ...]
    val: Labelled
    test: Labelled | None
    held_out: tuple[str, ...]
    told: tuple[str, ...]


@dataclass(frozen=True)
class _Splits:
    """The class folders' images; `held` tells of validation images that are part of the training folder."""

    train: Labelled
    val: Labelled
    test: Labelled | None
    held: str


def open_pool(data: PoolData, *, seed: int) -> LabelledPool:
    """Open the splits and the further sources, draw the shots, and prove that no image is on two sides.

    Args:
        data: what is read.
        seed: of the run, by which shots are drawn unless the data have a seed of their own.

    Raises:
        UserError: a folder is missing, the splits' classes differ, a class has no shot, a listed key is unknown or of
            the validation or test split, no labelled image of a class can be read, there is no training image, or one
            is, byte for byte, a validation or test image, or a validation image one of test.
    """
    splits = _open_splits(data)
    train, classes = splits.train, splits.train.classes
    sources = [open_pairs(ref) for ref in data.unlabelled]
    pairs = _joined(train, sources)
    labels = np.concatenate([train.labels, np.full(len(pairs) - len(train), -1, dtype=np.int64)])
    _check_listed(data.shots, splits)
    own_seed = seed if data.shots_seed < 0 else data.shots_seed
    labelled = choose_shots(labels, classes, data.shots, seed=own_seed, keys=pairs.keys)
    _check_disjoint(pairs, labelled, splits)
    _check_readable(pairs, labels, labelled, classes)
    templates = read_templates(Path(data.templates)) if data.templates else train.templates
    told = _told(data, splits, pairs, labels[labelled])
    held_out = tuple(splits.val.keys) if splits.held else ()
    return LabelledPool(pairs, labels, labelled, classes, templates, splits.val, splits.test, held_out, told)


def _open_splits(data: PoolData) -> _Splits:
    root = Path(data.root)
    if not data.root or not root.is_dir():
        raise UserError(f"There is no folder {data.root!r}; set data.root to a folder ROOT/SPLIT/CLASS/*.jpg.")
    if data.test and not (root / data.test).is_dir():
        raise UserError(
            f"There is no folder {root / data.test}; check data.root and data.test, or set data.test='' for none."
        )
    has_val = bool(data.val) and (root / data.val).is_dir()
    names = [data.train, *([data.val] if has_val else []), *([data.test] if data.test else [])]
    opened = _same_classes({name: _opened(root, name) for name in names}, data.leave_out)
    train = opened[data.train]
    test = opened[data.test] if data.test else None
    if has_val:
        return _Splits(train, opened[data.val], test, "")
    return _held_out(train, test, data)


def _opened(root: Path, split: str) -> Labelled:
    """With keys from the root on."""
    found = open_split(root, split)
    return replace(found, keys=[(Path(split) / key).as_posix() for key in found.keys])


def _held_out(train: Labelled, test: Labelled | None, data: PoolData) -> _Splits:
    """A part of the training split for validation; of a picture that is there twice, both copies stay together."""
    stay, held = split_validation(train.labels, share=data.val_share, seed=VALIDATION_SEED, keys=train.keys)
    twice = copies([train.files[row] for row in held], [train.files[row] for row in stay])
    back = held[sorted(twice)]
    held = np.setdiff1d(held, back)
    if not len(held):
        raise UserError(
            f"Every image that {data.train} could spare for validation is there twice; remove copies or name a split."
        )
    words = f"held out of {data.train!r} by val_share={data.val_share:g}"
    if data.val:
        words += f", because there is no folder {data.val!r}"
    if len(back):
        words += f"; {len(back)} more were copies of training images and stay with them"
    return _Splits(_part(train, np.sort(np.concatenate([stay, back]))), _part(train, held), test, words)


def _part(whole: Labelled, rows: Ids) -> Labelled:
    """Some rows of a split."""
    return replace(
        whole,
        files=[whole.files[row] for row in rows],
        labels=whole.labels[rows],
        keys=[whole.keys[row] for row in rows],
    )


def _same_classes(opened: dict[str, Labelled], leave_out: Sequence[str]) -> dict[str, Labelled]:
    """The splits without the classes left out, whose ids close up; raises `UserError` where classes differ."""
    first = next(iter(opened))
    classes = opened[first].classes
    id_of: dict[str, int] = {}
    for name, split in opened.items():
        folders = [Path(key).parent.name for key in split.keys]
        own = dict(zip(folders, split.labels.tolist(), strict=True))
        known = id_of | own
        if split.classes != classes or known != own | id_of or len(set(known.values())) < len(known):
            raise UserError(
                f"The splits {first!r} and {name!r} have {len(classes)} and {len(split.classes)} classes that do not "
                "match; expected the same class folders and the same class names: mend or rename them."
            )
        id_of = known
    unknown = [name for name in leave_out if name not in id_of]
    if unknown:
        raise UserError(
            f"data.leave_out names {unknown[0]!r}, and no split has that class folder; expected some of "
            f"{', '.join(sorted(id_of)[:_LISTED])}, ...: check it."
        )
    gone = {id_of[name] for name in leave_out}
    kept = [i for i in range(len(classes)) if i not in gone]
    if len(kept) < 2:
        raise UserError(
            f"data.leave_out leaves {len(kept)} of {len(classes)} classes; expected two or more: shorten it."
        )
    return {name: _renumbered(split, kept, name) for name, split in opened.items()}


def _renumbered(split: Labelled, kept: Sequence[int], name: str) -> Labelled:
    new_id = np.full(len(split.classes), -1, dtype=np.int64)
    new_id[kept] = np.arange(len(kept))
    rows = np.flatnonzero(new_id[split.labels] >= 0)
    if not len(rows):
        raise UserError(f"data.leave_out leaves no image in the split {name!r}; shorten it or name another split.")
    part = _part(split, rows)
    return replace(part, labels=new_id[part.labels], classes=tuple(split.classes[i] for i in kept))


def _joined(train: Labelled, sources: Sequence[Pairs]) -> Pairs:
    """The training split and the further sources; a source whose keys repeat gets its number in front of them.

    The split's own keys never change, so that a list of them stays valid when a source is added.
    """
    keys, files = list(train.keys), list(train.files)
    problems: list[str] = []
    known = set(keys)
    for number, source in enumerate(sources, 1):
        own = source.keys
        while not known.isdisjoint(own):
            own = [f"{number}:{key}" for key in own]
        known.update(own)
        keys += own
        files += source.files
        problems += source.problems
    return Pairs(keys, [()] * len(keys), files, tuple(problems))


def _check_listed(shots: str, splits: _Splits) -> None:
    """Raise `UserError` for a listed key of the validation or test split."""
    listed = listed_keys(shots)
    for name, split in (("validation", splits.val), ("test", splits.test)):
        if split is None:
            continue
        known = set(split.keys)
        found = [key for key in listed if key in known]
        if found:
            raise UserError(
                f"{shots} lists {len(found)} of {len(listed)} keys that are in the {name} split, first {found[0]!r}; "
                "expected training images alone: take them off the list."
            )


def _check_disjoint(pairs: Pairs, labelled: Ids, splits: _Splits) -> None:
    rest = np.setdiff1d(np.arange(len(pairs)), labelled)

    def part(name: str, rows: Ids, advice: str) -> ImageSet:
        return ImageSet(name, [pairs.keys[i] for i in rows], [pairs.files[i] for i in rows], advice)

    chosen = part("labelled images", labelled, "remove them from one of the splits")
    pool = part(
        "unlabelled images of the pool",
        rest,
        "remove them from the training split, or leave out the source in data.unlabelled that holds them",
    )
    val = _image_set("validation images", splits.val)
    against = [(chosen, val), (pool, val)]
    if splits.test is not None:
        test = _image_set("test images", splits.test)
        against = [(chosen, test), (val, test), (pool, test), *against]
    disjoint(*against)


def _check_readable(pairs: Pairs, labels: Ids, labelled: Ids, classes: Sequence[str]) -> None:
    """Raise `UserError` unless each class has a labelled image that opens; training leaves out the others, told."""
    for number, name in enumerate(classes):
        problem = ""
        rows = labelled[labels[labelled] == number].tolist()
        for row in rows:
            try:
                pairs.image(row)
                break
            except UserError as error:
                problem = problem or str(error)
        else:
            raise UserError(
                f"None of the {len(rows)} labelled images of the class {name!r} can be read (first {problem}); "
                "expected one or more: mend or remove the bad files, or give more shots."
            )


def _image_set(name: str, split: Labelled) -> ImageSet:
    files: Sequence[ImageFile] = split.files
    return ImageSet(name, split.keys, files, "remove them from one of the splits")


def _told(data: PoolData, splits: _Splits, pairs: Pairs, shown: Ids) -> tuple[str, ...]:
    """`shown` (L,) are the labels in use."""
    classes, train = splits.train.classes, len(splits.train)
    counts = np.bincount(shown, minlength=len(classes))
    further = f" and {len(pairs) - train} of {len(data.unlabelled)} further sources" if data.unlabelled else ""
    images = f"The pool has {len(pairs)} images: {train} of the split {data.train!r}{further}."
    labels = (
        f"{len(shown)} of them show their label, {counts.min()} to {counts.max()} of each of {len(classes)} classes"
    )
    fewer = int((counts < int(data.shots)).sum()) if NUMBER.fullmatch(data.shots) else 0
    labels += f" (shots={data.shots}"
    labels += f"; {fewer} {'class has' if fewer == 1 else 'classes have'} no more than those)." if fewer else ")."
    held = splits.held or f"the split {data.val!r}"
    val = f"{len(splits.val)} images are for validation, {held}{_lacking(splits.val)}."
    test = "There is no test split."
    if splits.test is not None:
        test = f"{len(splits.test)} images are for the test, the split {data.test!r}{_lacking(splits.test)}."
    proof = "No image is on two of these sides, by key and byte for byte."
    return (images, labels, val, test, proof)


def _lacking(split: Labelled) -> str:
    """The classes that a split has no image of."""
    counts = np.bincount(split.labels, minlength=len(split.classes))
    names = [split.classes[i] for i in np.flatnonzero(counts == 0)]
    if not names:
        return ""
    more = ", ..." if len(names) > _LISTED else ""
    return f"; it has none of {len(names)} of {len(split.classes)} classes ({', '.join(names[:_LISTED])}{more})"
