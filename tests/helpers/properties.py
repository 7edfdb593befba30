"""What every objective must satisfy, as asserts to apply to any of them.

An objective is handed over as a callable of its embedding tensors alone; scales and masks are bound by the caller.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence

import torch
from torch import Tensor

Objective = Callable[..., Tensor]


def embeddings(*shapes: tuple[int, ...], seed: int = 0, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """Normally distributed tensors that require gradients, the same for one seed."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator, dtype=dtype).requires_grad_() for shape in shapes]


def assert_follows_permutation(objective: Objective, inputs: Sequence[Tensor]) -> None:
    """Reordering the batch leaves a set-wise loss as it is and reorders a per-sample one."""
    order = torch.randperm(len(inputs[0]), generator=torch.Generator().manual_seed(1))
    plain, shuffled = objective(*inputs), objective(*(tensor[order] for tensor in inputs))
    torch.testing.assert_close(shuffled, plain[order] if plain.ndim else plain)


def assert_ignores_length(objective: Objective, inputs: Sequence[Tensor]) -> None:
    """Scaling every embedding by its own positive factor changes nothing."""
    generator = torch.Generator().manual_seed(2)
    factors = [0.1 + 5 * torch.rand(len(tensor), 1, generator=generator, dtype=tensor.dtype) for tensor in inputs]
    scaled = [tensor * factor for tensor, factor in zip(inputs, factors, strict=True)]
    torch.testing.assert_close(objective(*scaled), objective(*inputs))


def assert_gradient_reaches(objective: Objective, inputs: Sequence[Tensor], students: Collection[int]) -> None:
    """A non-zero, finite gradient at each input whose position is in `students`, and none at all at the others."""
    gradients = torch.autograd.grad(objective(*inputs).sum(), inputs, allow_unused=True)
    for position, gradient in enumerate(gradients):
        if position in students:
            assert gradient is not None, f"no gradient reaches input {position}"
            assert torch.isfinite(gradient).all()
            assert gradient.abs().max() > 0, f"the gradient at input {position} is zero"
        else:
            assert gradient is None or not gradient.any(), f"a gradient reaches input {position}, which is a constant"


def assert_finite_at_extremes(objective: Objective, shapes: Sequence[tuple[int, int]], students: Sequence[int]) -> None:
    """Finite value and gradient in float32 for vectors that vanish, nearly vanish, are huge, coincide or oppose."""
    tame = [tensor.detach() for tensor in embeddings(*shapes, dtype=torch.float32)]
    families = {
        "zero": [torch.zeros_like(tensor) for tensor in tame],
        "tiny": [tensor * 1e-30 for tensor in tame],
        "huge": [tensor * 1e15 for tensor in tame],
        "coinciding": [torch.ones_like(tensor) for tensor in tame],
        "opposed": [torch.ones_like(tensor) * (-1) ** position for position, tensor in enumerate(tame)],
    }
    for name, family in families.items():
        inputs = [tensor.clone().requires_grad_() for tensor in family]
        value = objective(*inputs)
        assert torch.isfinite(value).all(), f"{name} embeddings give {value}"
        value.sum().backward()
        for position in students:
            gradient = inputs[position].grad
            assert gradient is not None
            assert torch.isfinite(gradient).all(), f"{name} embeddings give a gradient that is not finite"


def assert_float32_under_autocast(objective: Objective, inputs: Sequence[Tensor]) -> None:
    """Inside bfloat16 autocast the value is float32 and the very one computed outside."""
    singles = [tensor.detach().float() for tensor in inputs]
    outside = objective(*singles)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = objective(*singles)
        halves = objective(*(tensor.bfloat16() for tensor in singles))
    assert inside.dtype == halves.dtype == torch.float32
    torch.testing.assert_close(inside, outside, rtol=0, atol=0)
