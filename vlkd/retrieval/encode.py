"""Encode a data set of images and captions, streaming, with progress and a list of the images that cannot be read."""

from __future__ import annotations

from collections import deque
from collections.abc import Generator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vlkd.errors import UserError
from vlkd.retrieval.progress import Progress

if TYPE_CHECKING:
    from PIL.Image import Image


class PairSource(Protocol):
    """Images with their captions, by position."""

    @property
    def keys(self) -> list[str]:
        """The stable name of each image."""
        ...

    @property
    def captions(self) -> list[tuple[str, ...]]:
        """The captions of each image, possibly none."""
        ...

    def image(self, i: int) -> Image:
        """Image i, decoded; raises `UserError` or `OSError` if it cannot be read. Several threads ask at once."""
        ...

    def __len__(self) -> int: ...


class ImageEncoder(Protocol):
    """What turns decoded images into vectors."""

    def encode_image(self, images: Sequence[Image], *, batch_size: int = 64) -> Tensor:
        """(B, D), not normalised."""
        ...


class TextEncoder(Protocol):
    """What turns texts into vectors."""

    def encode_text(self, texts: Sequence[str], *, batch_size: int = 256) -> Tensor:
        """(B, D), not normalised."""
        ...


@dataclass(frozen=True, kw_only=True)
class EncodedImages:
    """Embeddings of the images that could be read.

    Attributes:
        embed: (I, D) float32, not normalised.
        index: (I,) position of each in its source.
        bad: key and reason of every image that could not be read.
    """

    embed: Tensor
    index: NDArray[np.int64]
    bad: tuple[tuple[str, str], ...]


@dataclass(frozen=True, kw_only=True)
class EncodedPairs:
    """Embeddings of a data set of pairs, without the images that could not be read and without their captions.

    Attributes:
        image_embed: (I, D) float32, not normalised.
        text_embed: (T, E) float32, not normalised; E is D unless another model encodes the texts.
        image_of_text: (T,) index of each caption's image among the I.
        keys: I names.
        captions: T texts.
        bad: key and reason of every image that could not be read.
    """

    image_embed: Tensor
    text_embed: Tensor
    image_of_text: NDArray[np.int64]
    keys: tuple[str, ...]
    captions: tuple[str, ...]
    bad: tuple[tuple[str, str], ...]


def encode_images(
    model: ImageEncoder, source: PairSource, *, batch_size: int = 64, workers: int = 2, progress: bool = True
) -> EncodedImages:
    """Encode every readable image; while one batch is encoded, the next one is decoded.

    At most two batches of decoded images are held. The batches, and so the embeddings, do not depend on `workers`.

    Args:
        model: the encoder.
        source: the images.
        batch_size: images encoded together.
        workers: threads that decode, one or more.
        progress: show a bar with rate and time left.

    Raises:
        UserError: the source is empty, or none of its images can be read.
    """
    if not len(source):
        raise UserError("The data set is empty; give one with at least one image.")
    with Progress(len(source), unit="image", description="images", show=progress) as bar:
        found = _encode(model, source, range(len(source)), batch_size, workers, bar)
    if not len(found.index):
        first = found.bad[0]
        raise UserError(f"None of the {len(source)} images can be read; the first: {first[0]}: {first[1]}")
    return found


def encode_unread(
    model: ImageEncoder, source: PairSource, found: EncodedImages, *, batch_size: int = 64, workers: int = 2
) -> EncodedImages:
    """Try the images once more that an earlier pass could not read: a file's rights or a disk may have been mended.

    Args:
        model: the encoder.
        source: the images of that pass.
        found: what it gave.
        batch_size: images encoded together.
        workers: threads that decode, one or more.

    Returns:
        `found` itself where still none of them can be read; `bad` has the others.
    """
    rows = np.setdiff1d(np.arange(len(source)), found.index).tolist()
    with Progress(len(rows), unit="image", show=False) as bar:
        more = _encode(model, source, rows, batch_size, workers, bar)
    if not len(more.index):
        return found
    index = np.concatenate([found.index, more.index])
    order = np.argsort(index)
    return EncodedImages(embed=torch.cat([found.embed, more.embed])[order], index=index[order], bad=more.bad)


def _encode(
    model: ImageEncoder, source: PairSource, rows: Sequence[int], batch_size: int, workers: int, bar: Progress
) -> EncodedImages:
    """Encode some images; `embed` is (0, 0) where none of them can be read."""
    embeds: list[Tensor] = []
    index: list[int] = []
    bad: list[tuple[str, str]] = []
    with closing(_decoded(source, rows, workers, batch_size)) as decoded:
        for start in range(0, len(rows), batch_size):
            batch = rows[start : start + batch_size]
            images: list[Image] = []
            for i, image in zip(batch, decoded, strict=False):
                if isinstance(image, str):
                    bad.append((source.keys[i], image))
                    bar.note(f"{len(bad)} unreadable")
                else:
                    images.append(image)
                    index.append(i)
            if images:
                embeds.append(model.encode_image(images, batch_size=batch_size).detach().float().cpu())
            bar.advance(len(batch))
    embed = torch.cat(embeds) if embeds else torch.empty(0, 0)
    return EncodedImages(embed=embed, index=np.array(index, np.int64), bad=tuple(bad))


def _decoded(source: PairSource, rows: Sequence[int], workers: int, ahead: int) -> Generator[Image | str, None, None]:
    """Images in order, or why one cannot be read; `ahead` images wait decoded while the caller has the others."""

    def decode(i: int) -> Image | str:
        try:
            return source.image(i)
        except (UserError, OSError) as error:
            return str(error)

    pool = ThreadPoolExecutor(workers, thread_name_prefix="decode")
    waiting: deque[Future[Image | str]] = deque()
    try:
        for i in rows:
            waiting.append(pool.submit(decode, i))
            if len(waiting) > ahead:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)


def encode_texts(model: TextEncoder, texts: Sequence[str], *, batch_size: int = 256, progress: bool = True) -> Tensor:
    """Encode texts, each different one once, so that equal texts have exactly equal embeddings.

    Args:
        model: the encoder.
        texts: T texts.
        batch_size: texts encoded together.
        progress: show a bar with rate and time left.

    Returns:
        (T, D) float32, not normalised.

    Raises:
        UserError: there is no text.
    """
    if not texts:
        raise UserError("There is no caption to encode; give at least one.")
    number = {text: i for i, text in enumerate(dict.fromkeys(texts))}
    unique = list(number)
    embeds = []
    with Progress(len(unique), unit="caption", description="captions", show=progress) as bar:
        for start in range(0, len(unique), batch_size):
            batch = unique[start : start + batch_size]
            embeds.append(model.encode_text(batch, batch_size=batch_size).detach().float().cpu())
            bar.advance(len(batch))
    return torch.cat(embeds)[[number[text] for text in texts]]


def encode_pairs(
    image_model: ImageEncoder,
    text_model: TextEncoder,
    source: PairSource,
    *,
    batch_size: int = 64,
    workers: int = 2,
    progress: bool = True,
) -> EncodedPairs:
    """Encode images with one model and all their captions with another, or the same.

    Args:
        image_model: encodes the images.
        text_model: encodes the captions.
        source: the pairs; every image has a caption.
        batch_size: images encoded together; four times as many captions are.
        workers: threads that decode images.
        progress: show bars with rate and time left.

    Raises:
        UserError: an image has no caption, the source is empty, or none of its images can be read.
    """
    without = [key for key, captions in zip(source.keys, source.captions, strict=True) if not captions]
    if without:
        raise UserError(
            f"Image {without[0]!r} has no caption ({len(without)} of {len(source)} images); retrieval needs a caption "
            f"for each: leave these images out."
        )
    images = encode_images(image_model, source, batch_size=batch_size, workers=workers, progress=progress)
    kept = images.index.tolist()
    captions = [caption for i in kept for caption in source.captions[i]]
    return EncodedPairs(
        image_embed=images.embed,
        text_embed=encode_texts(text_model, captions, batch_size=4 * batch_size, progress=progress),
        image_of_text=np.repeat(np.arange(len(kept)), [len(source.captions[i]) for i in kept]),
        keys=tuple(source.keys[i] for i in kept),
        captions=tuple(captions),
        bad=images.bad,
    )
