"""The teacher of a classifier: loaded, told how well it knows the classes, and its features stored or made anew."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor

from vlkd.data.labelled import Labelled
from vlkd.data.pool import LabelledPool
from vlkd.data.sources import source_name
from vlkd.distill.cache import CacheSpec, ensure_cache
from vlkd.distill.class_teacher import ClassTeacher, ShotCache, choose_cache, zero_shot_logits
from vlkd.distill.teachers import CachedTeacher, OnlineTeacher, Teacher
from vlkd.engine.classify.mix import accuracy
from vlkd.engine.classify.settings import ClassifierRun
from vlkd.errors import UserError
from vlkd.metrics import wilson_interval
from vlkd.models.base import DualEncoderModule, channels_last
from vlkd.models.load import load
from vlkd.retrieval.encode import PairSource, encode_images
from vlkd.retrieval.zero_shot import DEFAULT_TEMPLATES, class_vectors


@dataclass(frozen=True, kw_only=True)
class Teaching:
    """A loaded teacher.

    Attributes:
        model: the dual encoder.
        teacher: its targets in training.
        accuracy: of its targets on validation images.
        told: what is to be known of it, in words.
    """

    model: DualEncoderModule
    teacher: ClassTeacher
    accuracy: float
    told: tuple[str, ...]


def prepare_teacher(config: ClassifierRun, pool: LabelledPool, accelerator: Accelerator) -> Teaching:
    """Load the teacher, measure it on validation images, and open its stored features, computed where missing.

    Raises:
        UserError: it cannot be loaded, has no text tower, or its features cannot teach.
    """
    settings = config.teacher
    model = channels_last(load(settings.ref, device=accelerator.device))
    if "text.embed" not in model.provides:
        raise UserError(f"teacher.ref={settings.ref} has no text tower; name a dual encoder.")
    vectors = class_vectors(model.encode_text, pool.classes, pool.templates or DEFAULT_TEMPLATES)
    zeta = settings.zeta or 1 / logit_scale(model)
    seen, labels = embedded(model, pool.val)
    plain = accuracy(zero_shot_logits(seen, vectors, zeta), labels)
    low, high = wilson_interval(plain * len(labels), len(labels))
    told = [
        f"Teacher {settings.ref}: zero-shot accuracy {100 * plain:.1f} % [{100 * low:.1f}, {100 * high:.1f}] on "
        f"{len(labels)} validation images, chance {100 / len(pool.classes):.1f} %, temperature zeta {zeta:.4g}."
    ]
    if low <= 1 / len(pool.classes):
        told.append("Warning: the teacher's zero-shot accuracy cannot be told from chance; it has nothing to teach.")
    cache, found = None, plain
    if settings.few_shot:
        cache, found, sentence = few_shot_cache(model, pool, vectors, zeta, seen, labels)
        told.append(sentence)
    for sentence in told:
        accelerator.print(sentence)
    teacher = ClassTeacher(_source(config, pool, model, accelerator), vectors, zeta, cache)
    return Teaching(model=model, teacher=teacher, accuracy=found, told=tuple(told))


def few_shot_cache(
    model: DualEncoderModule, pool: LabelledPool, vectors: Tensor, zeta: float, seen: Tensor, labels: Tensor
) -> tuple[ShotCache, float, str]:
    """The Tip-Adapter cache of the labelled images, its accuracy on validation images, and that in words."""
    known = Labelled(
        pool.classes,
        [pool.pairs.files[row] for row in pool.labelled],
        pool.labels[pool.labelled],
        [pool.pairs.keys[row] for row in pool.labelled],
    )
    keys, own = embedded(model, known)
    cache, found = choose_cache(keys, own, vectors, zeta, seen, labels)
    constants = f"weight {cache.weight:g}, sharpness {cache.sharpness:g}, chosen on validation images"
    return cache, found, f"With a cache of {len(own)} labelled images ({constants}): {100 * found:.1f} %."


def logit_scale(model: DualEncoderModule) -> float:
    """The factor on cosines that the model learned, already exponentiated."""
    with torch.no_grad():
        return float(model.encode({}, ("logit_scale",))["logit_scale"])


def embedded(model: DualEncoderModule, images: Labelled) -> tuple[Tensor, Tensor]:
    """Embeddings (I, D) and class ids (I,) of the readable images, prepared as in evaluation, on the CPU."""
    source: PairSource = images
    found = encode_images(model, source, progress=False)
    return found.embed, torch.from_numpy(np.asarray(images.labels)[found.index])


def _source(config: ClassifierRun, pool: LabelledPool, model: DualEncoderModule, accelerator: Accelerator) -> Teacher:
    settings = config.teacher
    if not settings.views:
        return OnlineTeacher(settings.name, model)
    spec = CacheSpec(
        features=("image.embed",),
        views=settings.views,
        view_settings=config.views,
        precision=config.train.precision,
        dtype=settings.dtype,
    )
    # Another validation split is another table.
    place = f"{source_name(config.data.root)}-{pool.pairs.fingerprint()[:8]}"
    with accelerator.main_process_first():
        reader = ensure_cache(
            Path(settings.folder) / settings.name / place,
            settings.name,
            model,
            pool.pairs,
            spec,
            workers=config.data.workers,
            batch_size=settings.batch_size,
        )
    return CachedTeacher(settings.name, model.width, [reader])
