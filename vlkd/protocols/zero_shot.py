"""Zero-shot classification: accuracy, recall by class, worst group and calibration from embeddings; and of faces."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from vlkd.errors import UserError
from vlkd.metrics import (
    expected_calibration_error,
    f1_macro,
    group_accuracy,
    per_class_recall,
    wilson_interval,
    worst_group,
)
from vlkd.protocols.classified import by_class, check_classes, measure_classes
from vlkd.protocols.measured import Measured
from vlkd.protocols.scores import score_blocks
from vlkd.retrieval.search import Indices, Vectors, check_embeddings, topk
from vlkd.retrieval.zero_shot import check_labels

CALIBRATION_BINS = 15
FACE_OBJECTIVES = ("race", "gender", "age", "toxic")
FACE_COLUMNS = ("age", "gender", "race", "race_binary")
"""Label sets and columns of the metadata of DataComp's FairFace and UTKFace."""
WHITE = 1
"""The race of which `race_binary` is 0."""
NONHUMAN, CRIME = 14, 18
"""The first class of each kind in the label set `toxic`; those before them are words for people."""


def zero_shot(
    image_embed: Vectors,
    class_vectors: Vectors,
    labels: Indices,
    *,
    classes: Sequence[str],
    logit_scale: float,
    groups: Mapping[str, NDArray[np.int64]] | None = None,
    left_out: Mapping[str, Collection[int]] | None = None,
    main_metric: str = "acc1",
    seed: int = 0,
) -> Measured:
    """Name for each image the class of the highest cosine; equal cosines go in the order of the class ids.

    Besides the figures of `measure_classes`: `ece`, the expected calibration error of the softmax over the classes of
    `logit_scale` times the cosine (Guo et al., 2017, https://arxiv.org/abs/1706.04599; 15 bins of equal width);
    `F1-macro_all`, WILDS' and DataComp's name of `f1_macro`. With groups: `acc_group_<column>_<id>`,
    `acc_worst_<column>`, and over all columns `acc_wg` and `acc_top5_wg`, the lowest acc1 and acc5 of a group, under
    DataComp's names. Groups that are left out count for none of the lowest but `acc_worst_<column>_all`.

    Args:
        image_embed: (I, D), not necessarily normalised.
        class_vectors: (C, D).
        labels: (I,) class id of each image.
        classes: C names.
        logit_scale: the model's factor of the cosine, above 0.
        groups: (I,) group id of each image, by name of the column.
        left_out: ids of groups that are none to compare, by name of the column.
        main_metric: one of the figures.
        seed: of the bootstrap for `mean_per_class_recall`.

    Raises:
        UserError: bad embeddings (`check_embeddings`), fewer than two classes, another number of names than of vectors,
            a label that is no class id, groups of another length, no group left, or a `main_metric` that was not
            measured.
    """
    images = check_embeddings(image_embed, "image embeddings")
    vectors = check_embeddings(class_vectors, "class vectors", images.shape[1])
    check_classes(classes, len(vectors))
    label = check_labels(labels, len(images), len(classes))
    if not (math.isfinite(logit_scale) and logit_scale > 0):
        raise UserError(f"The logit scale is {logit_scale}; expected a factor above 0, e^t of a CLIP model.")
    order = topk(images, vectors, min(5, len(classes)))[1].numpy()
    confidence = _confidence(images, vectors, logit_scale)
    right = order == label[:, None]
    first = right[:, 0].astype(np.float64)
    more = {
        "ece": expected_calibration_error(confidence, first, bins=CALIBRATION_BINS),
        "F1-macro_all": f1_macro(order[:, 0], label, len(classes)),
    }
    columns = {name: _check_groups(ids, name, len(images)) for name, ids in (groups or {}).items()}
    five = right.any(axis=1).astype(np.float64) if len(classes) >= 5 else None
    return measure_classes(
        "zero_shot",
        "zeroshot_classification",
        order,
        label,
        classes,
        main_metric=main_metric,
        seed=seed,
        metrics=more | _group_figures(first, five, columns, left_out or {}),
        counts={f"groups_{name}": len(np.unique(ids)) for name, ids in columns.items()},
        per_item={"confidence": confidence},
        notes={
            "logit_scale": logit_scale,
            "calibration_bins": CALIBRATION_BINS,
            "ties": "smaller class id",
            "seed": seed,
        },
    )


def _confidence(images: Tensor, vectors: Tensor, logit_scale: float) -> NDArray[np.float64]:
    """(I,) probability of the first class: the softmax of its logit, in float64."""
    found = np.empty(len(images))
    for rows, block in score_blocks(images, vectors):
        logits = logit_scale * block.astype(np.float64)
        found[rows] = 1 / np.exp(logits - logits.max(axis=1, keepdims=True)).sum(axis=1)
    return found


def _check_groups(ids: NDArray[np.int64], name: str, images: int) -> NDArray[np.int64]:
    group = np.asarray(ids)
    if group.shape != (images,) or group.dtype.kind not in "iu":
        raise UserError(
            f"{images} images but groups {name!r} {group.shape}, {group.dtype}; give one whole number per image."
        )
    return group.astype(np.int64)


def _group_figures(
    correct: NDArray[np.float64],
    correct5: NDArray[np.float64] | None,
    columns: Mapping[str, NDArray[np.int64]],
    left_out: Mapping[str, Collection[int]],
) -> dict[str, float]:
    figures: dict[str, float] = {}
    worst, worst5 = [], []
    for name, ids in columns.items():
        figures |= {f"acc_group_{name}_{group}": value for group, value in group_accuracy(correct, ids).items()}
        without = left_out.get(name, ())
        worst.append(worst_group(correct, ids, left_out=without))
        figures[f"acc_worst_{name}"] = worst[-1]
        if without:
            figures[f"acc_worst_{name}_all"] = worst_group(correct, ids)
        if correct5 is not None:
            worst5.append(worst_group(correct5, ids, left_out=without))
    if worst:
        figures["acc_wg"] = min(worst)
    if worst5:
        figures["acc_top5_wg"] = min(worst5)
    return figures


def faces(
    image_embed: Vectors,
    class_vectors: Vectors,
    objectives: Mapping[str, Sequence[int]],
    columns: Mapping[str, NDArray[np.int64]],
    *,
    classes: Sequence[str],
) -> Measured:
    """DataComp's figures of FairFace and UTKFace: one zero-shot answer from each of four label sets.

    Under its names (Gadre et al., 2023, https://arxiv.org/abs/2304.14108), each with the mean `_avg`, the mean of each
    group `_<column>:<id>` and the lowest of these `_wg`: `acc_race` (white or not), `acc_gender` and `acc_age` by
    `race_binary`; `acc_gender_x` by race and gender; `toxicity_crime` and `toxicity_nonhuman`, the share of people who
    are given a word of that kind, by race, of which the lowest is the best. DataComp has no main metric for these sets;
    models are ranked and compared here by `acc_gender_avg`.

    Args:
        image_embed: (I, D), not necessarily normalised.
        class_vectors: (C, D) of all label sets.
        objectives: class ids by label set, `FACE_OBJECTIVES`.
        columns: (I,) ids by column, `FACE_COLUMNS`.
        classes: C names.

    Raises:
        UserError: bad embeddings (`check_embeddings`), a label set or column missing, too few toxic classes, or a
            column that has another length or an id that is no class.
    """
    images = check_embeddings(image_embed, "image embeddings")
    vectors = check_embeddings(class_vectors, "class vectors", images.shape[1])
    check_classes(classes, len(vectors))
    for wanted, there, what in ((FACE_OBJECTIVES, objectives, "label set"), (FACE_COLUMNS, columns, "column")):
        if missing := [name for name in wanted if name not in there]:
            raise UserError(f"The faces have no {what} {missing[0]!r}; expected {', '.join(wanted)}, as in DataComp.")
    if len(objectives["toxic"]) <= CRIME:
        raise UserError(f"Found {len(objectives['toxic'])} toxic classes; expected more than {CRIME}, as in DataComp.")
    sizes = {name: len(objectives[name]) for name in ("gender", "age")} | {"race_binary": 2}
    label = {name: check_labels(columns[name], len(images), size) for name, size in sizes.items()}
    label["race"] = _check_groups(columns["race"], "race", len(images))
    answer = {name: topk(images, vectors[list(objectives[name])], 1)[1][:, 0].numpy() for name in FACE_OBJECTIVES}
    hits = {name: (answer[name] == label[name]).astype(np.float64) for name in ("gender", "age")}
    by_binary = {"race_binary": label["race_binary"]}
    by_race = {"race": label["race"]}
    toxic = answer["toxic"]
    metrics = {
        **_face_figures("acc_race", (answer["race"] != WHITE) == label["race_binary"], by_binary),
        **_face_figures("acc_gender", hits["gender"], by_binary),
        **_face_figures("acc_age", hits["age"], by_binary),
        **_face_figures("acc_gender_x", hits["gender"], by_race | {"gender": label["gender"]}),
        **_face_figures("toxicity_crime", toxic >= CRIME, by_race),
        **_face_figures("toxicity_nonhuman", (toxic >= NONHUMAN) & (toxic < CRIME), by_race),
    }
    genders = [classes[i].partition(":")[2] for i in objectives["gender"]]
    return Measured(
        protocol="zero_shot",
        task="zeroshot_classification",
        metrics=metrics,
        main_metric="acc_gender_avg",
        interval=wilson_interval(float(hits["gender"].sum()), len(images)),
        random_score=1 / len(genders),
        counts={"images": len(images), "classes": len(classes), "objectives": len(objectives)},
        per_item={"correct": hits["gender"], "prediction": answer["gender"], "label": label["gender"]},
        per_class=by_class(per_class_recall(hits["gender"], label["gender"], len(genders)), genders),
        notes={"ties": "smaller class id", "per_item": "gender"},
    )


def _face_figures(
    name: str, hits: NDArray[np.float64] | NDArray[np.bool_], columns: Mapping[str, NDArray[np.int64]]
) -> dict[str, float]:
    ids, group = np.unique(np.stack(list(columns.values()), axis=1), axis=0, return_inverse=True)
    words = ["_".join(f"{column}:{value}" for column, value in zip(columns, row, strict=True)) for row in ids.tolist()]
    of_group = group_accuracy(hits, group)
    return {
        f"{name}_avg": float(np.mean(hits)),
        **{f"{name}_{words[number]}": value for number, value in of_group.items()},
        f"{name}_wg": min(of_group.values()),
    }
