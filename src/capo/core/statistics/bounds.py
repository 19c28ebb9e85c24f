"""``B ≥ |u_k|`` for the vocabulary rows that a top-k set leaves out (README, §8)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from capo.core.statistics.projection import gradient_scale
from capo.core.steps import AdamStep, GivenStep, MomentumStep, SGDStep

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor

    from capo.core.statistics.problem import Problem

ROW_BLOCK = 1 << 14


def u_bound(chunk: Problem, probability: Float[Tensor, "n"]) -> Float[Tensor, "n"]:
    """Bound on ``|u_k| = |φ′ (Δ_i h_i)_k| / T`` over every row with ``π_k ≤ probability``."""
    head = chunk.head
    return _q_bound(chunk, probability) * (abs(head.scale) / head.temperature)


def _q_bound(chunk: Problem, probability: Float[Tensor, "n"]) -> Float[Tensor, "n"]:
    h, head, step = chunk.hidden, chunk.head, chunk.step
    norm: Tensor = torch.linalg.vector_norm(h, dim=1)
    bound: Tensor
    # A left-out row's gradient coefficient: |c_k| = |A φ′ π_k|/T
    coefficient = (
        chunk.advantages.abs()
        * probability
        * (abs(head.scale) / head.temperature * gradient_scale(step))
    )
    decay = 0.0
    match step:
        case GivenStep():
            bound = _max_row_norm(step.delta, h.dtype) * norm
        case SGDStep():
            bound = step.lr * coefficient * norm * norm
            decay = step.lr * step.weight_decay
        case MomentumStep():
            bound = step.lr * step.gradient_factor * coefficient * norm * norm
            if step.momentum_buffer is not None:
                old = _max_row_norm(step.momentum_buffer, h.dtype)
                bound = bound + step.lr * abs(step.buffer_factor) * old * norm
            decay = step.lr * abs(step.gradient_factor) * step.weight_decay
        case AdamStep(preconditioner="frozen"):
            momentum, inverse = _frozen_column_bounds(step, h.dtype)
            fresh = step.lr * (1.0 - step.betas[0]) / step.bias_corrections[0]
            bound = h.abs() @ momentum + fresh * coefficient * ((h * h) @ inverse)
            decay = step.lr * step.weight_decay
        case AdamStep():
            bound = h.abs() @ _adam_column_bounds(step, h)
            decay = step.lr * step.weight_decay
    if decay:
        bound = bound + decay * _max_row_norm(head.weight, h.dtype) * norm
    return bound


def _adam_column_bounds(step: AdamStep, h: Float[Tensor, "n d"]) -> Float[Tensor, "d"]:
    """``max_k |Δ_kj|`` over any gradient whatever, per column j.

    By Cauchy–Schwarz ``|β₁m + (1−β₁)G| ≤ √(β₁²m²/(β₂v) + (1−β₁)²/(1−β₂)) · √(β₂v + (1−β₂)G²)``. Moments
    with a genuine history have ``m²/v ≤ (1−β₁)²/(1−β₂) Σ_{j<t}(β₁²/β₂)^j``, but reading
    the ratio from the moments themselves also covers those without (README, eq. 14).
    """
    beta1, beta2 = step.betas
    correction1, correction2 = step.bias_corrections
    ratio: Tensor = torch.zeros(h.shape[1], dtype=h.dtype, device=h.device)
    if step.exp_avg is not None and step.exp_avg_sq is not None and beta1 > 0:
        for start in range(0, step.exp_avg.shape[0], ROW_BLOCK):
            m = step.exp_avg[start : start + ROW_BLOCK].to(h.dtype)
            v = step.exp_avg_sq[start : start + ROW_BLOCK].to(h.dtype)
            block = torch.where(m == 0, 0.0, m * m / v)  # v = 0 with m ≠ 0: no bound exists
            ratio = torch.maximum(ratio, block.amax(dim=0))
        ratio = ratio * (beta1**2 / beta2) if beta2 > 0 else torch.where(ratio > 0, torch.inf, 0.0)
    squared: Tensor = ratio + (1.0 - beta1) ** 2 / (1.0 - beta2)
    # Rounding of the quotient above must not undercut the theorem.
    slack = 1.0 + 8.0 * torch.finfo(h.dtype).eps
    bound: Tensor = squared.sqrt() * (step.lr * correction2**0.5 / correction1 * slack)
    return bound


def _frozen_column_bounds(
    step: AdamStep, dtype: torch.dtype
) -> tuple[Float[Tensor, "d"], Float[Tensor, "d"]]:
    assert step.exp_avg is not None
    assert step.exp_avg_sq is not None
    inverse = 1.0 / (
        (step.exp_avg_sq.to(dtype) / (1.0 - step.betas[1] ** step.step)).sqrt() + step.eps
    )
    momentum = (step.exp_avg.to(dtype) * inverse).abs().amax(dim=0)
    factor = step.lr * step.betas[0] / step.bias_corrections[0]
    return factor * momentum, inverse.amax(dim=0)


def _max_row_norm(matrix: Float[Tensor, "V d"], dtype: torch.dtype) -> Float[Tensor, ""]:
    parts = [
        torch.linalg.vector_norm(matrix[s : s + ROW_BLOCK].to(dtype), dim=1).amax()
        for s in range(0, matrix.shape[0], ROW_BLOCK)
    ]
    largest: Tensor = torch.stack(parts).amax()
    return largest
