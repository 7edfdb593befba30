"""What an evaluation set is to the protocols: pictures with labels, captions or choices, whatever files they lie in."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from PIL.Image import Image

from vlkd.data.images import open_image
from vlkd.data.sources import ImageFile

Kind = Literal["classification", "multilabel", "retrieval", "selection"]
KINDS: tuple[Kind, ...] = ("classification", "multilabel", "retrieval", "selection")
Box = tuple[int, int, int, int]
"""Left, top, right and bottom in pixels, the last two outside."""


@dataclass(frozen=True, kw_only=True)
class Choice:
    """One item of image and text selection: the i-th image belongs to the i-th caption, the others distract.

    Attributes:
        images: rows of the `EvalSet`.
        captions: SugarCrepe has 1 image and (true, false), Winoground 2 x 2, ARO 1 x n with the true one first.
        group: subset or category; "" for none.
        gold: places in `images` of all those that belong to the one caption (WinoGAViL); () for the i-th to the i-th.
    """

    images: tuple[int, ...]
    captions: tuple[str, ...]
    group: str = ""
    gold: tuple[int, ...] = ()


@dataclass(frozen=True, kw_only=True)
class EvalSet:
    """I pictures of one kind of task; C classes.

    Attributes:
        kind: what the pictures carry.
        keys: (I,) names without repeats.
        files: (I,) where each picture is.
        classes: (C,) names by class id (classification, multilabel); two classes may have one name.
        templates: prompts with `{c}` or `{}` in the place of the class name; () where the data bring none.
        prompts: whole prompts by class name, which win over templates; None where the data bring none.
        labels: (I,) int64 class ids, or (I, C) bool for multilabel; None for other kinds, and with objectives.
        objectives: class ids by label set, where several share the pictures (FairFace's race, gender, age, toxic) and
            the labels are among the groups; {} for one label set.
        captions: (I,) those of each picture in order, equal ones kept; () for other kinds than retrieval.
        choices: the items of a selection.
        groups: (I,) int64 group ids by the name of the column.
        boxes: the part of a picture that is shown, by row, and named in its key; where there is none, the whole.
        problems: what was left out, in words.
    """

    kind: Kind
    keys: list[str]
    files: list[ImageFile]
    classes: tuple[str, ...] = ()
    templates: tuple[str, ...] = ()
    prompts: Mapping[str, tuple[str, ...]] | None = None
    labels: NDArray[Any] | None = None
    objectives: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    captions: list[tuple[str, ...]] = field(default_factory=list)
    choices: tuple[Choice, ...] = ()
    groups: Mapping[str, NDArray[np.int64]] = field(default_factory=dict)
    boxes: Mapping[int, Box] = field(default_factory=dict)
    problems: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not self.captions:
            object.__setattr__(self, "captions", [()] * len(self.files))

    def __len__(self) -> int:
        return len(self.files)

    def image(self, i: int) -> Image:
        """Decode picture `i`, black where its box leaves it; raises `UserError` for one that cannot be used."""
        image = open_image(self.files[i].read())
        return image.crop(self.boxes[i]) if i in self.boxes else image

    def label_hash(self) -> str:
        """16 hexadecimal digits that change with any name, label, caption, prompt, choice or group, not with pixels."""
        told = {
            "kind": self.kind,
            "keys": self.keys,
            "classes": self.classes,
            "templates": self.templates,
            "prompts": None if self.prompts is None else sorted(self.prompts.items()),
            "labels": None if self.labels is None else self.labels.astype(np.int64).tolist(),
            "captions": self.captions,
            "choices": [(choice.images, choice.captions, choice.group, choice.gold) for choice in self.choices],
            "groups": [(name, ids.tolist()) for name, ids in sorted(self.groups.items())],
        }
        return hashlib.sha256(json.dumps(told).encode()).hexdigest()[:16]
