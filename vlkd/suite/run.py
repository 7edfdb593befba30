"""Running a suite: models times data sets, one image pass each, every result on disk before the next begins."""

from __future__ import annotations

import contextlib
import gc
import sys
import time
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from filelock import FileLock, Timeout

from vlkd.data.eval_set import EvalSet
from vlkd.errors import UserError
from vlkd.models.classifier_images import load_for_images
from vlkd.models.fingerprint import model_fingerprint
from vlkd.protocols.agreement import Scores, agreement
from vlkd.protocols.measured import Measured
from vlkd.retrieval.progress import Progress
from vlkd.suite.declaration import DataEntry, Suite
from vlkd.suite.job import LISTED, Job, about_data, about_entry, about_model, about_weights, check_job
from vlkd.suite.measure import IMAGE_ONLY, TASKS, kept_choices, measure, protocols_of
from vlkd.suite.presence import Present, presence
from vlkd.suite.results import (
    UNOPENED,
    Row,
    append_row,
    error_columns,
    identity,
    measured_columns,
    read_results,
    write_items,
)
from vlkd.suite.store import Store
from vlkd.suite.subject import Data, Subject, open_data
from vlkd.suite.table import AGREEMENT

EMBEDDINGS = "embeddings"
MEMORY = "data"
LOCK = ".suite.lock"
AGREEMENT_KINDS = ("classification", "retrieval")

Opened = Data | tuple[DataEntry, str]
"""A data set, or its declaration and what is wrong with it."""


@dataclass(frozen=True, kw_only=True)
class Summary:
    """How many results were made, were there before, and failed; and all these rows."""

    made: int
    kept: int
    failed: int
    rows: tuple[Row, ...]


def run_suite(job: Job, *, progress: bool = True) -> Summary:
    """Run every model on every data set that is there; a data set or a model that fails becomes error rows.

    Args:
        job: what to do. Results that are in `job.out` already, of the same weights, data and settings, are kept.
        progress: show how far everything is, with rate and time left.

    Raises:
        UserError: the job cannot begin (`check_job`), or results cannot be written.
    """
    check_job(job)
    job.out.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(job.out / LOCK, timeout=0):
            return _run(job, progress)
    except Timeout:
        raise UserError(f"Another run writes into {job.out}; wait for it, or give another --out.") from None


def _run(job: Job, progress: bool) -> Summary:
    opened: list[Opened] = []
    found = presence(job.suite, job.root)
    with Progress(len(found), unit="data set", description="opening", show=progress) as bar:
        for present in found:
            opened.append(_open(present, job))
            bar.advance()
    total = sum(_work(data) for data in opened) * len(job.models)
    with Progress(total, unit="image", show=progress) as bar:
        runner = _Runner(job, bar)
        for ref in job.models:
            runner.run_model(ref, opened)
    return Summary(made=runner.made, kept=runner.kept, failed=runner.failed, rows=tuple(runner.rows))


def _open(present: Present, job: Job) -> Opened:
    entry = present.entry
    if present.path is None:
        return entry, present.problem
    try:
        return open_data(entry, present.path, job.root, job.store / MEMORY)
    except Exception as error:  # One odd data set must not end the others.
        return entry, _sentence(error)


def _sentence(error: Exception) -> str:
    """What an error row says; of an error that is not the user's the whole trace goes to stderr."""
    if isinstance(error, UserError):
        return str(error)
    traceback.print_exception(error, file=sys.stderr)
    return f"{type(error).__name__}: {error}"


def _work(data: Opened) -> int:
    """Images and texts to pass for one model, training images included."""
    if not isinstance(data, Data):
        return 0
    return len(data.test) + _texts(data.test) + (len(data.train) if data.train is not None else 0)


def _texts(test: EvalSet) -> int:
    captions = {caption for own in test.captions for caption in own}
    captions |= {caption for choice in test.choices for caption in choice.captions}
    return len(test.classes) + len(captions)


def restrict(suite: Suite, names: Sequence[str]) -> Suite:
    """Only the data sets of these names, without aggregates; the whole suite for none.

    Raises:
        UserError: a name is not in the suite.
    """
    if not names:
        return suite
    known = [entry.name for entry in suite.entries]
    strange = sorted(set(names) - set(known))
    if strange:
        raise UserError(f"The suite {suite.name} has no data set {strange[0]!r}; it has {', '.join(known)}.")
    return replace(suite, entries=tuple(entry for entry in suite.entries if entry.name in names), aggregates=())


class _Runner:
    """The state of a running suite: what is on disk, what was counted, and the one bar."""

    def __init__(self, job: Job, bar: Progress) -> None:
        self.job, self.bar = job, bar
        self.made = self.kept = self.failed = 0
        self.rows: list[Row] = []
        known = read_results(job.out) if (job.out / "results.jsonl").is_file() else []
        self._known = {identity(row): row for row in known}
        self._teachers: dict[str, tuple[Store, float, str]] = {}

    def run_model(self, ref: str, opened: Sequence[Opened]) -> None:
        """All data sets of one model; one that cannot be loaded has an error row for each of them."""
        self.bar.describe(f"{Path(ref).name}: loading")
        about = about_model(ref, self.job)
        try:
            model: Any = load_for_images(ref, device=self.job.device)
            fingerprint = model_fingerprint(model)
            about |= about_weights(model, fingerprint)
            scale = _logit_scale(model)
        except Exception as error:  # One odd model must not end the others.
            sentence = f"The model was not loaded: {_sentence(error)}"
            for data in opened:
                self._fail(about | about_entry(_entry(data), self.job), UNOPENED, sentence)
                self.bar.skip(_work(data))
            return
        store = Store(self.job.store, fingerprint, self.job.encoding.precision)
        if ref == self.job.teacher:
            self._teachers[ref] = (store, scale, fingerprint)
        for data in opened:
            begin = self.bar.done
            self.bar.describe(f"{Path(ref).name}: {_entry(data).name}")
            if isinstance(data, Data):
                subject = Subject(model, ref, fingerprint, data, store, self.job.encoding, scale, self.bar.advance)
                self._run_data(subject, about)
            else:
                self._fail(about | about_entry(data[0], self.job), UNOPENED, data[1])
            # What came from the store was not passed.
            self.bar.skip(_work(data) - (self.bar.done - begin))
        del model
        gc.collect()

    def _run_data(self, subject: Subject, about: Row) -> None:
        data = subject.data
        row = about | about_data(data, self.job)
        for protocol in protocols_of(subject):
            self._one(subject, row, protocol)
        if not self.job.teacher or not subject.reads_texts or data.test.kind not in AGREEMENT_KINDS:
            return
        if subject.ref == self.job.teacher:
            with contextlib.suppress(UserError):
                _scores(subject)  # Its results may be kept, but its embeddings gone.
            return
        if self.job.teacher not in self._teachers:
            self._fail(row, AGREEMENT, f"The teacher {self.job.teacher} was not loaded; see its rows.")
            return
        teacher = {"teacher": self.job.teacher, "teacher_fingerprint": self._teachers[self.job.teacher][2]}
        self._one(subject, row | {"settings": row["settings"] | teacher}, AGREEMENT)

    def _one(self, subject: Subject, row: Row, protocol: str) -> None:
        started = time.perf_counter()
        try:
            known = self._known.get((subject.ref, subject.data.entry.name, protocol))
            if known is not None and _same(known, row) and not _readable_now(known, subject, protocol):
                self._keep(known)
                return
            measured = self._agreement(subject) if protocol == AGREEMENT else measure(subject, protocol)
            unreadable = _unreadable(subject, protocol)
        except Exception as error:
            self._fail(row, protocol, _sentence(error))
            return
        row = row | measured_columns(measured)
        if row["random_score"] is None and measured.main_metric == subject.data.entry.main_metric:
            row["random_score"] = subject.data.entry.random_score
        row |= unreadable | {"seconds": round(time.perf_counter() - started, 3)}
        row["items"] = write_items(self.job.out, row, measured.per_item, _item_keys(subject))
        self._write(row)
        self.made += 1
        if row["unreadable"]:
            first = row["unreadable_keys"][0]
            self.bar.write(f"{subject.data.entry.name}: {row['unreadable']} unreadable, first {first}")
        self.bar.note(f"{protocol} {measured.main_metric} {measured.score:.3f}")

    def _agreement(self, subject: Subject) -> Measured:
        store, scale, fingerprint = self._teachers[self.job.teacher]
        data, encoding = subject.data, self.job.encoding
        teacher = Subject(None, self.job.teacher, fingerprint, data, store, encoding, scale, lambda _: None)
        name = "zero_shot" if data.test.kind == "classification" else "retrieval"
        rows = [self._known.get((ref, data.entry.name, name)) for ref in (self.job.teacher, subject.ref)]
        prints = (fingerprint, subject.fingerprint)
        if not all(row is not None and _of(row, data, one) for row, one in zip(rows, prints, strict=True)):
            raise UserError(f"Teacher or student has no result for {data.entry.name}; see their rows.")
        if not np.array_equal(teacher.images.index, subject.images.index):
            raise UserError(
                f"Teacher and student could read different pictures of {data.entry.name}; run the suite again."
            )
        scores = [float(row["score"]) for row in rows if row is not None]
        return agreement(_scores(teacher), _scores(subject), teacher_score=scores[0], student_score=scores[1])

    def _keep(self, known: Row) -> None:
        self.kept += 1
        model, dataset, _ = identity(known)
        if (model, dataset, UNOPENED) in self._known:
            self._write(known)  # Only a later line ends that the data or the model could not be opened.
        else:
            self.rows.append(known)

    def _write(self, row: Row) -> None:
        append_row(self.job.out, row)
        model, dataset, protocol = identity(row)
        if protocol != UNOPENED:
            self._known.pop((model, dataset, UNOPENED), None)
        self._known[model, dataset, protocol] = row
        self.rows.append(row)

    def _fail(self, row: Row, protocol: str, sentence: str) -> None:
        self.failed += 1
        row = row | error_columns(protocol, TASKS.get(protocol, protocol), sentence)
        self._write(row)
        self.bar.write(f"{row['model_ref']}, {row['dataset']}, {protocol}: {sentence}")


def _entry(data: Opened) -> DataEntry:
    return data.entry if isinstance(data, Data) else data[0]


def _unreadable(subject: Subject, protocol: str) -> Row:
    """Of how many pictures the row's figures know nothing, and the first of those that are tested."""
    bad = subject.images.bad
    learned = subject.train_images.bad if protocol in IMAGE_ONLY else ()
    keys = [key for key, _ in bad[:LISTED]]
    return {"unreadable": len(bad), "unreadable_keys": keys, "unreadable_train": len(learned)}


def _readable_now(known: Row, subject: Subject, protocol: str) -> bool:
    """Whether pictures that a stored result had to leave out can be read by now; it stands if they cannot."""
    if not known.get("unreadable") and not known.get("unreadable_train"):
        return False
    return any(known.get(name) != value for name, value in _unreadable(subject, protocol).items())


def _scores(subject: Subject) -> Scores:
    """What two models are compared by: their images against class vectors, or against all captions."""
    test = subject.data.test
    if test.kind == "classification":
        against = subject.class_vectors
    else:
        captions = [test.captions[row] for row in subject.images.index.tolist()]
        against = subject.texts([caption for own in captions for caption in own])
    return Scores(image_embed=subject.images.embed, candidates=against, logit_scale=subject.logit_scale)


def _item_keys(subject: Subject) -> list[str]:
    """A name for each item: the image's key, or what is asked in a choice."""
    test = subject.data.test
    if test.kind != "selection":
        return [test.keys[row] for row in subject.images.index.tolist()]
    return [f"{test.keys[choice.images[0]]}: {choice.captions[0]}" for choice in kept_choices(subject)]


def _of(row: Mapping[str, Any], data: Data, fingerprint: str) -> bool:
    return row["status"] == "ok" and (row["data_hash"], row["fingerprint"]) == (data.hash, fingerprint)


def _same(known: Mapping[str, Any], row: Mapping[str, Any]) -> bool:
    names = ("fingerprint", "data_hash", "precision", "settings")
    return known["status"] == "ok" and all(known.get(name) == row[name] for name in names)


def _logit_scale(model: Any) -> float:
    """The model's own, or CLIP's usual 100 where it has none."""
    if "logit_scale" not in getattr(model, "provides", ()):
        return 100.0
    with torch.no_grad():
        return float(model.encode({}, ("logit_scale",))["logit_scale"])
