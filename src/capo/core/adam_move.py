"""A parameter displaced by a part of Adam's coming step, in few passes over memory.

Made and added, the step of a 16-bit parameter takes 17 elementwise passes in float32, 144 bytes a
parameter; one kernel reads four tensors and writes one, 10 bytes.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch

from capo.core.statistics import triton_backend, triton_launch

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor

    from capo.core.steps import AdamStep

BLOCK = 1024  # elements of one program of the kernel
NARROW_OR_SINGLE = frozenset({torch.float32, torch.bfloat16, torch.float16})


def moved_by_adam(
    step: AdamStep, value: Float[Tensor, "..."], grad: Float[Tensor, "..."], scale: float
) -> Float[Tensor, "..."] | None:
    """``value + scale · Δ`` in the dtype of ``value``, computed in float32 or wider.

    Args:
        step: with moments, shaped like ``value``.
        value, grad: of the parameter.
        scale: part of the step.

    Returns:
        the displaced parameter; None where the tensors ask for the long way: several dtypes without a GPU,
        or strided ones.
    """
    tensors = _tensors(step, value, grad)
    if (
        value.is_cuda
        and {each.dtype for each in tensors} <= NARROW_OR_SINGLE
        and all(each.is_contiguous() for each in tensors)
        and triton_backend.available()
    ):
        return triton_backend.or_plain(
            lambda: moved_by_kernel(step, value, grad, scale),
            lambda: _moved_in_passes(step, value, grad, scale),
        )
    return _moved_in_passes(step, value, grad, scale)


def moved_by_kernel(
    step: AdamStep, value: Float[Tensor, "..."], grad: Float[Tensor, "..."], scale: float
) -> Float[Tensor, "..."]:
    """The same by one Triton kernel, on contiguous tensors on a GPU (or in its interpreter)."""
    from capo.core import step_kernel

    beta1, beta2 = step.betas
    keep, eps, rate = _factors(step, scale)
    out = value.new_empty(value.shape)
    grid = (-(-value.numel() // BLOCK),)
    with triton_launch.on_device_of(value):
        step_kernel.moved_by_adam_kernel[grid](
            *_tensors(step, value, grad),
            out,
            value.numel(),
            keep,
            1.0 - beta1,
            beta2,
            1.0 - beta2,
            eps,
            rate,
            BLOCK=BLOCK,
        )
    return out


def _moved_in_passes(step: AdamStep, value: Tensor, grad: Tensor, scale: float) -> Tensor | None:
    """In six passes: the factors of the step are drawn out of the tensors."""
    value, grad, exp_avg, exp_avg_sq = tensors = _tensors(step, value, grad)
    dtypes = {each.dtype for each in tensors}
    if not (dtypes <= {torch.float32} or dtypes <= {torch.float64}):
        return None
    beta1, beta2 = step.betas
    keep, eps, rate = _factors(step, scale)
    first = torch.lerp(exp_avg, grad, 1.0 - beta1)
    second = torch.mul(exp_avg_sq, beta2).addcmul_(grad, grad, value=1.0 - beta2)
    second.sqrt_().add_(eps)
    return torch.addcdiv(value * keep if step.weight_decay else value, first, second, value=-rate)


def _tensors(step: AdamStep, value: Tensor, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Value, gradient and moments."""
    assert step.exp_avg is not None
    assert step.exp_avg_sq is not None
    return value, grad, step.exp_avg, step.exp_avg_sq


def _factors(step: AdamStep, scale: float) -> tuple[float, float, float]:
    """``keep``, ``eps`` and ``rate`` of ``keep · value − rate · m' / (√v' + eps)``."""
    beta1, beta2 = step.betas
    t, length = step.step + 1, scale * step.lr
    root = math.sqrt(1.0 - beta2**t)
    return 1.0 - length * step.weight_decay, root * step.eps, length * root / (1.0 - beta1**t)
