"""The teacher of a classifier: loaded, told how well it knows the classes, and its features stored or made anew."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import Tensor
from torch.nn.functional import normalize

from vlkd.data.labelled import Labelled
from vlkd.data.pool import LabelledPool
from vlkd.data.sources import source_name
from vlkd.distill.cache import CacheSpec, ensure_cache
from vlkd.distill.class_teacher import ClassTeacher, choose_cache, zero_shot_logits
from vlkd.distill.teachers import CachedTeacher, OnlineTeacher, Teacher
from vlkd.engine.classify.embedded import embedded
from vlkd.engine.classify.mix import accuracy
from vlkd.engine.classify.settings import ClassifierRun
from vlkd.errors import UserError
from vlkd.metrics import wilson_interval
from vlkd.models.base import DualEncoderModule, channels_last
from vlkd.models.load import load
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
    if not settings.zeta and "logit_scale" not in model.provides:
        raise UserError(f"teacher.ref={settings.ref} has no logit scale of its own; set teacher.zeta, 0.01 for CLIP's.")
    vectors = class_vectors(model.encode_text, pool.classes, pool.templates or DEFAULT_TEMPLATES)
    zeta = settings.zeta or 1 / logit_scale(model)
    seen, labels = embedded(model, pool.val, settings.place)
    if not seen.isfinite().all():
        raise UserError(f"teacher.ref={settings.ref} gives image embeddings that are not finite; check its weights.")
    plain = accuracy(zero_shot_logits(seen, vectors, zeta), labels)
    low, high = wilson_interval(plain * len(labels), len(labels))
    told = [
        f"Teacher {settings.ref}: zero-shot accuracy {100 * plain:.1f} % [{100 * low:.1f}, {100 * high:.1f}] on "
        f"{len(labels)} validation images, chance {100 / len(pool.classes):.1f} %, temperature zeta {zeta:.4g}."
    ]
    if low <= 1 / len(pool.classes) and not settings.few_shot:
        told.append("Warning: the teacher's zero-shot accuracy cannot be told from chance; it has nothing to teach.")
    for sentence in told:
        accelerator.print(sentence)
    source = _source(config, pool, model, accelerator)
    cache, found = None, plain
    if settings.few_shot:
        keys, own = shot_keys(model, pool, source, settings.place)
        cache, found = choose_cache(keys, own, vectors, zeta, seen, labels)
        constants = f"weight {cache.weight:g}, sharpness {cache.sharpness:g}, chosen on validation images"
        told.append(f"With a cache of {len(own)} labelled images ({constants}): {100 * found:.1f} %.")
        accelerator.print(told[-1])
    return Teaching(model=model, teacher=ClassTeacher(source, vectors, zeta, cache), accuracy=found, told=tuple(told))


def shot_keys(model: DualEncoderModule, pool: LabelledPool, source: Teacher, kept: Path) -> tuple[Tensor, Tensor]:
    """Embeddings (L, D) and class ids (L,) of the labelled images that can be read.

    The mean of each image's stored views, unit length each, as Tip-Adapter averages over augmented ones; of a teacher
    without stored features the picture as in evaluation.
    """
    if isinstance(source, CachedTeacher):
        (part,) = source.parts
        rows = torch.from_numpy(pool.labelled)
        rows = rows[~torch.isin(rows, torch.tensor(source.unreadable_rows(), dtype=torch.int64))]
        views = [part.image("image.embed", rows, torch.full_like(rows, view)) for view in range(part.views)]
        return torch.stack([normalize(view, dim=1) for view in views]).mean(dim=0), torch.from_numpy(pool.labels)[rows]
    known = Labelled(
        pool.classes,
        [pool.pairs.files[row] for row in pool.labelled],
        pool.labels[pool.labelled],
        [pool.pairs.keys[row] for row in pool.labelled],
    )
    return embedded(model, known, kept)


def logit_scale(model: DualEncoderModule) -> float:
    """The factor on cosines that the model learned, already exponentiated."""
    with torch.no_grad():
        return float(model.encode({}, ("logit_scale",))["logit_scale"])


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
            settings.place / place,
            settings.name,
            model,
            pool.pairs,
            spec,
            workers=config.data.workers,
            batch_size=settings.batch_size,
        )
    return CachedTeacher(settings.name, model.width, [reader])
