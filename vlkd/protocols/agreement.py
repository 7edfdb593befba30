"""How far a student says what its teacher says: about classes, or about the captions of a gallery."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vlkd.errors import UserError
from vlkd.metrics import kendall_tau, linear_cka, mean_kl, top_k_overlap, wilson_interval
from vlkd.protocols.measured import Measured
from vlkd.protocols.scores import score_blocks
from vlkd.retrieval.search import Vectors, check_embeddings, normalize, topk

MAX_RANKED = 256
"""Kendall's tau compares all pairs of candidates, so it takes at most so many, the first of them."""


@dataclass(frozen=True, kw_only=True)
class Scores:
    """One model's view of images and candidates, from which its scores follow.

    Attributes:
        image_embed: (I, D), not necessarily normalised.
        candidates: (C, D) class vectors, or captions of a gallery, two or more.
        logit_scale: the factor on cosines under the softmax, already exponentiated; a bias would cancel there.
    """

    image_embed: Vectors
    candidates: Vectors
    logit_scale: float


def agreement(
    teacher: Scores,
    student: Scores,
    *,
    k: int = 5,
    teacher_score: float | None = None,
    student_score: float | None = None,
) -> Measured:
    """Compare a student with its teacher on the same images and candidates, image by image, without labels.

    With p, q the softmax over the candidates of each model's own logit scale times its cosines:

    - `top1_agreement`: share of images whose best candidate is the same (ties by the smaller id);
    - `topK_overlap` for the given k: mean share of the k best candidates in common; left out unless 1 < k < C;
    - `kl`: mean of KL(p_teacher || q_student) = sum p ln(p / q), in nats;
    - `kendall_tau`: mean of tau-b between the two orders of the first `MAX_RANKED` candidates;
    - `cka`: linear centred kernel alignment of the two models' normalised image embeddings, which is all that cosines
      see of them (Kornblith et al., 2019, https://arxiv.org/abs/1905.00414);
    - `retention`: student_score / teacher_score, where both are given and the teacher's is above 0.

    A figure that is not defined (a constant ranking, a single image) is left out.

    Args:
        teacher: the teacher's embeddings.
        student: the student's, of the same images and candidates in the same order; widths may differ.
        k: candidates compared in `topK_overlap`.
        teacher_score: the teacher's quality on these data, in any unit with 0 as its origin.
        student_score: the student's, in the same unit.

    Returns:
        Per item: `correct`, whether the best candidates agree, and `teacher` and `student`, those candidates.

    Raises:
        UserError: other numbers of images or candidates, fewer than two candidates, a logit scale that is not positive
            and finite, k below 1, or bad embeddings.
    """
    images, count = _check(teacher, student, k)
    one, other = _tables(teacher, "teacher"), _tables(student, "student")
    ids = [topk(*tables, min(k, count))[1].numpy() for tables in (one, other)]
    same = (ids[0][:, 0] == ids[1][:, 0]).astype(np.float64)
    kl, tau = _over_rows(one, other, (teacher.logit_scale, student.logit_scale))
    cka = linear_cka(normalize(one[0]).numpy(), normalize(other[0]).numpy())
    found = {"top1_agreement": float(same.mean())}
    if 1 < k < count:
        found[f"top{k}_overlap"] = float(top_k_overlap(ids[0], ids[1]).mean())
    found |= {"kl": kl, "kendall_tau": tau, "cka": cka}
    if teacher_score is not None and student_score is not None and teacher_score > 0:
        found["retention"] = student_score / teacher_score
    return Measured(
        protocol="agreement",
        task="agreement",
        metrics={name: value for name, value in found.items() if math.isfinite(value)},
        main_metric="top1_agreement",
        interval=wilson_interval(float(same.sum()), images),
        random_score=1 / count,
        counts={"images": images, "candidates": count},
        per_item={"correct": same, "teacher": ids[0][:, 0], "student": ids[1][:, 0]},
        notes={
            "k": k,
            "teacher_logit_scale": float(teacher.logit_scale),
            "student_logit_scale": float(student.logit_scale),
            "ranked_candidates": min(count, MAX_RANKED),
            "ties": "smaller id first",
        },
    )


def _check(teacher: Scores, student: Scores, k: int) -> tuple[int, int]:
    """Numbers of images and candidates, where both models have the same."""
    images, candidates = len(teacher.image_embed), len(teacher.candidates)
    if (len(student.image_embed), len(student.candidates)) != (images, candidates):
        raise UserError(
            f"The teacher scored {images} images against {candidates} candidates, the student "
            f"{len(student.image_embed)} against {len(student.candidates)}; give both the same data."
        )
    if candidates < 2 or k < 1:
        raise UserError(f"Found {candidates} candidates and k = {k}; agreement needs two candidates or more, k >= 1.")
    for name, scores in (("teacher", teacher), ("student", student)):
        if not (math.isfinite(scores.logit_scale) and scores.logit_scale > 0):
            raise UserError(f"The {name}'s logit scale is {scores.logit_scale}; expected a positive, finite factor.")
    return images, candidates


def _tables(scores: Scores, name: str) -> tuple[Tensor, Tensor]:
    """Images and candidates, checked."""
    images = check_embeddings(scores.image_embed, f"the {name}'s image embeddings")
    return images, check_embeddings(scores.candidates, f"the {name}'s candidates", images.shape[1])


def _over_rows(
    one: tuple[Tensor, Tensor], other: tuple[Tensor, Tensor], scales: tuple[float, float]
) -> tuple[float, float]:
    """Mean KL divergence, and mean Kendall tau of the images where it is defined (NaN if nowhere)."""
    divergence = 0.0
    taus: list[NDArray[np.float64]] = []
    for (_, left), (_, right) in zip(score_blocks(*one), score_blocks(*other), strict=True):
        divergence += len(left) * mean_kl(_log_softmax(left, scales[0]), _log_softmax(right, scales[1]))
        taus.append(kendall_tau(left[:, :MAX_RANKED], right[:, :MAX_RANKED]))
    tau = np.concatenate(taus)
    defined = tau[np.isfinite(tau)]
    return divergence / len(tau), float(defined.mean()) if len(defined) else math.nan


def _log_softmax(cosines: NDArray[np.float32], scale: float) -> NDArray[np.float64]:
    return (scale * torch.from_numpy(cosines).double()).log_softmax(dim=1).numpy()
