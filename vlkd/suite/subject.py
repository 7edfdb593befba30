"""One model on one data set: what the protocols ask for, encoded once and kept."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vlkd.data.eval_set import EvalSet, open_eval_set
from vlkd.data.labelled import read_prompts_file
from vlkd.data.sources import MAX_BAD_SHARE
from vlkd.errors import UserError
from vlkd.models.classifier_images import ClassifierImages
from vlkd.retrieval.encode import EncodedImages, encode_images, encode_texts, encode_unread
from vlkd.retrieval.zero_shot import DEFAULT_TEMPLATES, class_vectors
from vlkd.suite.declaration import DataEntry
from vlkd.suite.store import Store, images_hash, texts_hash

if TYPE_CHECKING:
    from pathlib import Path

    from PIL.Image import Image


@dataclass(frozen=True, kw_only=True)
class Encoding:
    """How a suite encodes; nothing of it but `precision` changes more than the last digits of a figure.

    Attributes:
        batch_size: images encoded together; four times as many texts are.
        workers: threads that decode images ahead.
        precision: of the encoders: `fp32`, or `bf16` under autocast. Scores are float32 always.
        seed: of everything that a protocol draws.
    """

    batch_size: int = 64
    workers: int = 2
    precision: str = "fp32"
    seed: int = 0


@dataclass(frozen=True, kw_only=True)
class Data:
    """One declared data set, opened.

    Attributes:
        entry: its declaration.
        path: where it was found.
        test: what is measured.
        train: from which probes learn, None where there is none.
        hash: of the test images and their labels.
        images: hash of the test images alone.
        train_images: hash of the training images alone, "" for none.
    """

    entry: DataEntry
    path: Path
    test: EvalSet
    train: EvalSet | None
    hash: str
    images: str
    train_images: str


def open_data(entry: DataEntry, path: Path, root: Path, memory: Path) -> Data:
    """Open a declared data set, with the names and prompts that the declaration puts in place of its own.

    Args:
        entry: the declaration.
        path: where the data were found.
        root: below which the declaration's prompts lie.
        memory: a folder in which hashes of pictures are remembered.

    Raises:
        UserError: the data cannot be opened, or the declaration does not fit them.
    """
    test = _declared(open_eval_set(path, split=entry.split, kind=entry.kind), entry, root)
    train = _declared(open_eval_set(path, split=entry.train, kind=entry.kind), entry, root) if entry.train else None
    if train is not None and train.classes != test.classes:
        raise UserError(f"{path}: {entry.train} and {entry.split} have other classes; give both the same class list.")
    images = images_hash(test, memory)
    train_images = "" if train is None else images_hash(train, memory)
    if images == train_images:
        raise UserError(
            f"{entry.name}: {entry.train!r} holds the pictures of {entry.split or 'the test part'!r}; a probe "
            "that is tested on what it learned tells nothing: name another split."
        )
    labels = [test.label_hash(), "" if train is None else train.label_hash(), *(test.templates or DEFAULT_TEMPLATES)]
    return Data(
        entry=entry,
        path=path,
        test=test,
        train=train,
        hash=texts_hash([images, train_images, *labels], "data"),
        images=images,
        train_images=train_images,
    )


def _declared(opened: EvalSet, entry: DataEntry, root: Path) -> EvalSet:
    if entry.classnames and len(entry.classnames) != len(opened.classes):
        raise UserError(
            f"{entry.name}: the suite gives {len(entry.classnames)} class names, the data have {len(opened.classes)}; "
            "mend the suite."
        )
    classes = entry.classnames or opened.classes
    prompts = opened.prompts
    if entry.prompts_file:
        prompts = read_prompts_file(root / entry.prompts_file, classes)
    return replace(opened, classes=classes, templates=entry.templates or opened.templates, prompts=prompts)


class Subject:
    """A model and a data set.

    Args:
        model: the encoder, or None if everything asked for is in the store.
        ref: its reference, for messages.
        fingerprint: its hash.
        data: the data set.
        store: the model's embeddings.
        encoding: how to encode.
        logit_scale: the model's, exponentiated.
        advance: called with the number of images or texts that were passed.
    """

    def __init__(
        self,
        model: Any,
        ref: str,
        fingerprint: str,
        data: Data,
        store: Store,
        encoding: Encoding,
        logit_scale: float,
        advance: Callable[[int], object],
    ) -> None:
        self._model, self.ref, self.fingerprint, self.data, self._store = model, ref, fingerprint, data, store
        self.encoding, self.logit_scale, self._advance = encoding, logit_scale, advance

    @property
    def reads_texts(self) -> bool:
        """Whether the model has a text tower."""
        return "text.embed" in self._loaded().provides

    @property
    def classifier(self) -> ClassifierImages | None:
        """The model where it is a classifier, which has classes of its own; else None."""
        model = self._loaded()
        return model if isinstance(model, ClassifierImages) else None

    @functools.cached_property
    def images(self) -> EncodedImages:
        """The test images that can be read."""
        return self._passed(self.data.test, self.data.images, self.data.entry.name)

    @functools.cached_property
    def train_images(self) -> EncodedImages:
        """The training images that can be read; raises `UserError` without a training part."""
        train = self.data.train
        if train is None:
            raise UserError(f"{self.data.entry.name} has no training part; probes need one, so declare `train`.")
        return self._passed(train, self.data.train_images, f"{self.data.entry.name}, {self.data.entry.train}")

    @functools.cached_property
    def labels(self) -> NDArray[Any]:
        """Those of `images`."""
        return _labels(self.data.test)[self.images.index]

    @functools.cached_property
    def train_labels(self) -> NDArray[Any]:
        """Those of `train_images`."""
        assert self.data.train is not None
        return _labels(self.data.train)[self.train_images.index]

    @functools.cached_property
    def class_vectors(self) -> Tensor:
        """(C, D) from the data's prompts, or the plain ones where they bring none."""
        test = self.data.test
        templates = test.templates or DEFAULT_TEMPLATES
        prompts = test.prompts
        own_prompts = (f"{name}\0{one}" for name, own in (prompts or {}).items() for one in own)
        texts = [*test.classes, "", *templates, "", *own_prompts]

        def encode() -> Tensor:
            made = class_vectors(
                self._encode_text, test.classes, templates, prompts=prompts, batch_size=4 * self.encoding.batch_size
            )
            self._advance(len(test.classes))
            return made

        return self._store.texts(texts_hash(texts, "classes"), encode)

    def texts(self, texts: Sequence[str]) -> Tensor:
        """(T, D) embeddings of texts, equal ones equal."""

        def encode() -> Tensor:
            model = _Encoder(self._encode_text, self._advance)
            return encode_texts(model, texts, batch_size=4 * self.encoding.batch_size, progress=False)

        return self._store.texts(texts_hash(texts, "texts"), encode)

    def group_of(self, name: str) -> NDArray[np.int64]:
        """A metadata column of `images`."""
        return self.data.test.groups[name][self.images.index]

    def _passed(self, data: EvalSet, data_hash: str, name: str) -> EncodedImages:
        """One pass over pictures, or the stored one; what was unreadable then is tried again where a model is there."""
        encoding = self.encoding
        counted = _Counted(data, self._advance)

        def encode() -> EncodedImages:
            with self._precision():
                return encode_images(
                    self._loaded(), counted, batch_size=encoding.batch_size, workers=encoding.workers, progress=False
                )

        def retry(found: EncodedImages) -> EncodedImages:
            with self._precision():
                return encode_unread(
                    self._loaded(), counted, found, batch_size=encoding.batch_size, workers=encoding.workers
                )

        return _readable(self._store.images(data_hash, encode, None if self._model is None else retry), name)

    def _encode_text(self, texts: Sequence[str]) -> Tensor:
        with self._precision():
            embed: Tensor = self._loaded().encode_text(texts, batch_size=4 * self.encoding.batch_size)
        return embed.float().cpu()

    def _loaded(self) -> Any:
        if self._model is None:
            raise UserError(f"The embeddings of {self.ref} for {self.data.entry.name} are gone; run the suite again.")
        return self._model

    @contextmanager
    def _precision(self) -> Iterator[None]:
        device = "cpu" if self._model is None else self._model.device.type
        with torch.autocast(device, torch.bfloat16, enabled=self.encoding.precision == "bf16"):
            yield


def _readable(images: EncodedImages, name: str) -> EncodedImages:
    """The images, if not too many are missing for the figures to be those of the data set."""
    total = len(images.index) + len(images.bad)
    if len(images.bad) > max(1, MAX_BAD_SHARE * total):
        raise UserError(
            f"{name}: {len(images.bad)} of {total} pictures cannot be read, first {images.bad[0][0]!r} "
            f"({images.bad[0][1]}); expected at most {MAX_BAD_SHARE:.0%}: mend or remove them."
        )
    return images


def _labels(data: EvalSet) -> NDArray[Any]:
    if data.labels is None:
        raise UserError("The data have no labels; expected a class folder or a classification webdataset.")
    return data.labels


class _Counted:
    """A data set that tells of each image that is read."""

    def __init__(self, data: EvalSet, advance: Callable[[int], object]) -> None:
        self._data, self._advance = data, advance
        self.keys = data.keys
        self.captions: list[tuple[str, ...]] = [()] * len(data)

    def __len__(self) -> int:
        return len(self._data)

    def image(self, i: int) -> Image:
        self._advance(1)
        return self._data.image(i)


class _Encoder:
    """A text encoder that tells of each batch."""

    def __init__(self, encode: Callable[[Sequence[str]], Tensor], advance: Callable[[int], object]) -> None:
        self._encode, self._advance = encode, advance

    def encode_text(self, texts: Sequence[str], *, batch_size: int = 256) -> Tensor:
        del batch_size
        embed = self._encode(texts)
        self._advance(len(texts))
        return embed
