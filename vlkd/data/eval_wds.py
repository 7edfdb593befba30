"""CLIP_benchmark's and DataComp's evaluation folders, read by tar headers and labels without decoding a picture.

    ROOT/classnames.txt                            one name a line, by label
    ROOT/zeroshot_classification_templates.txt     one prompt a line, `{c}` for the name
    ROOT/dataset_type.txt                          `retrieval` or `multilabel`; absent for classification
    ROOT/SPLIT/nshards.txt                         their number N
    ROOT/SPLIT/0.tar .. N-1.tar                    KEY.webp|png|jpg|jpeg with KEY.cls, KEY.npy or KEY.txt

https://github.com/LAION-AI/CLIP_benchmark, `webdataset_builder.py`. A second vector beside `.cls`, `KEY.npy`
(DataComp) or `KEY.metadata.npy`, holds group ids. Written by `eval_wds_writer`.

Where every class name and every template begins with one of the same words and a colon (`race:`, `gender:`), as in
DataComp's FairFace and UTKFace, each word has a label set of its own, and the labels are columns of `KEY.npy`.
"""

from __future__ import annotations

import io
import math
import re
import tarfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vlkd.data.eval_types import EvalSet, Kind
from vlkd.data.labelled import CLASSES_FILE, TEMPLATES_FILE, read_names, read_prompts, read_templates
from vlkd.data.shards import IMAGE_EXTENSIONS, read_member
from vlkd.data.sources import MAX_BAD_SHARE, ImageFile
from vlkd.data.tar_members import MAX_TEXT_BYTES, Member, read_members
from vlkd.errors import UserError

TYPE_FILE = "dataset_type.txt"
COUNT_FILE = "nshards.txt"
MAX_SHARDS = 100_000
LABEL: dict[Kind, str] = {"classification": "cls", "multilabel": "npy", "retrieval": "txt"}
"""The extension of the member that each kind of set needs."""
METADATA = "metadata.npy"


@dataclass(frozen=True)
class _Sample:
    """One picture of a shard and the members beside it, by extension."""

    key: str
    shard: Path
    members: dict[str, Member]

    def read(self, extension: str) -> bytes:
        member = self.members[extension]
        if member.size > MAX_TEXT_BYTES:
            raise UserError(f"{self} has a .{extension} of {member.size} bytes; expected at most {MAX_TEXT_BYTES}.")
        return read_member(self.shard, member.offset, member.size)

    @property
    def file(self) -> ImageFile:
        image = next(member for name, member in self.members.items() if name in IMAGE_EXTENSIONS)
        return ImageFile(self.shard, image.offset, image.size)

    def __str__(self) -> str:
        return f"{self.shard}, sample {self.key}"


def is_wds(root: Path, split: str = "") -> bool:
    """Whether a folder has this layout, be it the root or, without a split, one split of it."""
    own = any((root / split / name).is_file() for name in (COUNT_FILE, "0.tar"))
    return own or (root / TYPE_FILE).is_file() or bool(_splits(root))


def open_wds(root: Path, split: str = "", kind: Kind | None = None) -> EvalSet:
    """Open one split; shards in their order, samples in the order of the tar, captions exactly as the file has them.

    Samples without exactly one usable picture are left out and named in `problems`, up to 5 %.

    Args:
        root: the folder of the class names; the folder of a split does, too.
        split: "" for `test`, or the only one there is.
        kind: for a folder without `dataset_type.txt`; classification by default.

    Raises:
        UserError: `nshards.txt` missing or no number, fewer tars, a damaged or cut one, a key twice in a shard, no
            sample, a label missing, of another type, or outside of the class names, or groups of several lengths.
    """
    root, split = _place(root, split)
    kind = _kind(root, kind)
    prompts = _prompts_by_objective(root) if kind == "classification" else {}
    samples, problems = _samples(root / split)
    for sample in samples:
        _check_label(sample, kind, "npy" if prompts else LABEL[kind], root)
    keys = [sample.key for sample in samples]
    if len(set(keys)) < len(keys):
        keys = [f"{sample.shard.stem}:{sample.key}" for sample in samples]
    files = [sample.file for sample in samples]
    if kind == "retrieval":
        captions = [_captions(sample, problems) for sample in samples]
        return EvalSet(kind=kind, keys=keys, files=files, captions=captions, problems=tuple(problems))
    groups = _groups(samples, kind)
    if prompts:
        return EvalSet(
            kind=kind,
            keys=keys,
            files=files,
            classes=tuple(prompts),
            prompts=prompts,
            objectives=_objectives(list(prompts)),
            groups=groups,
            problems=tuple(problems),
        )
    names_file, templates_file = root / CLASSES_FILE, root / TEMPLATES_FILE
    if not names_file.is_file():
        raise UserError(f"{root} has no {CLASSES_FILE}; add it with one class name per line, by label.")
    classes = read_names(names_file, None)
    labels = _class_ids(samples, classes, names_file) if kind == "classification" else _vectors(samples, len(classes))
    return EvalSet(
        kind=kind,
        keys=keys,
        files=files,
        classes=classes,
        templates=read_templates(templates_file) if templates_file.is_file() else (),
        prompts=read_prompts(root / split, classes),
        labels=labels,
        groups=groups,
        problems=tuple(problems),
    )


def _prompts_by_objective(root: Path) -> dict[str, tuple[str, ...]]:
    """Whole prompts by class name, made of the templates of its label set; {} for an ordinary set."""
    names_file, templates_file = root / CLASSES_FILE, root / TEMPLATES_FILE
    if not names_file.is_file() or not templates_file.is_file():
        return {}
    classes = read_names(names_file, None)
    names = [name.partition(":") for name in classes]
    templates = [template.partition(":") for template in read_templates(templates_file)]
    words = {word for word, _, _ in names}
    if len(words) < 2 or not all(colon for _, colon, _ in names + templates) or words != {own[0] for own in templates}:
        return {}
    if len(set(classes)) < len(classes):
        raise UserError(f"{names_file} has a name twice in one label set; expected each once: mend it.")
    return {
        f"{word}:{name}": tuple(
            text.replace("{c}" if "{c}" in text else "{}", name) for own, _, text in templates if own == word
        )
        for word, _, name in names
    }


def _objectives(classes: Sequence[str]) -> dict[str, tuple[int, ...]]:
    """The class ids of each label set, in the order of its names."""
    words = [name.partition(":")[0] for name in classes]
    return {word: tuple(i for i, own in enumerate(words) if own == word) for word in dict.fromkeys(words)}


def _splits(root: Path) -> list[Path]:
    return sorted({path.parent for name in (COUNT_FILE, "0.tar") for path in root.glob(f"*/{name}")})


def _place(root: Path, split: str) -> tuple[Path, str]:
    if not split and ((root / COUNT_FILE).is_file() or (root / "0.tar").is_file()):
        return root.absolute().parent, root.absolute().name
    names = [path.name for path in _splits(root)]
    if not split and "test" not in names and len(names) != 1:
        raise UserError(f"{root} has the splits {', '.join(names) or 'none'}; name one, as in {root}#test.")
    split = split or ("test" if "test" in names else names[0])
    if not (root / split).is_dir():
        raise UserError(f"{root} has no split {split!r}; it has {', '.join(names) or 'none'}.")
    return root, split


def _kind(root: Path, kind: Kind | None) -> Kind:
    file = root / TYPE_FILE
    if not file.is_file():
        return kind if kind in LABEL and kind is not None else "classification"
    told = _text(file).strip().lower()
    for known in LABEL:
        if told == known:
            return known
    raise UserError(f"{file} says {told!r:.80}; expected retrieval, multilabel, or no such file for classification.")


def _text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{file} cannot be read as UTF-8 text ({error}); mend it.") from None


def _samples(folder: Path) -> tuple[list[_Sample], list[str]]:
    file = folder / COUNT_FILE
    if not file.is_file():
        raise UserError(f"{folder} has no {COUNT_FILE}; write the number of its tars into it.")
    told = _text(file).strip()
    if not re.fullmatch(r"[0-9]{1,6}", told) or not 1 <= int(told) <= MAX_SHARDS:
        raise UserError(f"{file} says {told!r:.80}; expected the number of tars, from 1 to {MAX_SHARDS}.")
    shards = [folder / f"{number}.tar" for number in range(int(told))]
    missing = [shard.name for shard in shards if not shard.is_file()]
    if missing:
        raise UserError(
            f"{folder} lacks {len(missing)} of the {told} tars of its {COUNT_FILE}, first {missing[0]}; fetch them."
        )
    problems = []
    if extra := [path.name for path in sorted(folder.glob("*.tar")) if path not in set(shards)]:
        problems.append(f"{len(extra)} tars beyond {COUNT_FILE} are not read, first {extra[0]}")
    found = [_read_shard(shard, problems) for shard in shards]
    samples = [sample for own in found for sample in own if _has_one_image(sample)]
    total = sum(map(len, found))
    problems += [f"no single picture: {sample}" for own in found for sample in own if not _has_one_image(sample)]
    if not samples:
        raise UserError(f"{folder} holds no sample with a picture ({'; '.join(problems[:3]) or 'its tars are empty'}).")
    if total - len(samples) > max(1, MAX_BAD_SHARE * total):
        raise UserError(
            f"{total - len(samples)} of {total} samples of {folder} have no single usable picture "
            f"({'; '.join(problems[:3])}); expected one each: fetch the data again."
        )
    return samples, problems


def _has_one_image(sample: _Sample) -> bool:
    return sum(name in IMAGE_EXTENSIONS for name in sample.members) == 1


def _read_shard(shard: Path, problems: list[str]) -> list[_Sample]:
    try:
        listing = read_members(shard)
    except (OSError, tarfile.TarError) as error:
        raise UserError(f"{shard} is no uncompressed tar that can be read ({error}); fetch it again.") from None
    if cut := [problem for problem in listing.problems if problem.kind in ("truncated", "damaged", "no-end")]:
        raise UserError(f"{shard} is cut or damaged ({cut[0]}), so that samples may be missing; fetch it again.")
    seen: set[str] = set()
    for key, members in listing.groups:
        if key in seen or len({member.extension for member in members}) < len(members):
            raise UserError(f"{shard}: the key {key!r} stands for two samples; write the tar again with one key each.")
        seen.add(key)
    problems += [f"{shard.name}: {problem}" for problem in listing.problems]
    return [_Sample(key, shard, {member.extension: member for member in members}) for key, members in listing.groups]


def _check_label(sample: _Sample, kind: Kind, wanted: str, root: Path) -> None:
    if wanted not in sample.members:
        others = [f".{name}" for name in LABEL.values() if name in sample.members]
        hint = f"is {TYPE_FILE} of {root} right?" if others else "fetch the data again."
        raise UserError(
            f"{sample} has {' and '.join(others) or 'no label'} where .{wanted} was expected for {kind}: {hint}"
        )


def _captions(sample: _Sample, problems: list[str]) -> tuple[str, ...]:
    try:
        lines = sample.read("txt").decode().splitlines()
    except UnicodeDecodeError as error:
        raise UserError(f"{sample} has captions that are no UTF-8 ({error}); write it again.") from None
    captions = tuple(line for line in lines if line.strip())
    if not captions:
        raise UserError(f"{sample} has no caption; retrieval needs one for each picture: caption or remove it.")
    if len(captions) < len(lines):
        problems.append(f"{len(lines) - len(captions)} empty captions: {sample}")
    return captions


def _class_ids(samples: Sequence[_Sample], classes: Sequence[str], names_file: Path) -> NDArray[np.int64]:
    labels = np.empty(len(samples), dtype=np.int64)
    for row, sample in enumerate(samples):
        told = sample.read("cls").strip()
        if not re.fullmatch(rb"[0-9]{1,9}", told):
            raise UserError(f"{sample} has the label {told[:40]!r}; expected the number of a class, from 0.")
        labels[row] = int(told)
        if labels[row] >= len(classes):
            raise UserError(
                f"{sample} has the label {labels[row]}, but {names_file} has {len(classes)} names (0 to "
                f"{len(classes) - 1}); take the names that belong to these data."
            )
    return labels


def _vectors(samples: Sequence[_Sample], width: int) -> NDArray[np.bool_]:
    labels = np.zeros((len(samples), width), dtype=np.bool_)
    for row, sample in enumerate(samples):
        vector = _vector(sample, "npy")
        if len(vector) != width:
            raise UserError(f"{sample} has {len(vector)} labels for {width} class names; expected one 0 or 1 for each.")
        if not np.isin(vector, (0, 1)).all():
            raise UserError(f"{sample} has labels other than 0 and 1; expected one 0 or 1 for each class.")
        labels[row] = vector != 0
    return labels


def _groups(samples: Sequence[_Sample], kind: Kind) -> dict[str, NDArray[np.int64]]:
    extension = METADATA if any(METADATA in sample.members for sample in samples) else "npy"
    if extension == LABEL[kind] or not any(extension in sample.members for sample in samples):
        return {}
    rows = [_whole(sample, extension) for sample in samples]
    for sample, row in zip(samples, rows, strict=True):
        if len(row) != len(rows[0]):
            raise UserError(
                f"{sample} has {len(row)} group ids, the first sample {len(rows[0])}; expected as many each."
            )
    return {f"group{column}": ids.copy() for column, ids in enumerate(np.stack(rows).T)}


def _whole(sample: _Sample, extension: str) -> NDArray[np.int64]:
    if extension not in sample.members:
        raise UserError(f"{sample} has no .{extension} with group ids, as other samples have; fetch the data again.")
    vector = _vector(sample, extension)
    ids: NDArray[np.int64] = vector.astype(np.int64)
    if not (ids == vector).all():
        raise UserError(f"{sample} has group ids that are no whole numbers; expected a vector of integers.")
    return ids


def _vector(sample: _Sample, extension: str) -> NDArray[Any]:
    """A vector of numbers from `.npy` bytes, whose header is checked before numpy makes room for what it claims."""
    data = sample.read(extension)
    stream = io.BytesIO(data)
    try:
        version = np.lib.format.read_magic(stream)
        read_header = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
        shape, _, dtype = read_header[version](stream)
        if len(shape) > 1 or dtype.kind not in "biuf":
            raise ValueError(f"shape {shape} of type {dtype}")
        if math.prod(shape) * dtype.itemsize != len(data) - stream.tell():
            raise ValueError(f"{len(data)} bytes for shape {shape}")
        vector: NDArray[Any] = np.load(io.BytesIO(data), allow_pickle=False).reshape(-1)
        if not np.isfinite(vector).all():
            raise ValueError("NaN or infinity")
    # The header is parsed as a Python literal, which fails in many ways.
    except Exception as error:
        raise UserError(f"{sample}: .{extension} is no vector of numbers ({error!s:.120}); write it again.") from None
    return vector
