r"""``q = Δ_i h_i``: every token's own step, seen through its own hidden state.

A token's ascent-gradient row is ``c_k h`` with ``c_k = A (D w)_k / T`` (README, eq. 3), so a step needs
``c`` on the judged rows and nothing else. Two forms: ``block`` (the same contiguous rows for every
token) and ``gathered`` (each token's own rows). Adam with the exact preconditioner is the one step that
is not linear in the gradient: it costs ``n·k·d`` elementwise work, done in cache-sized pieces and, where
a compiler is at hand, fused into one loop (:mod:`capo.core.statistics.fused`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from capo.core.statistics import fused
from capo.core.statistics.options import current
from capo.core.statistics.rest import dot
from capo.core.steps import AdamStep, GivenStep, MomentumStep, SGDStep

if TYPE_CHECKING:
    from jaxtyping import Float, Int
    from torch import Tensor

    from capo.core.steps import Step


def gradient_scale(step: Step) -> float:
    """Factor on a token's own gradient before the optimizer sees it."""
    return step.grad_scale if isinstance(step, AdamStep | MomentumStep) else 1.0


def project_block(
    step: Step,
    hidden: Float[Tensor, "n d"],
    coefficient: Float[Tensor, "n v"],
    weight: Float[Tensor, "V d"],
    block: slice,
) -> Float[Tensor, "n v"]:
    """``q[i, k] = Δ_i[k] · h_i`` for the rows of one vocabulary block.

    Args:
        step: the step model.
        hidden: h, in the compute dtype.
        coefficient: c, the ascent-gradient coefficients ``A (D w)_k / T``.
        weight: the head, read for weight decay only.
        block: the rows.
    """
    dtype = hidden.dtype
    match step:
        case GivenStep():
            return hidden @ step.delta[block].to(dtype).T
        case SGDStep():
            q = step.lr * _square_norm(hidden)[:, None] * coefficient
            return _decay(q, step.lr * step.weight_decay, hidden, weight, block)
        case MomentumStep():
            factor = step.lr * step.gradient_factor
            q = factor * step.grad_scale * _square_norm(hidden)[:, None] * coefficient
            if step.momentum_buffer is not None:
                q = q - (step.lr * step.buffer_factor) * (
                    hidden @ step.momentum_buffer[block].to(dtype).T
                )
            return _decay(q, factor * step.weight_decay, hidden, weight, block)
        case AdamStep(preconditioner="frozen"):
            direction, inverse = _frozen_rows(step, block, dtype)
            fresh = frozen_factors(step)[1] * coefficient
            q = hidden @ direction.T + fresh * ((hidden * hidden) @ inverse.T)
            return _decay(q, step.lr * step.weight_decay, hidden, weight, block)
        case AdamStep():
            n, v = coefficient.shape
            rows = torch.arange(v, device=hidden.device).expand(n, v)
            q = _adam_exact(step, hidden, coefficient, _slice_moments(step, block), rows)
            return _decay(q, step.lr * step.weight_decay, hidden, weight, block)


def project_gathered(
    step: Step,
    hidden: Float[Tensor, "n d"],
    coefficient: Float[Tensor, "n k"],
    weight: Float[Tensor, "V d"],
    rows: Int[Tensor, "n k"],
) -> Float[Tensor, "n k"]:
    """``q[i, j] = Δ_i[rows[i, j]] · h_i`` for each token's own rows; arguments as in the block form."""
    match step:
        case GivenStep():
            return gathered_product(step.delta, rows, hidden)
        case SGDStep():
            q = step.lr * _square_norm(hidden)[:, None] * coefficient
            decay = step.lr * step.weight_decay
        case MomentumStep():
            factor = step.lr * step.gradient_factor
            q = factor * step.grad_scale * _square_norm(hidden)[:, None] * coefficient
            if step.momentum_buffer is not None:
                q = q - (step.lr * step.buffer_factor) * gathered_product(
                    step.momentum_buffer, rows, hidden
                )
            decay = factor * step.weight_decay
        case AdamStep(preconditioner="frozen"):
            q = _frozen_gathered(step, hidden, coefficient, rows)
            decay = step.lr * step.weight_decay
        case AdamStep():
            q = _adam_exact(step, hidden, coefficient, _slice_moments(step, slice(None)), rows)
            decay = step.lr * step.weight_decay
    if decay:
        q = q - decay * gathered_product(weight, rows, hidden)
    return q


def _square_norm(hidden: Float[Tensor, "n d"]) -> Float[Tensor, "n"]:
    return dot(hidden, hidden)


def _decay(
    q: Float[Tensor, "n v"],
    factor: float,
    hidden: Float[Tensor, "n d"],
    weight: Float[Tensor, "V d"],
    block: slice,
) -> Float[Tensor, "n v"]:
    return q - factor * (hidden @ weight[block].to(q.dtype).T) if factor else q


def gathered_product(
    matrix: Float[Tensor, "V d"], rows: Int[Tensor, "n k"], hidden: Float[Tensor, "n d"]
) -> Float[Tensor, "n k"]:
    """``matrix[rows[i, j]] · h_i``, gathering a few tokens' rows at a time."""
    n, k = rows.shape
    out = hidden.new_empty(n, k)
    for part in current(hidden.device).pieces(n, k * hidden.shape[1]):
        picked = matrix[rows[part]].to(hidden.dtype)  # [m, k, d]
        out[part] = torch.bmm(picked, hidden[part][:, :, None])[:, :, 0]
    return out


def adam_scalars(step: AdamStep) -> fused.AdamScalars:
    """Adam's constants with both bias corrections folded in (README, eq. 11)."""
    beta1, beta2 = step.betas
    correction1, correction2 = step.bias_corrections
    root = correction2**0.5
    return fused.AdamScalars(
        momentum=-step.lr * beta1 * root / correction1,
        fresh=step.lr * (1.0 - beta1) * root / correction1,
        keep=beta2,
        new=1.0 - beta2,
        eps=step.eps * root,
    )


def frozen_factors(step: AdamStep) -> tuple[float, float, float]:
    """Factors of ``m P``, of the own gradient, and of v, with ``P = 1/(√v̂ + ε)`` (README, eq. 12)."""
    correction1, _ = step.bias_corrections
    return (
        -step.lr * step.betas[0] / correction1,
        step.lr * (1.0 - step.betas[0]) / correction1 * step.grad_scale,
        1.0 / (1.0 - step.betas[1] ** step.step),
    )


def _frozen_gathered(
    step: AdamStep,
    hidden: Float[Tensor, "n d"],
    coefficient: Float[Tensor, "n k"],
    rows: Int[Tensor, "n k"],
) -> Float[Tensor, "n k"]:
    n, k = rows.shape
    out = hidden.new_empty(n, k)
    for part in current(hidden.device).pieces(n, k * hidden.shape[1]):
        direction, inverse = _frozen_rows(step, rows[part], hidden.dtype)  # [m, k, d]
        h = hidden[part, :, None]
        out[part] = torch.bmm(direction, h)[:, :, 0]
        out[part] += (
            frozen_factors(step)[1] * coefficient[part] * torch.bmm(inverse, h * h)[:, :, 0]
        )
    return out


def _frozen_rows(
    step: AdamStep, block: slice | Int[Tensor, "n k"], dtype: torch.dtype
) -> tuple[Float[Tensor, "*rows d"], Float[Tensor, "*rows d"]]:
    """``(−α β₁/(1−β₁^{t+1}) · m P, P)`` with ``P = 1/(√v̂ + ε)`` for the given rows."""
    assert step.exp_avg is not None
    assert step.exp_avg_sq is not None
    direction, _, inverse_correction = frozen_factors(step)
    variance = step.exp_avg_sq[block].to(dtype) * inverse_correction
    inverse = (variance.sqrt_() + step.eps).reciprocal_()
    return direction * step.exp_avg[block].to(dtype) * inverse, inverse


Moments = tuple["Float[Tensor, 'R d']", "Float[Tensor, 'R d']"] | None


def _slice_moments(step: AdamStep, block: slice) -> Moments:
    if step.exp_avg is None or step.exp_avg_sq is None:
        return None
    return step.exp_avg[block], step.exp_avg_sq[block]


def _adam_exact(
    step: AdamStep,
    hidden: Float[Tensor, "n d"],
    coefficient: Float[Tensor, "n k"],
    moments: Moments,
    rows: Int[Tensor, "n k"],
) -> Float[Tensor, "n k"]:
    """Exact Adam on the given rows (README, eq. 10)."""
    scalars = adam_scalars(step)
    scaled = coefficient * step.grad_scale
    if moments is None:
        return fused.adam_without_moments(hidden, scaled, scalars)
    return fused.adam_rows(hidden, scaled, moments[0], moments[1], rows, scalars)
