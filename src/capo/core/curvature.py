"""Objective shift and policy shift of a proposed step, token by token.

Pure formulas on the statistics of a backend; the derivation, with the equation numbers used here, is in
``core/README.md``.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, NamedTuple

import torch
import torch.nn.functional as F

from capo.core.errors import InputError
from capo.core.statistics import IMPLEMENTATIONS, compute_statistics
from capo.core.statistics.problem import Head, Problem, compute_dtype
from capo.core.statistics.result import Statistics, Support
from capo.core.steps import AdamStep, GivenStep, MomentumStep, Step, check_step_shape

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
    shape = token_ids.shape
    head = _head(hidden, head_weight, head_bias, temperature, logit_scale, logit_softcap, step)
    _check_choices(fisher, granularity, impl, top_k, renormalize, head.vocabulary)
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
    group_ids = _group_ids(granularity, sequence_ids, token_ids, chosen)

    if tokens.numel() == 0:
        zero = torch.zeros(shape, dtype=head.dtype, device=token_ids.device)
        bound = None if top_k is not None and renormalize else TruncationBound(*[zero] * 4)
        return TokenCurvature(zero, zero, zero, zero, zero, zero, bound, chosen)
    with torch.no_grad():
        statistics = compute_statistics(problem, impl, group_ids)
        flat = _formulas(statistics, effective, head, fisher)
        if not bool(torch.isfinite(flat.s.sum() + flat.log_prob.sum())):
            _report_non_finite(problem, advantages, coefficients, chosen)
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


# --- validation -----------------------------------------------------------------------------------


def make_head(
    hidden: Float[Tensor, "... d"],
    head_weight: Float[Tensor, "V d"],
    head_bias: Float[Tensor, "V"] | None,
    temperature: float,
    logit_scale: float,
    logit_softcap: float | None,
    dtype: torch.dtype | None = None,
) -> Head:
    """A checked :class:`Head`."""
    if head_weight.ndim != 2:
        raise InputError("head_weight", f"must be [V, d], got shape {tuple(head_weight.shape)}.")
    if head_bias is not None and tuple(head_bias.shape) != (head_weight.shape[0],):
        raise InputError(
            "head_bias", f"must be [{head_weight.shape[0]}], got {tuple(head_bias.shape)}."
        )
    if not (math.isfinite(temperature) and temperature > 0):
        raise InputError("temperature", f"must be a finite number > 0, got {temperature!r}.")
    if not math.isfinite(logit_scale):
        raise InputError("logit_scale", f"must be a finite number, got {logit_scale!r}.")
    if logit_softcap is not None and not (math.isfinite(logit_softcap) and logit_softcap > 0):
        raise InputError(
            "logit_softcap", f"must be a finite number > 0 or None, got {logit_softcap!r}."
        )
    dtype = dtype or compute_dtype(hidden, head_weight)
    return Head(
        head_weight.detach(),
        None if head_bias is None else head_bias.detach(),
        float(temperature),
        float(logit_scale),
        None if logit_softcap is None else float(logit_softcap),
        dtype,
    )


def _head(
    hidden: Float[Tensor, "... d"],
    head_weight: Float[Tensor, "V d"],
    head_bias: Float[Tensor, "V"] | None,
    temperature: float,
    logit_scale: float,
    logit_softcap: float | None,
    step: Step,
) -> Head:
    head = make_head(hidden, head_weight, head_bias, temperature, logit_scale, logit_softcap)
    check_step_shape(step, *head_weight.shape)
    return head


def _check_choices(
    fisher: str, granularity: str, impl: str, top_k: int | None, renormalize: bool, vocabulary: int
) -> None:
    for name, value, allowed in (
        ("fisher", fisher, ("sampled", "exact")),
        ("granularity", granularity, ("token", "sequence", "batch")),
        ("impl", impl, IMPLEMENTATIONS),
    ):
        if value not in allowed:
            raise InputError(name, f"must be one of {', '.join(allowed)}, got {value!r}.")
    if top_k is not None and not (isinstance(top_k, int) and 1 <= top_k <= vocabulary):
        raise InputError("top_k", f"must be an integer from 1 to V = {vocabulary}, got {top_k!r}.")
    if top_k is not None and not renormalize and granularity != "token":
        raise InputError(
            "renormalize",
            "False with top_k is bounded for a token's own step only: use granularity='token', "
            "renormalize=True or top_k=None.",
        )


def check_shapes(
    hidden: Float[Tensor, "... d"], head_weight: Float[Tensor, "V d"], token_ids: Int[Tensor, "..."]
) -> None:
    if tuple(hidden.shape) != (*token_ids.shape, head_weight.shape[1]):
        raise InputError(
            "hidden",
            f"must be shaped like token_ids with d = {head_weight.shape[1]} at the end, "
            f"{(*token_ids.shape, head_weight.shape[1])}, got {tuple(hidden.shape)}.",
        )
    if not hidden.is_floating_point():
        raise InputError("hidden", f"must be floating point, got {hidden.dtype}.")


def check_mask(
    mask: Bool[Tensor, "..."] | None, token_ids: Int[Tensor, "..."]
) -> Bool[Tensor, "..."]:
    if token_ids.is_floating_point() or token_ids.is_complex() or token_ids.dtype == torch.bool:
        raise InputError("token_ids", f"must be integers, got {token_ids.dtype}.")
    if mask is None:
        return torch.ones_like(token_ids, dtype=torch.bool)
    if mask.shape != token_ids.shape:
        raise InputError(
            "mask",
            f"must be shaped like token_ids {tuple(token_ids.shape)}, got {tuple(mask.shape)}.",
        )
    return mask.bool()


def check_tokens(tokens: Int[Tensor, "N"], vocabulary: int) -> None:
    if tokens.numel() and not (int(tokens.min()) >= 0 and int(tokens.max()) < vocabulary):
        raise InputError("token_ids", f"must be from 0 to V − 1 = {vocabulary - 1} where unmasked.")


def broadcast(name: str, value: Tensor, shape: torch.Size) -> Tensor:
    try:
        return value.detach().broadcast_to(shape)
    except RuntimeError:
        raise InputError(
            name,
            f"must broadcast to token_ids {tuple(shape)}, got {tuple(value.shape)}.",
        ) from None


def _group_ids(
    granularity: str,
    sequence_ids: Int[Tensor, "..."] | None,
    token_ids: Int[Tensor, "..."],
    chosen: Bool[Tensor, "..."],
) -> Int[Tensor, "N"] | None:
    if granularity == "token":
        return None
    if granularity == "batch":
        return torch.zeros_like(token_ids[chosen])
    if sequence_ids is None:
        if token_ids.ndim != 2:
            raise InputError("sequence_ids", "must be given unless token_ids is [B, T].")
        sequence_ids = torch.arange(token_ids.shape[0], device=token_ids.device)[:, None]
    return broadcast("sequence_ids", sequence_ids, token_ids.shape)[chosen]


def _report_non_finite(
    problem: Problem,
    advantages: Tensor,
    coefficients: Tensor | None,
    chosen: Bool[Tensor, "..."],
) -> None:
    """Name the input that made the result non-finite; return if none did (an overflow)."""
    step = problem.step
    inputs: dict[str, Tensor | None] = {
        "hidden": problem.hidden,
        "head_weight": problem.head.weight,
        "head_bias": problem.head.bias,
        "advantages": broadcast("advantages", advantages, chosen.shape)[chosen],
        "coefficients": None if coefficients is None else coefficients[chosen],
    }
    match step:
        case AdamStep():
            inputs |= {"step.exp_avg": step.exp_avg, "step.exp_avg_sq": step.exp_avg_sq}
        case MomentumStep():
            inputs["step.momentum_buffer"] = step.momentum_buffer
        case GivenStep():
            inputs["step.delta"] = step.delta
        case _:
            pass
    for name, tensor in inputs.items():
        if tensor is not None and not bool(torch.isfinite(tensor).all()):
            raise InputError(name, "must be finite at every unmasked token, found NaN or infinity.")
