"""What the protocols that name one class per image have in common: their figures from the ranked classes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from vlkd.errors import UserError
from vlkd.metrics import f1_macro, per_class_recall, stratified_interval, wilson_interval
from vlkd.protocols.measured import Measured


def check_classes(classes: Sequence[str], count: int) -> None:
    """Raises `UserError` if there are fewer than two classes, or another number than the `count` class vectors."""
    if len(classes) != count:
        raise UserError(
            f"{len(classes)} class names but {count} class vectors; make the vectors from the same list of names."
        )
    if count < 2:
        raise UserError(f"Found {count} class; a classification needs two or more: check the list of class names.")


def check_main_metric(main_metric: str, metrics: Mapping[str, float]) -> None:
    """Raises `UserError` if the main metric is none of the figures."""
    if main_metric not in metrics:
        raise UserError(f"No figure {main_metric!r} was measured; the main metric is one of {', '.join(metrics)}.")


def by_class(values: NDArray[np.float64], classes: Sequence[str]) -> dict[str, float]:
    """The finite values under the names of their classes; a name that stands twice gets its class id appended."""
    often = Counter(classes)
    names = [name if often[name] == 1 else f"{name} [{i}]" for i, name in enumerate(classes)]
    return {name: float(value) for name, value in zip(names, values, strict=True) if np.isfinite(value)}


def measure_classes(
    protocol: str,
    task: str,
    order: NDArray[np.int64],
    label: NDArray[np.int64],
    classes: Sequence[str],
    *,
    main_metric: str,
    seed: int = 0,
    metrics: Mapping[str, float] | None = None,
    counts: Mapping[str, int] | None = None,
    per_item: Mapping[str, NDArray[np.float64]] | None = None,
    notes: Mapping[str, str | int | float] | None = None,
) -> Measured:
    """The figures of a classification from the ranked classes of each image.

    `acc1` is the share of images of which the first class is right, `acc5` of which one of the first five is (left out
    below five classes, as CLIP_benchmark does; 1 by definition at five), `mean_per_class_recall` the mean of `acc1`
    within each class over the classes that have an image, `f1_macro` the mean of the F1 of the same classes.

    Args:
        protocol: name for the result.
        task: CLIP_benchmark's name for the result.
        order: (I, K) class ids, best first; -1 stands for no class. K is 5 or more if there are five classes.
        label: (I,) checked class ids.
        classes: C names.
        main_metric: one of the figures. `acc1` and `acc5` get Wilson's interval, `mean_per_class_recall` one by a
            bootstrap within the classes, others none.
        seed: of the bootstrap.
        metrics: more figures.
        counts: more counts.
        per_item: more values per image.
        notes: settings of the protocol.

    Raises:
        UserError: `main_metric` is none of the figures.
    """
    right = order == label[:, None]
    correct, five = right[:, 0].astype(np.float64), len(classes) >= 5
    correct5 = right[:, :5].any(axis=1).astype(np.float64)
    recall = per_class_recall(correct, label, len(classes))
    figures = {"acc1": float(correct.mean())}
    if five:
        figures["acc5"] = float(correct5.mean())
    figures["mean_per_class_recall"] = float(np.nanmean(recall))
    figures["f1_macro"] = f1_macro(order[:, 0], label, len(classes))
    figures |= metrics or {}
    check_main_metric(main_metric, figures)
    interval = None
    if main_metric in ("acc1", "acc5"):
        interval = wilson_interval(float((correct if main_metric == "acc1" else correct5).sum()), len(label))
    elif main_metric == "mean_per_class_recall":
        interval = stratified_interval(correct, label, seed=seed)
    chance = {"acc1": 1, "mean_per_class_recall": 1, "acc5": 5}
    return Measured(
        protocol=protocol,
        task=task,
        metrics=figures,
        main_metric=main_metric,
        interval=interval,
        random_score=chance[main_metric] / len(classes) if main_metric in chance else None,
        counts={
            "images": len(label),
            "classes": len(classes),
            "classes_without_images": int(np.isnan(recall).sum()),
            **(counts or {}),
        },
        per_item={
            "correct": correct,
            "prediction": order[:, 0],
            "label": label,
            **({"correct5": correct5} if five else {}),
            **(per_item or {}),
        },
        per_class=by_class(recall, classes),
        notes=notes or {},
    )
