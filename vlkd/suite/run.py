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

import torch
from filelock import FileLock, Timeout
from tqdm import tqdm

from vlkd.data.eval_set import EvalSet
from vlkd.errors import UserError
from vlkd.models.fingerprint import model_fingerprint
from vlkd.models.load import load_image_encoder
from vlkd.protocols.agreement import Scores, agreement
from vlkd.protocols.measured import Measured
from vlkd.suite.declaration import DataEntry, Suite
from vlkd.suite.measure import IMAGE_ONLY, MEASURES, TASKS, kept_choices
from vlkd.suite.presence import Present, presence
from vlkd.suite.results import (
    Row,
    append_row,
    error_columns,
    measured_columns,
    model_columns,
    read_results,
    versions,
    write_items,
)
from vlkd.suite.store import Store
from vlkd.suite.subject import Data, Encoding, Subject, open_data

EMBEDDINGS = "embeddings"
MEMORY = "data"
LOCK = ".suite.lock"
LISTED = 16
AGREEMENT_KINDS = ("classification", "retrieval")


@dataclass(frozen=True, kw_only=True)
class Job:
    """What a suite is asked to do.

    Attributes:
        suite: what is declared.
        root: where its data lie.
        refs: the models; the teacher is among them or is put in front.
        out: the folder of the results.
        store: the folder of the embeddings.
        encoding: how to encode.
        device: where the models run.
        teacher: reference of the model that the others are compared with, "" for none.
    """

    suite: Suite
    root: Path
    refs: tuple[str, ...]
    out: Path
    store: Path
    encoding: Encoding
    device: str = "cpu"
    teacher: str = ""

    @property
    def models(self) -> tuple[str, ...]:
        """The references, the teacher first, each once."""
        return tuple(dict.fromkeys([*([self.teacher] if self.teacher else []), *self.refs]))


@dataclass(frozen=True, kw_only=True)
class Summary:
    """How many results were made, were there before, and failed."""

    made: int
    kept: int
    failed: int


def run_suite(job: Job, *, progress: bool = True) -> Summary:
    """Run every model on every data set that is there; a data set that fails becomes an error row.

    Args:
        job: what to do. Results that are in `job.out` already, of the same weights, data and settings, are kept.
        progress: show one bar for everything, with rate and time left.

    Raises:
        UserError: a model cannot be loaded, or results cannot be written.
    """
    if not job.root.is_dir():
        raise UserError(
            f"There is no folder {job.root}; give the root of the data sets, as `vlkd prep tier0` makes one."
        )
    job.out.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(job.out / LOCK, timeout=0):
            return _run(job, progress)
    except Timeout:
        raise UserError(f"Another run writes into {job.out}; wait for it, or give another --out.") from None


def _run(job: Job, progress: bool) -> Summary:
    found = presence(job.suite, job.root)
    opened = [_open(present, job) for present in tqdm(found, desc="opening", unit="data set", disable=not progress)]
    with tqdm(total=_work(opened) * len(job.models), unit="image", disable=not progress, smoothing=0.05) as bar:
        runner = _Runner(job, bar)
        for ref in job.models:
            runner.run_model(ref, opened)
    return Summary(made=runner.made, kept=runner.kept, failed=runner.failed)


def _open(present: Present, job: Job) -> Data | tuple[DataEntry, str]:
    """The data set, or its declaration and what is wrong with it."""
    entry = present.entry
    if present.path is None:
        return entry, present.problem
    try:
        return open_data(entry, present.path, job.root, job.store / MEMORY)
    except UserError as error:
        return entry, str(error)
    except Exception as error:  # One odd data set must not end the others.
        traceback.print_exc(file=sys.stderr)
        return entry, f"{type(error).__name__}: {error}"


def _work(opened: Sequence[Data | tuple[DataEntry, str]]) -> int:
    """Images to pass for one model, training images and texts included."""
    return sum(_work_of(data) for data in opened if isinstance(data, Data))


def _work_of(data: Data) -> int:
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

    def __init__(self, job: Job, bar: Any) -> None:
        self.job, self.bar = job, bar
        self.made = self.kept = self.failed = 0
        self._passed = 0
        known = read_results(job.out) if (job.out / "results.jsonl").is_file() else []
        self._known = {(str(row["model_ref"]), str(row["dataset"]), str(row["protocol"])): row for row in known}
        self._teachers: dict[str, tuple[Store, float, str]] = {}

    def run_model(self, ref: str, opened: Sequence[Data | tuple[DataEntry, str]]) -> None:
        """All data sets of one model."""
        self.bar.set_description(f"{Path(ref).name}: loading")
        model = load_image_encoder(ref, device=self.job.device)
        fingerprint = model_fingerprint(model)
        store = Store(self.job.store, fingerprint, self.job.encoding.precision)
        about = _about_model(ref, model, fingerprint, self.job)
        scale = _logit_scale(model)
        if ref == self.job.teacher:
            self._teachers[ref] = (store, scale, fingerprint)
        for data in opened:
            begin = self.bar.n
            entry = data.entry if isinstance(data, Data) else data[0]
            self.bar.set_description(f"{Path(ref).name}: {entry.name}")
            if isinstance(data, Data):
                subject = Subject(model, ref, fingerprint, data, store, self.job.encoding, scale, self.bar.update)
                self._run_data(subject, about)
                # What came from the store was not passed; the bar takes it as done, the rate does not suffer much.
                self.bar.update(_work_of(data) - (self.bar.n - begin))
            else:
                self._fail(about | _about_entry(entry, self.job), entry, "data", data[1])
        del model
        gc.collect()

    def _run_data(self, subject: Subject, about: Row) -> None:
        data = subject.data
        row = about | _about_data(data, self.job)
        for protocol in data.entry.protocols_for(data.test.kind):
            if subject.reads_texts or protocol in IMAGE_ONLY:
                self._one(subject, row, protocol)
        if not self.job.teacher or not subject.reads_texts or data.test.kind not in AGREEMENT_KINDS:
            return
        if subject.ref == self.job.teacher:
            with contextlib.suppress(UserError):
                _scores(subject)  # Its results may be kept, but its embeddings gone.
            return
        teacher = {"teacher": self.job.teacher, "teacher_fingerprint": self._teachers[self.job.teacher][2]}
        self._one(subject, row | {"settings": row["settings"] | teacher}, "agreement")

    def _one(self, subject: Subject, row: Row, protocol: str) -> None:
        known = self._known.get((subject.ref, subject.data.entry.name, protocol))
        if known is not None and _same(known, row):
            self.kept += 1
            return
        started = time.perf_counter()
        try:
            measured = self._agreement(subject) if protocol == "agreement" else MEASURES[protocol](subject)
        except Exception as error:
            if not isinstance(error, UserError):
                traceback.print_exc(file=sys.stderr)
            sentence = str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
            self._fail(row, subject.data.entry, protocol, sentence)
            return
        bad = subject.images.bad
        row = row | measured_columns(measured)
        if row["random_score"] is None and measured.main_metric == subject.data.entry.main_metric:
            row["random_score"] = subject.data.entry.random_score
        row |= {
            "unreadable": len(bad),
            "unreadable_keys": [key for key, _ in bad[:LISTED]],
            "seconds": round(time.perf_counter() - started, 3),
        }  # fmt: skip
        keys = _item_keys(subject)
        row["items"] = write_items(self.job.out, row, measured.per_item, keys)
        append_row(self.job.out, row)
        self._known[subject.ref, subject.data.entry.name, protocol] = row
        self.made += 1
        if bad:
            self.bar.write(f"{subject.data.entry.name}: {len(bad)} unreadable, first {bad[0][0]}", file=sys.stderr)
        self.bar.set_postfix_str(f"{protocol} {measured.main_metric} {measured.score:.3f}")

    def _agreement(self, subject: Subject) -> Measured:
        store, scale, fingerprint = self._teachers[self.job.teacher]
        data, encoding = subject.data, self.job.encoding
        teacher = Subject(None, self.job.teacher, fingerprint, data, store, encoding, scale, lambda _: None)
        name = "zero_shot" if data.test.kind == "classification" else "retrieval"
        rows = [self._known.get((ref, data.entry.name, name)) for ref in (self.job.teacher, subject.ref)]
        prints = (fingerprint, subject.fingerprint)
        if not all(row is not None and _of(row, data, one) for row, one in zip(rows, prints, strict=True)):
            raise UserError(f"Teacher or student has no result for {data.entry.name}; see their rows.")
        scores = [float(row["score"]) for row in rows if row is not None]
        return agreement(_scores(teacher), _scores(subject), teacher_score=scores[0], student_score=scores[1])

    def _fail(self, row: Row, entry: DataEntry, protocol: str, sentence: str) -> None:
        self.failed += 1
        row = row | error_columns(protocol, TASKS.get(protocol, protocol), sentence)
        append_row(self.job.out, row)
        self._known[str(row["model_ref"]), entry.name, protocol] = row
        self.bar.write(f"{row['model_ref']}, {entry.name}, {protocol}: {sentence}", file=sys.stderr)


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


def _about_model(ref: str, model: Any, fingerprint: str, job: Job) -> Row:
    return {
        **model_columns(ref),
        "language": "en",
        "model_ref": ref,
        "fingerprint": fingerprint,
        "width": model.width,
        "parameters": sum(value.numel() for value in model.parameters()),
        "precision": job.encoding.precision,
        "dtype": "float32",
        "similarity": "cosine",
        "ties": "smaller id first",
        "seed": job.encoding.seed,
        "device": job.device,
        "batch_size": job.encoding.batch_size,
        "versions": versions(),
    }


def _about_entry(entry: DataEntry, job: Job) -> Row:
    return {
        "dataset": entry.name,
        "suite": job.suite.name,
        "tags": list(entry.tags),
        "settings": {
            "main_metric": entry.main_metric,
            "random_score": entry.random_score,
            "tags": list(entry.tags),
            "folds": entry.folds,
            "seed": job.encoding.seed,
            "vlkd": versions()["vlkd"],
        },
        "data": {"path": None, "split": entry.split, "kind": entry.kind, "train": entry.train},
        "data_hash": None,
        "items": None,
    }


def _about_data(data: Data, job: Job) -> Row:
    entry = data.entry
    return _about_entry(entry, job) | {
        "data": {
            "path": str(data.path.absolute()), "split": entry.split, "kind": data.test.kind, "train": entry.train,
        },
        "data_hash": data.hash,
        "data_problems": list(data.test.problems[:LISTED]),
    }  # fmt: skip


def _logit_scale(model: Any) -> float:
    """The model's own, or CLIP's usual 100 where it has none."""
    if "logit_scale" not in getattr(model, "provides", ()):
        return 100.0
    with torch.no_grad():
        return float(model.encode({}, ("logit_scale",))["logit_scale"])
