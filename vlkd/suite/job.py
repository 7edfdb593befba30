"""What a suite is asked to do, whether that can begin, and what every row of it says before anything is measured."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from vlkd.errors import UserError
from vlkd.models.load import JOIN, load_folder, load_named
from vlkd.suite.declaration import DataEntry, Suite
from vlkd.suite.results import Row, model_columns, versions
from vlkd.suite.subject import Data, Encoding

LISTED = 16
"""Names of pictures or problems in a row, at most."""
_CONFIGURATIONS = ("model.json", "open_clip_config.json", "config.json")
_FAMILIES = ("open_clip", "hf", "timm")


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


def check_job(job: Job) -> None:
    """Look for what would fail for sure, before anything is written or loaded.

    Raises:
        UserError: there is no root or no such device, a file stands where a folder is to be written, or references name
            no file, folder or family of models.
    """
    check_root(job.root)
    for option, folder in (("--out", job.out), ("--embeddings", job.store)):
        if folder.is_file():
            raise UserError(f"{option} {folder} is a file; expected a folder, new or of earlier runs: name another.")
    try:
        torch.empty(1, device=job.device)
    except (RuntimeError, AssertionError) as error:
        raise UserError(
            f"The device {job.device} cannot be used ({str(error).splitlines()[0]}); name another one."
        ) from None
    check_references(job.models)


def check_root(root: Path) -> None:
    """Raise `UserError` where the root of the data sets is no folder."""
    if not root.is_dir():
        raise UserError(f"There is no folder {root}; give the root of the data sets, as `vlkd prep tier0` makes one.")


def check_references(refs: Sequence[str]) -> None:
    """Refuse references to which nothing can answer, as far as names and folders tell without loading.

    Raises:
        UserError: one or several cannot.
    """
    problems = [problem for ref in refs if (problem := _problem(ref))]
    if len(problems) > 1:
        raise UserError(f"{len(problems)} of the {len(refs)} models cannot be loaded: {' '.join(problems)}")
    if problems:
        raise UserError(problems[0])


def _problem(ref: str) -> str:
    family, _, rest = ref.partition(":")
    file = rest.partition("@")[2]
    try:
        if ref and Path(ref).is_dir():
            if not any((Path(ref) / name).is_file() for name in _CONFIGURATIONS):
                load_folder(ref, Path(ref))
        elif JOIN in ref:
            return " ".join(filter(None, map(_problem, ref.split(JOIN))))
        elif family not in _FAMILIES or not rest:
            load_named(ref)
        elif family == "hf" and rest.startswith((".", "/")) and not Path(rest).is_dir():
            return f"There is no folder {rest} for {ref}; check the path."
        elif family != "hf" and file.endswith(".safetensors") and not Path(file).is_file():
            return f"There is no file {file} for {ref}; check the path."
    except UserError as error:
        return str(error)
    return ""


def about_model(ref: str, job: Job) -> Row:
    """What is known of a model without loading it, and how it is measured."""
    return {
        **model_columns(ref),
        "language": "en",
        "model_ref": ref,
        "fingerprint": None,
        "width": None,
        "parameters": None,
        "precision": job.encoding.precision,
        "dtype": "float32",
        "similarity": "cosine",
        "ties": "smaller id first",
        "seed": job.encoding.seed,
        "device": job.device,
        "batch_size": job.encoding.batch_size,
        "versions": versions(),
    }


def about_weights(model: Any, fingerprint: str) -> Row:
    """What is known of a model once it is loaded."""
    parameters = sum(value.numel() for value in model.parameters())
    return {"fingerprint": fingerprint, "width": model.width, "parameters": parameters}


def about_entry(entry: DataEntry, job: Job) -> Row:
    """What is declared of a data set."""
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


def about_data(data: Data, job: Job) -> Row:
    """What is known of a data set once it is opened."""
    entry = data.entry
    return about_entry(entry, job) | {
        "data": {
            "path": str(data.path.absolute()), "split": entry.split, "kind": data.test.kind, "train": entry.train,
        },
        "data_hash": data.hash,
        "data_problems": list(data.test.problems[:LISTED]),
        "left_out_samples": len(data.test.problems),
    }  # fmt: skip
