"""Zero-shot classification: class vectors from prompts, and the accuracy of images against them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vlkd.errors import UserError
from vlkd.retrieval.encode import ImageEncoder, PairSource, TextEncoder, encode_images
from vlkd.retrieval.progress import Progress
from vlkd.retrieval.search import Indices, Vectors, check_embeddings, normalize
from vlkd.retrieval.search import topk as nearest

DEFAULT_TEMPLATES: tuple[str, ...] = (
    "a photo of a {c}",
    "a picture of a {c}",
    "a drawing of a {c}",
    "a close view of a {c}",
    "a small {c} in a scene",
    "an image that shows a {c}",
    "{c}",
)
"""Plain sentences for data that bring no templates; `{c}` is the class name."""


class LabelledSource(PairSource, Protocol):
    """Images with one class each; the captions are not read."""

    @property
    def classes(self) -> tuple[str, ...]:
        """(C,) names in words, by class id."""
        ...

    @property
    def labels(self) -> NDArray[np.int64]:
        """(I,) class id of each image."""
        ...

    @property
    def templates(self) -> tuple[str, ...]:
        """Prompts with `{c}`; () for `DEFAULT_TEMPLATES`."""
        ...


class ImageTextEncoder(ImageEncoder, TextEncoder, Protocol):
    """What turns decoded images and texts into vectors of one space."""


def class_vectors(
    encode_text: Callable[[Sequence[str]], Tensor],
    classes: Sequence[str],
    templates: Sequence[str],
    *,
    prompts: Mapping[str, Sequence[str]] | None = None,
    batch_size: int = 256,
    progress: bool = False,
) -> Tensor:
    """Per class the mean of its normalised prompt embeddings, normalised again.

    w_c = m_c / |m_c| with m_c = 1/P sum over the P templates of t / |t|, t the embedding of the template about c: the
    prompt ensemble in embedding space of Radford et al., 2021, section 3.1.4 (https://arxiv.org/abs/2103.00020), as in
    `open_clip.build_zero_shot_classifier`. Equal names have exactly equal vectors.

    Args:
        encode_text: B prompts to (B, D), not necessarily normalised.
        classes: C names.
        templates: P sentences with `{c}` in the place of the name, or `{}` if they have no `{c}`.
        prompts: whole sentences of each class by its name (CuPL, Pratt et al., 2023), in place of the templates.
        batch_size: prompts encoded together; only whole classes, so at least those of one class.
        progress: show a bar with rate and time left.

    Returns:
        (C, D) float32 of length 1, on the CPU.

    Raises:
        UserError: no class, no template or one without `{c}` or `{}`, a class without prompts of its own where there
            are some, or an embedding that holds NaN or has no length.
    """
    unique = list(dict.fromkeys(classes))
    number = {name: i for i, name in enumerate(unique)}
    sentences = _sentences(unique, templates) if prompts is None else _own_sentences(unique, prompts)
    means = []
    with Progress(len(unique), unit="class", description="classes", show=progress) as bar:
        for block in _blocks(unique, sentences, batch_size):
            embed = encode_text([sentence for name in block for sentence in sentences[name]])
            unit = normalize(check_embeddings(embed, f"prompts of the classes {block[0]!r} to {block[-1]!r}"))
            means += [own.mean(dim=0) for own in torch.split(unit, [len(sentences[name]) for name in block])]
            bar.advance(len(block))
    vectors = normalize(check_embeddings(torch.stack(means), "mean prompts of the classes"))
    return vectors[[number[name] for name in classes]]


def _sentences(classes: Sequence[str], templates: Sequence[str]) -> dict[str, list[str]]:
    if not classes or not templates:
        raise UserError(f"Found {len(classes)} class names and {len(templates)} templates; give at least one of each.")
    for template in templates:
        if "{c}" not in template and "{}" not in template:
            raise UserError(f"The template {template!r} has no {{c}} and no {{}}; put one where the class name goes.")
    # Not `str.format`: a template from a file could reach into objects or ask for a huge width.
    return {name: [t.replace("{c}" if "{c}" in t else "{}", name) for t in templates] for name in classes}


def _own_sentences(classes: Sequence[str], prompts: Mapping[str, Sequence[str]]) -> dict[str, list[str]]:
    without = [name for name in classes if not prompts.get(name)]
    if without or not classes:
        raise UserError(
            f"{len(without)} of {len(classes)} classes have no prompts of their own, such as {without[:3]}; give at "
            f"least one class, and prompts for each under exactly its name."
        )
    return {name: list(prompts[name]) for name in classes}


def _blocks(classes: Sequence[str], sentences: Mapping[str, Sequence[str]], batch_size: int) -> Iterator[list[str]]:
    """Classes in their order, as many at once as have no more than `batch_size` sentences."""
    block: list[str] = []
    size = 0
    for name in classes:
        if block and size + len(sentences[name]) > batch_size:
            yield block
            block, size = [], 0
        block.append(name)
        size += len(sentences[name])
    yield block


def check_labels(labels: Indices, images: int, classes: int) -> NDArray[np.int64]:
    """The labels as (I,) int64, if there is one class id per image.

    Raises:
        UserError: another number of labels than of images, labels that are no whole numbers, or one that is no class.
    """
    try:
        label = torch.as_tensor(labels).cpu().numpy()
    except (TypeError, ValueError, RuntimeError):
        label = np.asarray(labels)
    if label.shape != (images,) or label.dtype.kind not in "iu":
        raise UserError(f"{images} images but labels {label.shape}, {label.dtype}; give one class id per image.")
    if label.min() < 0 or label.max() >= classes:
        raise UserError(
            f"Labels lie between {label.min()} and {label.max()}; the class ids go from 0 to {classes - 1}."
        )
    return label.astype(np.int64)


def accuracy(
    image_embed: Vectors, class_vectors: Vectors, labels: Indices, topk: Sequence[int] = (1, 5)
) -> dict[str, float]:
    """How often the class of an image is among the k classes of the highest cosine.

    Equal cosines go in the order of the class ids, so a model that has collapsed to a point answers class 0 throughout.
    Exact, in tiles: nothing depends on a chunk size, and the (I, C) scores are never stored.

    Args:
        image_embed: (I, D), not necessarily normalised.
        class_vectors: (C, D), two classes or more.
        labels: (I,) class id of each image.
        topk: cut-offs; 1 is always among the figures, and one that takes in all classes is left out.

    Returns:
        `acc1`, `acc5`: shares of the images. `mean_per_class_recall`: mean of `acc1` within each class over the classes
        that have an image (scikit-learn's balanced accuracy). `images`, `classes`, `classes_without_images`: counts.

    Raises:
        UserError: bad embeddings (`check_embeddings`), fewer than two classes, a label that is no class, or a cut-off
            below 1.
    """
    images = check_embeddings(image_embed, "image embeddings")
    vectors = check_embeddings(class_vectors, "class vectors", images.shape[1])
    count = len(vectors)
    if count < 2 or any(k < 1 for k in topk):
        raise UserError(f"Found {count} classes and the cut-offs {tuple(topk)}; expected two classes or more, k >= 1.")
    label = check_labels(labels, len(images), count)
    cutoffs = [k for k in sorted({1, *topk}) if k < count]
    right = nearest(images, vectors, cutoffs[-1])[1].numpy() == label[:, None]
    sizes = np.bincount(label, minlength=count)
    hits = np.bincount(label, weights=right[:, 0], minlength=count)
    there = sizes > 0
    return {
        **{f"acc{k}": float(right[:, :k].any(axis=1).mean()) for k in cutoffs},
        "mean_per_class_recall": float((hits[there] / sizes[there]).mean()),
        "images": float(len(images)),
        "classes": float(count),
        "classes_without_images": float(count - there.sum()),
    }


def zero_shot_figures(
    model: ImageTextEncoder, labelled: LabelledSource, *, batch_size: int = 128, progress: bool = False
) -> dict[str, float]:
    """Zero-shot classification of a labelled set, its images streamed; those that cannot be read are left out.

    Args:
        model: encodes images and prompts, in whatever mode it does that itself.
        labelled: images, labels, class names, and templates or none.
        batch_size: images decoded and encoded together; twice as many prompts are.
        progress: show bars with rate and time left.

    Returns:
        The figures of `accuracy`, and `unreadable`, the number of images left out.

    Raises:
        UserError: as `class_vectors`, `accuracy` and `encode_images`, which needs one readable image.
    """
    prompts = 2 * batch_size
    vectors = class_vectors(
        lambda texts: model.encode_text(texts, batch_size=prompts),
        labelled.classes,
        labelled.templates or DEFAULT_TEMPLATES,
        batch_size=prompts,
        progress=progress,
    )
    encoded = encode_images(model, labelled, batch_size=batch_size, progress=progress)
    figures = accuracy(encoded.embed, vectors, labelled.labels[encoded.index])
    return {**figures, "unreadable": float(len(encoded.bad))}
