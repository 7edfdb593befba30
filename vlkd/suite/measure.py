"""Each protocol on a subject: what it asks for, handed to the pure function in `vlkd/protocols`."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np

from vlkd.data.eval_set import Choice
from vlkd.errors import UserError
from vlkd.protocols.knn import knn as measure_knn
from vlkd.protocols.linear_probe import linear_probe as measure_linear_probe
from vlkd.protocols.measured import Measured
from vlkd.protocols.multilabel import multilabel as measure_multilabel
from vlkd.protocols.retrieval import retrieval as measure_retrieval
from vlkd.protocols.selection import ChoiceRows
from vlkd.protocols.selection import selection as measure_selection
from vlkd.protocols.zero_shot import zero_shot as measure_zero_shot
from vlkd.suite.subject import Subject


def zero_shot(subject: Subject) -> Measured:
    """Classification by prompts."""
    test = subject.data.test
    return measure_zero_shot(
        subject.images.embed,
        subject.class_vectors,
        subject.labels,
        classes=test.classes,
        logit_scale=subject.logit_scale,
        groups={name: subject.group_of(name) for name in test.groups},
        main_metric=subject.data.entry.main_metric or "acc1",
        seed=subject.encoding.seed,
    )


def multilabel(subject: Subject) -> Measured:
    """Several classes per image, by prompts."""
    measured = measure_multilabel(
        subject.images.embed,
        subject.class_vectors,
        subject.labels,
        classes=subject.data.test.classes,
        seed=subject.encoding.seed,
    )
    declared = subject.data.entry.main_metric
    if declared not in ("", measured.main_metric):
        raise UserError(
            f"The main metric {declared!r} is not measured here; the suite may declare {measured.main_metric}."
        )
    return measured


def retrieval(subject: Subject) -> Measured:
    """Images and all their captions, both ways."""
    captions = [subject.data.test.captions[row] for row in subject.images.index.tolist()]
    texts = [caption for own in captions for caption in own]
    owner = np.repeat(np.arange(len(captions)), [len(own) for own in captions])
    return measure_retrieval(
        subject.images.embed,
        subject.texts(texts),
        owner,
        captions=texts,
        folds=subject.data.entry.folds,
        main_metric=subject.data.entry.main_metric or "mean_recall@1",
        seed=subject.encoding.seed,
    )


def selection(subject: Subject) -> Measured:
    """Which caption belongs to which image; items with an unreadable image are left out."""
    position = {row: place for place, row in enumerate(subject.images.index.tolist())}
    kept = kept_choices(subject)
    texts: dict[str, int] = {}
    for choice in kept:
        for caption in choice.captions:
            texts.setdefault(caption, len(texts))
    rows = [
        ChoiceRows(
            images=tuple(position[row] for row in choice.images),
            texts=tuple(texts[caption] for caption in choice.captions),
            group=choice.group,
        )
        for choice in kept
    ]
    main_metric = subject.data.entry.main_metric or "acc"
    return measure_selection(subject.images.embed, subject.texts(list(texts)), rows, main_metric=main_metric)


def kept_choices(subject: Subject) -> list[Choice]:
    """The items whose images can all be read; raises `UserError` for none."""
    there = set(subject.images.index.tolist())
    kept = [choice for choice in subject.data.test.choices if there.issuperset(choice.images)]
    if not kept:
        raise UserError(f"No item of {subject.data.entry.name} has all its images; check the pictures.")
    return kept


def linear_probe(subject: Subject) -> Measured:
    """Logistic regression on frozen features."""
    return measure_linear_probe(
        subject.train_images.embed,
        subject.train_labels,
        subject.images.embed,
        subject.labels,
        classes=subject.data.test.classes,
        seed=subject.encoding.seed,
        main_metric=_probe_metric(subject),
    )


def _probe_metric(subject: Subject) -> str:
    """The declared one where probes have it; those of prompts and groups fall back to the accuracy."""
    declared = subject.data.entry.main_metric
    return declared if declared in PROBE_METRICS else PROBE_METRICS[0]


def knn(subject: Subject) -> Measured:
    """The vote of the nearest training images."""
    return measure_knn(
        subject.train_images.embed,
        subject.train_labels,
        subject.images.embed,
        subject.labels,
        classes=subject.data.test.classes,
        main_metric=_probe_metric(subject),
    )


MEASURES: Mapping[str, Callable[[Subject], Measured]] = {
    "zero_shot": zero_shot,
    "multilabel": multilabel,
    "retrieval": retrieval,
    "selection": selection,
    "linear_probe": linear_probe,
    "knn": knn,
}
TASKS: Mapping[str, str] = {
    "zero_shot": "zeroshot_classification",
    "multilabel": "zeroshot_classification",
    "retrieval": "zeroshot_retrieval",
    "selection": "image_caption_selection",
    "linear_probe": "linear_probe",
    "knn": "knn",
}
"""CLIP_benchmark's names, for the rows of protocols that failed."""
PROBE_METRICS = ("acc1", "mean_per_class_recall")
IMAGE_ONLY = ("linear_probe", "knn")
"""What a tower without texts can do."""
