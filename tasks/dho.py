"""Train a compact classifier with two heads from few labels, many images without any, and a dual encoder (DHO).

    vlkd train dho data.root=DATA data.shots=4 teacher.ref=runs/teacher/student out=runs/dho
    vlkd train dho data.root=DATA data.shots=4 method.distillation=0 out=runs/labels
    vlkd train dho smoke=true teacher.ref=any out=runs/smoke

DATA holds DATA/train/CLASS/*.jpg, DATA/test/CLASS/*.jpg and perhaps DATA/val. The label head learns from the labelled
images, the teacher head matches the teacher on these and on the pool of all training images; probabilities are
alpha softmax(label head) + (1 - alpha) softmax(teacher head / beta), with alpha and beta chosen on validation images.

Source: DHO (Kang et al., 2025, arXiv:2505.07675, equations 5, 6 and 8). The factor eta^2 on the KL is that of its
public code; the paper's equation 6 has none. What it is compared with are settings of this file, at equal student
samples:

    labels alone             method.distillation=0
    teacher alone            method.supervised=0
    one head, logits         model.heads=one
    one head, features       model.heads=one method.match=features
    one head, PCGrad         model.heads=one method.surgery=true
    auxiliary head (DHKD)    method.match=binary mix.tune=false mix.alpha=1

DHO-F is `teacher.few_shot=true`: the teacher also looks at the labelled images, as in Tip-Adapter.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial
from typing import Literal

from vlkd.distill.class_terms import PARTS, ClassTerm
from vlkd.engine.classify.settings import ClassifierRun
from vlkd.errors import UserError
from vlkd.objectives import binary_kl_norm, cross_entropy, distillation_kl, feature_cosine


@dataclass(frozen=True, kw_only=True)
class Method:
    """The objectives and their weights.

    Args:
        supervised: lambda, the weight of the cross-entropy on labelled images.
        distillation: 1 - lambda, the weight of each of the two means of what follows the teacher, over labelled images
            and over the pool.
        match: what follows the teacher: "kl" (distributions over the classes), "features" (the trunk through a linear
            head against its embeddings, by cosine), "binary" (DHKD's normalised binary KL of each class).
        eta: the temperature of both sides of "kl" and "binary"; the losses carry eta^2.
        surgery: combine the gradients of labels and teacher by PCGrad instead of adding them.
    """

    supervised: float = 0.5
    distillation: float = 0.5
    match: Literal["kl", "features", "binary"] = "kl"
    eta: float = 2.0
    surgery: bool = False


@dataclass(frozen=True, kw_only=True)
class Dho(ClassifierRun):
    """The shared settings and the method's."""

    out: str = "runs/dho"
    method: Method = field(default_factory=Method)


def config() -> Dho:
    """Two heads, lambda = 0.5, eta = 2."""
    return Dho()


def terms(cfg: Dho) -> tuple[ClassTerm, ...]:
    """Cross-entropy on labelled images, and the teacher on labelled images and pool; without labels on the pool alone.

    Raises:
        UserError: eta is not above 0, or the teacher is asked for and none is named, or the other way round.
    """
    method = cfg.method
    if not method.eta > 0:
        raise UserError(f"method.eta={method.eta}: expected more than 0.")
    if bool(method.distillation) != bool(cfg.teacher.ref):
        raise UserError(
            f"method.distillation={method.distillation:g} and teacher.ref={cfg.teacher.ref!r}: name a teacher with "
            "teacher.ref=REF, or train from labels alone with method.distillation=0 and no teacher."
        )
    supervised = ClassTerm(
        name="labels",
        objective=cross_entropy,
        features=("labelled.label_logits", "labelled.labels"),
        group="supervised",
        weight=method.supervised,
    )
    objective, student, target = {
        "kl": (partial(distillation_kl, tau=method.eta), "teacher_logits", "target_logits"),
        "binary": (partial(binary_kl_norm, tau=method.eta), "teacher_logits", "target_logits"),
        "features": (feature_cosine, "projected", "target_embed"),
    }[method.match]
    distilled = [
        ClassTerm(
            name=f"teacher/{part}",
            objective=objective,
            features=(f"{part}.{student}", f"{part}.{target}"),
            group="distillation",
            weight=method.distillation,
        )
        for part in (PARTS if method.supervised else PARTS[1:])
    ]
    return tuple(term for term in (supervised, *distilled) if term.weight)


def surgery(cfg: Dho) -> bool:
    """Whether the gradients of labels and teacher are combined by PCGrad."""
    return cfg.method.surgery
