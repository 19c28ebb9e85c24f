"""The one step of a whole batch, judged from what the judgement of its tokens has left behind.

``token_curvature(granularity="batch")`` finds every token's judged rows by a pass over the vocabulary. Where
the tokens have been judged one by one already, their :class:`Support` holds the same rows and, in the
residuals, the probabilities on them, so that the pass need not be made again: what is left is the gradient
of the rows, the step and one gathered product.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch

from capo.core.errors import InputError
from capo.core.statistics import triton_backend
from capo.core.statistics.groups import product_of_rows, step_on_rows
from capo.core.statistics.rest import dot
from capo.core.steps import GivenStep, check_step_shape
from capo.core.validation import check_shapes, make_head

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int
    from torch import Tensor

    from capo.core.statistics.result import Support
    from capo.core.steps import Step


class BatchShift(NamedTuple):
    """Means over the tokens: policy shift (nats) and objective shift (units of the advantage)."""

    policy: Float[Tensor, ""]
    objective: Float[Tensor, ""]


@torch.no_grad()
def batch_shift(
    hidden: Float[Tensor, "... d"],
    head_weight: Float[Tensor, "V d"],
    token_ids: Int[Tensor, "..."],
    advantages: Float[Tensor, "..."],
    *,
    step: Step,
    support: Support,
    mask: Bool[Tensor, "..."],
    temperature: float = 1.0,
    logit_scale: float = 1.0,
    fisher: str = "sampled",
    impl: str = "auto",
) -> BatchShift:
    """As ``token_curvature(..., granularity="batch", top_k=K, renormalize=True)``, without its logits.

    Args:
        hidden, head_weight, token_ids, advantages, step, mask, temperature, logit_scale, fisher,
            impl: as for :func:`capo.token_curvature`.
        support: of the unmasked tokens' own judgement, with ``top_k`` and ``renormalize=True`` and without
            a soft-cap, under which the residuals do not tell the probabilities.

    Raises:
        InputError: the shapes do not fit, or ``logit_scale`` is 0.
    """
    check_shapes(hidden, head_weight, token_ids)
    check_step_shape(step, *head_weight.shape)
    if support.rows.shape[0] != int(mask.sum()):
        raise InputError("support", "must come from a top_k curvature of the same tokens.")
    if logit_scale == 0:
        raise InputError("logit_scale", "must not be 0.")
    head = make_head(hidden, head_weight, None, temperature, logit_scale, None)
    chosen = hidden[mask]
    n = chosen.shape[0]
    if n == 0:
        return BatchShift(*torch.zeros(2, dtype=head.dtype, device=hidden.device))
    a = advantages[mask].to(head.dtype)
    slope = logit_scale / temperature
    if isinstance(step, GivenStep):
        delta, position = step.delta, support.rows
    else:
        delta, position = step_on_rows(
            step, head, chosen.to(head.dtype), a[:, None] * support.residual, support.rows
        )
    fused = impl in ("auto", "triton") and hidden.is_cuda and triton_backend.available()
    fused = fused and head.dtype != torch.float64
    u = product_of_rows(delta, position, chosen, head.dtype, fused=fused) * slope
    w = support.residual.to(head.dtype) / slope  # r for the sampled token, −r π′ for its rivals
    r = w[:, -1]
    rest = -w[:, :-1]
    weights = rest / rest.sum(dim=1, keepdim=True).clamp_min(torch.finfo(head.dtype).tiny)
    mean = dot(weights, u[:, :-1])
    centred = u[:, :-1] - mean[:, None]
    gap = u[:, -1] - mean
    s = r * gap
    variance = r * dot(weights, centred * centred) + (1.0 - r) * r * gap * gap
    objective = a * (s + 0.5 * (s * s - variance))
    policy = 0.5 * (s * s if fisher == "sampled" else variance)
    return BatchShift(policy.mean(), objective.mean())
