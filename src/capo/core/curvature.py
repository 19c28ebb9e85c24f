"""Objective shift and policy shift of a proposed step, token by token.

Pure formulas on the statistics of a backend; the derivation, with the equation numbers used here, is in
``core/README.md``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, NamedTuple

import torch
import torch.nn.functional as F

from capo.core.errors import InputError
from capo.core.statistics import compute_statistics
from capo.core.statistics.problem import Head, Problem
from capo.core.statistics.result import Statistics, Support
from capo.core.steps import Step, check_step_shape
from capo.core.validation import (
    broadcast,
    check_choices,
    check_mask,
    check_shapes,
    check_tensors,
    check_tokens,
    make_head,
    report_non_finite,
    resolve_groups,
)

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int
    from torch import Tensor

Fisher = Literal["sampled", "exact"]
Granularity = Literal["token", "sequence", "batch"]


class TruncationBound(NamedTuple):
    """Rigorous bounds on what ``top_k`` with ``renormalize=False`` leaves out (README, §8)."""

    s: Float[Tensor, "..."]
    variance: Float[Tensor, "..."]
    policy_shift: Float[Tensor, "..."]
    objective_shift: Float[Tensor, "..."]


@dataclass(frozen=True)
class TokenCurvature:
    """Curvature of the proposed step at every token; all tensors are shaped like ``token_ids``.

    Masked tokens are 0 everywhere. At sequence and batch granularity both shifts are the mean over the
    token's group, so that all its tokens share them; ``s`` and ``variance`` stay per token.
    """

    objective_shift: Float[Tensor, "..."]  # m_H, in units of the advantage
    policy_shift: Float[Tensor, "..."]  # m_F, nats
    log_prob: Float[Tensor, "..."]  # log π_a, full vocabulary, nats
    entropy: Float[Tensor, "..."]  # H(π), full vocabulary, nats
    s: Float[Tensor, "..."]  # wᵀu: first-order change of log π_a
    variance: Float[Tensor, "..."]  # Var_π(u)
    truncation_bound: TruncationBound | None  # None where π is renormalised: no bound exists
    mask: Bool[Tensor, "..."]  # tokens that were judged
    support: Support | None = None  # judged rows of the unmasked tokens, in order (top_k only)


def token_curvature(
    hidden: Float[Tensor, "... d"],
    head_weight: Float[Tensor, "V d"],
    token_ids: Int[Tensor, "..."],
    advantages: Float[Tensor, "..."],
    *,
    step: Step,
    coefficients: Float[Tensor, "..."] | None = None,
    temperature: float = 1.0,
    logit_scale: float = 1.0,
    logit_softcap: float | None = None,
    head_bias: Float[Tensor, "V"] | None = None,
    top_k: int | None = None,
    renormalize: bool = True,
    fisher: Fisher = "sampled",
    granularity: Granularity = "token",
    sequence_ids: Int[Tensor, "..."] | None = None,
    mask: Bool[Tensor, "..."] | None = None,
    impl: str = "auto",
) -> TokenCurvature:
    r"""Objective shift ``m_H`` and policy shift ``m_F`` of the step that each token proposes.

    With ``w = e_a − π``, the logit change ``u = D Δ h / T``, ``s = wᵀu`` and ``var = Var_π(u)``:

        m_H = A s + ½ A (s² − var) + ½ A wᵀx,      m_F = ½ s² (sampled) or ½ var (exact),

    where ``A`` is advantage × coefficient and ``x = φ″(y) (Δh)²/T`` is 0 without a soft-cap.

    Args:
        hidden: ``[..., d]`` input of the LM head at the position that *predicts* each token.
        head_weight: ``[V, d]`` head W.
        token_ids: ``[...]`` sampled tokens a.
        advantages: A, broadcastable to ``token_ids``.
        step: what the optimizer would do: :class:`SGDStep`, :class:`MomentumStep`, :class:`AdamStep` or
            a :class:`GivenStep`.
        coefficients: importance ratio × not-clipped, shaped like ``token_ids``; None is 1 (on-policy).
        temperature: T of the sampling distribution, > 0.
        logit_scale: factor on the head's output, before the soft-cap.
        logit_softcap: c of ``c·tanh(·/c)``, > 0, or None.
        head_bias: ``[V]`` bias; it shifts the logits and is not stepped (ψ = vec W).
        top_k: judge only the sampled token and the K − 1 largest other logits (1 ≤ K ≤ V); None: all.
        renormalize: with ``top_k``, π renormalised over the set (the paper), or π of the full
            vocabulary in gradient and sums, which has a rigorous ``truncation_bound``.
        fisher: ``"sampled"`` or ``"exact"`` (its expectation over the sampled token).
        granularity: ``"token"``: each token's own step. ``"sequence"`` / ``"batch"``: one step from the
            mean gradient over the group's unmasked tokens.
        sequence_ids: sequence of each token, shaped like ``token_ids``; needed for ``"sequence"`` unless
            ``token_ids`` is ``[B, T]`` (then the row).
        mask: tokens to judge; the others are never read (they may be NaN) and come out as 0.
        impl: backend, ``"auto" | "eager" | "chunked" | "triton"``.

    Returns:
        TokenCurvature in float64 for float64 input, else float32 (bf16 and fp16 accumulate in fp32).

    Raises:
        InputError: an argument is not usable; the message names it and what is allowed.

    Source: arXiv 2510.00819, eq. 7–10; ``core/README.md``, eq. 1–12.
    """
    check_tensors(
        hidden=hidden,
        head_weight=head_weight,
        token_ids=token_ids,
        advantages=advantages,
        coefficients=coefficients,
        head_bias=head_bias,
        sequence_ids=sequence_ids,
        mask=mask,
    )
    shape = token_ids.shape
    head = make_head(hidden, head_weight, head_bias, temperature, logit_scale, logit_softcap)
    check_step_shape(step, *head_weight.shape)
    check_choices(fisher, granularity, impl, top_k, renormalize, head.vocabulary)
    chosen = check_mask(mask, token_ids)
    check_shapes(hidden, head_weight, token_ids)
    effective = broadcast("advantages", advantages, shape)[chosen].to(head.dtype)
    if coefficients is not None:
        if coefficients.shape != shape:
            raise InputError(
                "coefficients",
                f"must be shaped like token_ids {tuple(shape)}, got {tuple(coefficients.shape)}.",
            )
        effective = effective * coefficients[chosen].to(head.dtype)
    tokens = token_ids[chosen]
    check_tokens(tokens, head.vocabulary)
    problem = Problem(hidden[chosen], head, tokens, effective, step, top_k, renormalize)
    group_ids = resolve_groups(granularity, sequence_ids, token_ids, chosen)

    if tokens.numel() == 0:
        zero = torch.zeros(shape, dtype=head.dtype, device=token_ids.device)
        bound = None if top_k is not None and renormalize else TruncationBound(*[zero] * 4)
        return TokenCurvature(zero, zero, zero, zero, zero, zero, bound, chosen)
    with torch.no_grad():
        statistics = compute_statistics(problem, impl, group_ids)
        flat = _formulas(statistics, effective, head, fisher)
        if not bool(torch.isfinite(flat.s.sum() + flat.log_prob.sum())):
            report_non_finite(problem, advantages, coefficients, chosen)
        if group_ids is not None:
            flat = _average(flat, group_ids)
        bounded = top_k is None or not renormalize
        return _scatter(flat, statistics.support, chosen, bounded)


class _Flat(NamedTuple):
    """The result for the unmasked tokens, ``[N]`` each."""

    objective_shift: Tensor
    policy_shift: Tensor
    log_prob: Tensor
    entropy: Tensor
    s: Tensor
    variance: Tensor
    bound: TruncationBound


def _formulas(t: Statistics, advantages: Float[Tensor, "N"], head: Head, fisher: Fisher) -> _Flat:
    """README, eq. 4–6 and 13: no difference of nearly equal numbers on confident tokens."""
    log_prob = F.logsigmoid(t.log_odds)
    p, r = torch.sigmoid(t.log_odds), torch.sigmoid(-t.log_odds)
    entropy = -p * log_prob - r * F.logsigmoid(-t.log_odds).clamp_min(-1e30) + r * t.rest_entropy
    p, r = torch.sigmoid(t.judged_log_odds), torch.sigmoid(-t.judged_log_odds)
    gap = t.u_sampled - t.u_mean
    s = r * gap
    variance = r * t.u_var + p * r * gap * gap
    curvature = s * s - variance + r * t.bend_gap
    objective = advantages * (s + 0.5 * curvature)
    policy = 0.5 * (s * s if fisher == "sampled" else variance)

    # README, eq. 13: |E_out u| ≤ ρB and E_out u² ≤ ρB²
    e_in = p * t.u_sampled + r * t.u_mean
    ds = t.left_out * t.u_bound
    dvar = ds * (t.u_bound + 2.0 * e_in.abs())
    ds2 = ds * (2.0 * s.abs() + ds)
    q_bound = t.u_bound * (head.temperature / abs(head.scale) if head.scale else 0.0)
    dx = t.left_out * head.max_bend * q_bound * q_bound / head.temperature
    bound = TruncationBound(
        ds,
        dvar,
        0.5 * (ds2 if fisher == "sampled" else dvar),
        advantages.abs() * (ds + 0.5 * (ds2 + dvar + dx)),
    )
    return _Flat(objective, policy, log_prob, entropy, s, variance, bound)


def _average(flat: _Flat, group_ids: Int[Tensor, "N"]) -> _Flat:
    """Both shifts averaged over the group and handed back to every token of it."""
    _, index = torch.unique(group_ids, return_inverse=True)
    counts = torch.bincount(index).to(flat.s.dtype)

    def mean(x: Tensor) -> Tensor:
        return (torch.zeros_like(counts).index_add_(0, index, x) / counts)[index]

    bound = flat.bound._replace(
        policy_shift=mean(flat.bound.policy_shift), objective_shift=mean(flat.bound.objective_shift)
    )
    return flat._replace(
        objective_shift=mean(flat.objective_shift),
        policy_shift=mean(flat.policy_shift),
        bound=bound,
    )


def _scatter(
    flat: _Flat, support: Support | None, chosen: Bool[Tensor, "..."], bounded: bool
) -> TokenCurvature:
    def full(x: Tensor) -> Tensor:
        return torch.zeros(chosen.shape, dtype=x.dtype, device=x.device).masked_scatter_(chosen, x)

    bound = TruncationBound(*(full(b) for b in flat.bound)) if bounded else None
    return TokenCurvature(
        objective_shift=full(flat.objective_shift),
        policy_shift=full(flat.policy_shift),
        log_prob=full(flat.log_prob),
        entropy=full(flat.entropy),
        s=full(flat.s),
        variance=full(flat.variance),
        truncation_bound=bound,
        mask=chosen,
        support=support,
    )
