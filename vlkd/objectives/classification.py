r"""Classifiers: logits of a student's head against labels, or against a teacher's logits, and the mix of two heads.

Logits are finite and come in as heads give them, (B, C) with one column per class. Dual-head optimisation (DHO, Kang
et al., 2025, arXiv:2505.07675) trains a label head and a teacher head on one trunk with

.. math:: L = \lambda\,\mathrm{CE} + (1 - \lambda) (\mathrm{KL}_\text{labelled} + \mathrm{KL}_\text{pool}),

where each part is a mean over its own batch of the per-sample values below. How the heads are joined belongs to the
model: `vlkd.models.classifier.mixed_probabilities`.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from vlkd.errors import UserError
from vlkd.objectives.embedding import check_paired, unit


def cross_entropy(logits_BC: Tensor, labels_B: Tensor) -> Tensor:
    r"""Cross entropy of the softmax with the true classes: (B,).

    .. math:: \ell_b = -\log\mathrm{softmax}(s_b)_{y_b}

    Equation 5 of DHO before its mean. No label is skipped: -1 and -100, which mark images without a known class
    elsewhere, are refused, because an image that counts as zero would make the mean smaller in silence.

    Args:
        logits_BC: s, the label head's logits, (B, C).
        labels_B: y, the true class of each row, integers in [0, C), (B,).

    Raises:
        UserError: the shapes do not fit, the labels are no integers, or one lies outside [0, C).
    """
    whole = not (labels_B.is_floating_point() or labels_B.is_complex() or labels_B.dtype == torch.bool)
    if logits_BC.ndim != 2 or not logits_BC.shape[1] or labels_B.shape != logits_BC.shape[:1] or not whole:
        raise UserError(
            f"cross_entropy: the logits are {tuple(logits_BC.shape)} and the labels {tuple(labels_B.shape)} of "
            f"{labels_B.dtype}; expected (B, C) and (B,) of torch.int64, one class number per row."
        )
    classes = logits_BC.shape[1]
    outside_B = (labels_B < 0) | (labels_B >= classes)
    if outside_B.any():
        raise UserError(
            f"cross_entropy: found the label {labels_B[outside_B][0].item()}, expected 0 to {classes - 1} for "
            f"{classes} classes; leave images without a known class out of the labelled batch."
        )
    return F.cross_entropy(_wide(logits_BC), labels_B.long(), reduction="none")


def distillation_kl(student_BC: Tensor, teacher_BC: Tensor, *, tau: float) -> Tensor:
    r"""KL between the teacher's and the student's softmax over the classes, both at one temperature: (B,).

    .. math:: \ell_b = \tau^2\, \mathrm{KL}\big(\mathrm{softmax}(t_b / \tau) \,\Vert\, \mathrm{softmax}(s_b / \tau)\big)

    Each of the two KL terms of DHO's equation 6, before its mean. The factor tau^2, which keeps the size of gradients
    over tau (Hinton et al., 2015, arXiv:1503.02531, section 2), is in the authors' public code and missing from the
    paper's equation; their algorithm 1 prints the arguments of the KL the other way round. We follow the code, where
    tau = 2 (the paper's eta). Its appendix B speaks of temperature 1 in training, its table 7 of 2.

    The logits of a zero-shot teacher are its cosines times its scale, cos / zeta with zeta = 0.01 in the paper; log
    probabilities do as well, as a shift of a row changes nothing. Zero exactly when the distributions agree.

    Args:
        student_BC: s, the teacher head's logits, (B, C).
        teacher_BC: t, the teacher's logits of the same images, (B, C); constant.
        tau: the temperature, above 0.

    Raises:
        UserError: the shapes differ, or tau is not above 0.
    """
    _check_logits(student_BC, teacher_BC, "distillation_kl", ("student's", "teacher's"))
    _check_above_zero(tau, "distillation_kl", "temperature tau")
    log_student_BC = (_wide(student_BC) / tau).log_softmax(dim=1)
    log_teacher_BC = (_wide(teacher_BC.detach()) / tau).log_softmax(dim=1)
    return tau**2 * F.kl_div(log_student_BC, log_teacher_BC, reduction="none", log_target=True).sum(dim=1)


def binary_kl_norm(student_BC: Tensor, teacher_BC: Tensor, *, tau: float) -> Tensor:
    r"""Each logit drawn to the teacher's own by a binary KL, summed over the classes: (B,).

    .. math:: \ell_b = \tau^2 \sum_c \mathrm{KL}\big(\tfrac12 \,\Vert\, \sigma(\tfrac{s_{bc} - t_{bc}}{\tau})\big)
        = \tau^2 \sum_c \log\cosh\frac{s_{bc} - t_{bc}}{2\tau}

    The KL is that of two Bernoulli distributions. BinaryKL-Norm of DHKD (Yang et al., 2024, arXiv:2411.08937), from its
    public code, which trains the auxiliary head with it at tau = 2. The second form is ours: the code clamps
    probabilities at 1e-8, which stops the gradient where logits differ by more than about 18 tau, while log cosh keeps
    it: (tau / 2) tanh((s - t) / (2 tau)) per logit, at most tau / 2. A smooth L1, then, which tends to |s - t|^2 / 8 at
    high tau. Other than `distillation_kl` it is not blind to a shift of the logits of a row: that is its
    purpose, and why teacher *logits* are needed here. Zero exactly where s = t.

    Args:
        student_BC: s, the auxiliary head's logits, (B, C).
        teacher_BC: t, the teacher's logits of the same images, (B, C); constant.
        tau: the temperature, above 0.

    Raises:
        UserError: the shapes differ, or tau is not above 0.
    """
    _check_logits(student_BC, teacher_BC, "binary_kl_norm", ("student's", "teacher's"))
    _check_above_zero(tau, "binary_kl_norm", "temperature tau")
    return tau**2 * _log_cosh((_wide(student_BC) - _wide(teacher_BC.detach())) / (2 * tau)).sum(dim=1)


def feature_cosine(student_BF: Tensor, teacher_BF: Tensor) -> Tensor:
    r"""One minus the cosine of the student's and the teacher's image features: (B,), between 0 and 2.

    .. math:: \ell_b = 1 - \cos(z_b, t_b)

    The term of the single-head baseline CE + KD (feature) in DHO's tables, whose distance we could not read in the
    paper's text; this one is blind to the features' length, as zero-shot teachers are. `embedding_cosine` of two
    encoders' joint embeddings is the same number.

    Args:
        student_BF: z, the trunk's features, projected to the teacher's width if need be, (B, F).
        teacher_BF: t, the teacher's features of the same images, (B, F); constant.

    Raises:
        UserError: the shapes differ.
    """
    check_paired(student_BF, teacher_BF, "feature_cosine", ("student", "teacher"))
    return 1 - (unit(student_BF) * unit(teacher_BF.detach())).sum(dim=1)


def _log_cosh(values: Tensor) -> Tensor:
    """log cosh x, exact to rounding near zero, finite where cosh overflows, gradient tanh x throughout."""
    near = values.abs() < 1
    # |x| + log(1 + exp(-2|x|)) - log 2 cancels near zero; log(1 + sinh^2 x) / 2 does not, but overflows far from it.
    close = torch.where(near, values, 0).sinh().square().log1p() / 2
    return torch.where(near, close, values.abs() + F.softplus(-2 * values.abs()) - math.log(2))


def _wide(logits: Tensor) -> Tensor:
    """In float32 under autocast, too; float64 stays float64."""
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def _check_logits(left_BC: Tensor, right_BC: Tensor, objective: str, roles: tuple[str, str]) -> None:
    """Anything else would broadcast to a plausible number."""
    if left_BC.ndim != 2 or left_BC.shape != right_BC.shape or not left_BC.shape[1]:
        raise UserError(
            f"{objective}: the {roles[0]} logits are {tuple(left_BC.shape)} and the {roles[1]} "
            f"{tuple(right_BC.shape)}; expected one shape (B, C): pair the rows and use one list of classes."
        )


def _check_above_zero(value: float, objective: str, name: str) -> None:
    if not 0 < value < math.inf:
        raise UserError(f"{objective}: found the {name} {value}, expected a number above 0.")
