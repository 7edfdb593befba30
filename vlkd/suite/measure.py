"""Each protocol on a subject: what it asks for, handed to the pure function in `vlkd/protocols`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray

from vlkd.data.eval_set import Choice, Kind
from vlkd.errors import UserError
from vlkd.protocols.classifier import classifier as measure_classifier
from vlkd.protocols.knn import knn as measure_knn
from vlkd.protocols.linear_probe import linear_probe as measure_linear_probe
from vlkd.protocols.measured import Measured
from vlkd.protocols.multilabel import multilabel as measure_multilabel
from vlkd.protocols.retrieval import retrieval as measure_retrieval
from vlkd.protocols.selection import ChoiceRows
from vlkd.protocols.selection import associations as measure_associations
from vlkd.protocols.selection import selection as measure_selection
from vlkd.protocols.zero_shot import FACE_COLUMNS
from vlkd.protocols.zero_shot import faces as measure_faces
from vlkd.protocols.zero_shot import zero_shot as measure_zero_shot
from vlkd.suite.subject import Subject


@dataclass(frozen=True, kw_only=True)
class Grouping:
    """What DataComp makes of the metadata of one data set (https://github.com/mlfoundations/datacomp, `eval_utils`).

    Attributes:
        columns: their names in the order of the vector beside each label.
        by: those of which the groups are compared.
        left_out: ids of groups that are not, by column.
    """

    columns: tuple[str, ...]
    by: tuple[str, ...] = ()
    left_out: Mapping[str, tuple[int, ...]] = field(default_factory=dict)


GROUPINGS: Mapping[str, Grouping] = {
    "wilds/iwildcam": Grouping(
        columns=("location", "sequence", "year", "month", "day", "hour", "minute", "second", "y")
    ),
    "wilds/camelyon17": Grouping(columns=("hospital", "slide", "y"), by=("slide",)),
    # The regions are Asia, Europe, Africa, the Americas, Oceania and Other.
    "wilds/fmow": Grouping(columns=("region", "year", "y"), by=("region", "year"), left_out={"region": (5,)}),
    "fairness/dollar_street": Grouping(columns=("income_ds", "income_meta", "region"), by=("income_ds",)),
    "fairness/geode": Grouping(columns=("region", "country"), by=("region",)),
}
"""By the name of the declaration; another data set is grouped by all its columns."""


def zero_shot(subject: Subject) -> Measured:
    """Classification by prompts."""
    test, entry = subject.data.test, subject.data.entry
    if test.objectives:
        return measure_faces(
            subject.images.embed,
            subject.class_vectors,
            test.objectives,
            _columns(subject, FACE_COLUMNS, FACE_COLUMNS),
            classes=test.classes,
        )
    names = tuple(test.groups)
    grouping = GROUPINGS.get(entry.name, Grouping(columns=names, by=names))
    return measure_zero_shot(
        subject.images.embed,
        subject.class_vectors,
        subject.labels,
        classes=test.classes,
        logit_scale=subject.logit_scale,
        groups=_columns(subject, grouping.columns, grouping.by),
        left_out=grouping.left_out,
        main_metric=entry.main_metric or "acc1",
        seed=subject.encoding.seed,
    )


def _columns(subject: Subject, names: tuple[str, ...], wanted: tuple[str, ...]) -> dict[str, NDArray[np.int64]]:
    """The wanted metadata columns by their place in the vector; {} without metadata, where no group counts."""
    groups, entry = subject.data.test.groups, subject.data.entry
    own = dict(zip(names, groups, strict=False))
    missing = [name for name in wanted if name not in own]
    if missing and (groups or entry.main_metric.startswith("acc_")):
        raise UserError(
            f"{entry.name}: the metadata beside the labels (KEY.npy) have {len(groups)} columns, no {missing[0]!r}; "
            f"expected {', '.join(names)}: fetch DataComp's copy of the data."
        )
    return {name: subject.group_of(own[name]) for name in wanted if name in own}


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
            gold=choice.gold,
        )
        for choice in kept
    ]
    declared, embed = subject.data.entry.main_metric, subject.texts(list(texts))
    if kept[0].gold:
        return measure_associations(
            subject.images.embed,
            embed,
            rows,
            main_metric=declared or "avg_jaccard_score",
            seed=subject.encoding.seed,
        )
    return measure_selection(subject.images.embed, embed, rows, main_metric=declared or "acc")


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


def classifier(subject: Subject) -> Measured:
    """A classifier's own probabilities, and the accuracy of each of its heads where there are two."""
    model, classes = subject.classifier, subject.data.test.classes
    if model is None:
        raise UserError(f"{subject.ref} has no classes of its own; measure it by `vlkd eval zero_shot`.")
    columns = _own_columns(model.classes, classes, subject)
    labels = subject.labels
    tables = {name: table[:, columns].numpy() for name, table in model.probabilities(subject.images.embed).items()}
    declared = subject.data.entry.main_metric
    measured = measure_classifier(
        tables.pop("mix"),
        labels,
        classes=classes,
        main_metric=declared if declared in CLASSIFIER_METRICS else CLASSIFIER_METRICS[0],
        seed=subject.encoding.seed,
        notes={"alpha": model.classifier.alpha, "beta": model.classifier.beta},
    )
    heads = {f"acc1_{name}_head": float((own.argmax(axis=1) == labels).mean()) for name, own in tables.items()}
    return replace(measured, metrics={**measured.metrics, **heads})


def _own_columns(own: Sequence[str], classes: Sequence[str], subject: Subject) -> list[int]:
    """For each class of the data the classifier's column, by its name."""
    if tuple(own) == tuple(classes):
        return list(range(len(own)))
    column = {name: i for i, name in enumerate(own)}
    strange = [name for name in classes if name not in column]
    without = sorted(set(own) - set(classes))
    if not strange and not without and len(column) == len(own) == len(classes):
        return [column[name] for name in classes]
    only = [
        f"only in the {where}: {', '.join(map(repr, names[:3]))}"
        for where, names in (("data", strange), ("model", without))
        if names
    ]
    raise UserError(
        f"{subject.ref} names {len(own)} classes and {subject.data.entry.name} has {len(classes)} "
        f"({'; '.join(only) or 'some of one name'}); expected the same names: take data of the model's own classes."
    )


def protocols_of(subject: Subject) -> list[str]:
    """Of what is declared for the data all that the model can do; a classifier needs no prompts to name classes."""
    declared = subject.data.entry.protocols_for(subject.data.test.kind)
    if subject.classifier is not None:
        own = ["classifier" if protocol == "zero_shot" else protocol for protocol in declared]
        return [protocol for protocol in dict.fromkeys(own) if protocol in ("classifier", *IMAGE_ONLY)]
    able = declared if subject.reads_texts else ("classifier", *IMAGE_ONLY)
    return [protocol for protocol in declared if protocol in able]


def measure(subject: Subject, protocol: str) -> Measured:
    """Run a protocol, on the kind of data that it needs.

    Raises:
        UserError: the data are of another kind, and whatever the protocol raises.
    """
    kind, wanted = subject.data.test.kind, KIND_OF[protocol]
    if kind != wanted:
        raise UserError(
            f"{subject.data.entry.name} is a set for {kind}, but {protocol} needs one for {wanted}; name other data or "
            "another protocol."
        )
    return MEASURES[protocol](subject)


MEASURES: Mapping[str, Callable[[Subject], Measured]] = {
    "zero_shot": zero_shot,
    "classifier": classifier,
    "multilabel": multilabel,
    "retrieval": retrieval,
    "selection": selection,
    "linear_probe": linear_probe,
    "knn": knn,
}
KIND_OF: Mapping[str, Kind] = {
    "zero_shot": "classification",
    "classifier": "classification",
    "multilabel": "multilabel",
    "retrieval": "retrieval",
    "selection": "selection",
    "linear_probe": "classification",
    "knn": "classification",
}
TASKS: Mapping[str, str] = {
    "zero_shot": "zeroshot_classification",
    "classifier": "classification",
    "multilabel": "zeroshot_classification",
    "retrieval": "zeroshot_retrieval",
    "selection": "image_caption_selection",
    "linear_probe": "linear_probe",
    "knn": "knn",
}
"""CLIP_benchmark's names, for the rows of protocols that failed."""
CLASSIFIER_METRICS = ("acc1", "acc5", "mean_per_class_recall")
PROBE_METRICS = ("acc1", "mean_per_class_recall")
IMAGE_ONLY = ("linear_probe", "knn")
"""What a tower without texts can do."""
